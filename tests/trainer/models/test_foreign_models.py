"""Model folders and files that somebody else may have made: what is never opened, and what is refused in one line."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from safelight.errors import UserError
from safelight.trainer.config.schema import Model
from safelight.trainer.config.toml import parse_config
from safelight.trainer.memory_plan.static_bytes import summary
from safelight.trainer.models.base import base_of, resolve_base, tiny_folder
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.tensor_files import TensorFile, first_non_finite
from safelight.trainer.models.weights import check_unet, fingerprint, load_texts, load_unet, load_vae, meta_unet
from tests.trainer.models.tiny_base import WEIGHTS, Opened, load

CONFIG = {"unet": "unet/config.json", "vae": "vae/config.json", "text_encoder": "text_encoder/config.json"}
CONFIG |= {"scheduler": "scheduler/scheduler_config.json", "index": "model_index.json"}


def edit(path: Path, **changes) -> None:
    """Change values of a JSON file; ... removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def load_all(folder: Path) -> None:
    base = base_of(Model(base=str(folder)))
    load_vae(base, "", 0)
    load_texts(base, "", 0)
    check_unet(base)
    load_unet(base, 0)


def refused(folder: Path, match: str) -> str:
    """Check that a base is refused in one line, and return it."""
    with pytest.raises(UserError, match=match) as caught:
        load_all(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# which files are opened


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("named", ["evil.bin", "/etc/hostname", "../other.safetensors", "sub/other.safetensors"])
def test_an_index_names_only_safetensors_beside_it(base_folder, tmp_path, part, named):
    weights = base_folder / part / WEIGHTS[part]
    names = list(load_file(weights))
    weights.rename(weights.with_name(f"{weights.stem}-00001-of-00002.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, named)}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    (base_folder / part / "evil.bin").write_bytes(pickle.dumps(Opened(tmp_path / "opened")))
    message = refused(base_folder, "its index .* names .* which is no .safetensors file of this folder")
    assert f"{base_folder}/{part}: " in message
    assert named in message
    assert not (tmp_path / "opened").exists()


def test_weights_of_a_unet_that_its_config_does_not_use_are_refused(base_folder):
    edit(base_folder / CONFIG["unet"], down_block_types=["DownBlock2D"] * 3)
    refused(
        base_folder, r"files have \d+ tensors more than its config\.json, the first is down_blocks\.0\.attentions\.0"
    )


@pytest.mark.parametrize("part", WEIGHTS)
def test_an_index_may_name_its_shards_freely_and_says_which_are_missing(base_folder, part):
    weights = base_folder / part / WEIGHTS[part]
    tensors = load_file(weights)
    weights.unlink()
    shard_of = {name: f"part {number % 2}.safetensors" for number, name in enumerate(tensors)}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": shard_of}))
    message = refused(base_folder, "lacks 2 files that its index .* names, the first is part 0.safetensors; get this f")
    assert f"{base_folder}/{part} lacks" in message
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, weights.with_name(shard))
    assert fingerprint(load(part, base_folder)) == fingerprint(load(part, tiny_folder()))
    weights.with_name("part 1.safetensors").unlink()
    refused(base_folder, "lacks 1 file that its index .* names, the first is part 1.safetensors; get this folder again")


@pytest.mark.parametrize("value", [5, [], None, {"x": 5}, {"x": None}])
def test_an_index_of_a_wrong_type_is_refused(base_folder, value):
    weights = base_folder / "unet" / WEIGHTS["unet"]
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": value}))
    refused(base_folder, r"index\.json has no weight_map from tensors to files")


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet",
        "unet/config.json",
        "scheduler",
        "vae",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_links_that_leave_a_models_folder_are_not_followed(base_folder, tmp_path, name):
    outside = tmp_path / "outside"
    (base_folder / name).rename(outside)
    (base_folder / name).symlink_to(outside)
    refused(base_folder, "leads out of the model's folder, to .*: replace it by a copy")


def test_links_inside_a_models_folder_and_to_it_are_followed(base_folder, tmp_path):
    (base_folder / "unet").rename(base_folder / "renamed")
    (base_folder / "unet").symlink_to("renamed")
    (tmp_path / "link").symlink_to(base_folder)
    load_all(tmp_path / "link")


def test_a_snapshot_of_the_hub_may_link_to_its_repositorys_blobs(base_folder, tmp_path):
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "5f3a", repository / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in base_folder.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        link = snapshot / path.relative_to(base_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    for part in WEIGHTS:
        assert fingerprint(load(part, snapshot)) == fingerprint(load(part, tiny_folder()))
    assert fingerprint(load_vae(resolve_base("tiny"), str(snapshot / "vae"), 0))
    (snapshot / "vae" / "config.json").unlink()
    (snapshot / "vae" / "config.json").symlink_to(tiny_folder() / "vae" / "config.json")
    refused(snapshot, "leads out of the model's folder, to .*: replace it by a copy")


@pytest.mark.parametrize(
    "name",
    [*CONFIG.values(), "unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"],
)
def test_a_pipe_in_place_of_a_file_is_refused(base_folder, name):
    (base_folder / name).unlink()
    os.mkfifo(base_folder / name)
    refused(base_folder, "not a regular file|is not a diffusers folder")


# configs


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("text_encoder", "hidden_act", "nope"),
        ("text_encoder", "attn_implementation", "kernels-community/flash-attn"),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder", "num_attention_heads", 3),
        ("text_encoder", "max_position_embeddings", 10**12),
        ("text_encoder", "vocab_size", "many"),
        ("text_encoder", "layer_norm_eps", 0),
        ("vae", "block_out_channels", 5),
        ("vae", "block_out_channels", [16, 32]),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", True),
        ("vae", "latent_channels", -4),
        ("vae", "norm_num_groups", 7),
        ("vae", "_class_name", ["AutoencoderKL"]),
        ("unet", "block_out_channels", [-1, -1, -1]),
        ("unet", "block_out_channels", [10**9] * 3),
        ("unet", "transformer_layers_per_block", 10**9),
        ("unet", "layers_per_block", 10**9),
        ("unet", "down_block_types", ["os.system"] * 3),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "act_fn", {"a": 1}),
        ("unet", "sample_size", ...),
        ("unet", "cross_attention_dim", None),
        ("unet", "_class_name", "UNet3DConditionModel"),
        ("unet", "dropout", 1),
        ("scheduler", "beta_start", -1),
        ("scheduler", "beta_end", "x"),
        ("scheduler", "num_train_timesteps", 10**9),
        ("scheduler", "prediction_type", 5),
        ("scheduler", "rescale_betas_zero_snr", "yes"),
        ("scheduler", "_class_name", "os"),
        ("scheduler", "clip_sample", "yes"),
        ("scheduler", "solver_order", 600_000_000),
        ("scheduler", "solver_order", -6e8),
        ("scheduler", "timestep_spacing", 5),
        ("scheduler", "steps_offset", "x"),
        ("scheduler", "of_another_scheduler", [[]]),
        ("index", "_class_name", 5),
    ],
)
def test_a_wrong_value_in_a_config_is_refused_by_name(base_folder, part, key, value):
    edit(base_folder / CONFIG[part], **{key: value})
    with pytest.raises(UserError) as caught:
        base_of(Model(base=str(base_folder)))
    message = str(caught.value)
    assert str(base_folder / CONFIG[part]) in message
    assert key in message or key == "_class_name"
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("part", CONFIG)
@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b"\xff", b'{"a":' * 10_000, b'{"sample_size": 1e999}'])
def test_a_config_that_is_no_object_is_refused(base_folder, part, content):
    (base_folder / CONFIG[part]).write_bytes(content)
    refused(base_folder, f"{CONFIG[part]} is not valid")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_head_dim": 1024}, "attention_head_dim 1024 does not divide 32 of block_out_channels"),
        ({"attention_head_dim": 5}, "attention_head_dim 5 does not divide 32 of block_out_channels"),
        ({"attention_head_dim": [4, 6, 4]}, "attention_head_dim 6 does not divide 64 of block_out_channels"),
        # of the middle block
        ({"attention_head_dim": [4, 4, 3]}, "attention_head_dim 3 does not divide 128 of block_out_channels"),
    ],
)
def test_values_of_a_unets_config_that_contradict_each_other_are_refused(base_folder, changes, reason):
    edit(base_folder / CONFIG["unet"], **changes)
    assert "unet/config.json is wrong" in refused(base_folder, reason)


