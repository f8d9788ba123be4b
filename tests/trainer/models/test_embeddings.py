"""Embeddings in prompts: equal to diffusers' load_textual_inversion, from every kind of file; hostile files."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.torch import save_file
from torch import nn

from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.models.base import encoder_widths, resolve_base
from safelight.trainer.models.embeddings import Embedding, file_hashes, file_tensors, open_embedding, open_embeddings
from safelight.trainer.models.encoders import CaptionEncoder, load_caption_encoder
from safelight.trainer.models.torch_archive import read_archive
from safelight.untrusted import UnsafeFile
from tests.trainer.families.small_sdxl import write_small_sdxl

WIDTH = 128
CPU = torch.device("cpu")


def vectors(num: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed)) * 0.5


class Loader(TextualInversionLoaderMixin):
    """What load_textual_inversion needs of a pipeline."""

    hf_device_map = None

    def __init__(self, tokenizer, text_encoder):
        self.tokenizer, self.text_encoder, self.components = tokenizer, text_encoder, {}

    def read(self, prompt: str, hidden: int | None = None) -> tuple:
        text = self.maybe_convert_prompt(prompt, self.tokenizer)
        ids = self.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            return self.text_encoder(ids, output_hidden_states=True)


def encoder_of(spec: str, clip_skip: int = 0) -> CaptionEncoder:
    config = Config(model={"base": spec, "clip_skip": clip_skip})
    return load_caption_encoder(config, resolve_base(spec), CPU)


def theirs(spec: str, place: int = 0) -> Loader:
    """diffusers' reader of the same base, with its own copies."""
    encoder = encoder_of(spec)
    return Loader(encoder.tokenizers[place], encoder.text_encoders[place])


@pytest.mark.parametrize("spec", ["tiny", "tiny-v"])
@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_a_prompt_is_read_as_diffusers_reads_it(tmp_path, spec, num, clip_skip):
    width = next(iter(encoder_widths(resolve_base(spec)).values()))
    path = tmp_path / "look.safetensors"
    save_file({"<look>": vectors(num, width)}, path)
    reference = theirs(spec)
    reference.load_textual_inversion(str(path))
    encoder = encoder_of(spec, clip_skip)
    encoder = encoder.knowing([open_embedding(f"<look>={path}", encoder.widths, "here")]).reading(True, 1)
    for prompt in ("a red square, <look>", "<look>", "a <look> circle in <look> tones"):
        output = reference.read(prompt)
        expected = output.last_hidden_state
        if clip_skip:
            inner = getattr(reference.text_encoder, "text_model", reference.text_encoder)
            with torch.no_grad():
                expected = inner.final_layer_norm(output.hidden_states[-2])
        assert torch.equal(encoder.encode([prompt]), expected), prompt
    # without the word nothing changes
    assert torch.equal(encoder.encode(["a red square"]), encoder.knowing(()).encode(["a red square"]))


def test_sdxl_reads_both_vectors_as_diffusers_does(tmp_path):
    spec = str(write_small_sdxl(tmp_path / "base"))
    encoder = encoder_of(spec)
    first, second = encoder.widths.values()
    path = tmp_path / "look.safetensors"
    save_file({"clip_l": vectors(2, first), "clip_g": vectors(2, second, 1)}, path)
    encoder = encoder.knowing([open_embedding(str(path), encoder.widths, "here")]).reading(True, 1)
    prompt = "a look of a red square"
    row = encoder.encode([prompt])[0]
    parts = [theirs(spec, place) for place in (0, 1)]
    for reference, key, seed, width in zip(parts, ("clip_l", "clip_g"), (0, 1), (first, second), strict=True):
        reference.load_textual_inversion({key: vectors(2, width, seed)}, token="look")
    outputs = [reference.read(prompt) for reference in parts]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=2)
    # the words are lower case and stand between others
    assert torch.equal(row[: states.numel()], states.flatten())
    assert torch.equal(row[states.numel() :], outputs[1].text_embeds[0])


def test_the_pooled_embedding_is_that_of_the_end_also_by_the_older_rule(tmp_path):
    """Published SDXL's config says eos_token_id 2: transformers then takes the token of the largest number."""
    spec = str(write_small_sdxl(tmp_path / "base"))
    encoder = encoder_of(spec)
    own = Embedding("look", {part: vectors(2, width) for part, width in encoder.widths.items()})
    encoder = encoder.knowing([own]).reading(True, 1)
    expected = encoder.encode(["a look of red"])
    encoder.text_encoders[1].config.eos_token_id = 2
    encoder.text_encoders[1].eos_token_id = 2
    assert torch.equal(encoder.encode(["a look of red"]), expected)


