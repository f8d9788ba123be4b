"""Thousands of damaged model files: none may crash, hang, take memory, or make anything outside the folder be opened.

Every input ends in a UserError of one line, or in a model that works.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.errors import UserError
from safelight.trainer.config.schema import Model
from safelight.trainer.families.original_layout import unet_layout, vae_layout
from safelight.trainer.models.base import base_of, tiny_folder
from safelight.trainer.models.build import build, shapes_of, text_config
from safelight.trainer.models.model_configs import UNet, checked
from safelight.trainer.models.model_folder import DIFFUSERS_STEM, weight_files
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.tensor_files import FLOATS, TensorFile
from safelight.trainer.models.tokenizer import load_tokenizer
from safelight.trainer.models.weights import check_unet, load_texts, load_unet, load_vae
from tests.trainer.models.test_foreign_models import CONFIG

pytestmark = pytest.mark.slow

NUM_INPUTS = 10_000
MAX_SECONDS, MAX_GROWTH_MIB = 10, 512
# what values are replaced by
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 64, 100, 10**6, 10**9, 2**40, 2**63 - 1, -(2**40)),
    *(0.0, -0.0, 0.5, -0.5, 1.0, 1e-30, 1e-5, 1e300, -1e300),
    *("", "nope", "x" * 10_000, "../../outside", "/etc/hostname", "\x1b]0;x\x07", "silu", "relu", "default", "\ud800"),
    *([], [1], [0], [-1] * 3, [1] * 3, [2, 3, 5], [4, 4, 4], [8, 16, 32], [10**9] * 3, [[1]], ["x"] * 3, [None] * 3),
    *([16, 32], [1] * 9, [0.5] * 3, {}, {"a": 1}, {"a": {"b": [1]}}, "missing.safetensors", "evil.bin", "..", "."),
]

opened: list[str] = []
is_watching = False


def _record(event: str, arguments: tuple) -> None:
    if is_watching and event == "open" and any(word in str(arguments[0]) for word in ("outside", "evil", "hostname")):
        opened.append(str(arguments[0]))


sys.addaudithook(_record)


@pytest.fixture
def guarded(tmp_path) -> Iterator[Callable]:
    """A function that calls another, and returns what it returns or None for a UserError.

    It fails for any other exception, a message of several lines, and a call that takes too long. At the end it fails if
    memory has grown, or if a file with one of the names that the inputs bring along was opened.
    """
    opened.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def guard(call: Callable, *arguments):
        global is_watching
        start, is_watching, result, message = time.process_time(), True, None, ""
        try:
            result = call(*arguments)
        except UserError as error:
            message = str(error)
        finally:
            is_watching = False
        assert message.isprintable()
        assert time.process_time() - start < MAX_SECONDS, arguments
        return result

    yield guard
    assert opened == []
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MAX_GROWTH_MIB


def mutate(values: object, rng: random.Random) -> object:
    """Return a copy of a JSON value with one to three of its parts replaced, removed, added, or copied elsewhere."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = values
        while isinstance(place, dict | list) and place and rng.random() < 0.7:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key]:
                break
            place = place[key]
        if not isinstance(place, dict | list) or not place:
            return rng.choice(VALUES)
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        action = rng.random()
        if action < 0.1:
            del place[key]
        elif action < 0.15 and isinstance(place, dict):
            place[rng.choice(["x", "", "_class_name", "quantization_config"])] = rng.choice(VALUES)
        elif action < 0.2 and isinstance(place, dict):
            place[key] = copy.deepcopy(place[rng.choice(list(place))])
        elif isinstance(place[key], int) and action < 0.4:
            place[key] += rng.choice((-1, 1, 10**6))
        else:
            place[key] = copy.deepcopy(rng.choice(VALUES))
    return values


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with some flipped, cut, doubled or replaced."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not content:
            break
        position, action = rng.randrange(len(content)), rng.random()
        if action < 0.5:
            content[position] ^= 1 << rng.randrange(8)
        elif action < 0.6:
            del content[position:]
        elif action < 0.8:
            content[position:position] = content[position : position + rng.randrange(1, 40)]
        else:
            content[position : position + 1] = rng.choice(
                (b"9" * 30, b"-", b'"', b"[" * 100, b"{", b"}", b"\xff", b"1e999")
            )
    return bytes(content)


