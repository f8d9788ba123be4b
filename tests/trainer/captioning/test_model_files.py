"""A captioner's folder may come from anybody: it runs no code, asks no hub, opens nothing else, claims no memory."""

from __future__ import annotations

import base64
import importlib.util
import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.errors import UserError
from safelight.trainer.captioning import model_files, models, prompts
from safelight.trainer.captioning.models import load_captioner, open_captioner
from safelight.trainer.captioning.tokenizer_file import check_tokenizer
from tests.trainer.captioning.conftest import CPU, photo
from tests.trainer.captioning.small_captioners import change_json


@pytest.fixture
def folder(captioner_folder, tmp_path) -> Path:
    return Path(shutil.copytree(captioner_folder("blip"), tmp_path / "model"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def plain_caption(folder: Path) -> str:
    return load_captioner(str(folder), CPU).caption([photo(1)], models.Generation(max_new_tokens=5))[0]


def test_code_in_the_folder_is_never_run(folder, tmp_path, no_network):
    expected = plain_caption(folder)
    flag = tmp_path / "ran"
    code = f"open({str(flag)!r}, 'w')\nclass Model: pass\nclass Config: pass\nclass Processor: pass\n"
    for name in ("modeling.py", "custom_generate/generate.py", "processing.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        change_json(
            folder / name,
            auto_map={
                **{"AutoModelForImageTextToText": "modeling.Model", "AutoConfig": "modeling.Config"},
                **{"AutoProcessor": "processing.Processor", "AutoTokenizer": ["processing.Processor", None]},
            },
            custom_generate="generate.py",
            _attn_implementation="stranger/kernels",
            attn_implementation="stranger/kernels",
            transformers_weights="../../other.safetensors",
        )
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"_attn_implementation": "stranger/kernels", "auto_map": {"AutoModel": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert plain_caption(folder) == expected
    assert not flag.exists()


def test_pickled_weights_are_never_opened(folder):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"no .safetensors file \(it has .*pytorch_model.bin.*convert its weights"):
        load_captioner(str(folder), CPU)


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(UserError, match="leads out of the model's folder"):
            load_captioner(str(folder), CPU)
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


def test_a_config_may_not_claim_more_than_the_files_hold(folder):
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"hidden_size": 2**14, "intermediate_size": 2**16}, "describes .* weights, and its files have"),
        ({"num_hidden_layers": 3}, "describes .* weights, and its files have"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers is 1,000,000, over the limit of 512"),
        ({"hidden_size": 10**12}, "hidden_size is 1,000,000,000,000, over the limit"),
        ({"hidden_size": 33}, "no model can be built|do not fit its config.json"),
        ({"hidden_size": "wide"}, "do not fit its config.json"),
        ({"num_hidden_layers": 1}, ""),
    ):
        changed = {**config, "text_config": {**config["text_config"], **changes}}
        (folder / "config.json").write_text(json.dumps(changed))
        if message:
            with pytest.raises(UserError, match=message) as error:
                load_captioner(str(folder), CPU)
            assert "\n" not in str(error.value)


def test_weights_must_be_finite_complete_and_not_quantized(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight"))
    damaged = {
        "values that are not finite": {**tensors, name: torch.full_like(tensors[name], torch.nan)},
        "they lack .* and 0 more": {**{k: v for k, v in tensors.items() if k != name}, "spare": torch.zeros(10_000)},
        "is quantized": {**tensors, name: tensors[name].to(torch.float8_e4m3fn)},
    }
    for message, changed in damaged.items():
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_captioner(str(folder), CPU)
    save_file(tensors, folder / "model.safetensors")
    change_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match="is quantized"):
        load_captioner(str(folder), CPU)


def test_a_folder_without_a_processor_or_config_says_what_is_missing(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "processor_config.json").unlink()
    with pytest.raises(UserError, match="no processor can be made of its files"):
        load_captioner(str(folder), CPU)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="give the folder of a captioner"):
        load_captioner(str(folder), CPU)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file; give the model's folder"):
        load_captioner(str(tmp_path / "model.safetensors"), CPU)


def test_a_built_in_captioner_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "tiny_captioner_folder", lambda: tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone has no config.json; .* install Safelight again"):
        load_captioner("tiny", CPU)


def test_the_fingerprint_follows_weights_and_settings(folder):
    def fingerprint() -> str:
        with open_captioner(str(folder)) as source:
            return source.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    (folder / "README.md").write_text("says nothing")
    assert fingerprint() == first
    tensors = load_file(folder / "model.safetensors")
    tensors[min(tensors)] += 1
    save_file(tensors, folder / "model.safetensors")
    second = fingerprint()
    assert second != first
    change_json(folder / "processor_config.json", image_processor={"size": {"height": 16, "width": 16}})
    assert fingerprint() not in (first, second)