def test_heads_of_blocks_without_attention_do_not_matter(base_folder):
    path = base_folder / CONFIG["unet"]
    edit(path, down_block_types=["DownBlock2D", *["CrossAttnDownBlock2D"] * 2], attention_head_dim=[5, 4, 4])
    edit(path, up_block_types=[*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"])
    meta_unet(base_of(Model(base=str(base_folder))))


def test_a_unet_may_have_no_middle_block(base_folder):
    # nor does its last block attend to anything then, so that its heads do not matter either
    values = json.loads((base_folder / CONFIG["unet"]).read_text())
    values |= {
        "mid_block_type": None,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2],
        "attention_head_dim": [4, 4, 5],
    }
    saved = UNet2DConditionModel.from_config(values)
    shutil.rmtree(base_folder / "unet")
    saved.save_pretrained(base_folder / "unet")
    load_all(base_folder)
    assert fingerprint(load("unet", base_folder)) == fingerprint(saved)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"beta_schedule": "nope"}, "beta_schedule 'nope' is not supported"),
        ({"trained_betas": [0.1]}, "has trained_betas"),
        ({"prediction_type": "sample"}, "prediction type 'sample' is not supported; set loss.prediction to"),
        ({"rescale_betas_zero_snr": True}, "zero_terminal_snr needs v_prediction"),
        ({"beta_start": 1e-30, "beta_end": 1e-30}, "leaves no noise"),
        ({"beta_start": 0.9, "beta_end": 0.99, "beta_schedule": "linear"}, "leaves nothing of the image"),
    ],
)
def test_a_noise_schedule_that_cannot_be_used_names_its_file(base_folder, changes, reason):
    edit(base_folder / CONFIG["scheduler"], **changes)
    base = base_of(Model(base=str(base_folder)))
    with pytest.raises(UserError, match=reason) as caught:
        base.noise_schedule()
    assert str(caught.value).startswith(f"model.base {str(base_folder)!r} ({base_folder / CONFIG['scheduler']}): ")