def test_every_kind_of_file_gives_the_same_vectors(tmp_path):
    widths, values = {"text_encoder": WIDTH}, vectors(2)
    save_file({"<x>": values}, tmp_path / "a.safetensors")
    save_file({"emb_params": values}, tmp_path / "b.safetensors")
    torch.save({"<x>": values}, tmp_path / "c.bin")
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": values}, "name": "c", "step": 9, "sd": None}
    torch.save(a1111, tmp_path / "d.pt")
    torch.save({"string_to_param": {"*": nn.Parameter(values)}}, tmp_path / "e.pt")
    torch.save(OrderedDict({"<x>": values}), tmp_path / "f.bin")
    (tmp_path / "g").mkdir()
    save_file({"<x>": values}, tmp_path / "g" / "learned_embeds.safetensors")
    for name in ("a.safetensors", "b.safetensors", "c.bin", "d.pt", "e.pt", "f.bin", "g"):
        found = open_embedding(str(tmp_path / name), widths, "here")
        assert found.name == name[0]
        assert torch.equal(found.vectors["text_encoder"], values)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.save({"<x>": values.to(dtype)}, tmp_path / "h.pt")
        assert torch.equal(
            open_embedding(str(tmp_path / "h.pt"), widths, "").vectors["text_encoder"], values.to(dtype).float()
        )
    save_file(file_tensors(found), tmp_path / "again.safetensors")
    assert open_embedding(str(tmp_path / "again.safetensors"), widths, "").fingerprint == found.fingerprint
    sdxl = {"text_encoder": 8, "text_encoder_2": 12}
    both = {"clip_l": vectors(3, 8), "clip_g": vectors(3, 12)}
    torch.save(both, tmp_path / "x.pt")
    save_file({"<x>": both["clip_l"]}, tmp_path / "g" / "learned_embeds.safetensors")
    save_file({"<x>": both["clip_g"]}, tmp_path / "g" / "learned_embeds_2.safetensors")
    for name in ("x.pt", "g"):
        found = open_embedding(str(tmp_path / name), sdxl, "here")
        assert torch.equal(found.vectors["text_encoder_2"], both["clip_g"])
        assert file_tensors(found).keys() == both.keys()


def test_weights_chunks_and_names_of_embeddings(tmp_path):
    encoder = encoder_of("tiny")
    own = [Embedding(name, {"text_encoder": vectors(num, seed=num)}) for name, num in (("bad", 2), ("bad-hands", 3))]
    encoder = encoder.knowing(own).reading(True, 2)
    (chunk,) = encoder.chunks("a (BAD:1.5), bad-hands and badly")
    a, comma = (encoder.tokenizer(x, add_special_tokens=False).input_ids for x in ("a", ","))
    assert chunk.ids[: len(a) + 6] == [*a, -1, -2, *comma, -3, -4, -5][: len(a) + 6]
    assert chunk.weights[len(a) : len(a) + 2] == [1.5, 1.5]
    assert not any(token < 0 for token in chunk.ids[len(a) + 6 :])
    # vectors are never parted by the border of a chunk
    length = encoder.chunk_tokens - 2
    fill = " ".join(["a"] * (length - 1))
    first, second = encoder.chunks(f"{fill} bad")
    assert (len(first.ids), second.ids) == (length - 1, [-1, -2])
    row = encoder.encode([f"{fill} bad"])[0]
    assert torch.equal(row[encoder.chunk_tokens :], encoder.reading(True, 1).encode(["bad"])[0])
    # nor after a comma behind which they would not fit
    _, second = encoder.chunks(f"{' '.join(['a'] * (length - 2))}, bad")
    assert second.ids == [-1, -2]
    # what is cut is told by its name
    few = " ".join(["a"] * (length - 3))
    assert encoder.reading(True, 1).cuts([f"{few} bad-hands a a"]).popitem()[1].endswith("a bad-hands")


def test_keys_depend_on_the_embeddings_that_are_named():
    plain = encoder_of("tiny").reading(True, 1)
    one, other = (Embedding("look", {"text_encoder": vectors(2, seed=seed)}) for seed in (0, 1))
    assert plain.knowing([one]).for_text("a red square").fingerprint == plain.fingerprint
    prints = {plain.knowing([x]).for_text("look").fingerprint for x in (one, other)}
    assert len(prints | {plain.fingerprint}) == 3


def test_only_what_is_in_a_file_has_a_files_hash_and_only_where_a_text_names_it(tmp_path):
    file = tmp_path / "look.safetensors"
    save_file({"x": vectors(2)}, file)
    of_file = open_embedding(str(file), {"text_encoder": WIDTH}, "--embedding")
    (tmp_path / "folder").mkdir()
    save_file({"x": vectors(2)}, tmp_path / "folder" / "learned_embeds.safetensors")
    of_folder = open_embedding(f"other={tmp_path / 'folder'}", {"text_encoder": WIDTH}, "--embedding")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file_hashes([of_file, of_folder], "a look", "other") == {"look": sha256}
    assert file_hashes([of_file], "a barn", "blurry") == {}