@pytest.fixture
def chat_folder(captioner_folder, tmp_path) -> Path:
    return Path(shutil.copytree(captioner_folder("idefics3"), tmp_path / "chat"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # jinja would work this out while it compiles
        ("<image>{{ 'a' * 30000000000 }}", "MemoryError|fills the memory"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it does not end"),
        ("<image>{{ 'a' * 100000 }}", "100,007 characters, over the limit of 16,384"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ messages[", "its chat template or tokenizer makes no prompt"),
        ("<image>{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
@pytest.mark.long
def test_a_chat_template_is_bounded_in_memory_and_time(chat_folder, monkeypatch, template, message):
    monkeypatch.setattr(prompts, "MAX_CPU_SECONDS", 3)
    (chat_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=message) as error:
        load_captioner(str(chat_folder), CPU)
    assert str(chat_folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_chat_template_is_rendered_where_memory_has_no_limits(chat_folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "resource" else find(name, *_))
    with pytest.raises(UserError, match="is not tried on this system, which cannot limit its memory"):
        load_captioner(str(chat_folder), CPU)


def test_a_chat_template_is_rendered_once_for_all_photos(captioner_folder, monkeypatch):
    captioner = load_captioner(str(captioner_folder("idefics3")), CPU)
    generation = models.Generation(max_new_tokens=3, prompt="what is this?")
    calls, tried = [], models.tried

    def spy(tokenizer, texts, template):
        calls.extend(texts)
        return tried(tokenizer, texts, template)

    monkeypatch.setattr(models, "tried", spy)
    for _ in range(2):
        captioner.caption([photo(1), photo(2)], generation)
    assert calls == ["what is this?"]


def with_tokenizer(folder: Path, **parts) -> str:
    """Return why a captioner with other parts of its tokenizer.json is refused, "" if it is not."""
    original, message = (folder / "tokenizer.json").read_text(), f"{folder}:"
    change_json(folder / "tokenizer.json", **parts)
    try:
        load_captioner(str(folder), CPU)
    except UserError as error:
        message = str(error)
    (folder / "tokenizer.json").write_text(original)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message.removeprefix(f"{folder}:")


def replaced(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(kind: str, *parts: dict) -> dict:
    return {"type": "Sequence", kind: list(parts)}


DOUBLE = replaced({"String": "e"}, "ee")
# of eighteen letters
LONG = "\ufdfa"
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
EVERYTHING = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": sequence("normalizers", *[DOUBLE] * 7)},
        {"normalizer": sequence("normalizers", sequence("normalizers", *[DOUBLE] * 4), *[DOUBLE] * 4)},
        {"normalizer": replaced({"Regex": "."}, "a" * 100)},
        {"normalizer": replaced({"String": ""}, "a" * 100)},
        {"normalizer": sequence("normalizers", *[replaced({"String": "l"}, LONG), {"type": "NFKD"}] * 8)},
        {"normalizer": sequence("normalizers", *[{"type": "Prepend", "prepend": "a" * 10}] * 2)},
        {"pre_tokenizer": sequence("pretokenizers", *[BYTES] * 3)},
        {"decoder": sequence("decoders", *[DOUBLE] * 7)},
        {"decoder": sequence("decoders", *[{"type": "BPEDecoder", "suffix": ""}] * 7)},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [EVERYTHING] * 65,
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
)
def test_a_tokenizer_may_not_lengthen_a_text_without_bounds(chat_folder, parts):
    assert "can make a text more than 64 times as long" in with_tokenizer(chat_folder, **parts)


def test_a_table_of_sentencepiece_may_not_lengthen_a_text_without_bounds(chat_folder):
    def normalizer(text: str) -> dict:
        table = (0).to_bytes(4, "little") + b"a\0" + text.encode() + b"\0"
        return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}

    check_tokenizer({"normalizer": normalizer(LONG)}, chat_folder)
    for text in ("a" * 65, LONG * 4):
        assert "times as long" in with_tokenizer(chat_folder, normalizer=normalizer(text))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": replaced({"Regex": "(a|a)*b"}, "")},
        {"normalizer": replaced({"Regex": "a*a*a*b"}, "")},
        {"decoder": replaced({"Regex": " +b"}, "")},
    ],
)
def test_regular_expressions_of_a_tokenizer_end(chat_folder, parts):
    assert "may take for ever" in with_tokenizer(chat_folder, **parts)


def test_regular_expressions_of_a_pre_tokenizer_are_tried_within_bounds(chat_folder, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_CPU_SECONDS", 3)

    def split(regex: str) -> dict:
        return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}

    assert with_tokenizer(chat_folder, pre_tokenizer=sequence("pretokenizers", split(r" ?\p{L}+|\s+"), BYTES)) == ""
    slow = split(r"(?:(?:.|.)+)+[\d]{2}")
    assert "makes no prompt: it does not end" in with_tokenizer(chat_folder, pre_tokenizer=slow)


def test_a_tokenizers_tokens_are_bounded(chat_folder):
    values = json.loads((chat_folder / "tokenizer.json").read_text())
    values["model"]["vocab"]["a" * 1001] = len(values["model"]["vocab"])
    assert "a token has 1,001 characters" in with_tokenizer(chat_folder, model=values["model"])
    token = {"id": 900, "content": "b" * 2**20, "special": False, "normalized": True}
    added = [*values["added_tokens"], {**dict.fromkeys(("single_word", "lstrip", "rstrip"), False), **token}]
    assert "more than 1,048,576 characters" in with_tokenizer(chat_folder, added_tokens=added)
    change_json(chat_folder / "processor_config.json", image_token="<" * 1001)
    assert "image_token has 1,001 characters" in with_tokenizer(chat_folder)