def test_a_plan_refuses_the_schedule_that_training_would_refuse(base_folder):
    edit(base_folder / CONFIG["scheduler"], beta_schedule="nope")
    with pytest.raises(UserError, match="beta_schedule 'nope' is not supported"):
        summary(parse_config({"model": {"base": str(base_folder)}, "data": {"resolution": 64}}, "test"))


def test_unknown_values_of_a_config_are_dropped(base_folder):
    edit(
        base_folder / CONFIG["text_encoder"], quantization_config={"quant_method": "bitsandbytes"}, auto_map={"x": "y"}
    )
    edit(base_folder / CONFIG["unet"], _name_or_path="/home/somebody", quantization_config={})
    load_all(base_folder)
    assert "_name_or_path" not in load("unet", base_folder).config


# headers and weights


def header(size: int | None = None, data: bytes = b"", **entries) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape: list, start: object, end: object, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its header is longer than the file"),
        (struct.pack("<Q", 2**63) + b"{}", "its header is longer than the file"),
        (header(size=10**9), "its header is longer than the file"),
        (b"\x02" + b"\0" * 7 + b"[]", "its header is not a JSON object"),
        (b"\x02" + b"\0" * 7 + b"{]", "its header is not valid JSON"),
        (header(__metadata__={"a": 5}), "the metadata in its header is not a table of text"),
        (header(a=5), "the entry of a in its header is not valid"),
        (header(a=entry([1], 0, 4, "OBJECT"), data=b"1234"), "the entry of a"),
        (header(a=entry([1], 0, 4, ["F32"]), data=b"1234"), "the entry of a"),
        (header(a=entry([2**40, 2**40], 0, 4), data=b"1234"), "the entry of a"),
        (header(a=entry([0, 2**63, 2**63], 0, 0)), "the entry of a"),
        (header(a=entry([0, 2**63], 0, 0)), "the entry of a"),
        (header(a=entry([-1], 0, -4), data=b"1234"), "the entry of a"),
        (header(a=entry([True], 0, 4), data=b"1234"), "the entry of a"),
        (header(a=entry([1] * 99, 0, 4), data=b"1234"), "the entry of a"),
        (header(a=entry([1], 0, 4), b=entry([1], 0, 4), data=b"1234"), "the bytes of b do not begin"),
        (header(a=entry([1], 0, 4), b=entry([1], 2, 6), data=b"123456"), "the bytes of b do not begin"),
        (header(a=entry([1], 4, 8), data=b"12345678"), "the bytes of a do not begin"),
        (header(a=entry([1], 0, 4), data=b"12345678"), "its tensors have 4 bytes, but 8 follow the header"),
        (header(a=entry([2], 0, 8), data=b"1234"), "its tensors have 8 bytes, but 4 follow the header"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path, content, reason):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        TensorFile(path)
    with pytest.raises(UserError, match="is damaged or not a safetensors file"):
        resolve_base(str(path))