def test_two_embeddings_of_one_name_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"x": vectors(1)}, tmp_path / name / "look.safetensors")
    files = [str(tmp_path / name / "look.safetensors") for name in ("a", "b")]
    widths = {"text_encoder": WIDTH}
    with pytest.raises(UserError, match="two embeddings are called 'look'"):
        open_embeddings(files, widths, "sample.embeddings")
    assert [x.name for x in open_embeddings([files[0], f"other={files[1]}"], widths, "")] == ["look", "other"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.zeros(1, 64)}, r"vectors of 1 x 64 values, and this base's text encoder reads 128"),
        ({"x": torch.zeros(76, WIDTH)}, r"76 vectors; a text encoder reads 1 to 75"),
        ({"x": torch.zeros(0, WIDTH)}, r"0 vectors"),
        ({"x": torch.zeros(1, 1, WIDTH)}, r"vectors of 1 x 1 x 128"),
        ({"x": torch.full((1, WIDTH), torch.nan)}, r"not finite"),
        ({"x": torch.full((1, WIDTH), 1e6)}, r"far too large"),
        ({"x": torch.zeros(1, WIDTH), "y": torch.zeros(1, WIDTH)}, r"2 tensors \(x, y\), not one embedding"),
        ({"clip_l": torch.zeros(1, WIDTH), "clip_g": torch.zeros(1, 8)}, r"an embedding for SDXL"),
        ({"x": torch.zeros(1, WIDTH, dtype=torch.int32)}, r"x is I32, which is no vector"),
        ({}, r"0 tensors"),
    ],
)
def test_a_file_that_is_no_embedding_of_the_base_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        open_embedding(str(tmp_path / "x.safetensors"), {"text_encoder": WIDTH}, "--embedding")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("lora_unet_mid.lora_down.weight", "lora_unet_mid.lora_up.weight"), "it is a LoRA, which changes a UNet"),
        (("unet.mid.lora_A.weight", "unet.mid.lora_B.weight"), "it is a LoRA, which changes a UNet"),
        (
            ("down_blocks.0.a.weight", "mid_block.b.weight"),
            "it is the UNet of a model, which belongs into the model of",
        ),
        (("model.diffusion_model.a", "first_stage_model.b"), "it is a model, which model.base names"),
        (("encoder.down_blocks.0.a", "decoder.b"), "it is an autoencoder, which model.vae names"),
        (("text_model.a", "text_model.b"), "it is the text encoder of a model"),
    ],
)
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, names, told, ending):
    file, tensors = tmp_path / f"x{ending}", {name: torch.ones(1, WIDTH) for name in names}
    save_file(tensors, file) if ending == ".safetensors" else torch.save(tensors, file)
    with pytest.raises(UserError, match=told):
        open_embedding(str(file), {"text_encoder": WIDTH}, "--embedding")


def test_a_word_may_be_called_as_a_part_of_a_model_is(tmp_path):
    save_file({"decoder.lora_A": torch.ones(1, WIDTH)}, tmp_path / "x.safetensors")
    assert open_embedding(str(tmp_path / "x.safetensors"), {"text_encoder": WIDTH}, "--embedding").name == "x"


@pytest.mark.parametrize(
    ("inside", "told"),
    [
        ("config.toml", "is a run's folder; write its word into a file with `safelight export`"),
        ("model_index.json", "is a model's folder, which model.base names"),
        ("x.txt", "is a folder without learned_embeds.safetensors"),
    ],
)
def test_a_folder_of_another_kind_is_called_by_its_name(tmp_path, inside, told):
    (tmp_path / inside).write_text("")
    with pytest.raises(UserError, match=told):
        open_embedding(f"word={tmp_path}", {"text_encoder": WIDTH}, "--embedding")


def test_sdxl_refuses_what_has_vectors_for_one_text_encoder(tmp_path):
    save_file({"x": torch.zeros(1, 8)}, tmp_path / "x.safetensors")
    save_file({"clip_l": torch.zeros(1, 8), "clip_g": torch.zeros(2, 12)}, tmp_path / "y.safetensors")
    sdxl = {"text_encoder": 8, "text_encoder_2": 12}
    with pytest.raises(UserError, match="no embedding for SDXL: that has clip_l and clip_g"):
        open_embedding(str(tmp_path / "x.safetensors"), sdxl, "")
    with pytest.raises(UserError, match="different numbers of vectors"):
        open_embedding(str(tmp_path / "y.safetensors"), sdxl, "")