def use(part: str, config: dict) -> None:
    """Build what a config describes, and run it, on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    if part == "unet":
        unet = build(lambda: UNet2DConditionModel.from_config(config), "unet")
        if "addition_embed_type" not in config:
            assert unet_layout(shapes_of(unet), unet.config.layers_per_block)
            side = 2 ** len(config["block_out_channels"])
            latents = torch.empty(1, unet.config.in_channels, side, side, device="meta")
            text = torch.empty(1, 3, config["cross_attention_dim"], device="meta")
            assert unet(latents, torch.zeros(1, device="meta"), encoder_hidden_states=text).sample.shape[-1] == side
    elif part == "vae":
        vae = build(lambda: AutoencoderKL.from_config(config), "vae")
        assert vae_layout(shapes_of(vae))
        side = 2 ** len(config["block_out_channels"])
        posterior = vae.encode(torch.empty(1, 3, side, side, device="meta")).latent_dist
        assert vae.decode(posterior.mean).sample.shape[-1] == side
    elif part == "text_encoder":
        module = build(lambda: CLIPTextModel(text_config(config)), "text_encoder")
        module(torch.zeros(1, 3, dtype=torch.long, device="meta"))
    elif part == "scheduler":
        alphas = make_schedule(config).alphas_cumprod_T
        assert alphas.isfinite().all()
        assert ((alphas >= 0) & (alphas <= 1)).all()


@torch.no_grad()
def test_configs(guarded):
    rng, num_accepted = random.Random(1), 0
    configs = {part: json.loads((tiny_folder() / name).read_text()) for part, name in CONFIG.items() if part != "index"}
    configs["unet"] |= {field.alias or name: None for name, field in UNet.model_fields.items()} | configs["unet"]
    parts = list(configs)
    for number in range(NUM_INPUTS):
        part = parts[number % len(parts)]
        values = mutate(configs[part], rng)
        if isinstance(values, dict) and (config := guarded(checked, part, values, Path("x/config.json"))) is not None:
            num_accepted += 1
            if part != "vae" or config.get("_class_name") != "AutoencoderTiny":
                guarded(use, part, config)
    assert num_accepted > NUM_INPUTS / 50


def small_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder(), folder)
    for name in ("evil.bin", "evil.safetensors"):
        (tmp_path / name).write_bytes(b"evil")
    return folder


def load_all(folder: Path) -> None:
    base = base_of(Model(base=str(folder)))
    load_vae(base, "", 0)
    load_texts(base, "", 0)
    check_unet(base)
    load_unet(base, 0)


def test_whole_folders(guarded, tmp_path):
    """As train loads them: a config is changed, or the bytes of any file, and everything is loaded."""
    rng, folder = random.Random(2), small_folder(tmp_path)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "training_log.jsonl")
    for number in range(NUM_INPUTS // 10):
        path = paths[number % len(paths)]
        content = path.read_bytes()
        if path.suffix == ".json" and path.name != "tokenizer.json" and rng.random() < 0.7:
            path.write_text(json.dumps(mutate(json.loads(content), rng)))
        else:
            head = content[:20_000]
            path.write_bytes(damaged(head, rng) + content[20_000:])
        guarded(load_all, folder)
        path.write_bytes(content)
    load_all(folder)


def test_indices(guarded, tmp_path):
    rng, folder, num_accepted = random.Random(3), small_folder(tmp_path), 0
    tensors = load_file(folder / "unet" / f"{DIFFUSERS_STEM}.safetensors")
    (folder / "unet" / f"{DIFFUSERS_STEM}.safetensors").unlink()
    names = [f"{DIFFUSERS_STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    shards: dict[str, list[str]] = {
        name: sorted(tensors)[part : part + 3] for name, part in zip(names, (0, 3), strict=True)
    }
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / "unet" / name)
    index = {"metadata": {"total_size": 5}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    path = folder / "unet" / f"{DIFFUSERS_STEM}.safetensors.index.json"
    for number in range(NUM_INPUTS):
        if number % 2:
            path.write_text(json.dumps(mutate(index, rng)))
        else:
            path.write_bytes(damaged(json.dumps(index).encode(), rng))
        num_accepted += guarded(weight_files, folder, "unet", DIFFUSERS_STEM) is not None
    assert num_accepted > NUM_INPUTS / 50


def test_headers(guarded, tmp_path):
    """Every header that is accepted describes tensors that can be read."""
    rng, num_accepted = random.Random(4), 0
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2).half(), "c": torch.ones(()).bfloat16()}, path, {"k": "v"})
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for number in range(NUM_INPUTS):
        if number % 2:
            text = json.dumps(mutate(header, rng)).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        else:
            path.write_bytes(damaged(content, rng))
        if (file := guarded(TensorFile, path)) is not None:
            num_accepted += 1
            for name, entry in file.entries.items():
                if entry.dtype in FLOATS:
                    assert guarded(file.read, name).shape == entry.shape
    assert num_accepted > NUM_INPUTS / 50


def test_tokenizers(guarded, tmp_path):
    """Every tokenizer that is accepted encodes a caption with ids that the text encoder has."""
    rng, folder, num_accepted = random.Random(5), small_folder(tmp_path) / "tokenizer", 0
    whole = json.loads((folder / "tokenizer.json").read_text())
    # CLIP's characters, two merges, and the ends: loading takes milliseconds
    tokens = [token for token in whole["model"]["vocab"] if len(token.removesuffix("</w>")) == 1]
    vocabulary = {
        token: number for number, token in enumerate([*tokens, "ab", "abc</w>", "<|startoftext|>", "<|endoftext|>"])
    }
    merges = [["a", "b"], ["ab", "c</w>"]]
    whole["model"] |= {"vocab": vocabulary, "merges": merges}
    whole["added_tokens"] = [
        {
            "id": vocabulary[token],
            "content": token,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in ("<|startoftext|>", "<|endoftext|>")
    ]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"added_tokens_decoder": {"5": {"content": "<x>", "special": True}}, "vocab_file": "evil.bin"}
    settings["extra_special_tokens"] = [{"content": "<y>", "lstrip": True}]
    files = {
        "tokenizer.json": whole,
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {"bos_token": {"content": "<|startoftext|>", "lstrip": False}, "pad_token": "a"},
        "added_tokens.json": {"<z>": len(vocabulary)},
        "vocab.json": vocabulary,
        "merges.txt": None,
    }
    for number in range(NUM_INPUTS):
        for name, values in files.items():
            text = "\n".join(["#version: 0.2", *map(" ".join, merges)]) if values is None else json.dumps(values)
            (folder / name).write_text(text)
        # half of them from vocab.json and merges.txt, and some without settings of added tokens
        if number % 2:
            (folder / "tokenizer.json").unlink()
        if rng.random() < 0.5:
            (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": {}}))
        name = rng.choice([name for name in files if (folder / name).exists()])
        if rng.random() < 0.6 and files[name] is not None:
            (folder / name).write_text(json.dumps(mutate(files[name], rng)))
        else:
            (folder / name).write_bytes(damaged((folder / name).read_bytes(), rng))
        limit = len(vocabulary) + 20
        if (tokenizer := guarded(load_tokenizer, folder.parent, "tokenizer", 77, limit)) is not None:
            num_accepted += 1
            ids = tokenizer(
                ["abc ÄÖ <x> <|endoftext|> 123 " * 9, ""],
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
            ).input_ids
            assert max(map(max, ids)) < limit
            assert {len(row) for row in ids} == {tokenizer.model_max_length}
    assert num_accepted > NUM_INPUTS / 50