def test_every_tensor_of_a_file_is_read_as_the_library_reads_it(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = {
        f"{shape}{dtype}": torch.randn(shape).to(dtype) for shape in ((), (3,), (0, 2), (2, 1, 3)) for dtype in dtypes
    }
    save_file(tensors, tmp_path / "x.safetensors", {"key": "ä"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"key": "ä"}
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        ours = file.read(name)
        assert ours.dtype == tensor.dtype
        assert torch.equal(ours, tensor)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        (
            {"middle_block.1.transformer_blocks.0.attn2.to_k.weight": []},
            r"is damaged: .*attn2.to_k.weight is \(\), not",
        ),
        ({"middle_block.1.transformer_blocks.0.attn2.to_k.weight": [0]}, r"is damaged: .* is \(0,\), not a matrix"),
        ({"middle_block.1.transformer_blocks.0.attn2.to_k.weight": [8, 0]}, r"is damaged: .* is \(8, 0\), not a m"),
        ({"input_blocks.0.0.weight": []}, r"is damaged: .*input_blocks.0.0.weight is \(\), not"),
        ({"input_blocks.0.0.weight": [32, 0, 3, 3]}, r"is damaged: .* is \(32, 0, 3, 3\), not"),
        ({"input_blocks.0.0.weight": [32, 9, 3, 3]}, "is an inpainting or editing model, whose UNet has 9 input ch"),
        ({"input_blocks.0.0.weight": [1] * 9}, r"is damaged: .*input_blocks.0.0.weight is"),
    ],
)
def test_a_single_file_is_recognized_by_shapes_of_any_rank(tmp_path, shapes, reason):
    names = {
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": [8, 128],
        "input_blocks.0.0.weight": [32, 4, 3, 3],
    }
    path = tmp_path / "x.safetensors"
    save_file({f"model.diffusion_model.{name}": torch.zeros(s) for name, s in {**names, **shapes}.items()}, path)
    with pytest.raises(UserError, match=reason) as caught:
        resolve_base(str(path), "tiny")
    assert str(path) in str(caught.value)