def test_names_that_no_prompt_can_have_are_refused(tmp_path):
    save_file({"x": torch.zeros(1, WIDTH)}, tmp_path / "bad hands.safetensors")
    with pytest.raises(UserError, match=r"'bad hands' cannot be named in a prompt; give a word without spaces"):
        open_embedding(str(tmp_path / "bad hands.safetensors"), {"text_encoder": WIDTH}, "--embedding")
    with pytest.raises(UserError, match="does not exist"):
        open_embedding(str(tmp_path / "nothing.safetensors"), {"text_encoder": WIDTH}, "--embedding")


class Evil:
    def __reduce__(self):
        return (Path("/tmp/never").touch, ())


def write_program(path: Path, program: bytes, storages: dict[str, bytes] | None = None, compression=0) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def rewritten(path: Path, old: bytes, new: bytes) -> Path:
    """A copy of torch.save's file with another program."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = names[0].split("/")[0]
        program = archive.read(f"{root}/data.pkl")
        assert old in program
        content = archive.read(f"{root}/data/0")
    return write_program(path.with_name("changed.pt"), program.replace(old, new), {"0": content})


def test_no_pickle_is_loaded(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    torch.save({"x": vectors(1)}, tmp_path / "x.pt")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert torch.equal(read_archive(tmp_path / "x.pt")["x"], vectors(1))


def test_hostile_archives_are_refused_and_run_nothing(tmp_path):
    marker = tmp_path / "ran"
    for number, value in enumerate(
        [
            pickle.dumps(Evil(), 2),
            b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.",
            pickle.dumps({"x": Evil()}, 4),
            b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
            b"\x80\x02}" + b"(" * 100 + b"u.",
            b"\x80\x02}q\x00h\x00h\x00s.",
            b"\x80\x02.",
            b"\x80\x02}",
            b"\x80\x02t.",
            b"\x80\x02h\x05.",
            b"",
            b"\x80\x02K\x01K\x02R.",
            pickle.dumps([1] * 10, 2)[:-1],
        ]
    ):
        path = write_program(tmp_path / f"{number}.pt", value)
        with pytest.raises(UserError):
            open_embedding(f"x={path}", {"text_encoder": WIDTH}, "--embedding")
    assert not marker.exists()
    assert not Path("/tmp/never").exists()


def test_archives_with_wrong_tensors_are_refused(tmp_path):
    torch.save({"x": vectors(2)}, tmp_path / "x.pt")
    # K\x02M\x80\x00: shape (2, 128), then its strides
    shape = b"K\x02K\x80\x86"
    for new in (b"K\x03K\x80\x86", b"K\x02K\x81\x86", b"J\xff\xff\xff\x7fK\x80\x86", b"J\xff\xff\xff\xffK\x80\x86"):
        with pytest.raises(UnsafeFile, match=r"fewer values|none of an embedding's|not in order"):
            read_archive(rewritten(tmp_path / "x.pt", shape, new))
    with pytest.raises(UnsafeFile, match=r"asks for torch\.ShortStorage"):
        read_archive(rewritten(tmp_path / "x.pt", b"FloatStorage", b"ShortStorage"))
    with pytest.raises(UnsafeFile, match="no floating-point"):
        read_archive(rewritten(tmp_path / "x.pt", b"torch\nFloatStorage", b"collections\nOrderedDict"))
    with pytest.raises(UnsafeFile, match="missing, compressed or too large"):
        read_archive(rewritten(tmp_path / "x.pt", b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"))
    with pytest.raises(UnsafeFile, match="compressed"):
        read_archive(write_program(tmp_path / "bomb.pt", bytes(2**20), compression=zipfile.ZIP_DEFLATED))
    (tmp_path / "no.pt").write_bytes(b"no zip")
    (tmp_path / "text.pt").write_bytes(pickle.dumps({"x": 1}))
    for name in ("no.pt", "text.pt"):
        with pytest.raises(UnsafeFile, match=r"damaged, or not a file of torch\.save"):
            read_archive(tmp_path / name)


def test_damaged_archives_never_fail_otherwise(tmp_path):
    torch.save({"string_to_param": {"*": vectors(2)}, "name": "x", "step": 3}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    draws = torch.Generator().manual_seed(0)
    path = tmp_path / "damaged.pt"
    for _ in range(400):
        damaged = bytearray(content)
        for place in torch.randint(0, len(content), (4,), generator=draws).tolist():
            damaged[place] = int(torch.randint(0, 256, (1,), generator=draws))
        cut = int(torch.randint(1, len(content), (1,), generator=draws))
        path.write_bytes(damaged[:cut] if cut % 4 == 0 else damaged)
        try:
            open_embedding(str(path), {"text_encoder": WIDTH}, "--embedding")
        except UserError:
            pass