def change_a_tensor(path: Path, change) -> str:
    """Change one tensor of a file and return its name."""
    tensors = load_file(path)
    name = sorted(tensors)[3]
    save_file({**tensors, name: change(tensors[name])}, path, {"format": "pt"})
    return name


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_not_floating_point_numbers_are_refused(base_folder, part, dtype):
    name = change_a_tensor(base_folder / part / WEIGHTS[part], lambda tensor: tensor.to(dtype))
    message = refused(base_folder, "is quantized")
    assert name in message
    assert str(base_folder / part) in message


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_encoded(base_folder, part, value):
    path = base_folder / part / WEIGHTS[part]
    assert first_non_finite([path]) is None

    def damage(tensor: torch.Tensor) -> torch.Tensor:
        damaged = tensor.clone()
        damaged.view(-1)[-1] = value
        return damaged

    name = change_a_tensor(path, damage)
    assert first_non_finite([path]) == f"{path}: {name}"
    base = base_of(Model(base=str(base_folder)))
    with pytest.raises(UserError, match=f"{path}: {name} has values that are not finite"):
        check_unet(base) if part == "unet" else load(part, base_folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    for position in range(19):
        for value in (float("nan"), float("inf"), float("-inf")):
            tensor = torch.full((19,), 60000.0).to(dtype)
            tensor[position] = value
            save_file({"x": tensor}, path)
            assert first_non_finite([path]) == f"{path}: x"
    save_file(
        {"x": torch.full((19,), torch.finfo(dtype).max, dtype=dtype), "n": torch.ones(3, dtype=torch.int64)}, path
    )
    assert first_non_finite([path]) is None


# tokenizers


@pytest.mark.parametrize("length", [..., None, 1000000000000000019884624838656, 1e30, 77, 49])
def test_a_tokenizer_without_a_length_of_its_own_has_the_text_encoders(base_folder, length):
    edit(base_folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    ((tokenizer, text_encoder),) = load_texts(resolve_base(str(base_folder)), "", 0)
    tiny = resolve_base("tiny")
    encoder = CaptionEncoder.of(tiny, [(tokenizer, text_encoder)], torch.device("cpu"))
    assert encoder.num_tokens == 48
    assert encoder.encode(["a red circle " * 99]).shape == (1, 48, 128)
    assert encoder.fingerprint == CaptionEncoder.of(tiny, load_texts(tiny, "", 0), torch.device("cpu")).fingerprint


def test_a_random_base_reads_77_tokens_if_its_tokenizer_says_none(base_folder):
    edit(base_folder / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    ((tokenizer, text_encoder),) = load_texts(resolve_base("random:small"), str(base_folder / "tokenizer"), 0)
    assert (tokenizer.model_max_length, text_encoder.config.max_position_embeddings) == (77, 77)


def test_a_tokenizer_of_vocab_and_merges_equals_the_one_file(base_folder):
    folder = base_folder / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "added_tokens.json").write_text("{}")
    text = "A <|startoftext|> b's ÄÖ  123 cat-toy"
    ours, theirs = (load_texts(resolve_base(spec), "", 0)[0][0] for spec in (str(base_folder), "tiny"))
    assert ours(text).input_ids == theirs(text).input_ids


@pytest.mark.parametrize("length", [-1, 0, 2, "77", True, [77]])
def test_an_impossible_length_of_a_tokenizer_is_refused(base_folder, length):
    edit(base_folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    refused(base_folder, "its model_max_length is")


def test_a_tokenizer_names_no_other_files_and_runs_no_code(base_folder, tmp_path):
    other = tmp_path / "other.json"
    other.write_text((base_folder / "tokenizer" / "tokenizer.json").read_text().replace("circle", "square"))
    edit(
        base_folder / "tokenizer" / "tokenizer_config.json",
        tokenizer_file=str(other),
        vocab_file=str(other),
        fast_tokenizer_files=["tokenizer.4.0.0.json", str(other)],
        auto_map={"AutoTokenizer": ["code.Tokenizer", None]},
        chat_template="{% for x in range(10**9) %}{% endfor %}",
    )
    (base_folder / "tokenizer" / "tokenizer.4.0.0.json").write_text(other.read_text())
    # a regular expression that takes forever
    split = {"type": "Split", "pattern": {"Regex": "(a|a?)+b"}, "behavior": "Isolated", "invert": False}
    edit(base_folder / "tokenizer" / "tokenizer.json", pre_tokenizer=split)
    tokenizer = load_texts(resolve_base(str(base_folder)), "", 0)[0][0]
    tiny = load_texts(resolve_base("tiny"), "", 0)[0][0]
    assert tokenizer.get_vocab() == tiny.get_vocab()
    assert tokenizer("a circle " + "a" * 60).input_ids == tiny("a circle " + "a" * 60).input_ids


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab": {"a": 2**40}}, "its vocabulary is not a table"),
        ({"vocab": {"a": -1}}, "its vocabulary is not a table"),
        ({"vocab": {"a": 1, "b": 1}}, "its vocabulary has an id twice"),
        ({"vocab": []}, "its vocabulary is not a table"),
        ({"merges": [["a"]]}, "its merges are not a list of pairs"),
        ({"merges": [["never", "seen"]]}, "its tokenizer cannot be used"),
        ({"type": "Unigram"}, "has no byte-pair encoding"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(base_folder, changes, reason):
    path = base_folder / "tokenizer" / "tokenizer.json"
    edit(path, model={**json.loads(path.read_text())["model"], **changes})
    refused(base_folder, reason)


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(base_folder):
    path = base_folder / "tokenizer" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    edit(path, model={**model, "vocab": {**model["vocab"], "new": 1291}})
    refused(base_folder, r"it has ids up to 1,291, but the text encoder has embeddings for 1,291 tokens")


def test_a_folder_without_a_tokenizer_is_refused(base_folder):
    shutil.rmtree(base_folder / "tokenizer")
    refused(base_folder, r"it has neither tokenizer\.json nor vocab\.json and merges\.txt")
