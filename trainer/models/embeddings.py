"""Embeddings: words whose vectors are in a file instead of the text encoder's table, or trained (textual inversion).

Read are the files that diffusers' and kohya's training write, those of A1111, and SDXL's with the vectors of both text
encoders. The tokenizer does not know the words: a text is cut at their names, and in the place of each stand numbers
from the end of the vocabulary on, one for each of its vectors. `read_ids` lets the text encoder read a plain token
there and replaces what its table answers. So the end of the text is found where it is, also by the older text encoders
that take the token of the largest number for it.
Source: Gal et al. 2022, arXiv:2208.01618.
Letters: B batch, T tokens, N vectors of one embedding, K vectors of all of them, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.config.schema import MAX_WORD_VECTORS, WORD, WORD_RULE
from safelight.trainer.families.family import Family
from safelight.trainer.models.tensor_files import FLOATS, TensorFile, is_finite
from safelight.trainer.models.torch_archive import read_archive
from safelight.untrusted import UnsafeFile, read_bytes

# in one prompt's reach; each costs memory of its own
MAX_EMBEDDINGS = 64
# what SDXL's files call the vectors of each text encoder, as A1111 and ComfyUI read them
SDXL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
# files of a folder as diffusers' training writes them
FOLDER_FILES = {"text_encoder": "learned_embeds.safetensors", "text_encoder_2": "learned_embeds_2.safetensors"}
# in the metadata of our files: the embedding belongs into negative prompts
NEGATIVE = "safelight.negative"
ARCHIVES = (".pt", ".bin")
# larger than any vector of a vocabulary by far, and still a number in fp16
MAX_MAGNITUDE = 1e4
# what the text encoder reads in the place of a vector: never the end of a text
_STAND_IN = 0


# what else a file is, by a part of any tensor's name, and where it belongs; the first match counts
_LORA = (
    "a LoRA, which changes a UNet: a run draws with the LoRA that it trained (--lora-scale), and others belong into "
    "programs that load them, or merged into model.base"
)
_MODEL = "a model, which model.base names"
_OTHER_FILES = {
    **dict.fromkeys(("lora_unet_", "lora_te", ".lora_", ".hada_", ".lokr_"), _LORA),
    "model.diffusion_model.": _MODEL,
    **dict.fromkeys(
        ("down_blocks.", "input_blocks."), "the UNet of a model, which belongs into the model of model.base"
    ),
    **dict.fromkeys(
        ("first_stage_model.", "encoder.", "decoder.", "quant_conv."), "an autoencoder, which model.vae names"
    ),
    **dict.fromkeys(
        ("text_model.", "cond_stage_model.", "conditioner."),
        "the text encoder of a model, which belongs into the model of model.base",
    ),
}


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word and its vectors. vectors: (N, D) for each text encoder, by its folder in a model; all have one N.

    is_negative: whether it was trained for negative prompts. file_hash: SHA-256 of its file, 64 hex digits, '' if it is
    in no single file.
    """

    name: str
    vectors: Mapping[str, Tensor]
    is_negative: bool = False
    file_hash: str = ""
    _pattern: re.Pattern = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_pattern", pattern_of([self.name]))

    @property
    def num_vectors(self) -> int:
        return len(next(iter(self.vectors.values())))

    @property
    def fingerprint(self) -> str:
        """A hash of the present vectors, 64 hex digits."""
        digest = hashlib.sha256()
        for part, vectors in sorted(self.vectors.items()):
            digest.update(f"{part}{tuple(vectors.shape)}".encode())
            digest.update(vectors.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def is_named(self, *texts: str) -> bool:
        """Return whether one of the texts has the word."""
        return any(self._pattern.search(text) for text in texts)


def pattern_of(names: Sequence[str]) -> re.Pattern:
    """Return the pattern that finds any of the names as a whole word; case does not matter, as CLIP reads none.

    A letter, a digit, _ or - beside a name makes another word of it.
    """
    listed = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{listed})(?![\w-])", re.IGNORECASE)


def check_name(name: str, source: str) -> None:
    """Raise UserError unless prompts can contain the name. source: where the name comes from, for messages."""
    if not WORD.fullmatch(name):
        raise UserError(f"{source}: {name!r} cannot be named in a prompt; give {WORD_RULE}")


def check_distinct(embeddings: Sequence[Embedding]) -> None:
    """Raise UserError if two embeddings have one name, or there are too many."""
    names = [embedding.name.lower() for embedding in embeddings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two embeddings are called {twice[0]!r}; give one another name: NAME=FILE")
    if len(embeddings) > MAX_EMBEDDINGS:
        raise UserError(f"{len(embeddings)} embeddings are more than {MAX_EMBEDDINGS}; give fewer")


def open_embeddings(given: Sequence[str], widths: Mapping[str, int], setting: str) -> tuple[Embedding, ...]:
    """Return the embeddings of files. given: FILE, whose stem is the name, or NAME=FILE.

    widths: D of each text encoder, by its folder. setting: the setting or option
    that names the files, for messages. Raises UserError.
    """
    embeddings = tuple(open_embedding(one, widths, setting) for one in given)
    check_distinct(embeddings)
    return embeddings


def open_embedding(given: str, widths: Mapping[str, int], setting: str) -> Embedding:
    """Return the embedding of one file, or of a folder of diffusers' training. Arguments as of `open_embeddings`."""
    name, equals, file = given.partition("=")
    if not equals or not WORD.fullmatch(name):
        name, file = "", given
    path = Path(file).expanduser()
    name = name or (path.name if path.is_dir() else path.stem)
    check_name(name, f"{setting} {given}" + "" if equals else f"{setting} {given} (or NAME={given})")
    try:
        tensors, metadata = _read(path, len(widths))
    except FileNotFoundError:
        if path.is_dir():
            raise UserError(f"{setting} {file} is {_folder_kind(path)}") from None
        raise UserError(f"{setting} {file} does not exist; give the path of an embedding") from None
    except (UnsafeFile, OSError) as error:
        raise UserError(f"{setting} {file} is no embedding that can be read: {error}") from None
    vectors = _by_part(tensors, widths, f"{setting} {file}")
    file_hash = hashlib.sha256(read_bytes(path)).hexdigest() if path.is_file() else ""
    return Embedding(name, vectors, metadata.get(NEGATIVE) == "true", file_hash)


def _check_kind(names: Iterable[str]) -> None:
    """Raise UnsafeFile, with what a file is and where it belongs, if its tensors have the names of another kind."""
    listed = list(names)
    # the single tensor of an embedding may have any name
    for word, kind in _OTHER_FILES.items() if len(listed) > 1 else ():
        is_inside = word.startswith((".", "lora_"))
        if any(word in name if is_inside else name.startswith(word) for name in listed):
            raise UnsafeFile(f"it is {kind}")


def _folder_kind(path: Path) -> str:
    """Return what a folder without an embedding's file is, and what to give instead."""
    if (path / "config.toml").is_file():
        return "a run's folder; write its word into a file with `safelight export`, and give that"
    if (path / "model_index.json").is_file():
        return "a model's folder, which model.base names; give the file of an embedding"
    return f"a folder without {' or '.join(FOLDER_FILES.values())}; give the file of an embedding"


def _read(path: Path, num_parts: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of an embedding by their names in its files, and the metadata."""
    if path.is_dir():
        names = list(FOLDER_FILES.values())[:num_parts]
        found = [_read(path / name, 1) for name in names]
        if num_parts == 1:
            return found[0]
        tensors = {SDXL_KEYS[part]: next(iter(own.values())) for part, (own, _) in zip(SDXL_KEYS, found, strict=True)}
        return tensors, found[0][1]
    if path.suffix.lower() in ARCHIVES:
        tensors = _of_archive(read_archive(path))
        _check_kind(tensors)
        return tensors, {}
    file = TensorFile(path)
    _check_kind(file.entries)
    if wrong := [name for name, entry in file.entries.items() if entry.dtype not in FLOATS]:
        raise UnsafeFile(f"{wrong[0][:80]} is {file.entries[wrong[0]].dtype}, which is no vector")
    if sum(entry.end - entry.start for entry in file.entries.values()) > 2**26:
        raise UnsafeFile("its tensors are far larger than an embedding's")
    return {name: file.read(name) for name in file.entries}, file.metadata


def _of_archive(content: object) -> dict[str, Tensor]:
    """Return the tensors of A1111's form, a table string_to_param of them, or of diffusers' {word: tensor}."""
    if isinstance(content, dict) and isinstance(content.get("string_to_param"), dict):
        content = content["string_to_param"]
    tensors = (
        {str(name): x for name, x in content.items() if isinstance(x, Tensor)} if isinstance(content, dict) else {}
    )
    if not tensors:
        raise UnsafeFile("it holds no vectors")
    return tensors


def _by_part(tensors: Mapping[str, Tensor], widths: Mapping[str, int], source: str) -> dict[str, Tensor]:
    """Return the vectors of each text encoder, (N, D) float32."""
    expected = "this base's text encoder reads " + " and ".join(f"{width:,}" for width in widths.values())
    if len(widths) > 1 and tensors.keys() == set(SDXL_KEYS.values()):
        found = {part: tensors[SDXL_KEYS[part]] for part in widths}
    elif len(widths) == 1 and len(tensors) == 1:
        found = dict(zip(widths, tensors.values(), strict=True))
    elif len(widths) == 1 and tensors.keys() != set(SDXL_KEYS.values()):
        listed = ", ".join(name[:40] for name in list(tensors)[:5])
        raise UserError(f"{source} holds {counted(len(tensors), 'tensor')} ({listed}), not one embedding")
    else:
        is_sdxl = tensors.keys() == set(SDXL_KEYS.values())
        kind = (
            "an embedding for SDXL"
            if is_sdxl
            else f"no embedding for SDXL: that has {' and '.join(SDXL_KEYS.values())}"
        )
        raise UserError(f"{source} is {kind}; {expected} values a vector; use an embedding made for it")
    vectors = {part: x[None] if x.dim() == 1 else x for part, x in found.items()}
    for part, x in vectors.items():
        if x.dim() != 2 or x.shape[1] != widths[part]:
            shape = " x ".join(map(str, x.shape))
            raise UserError(f"{source} has vectors of {shape} values, and {expected}; use an embedding made for it")
        if not 1 <= len(x) <= MAX_WORD_VECTORS:
            raise UserError(
                f"{source} has {counted(len(x), 'vector')}; a text encoder reads 1 to {MAX_WORD_VECTORS} at a time"
            )
        if not is_finite(x) or x.abs().max() > MAX_MAGNITUDE:
            raise UserError(f"{source} has values that are not finite, or far too large; get it again")
    if len({len(x) for x in vectors.values()}) > 1:
        raise UserError(f"{source} has different numbers of vectors for the two text encoders; get it again")
    return {part: x.float().contiguous() for part, x in vectors.items()}


def file_tensors(embedding: Embedding, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return what a single file holds of an embedding, which diffusers, A1111, Forge and ComfyUI read.

    {word: (N, D)}, or clip_l and clip_g for SDXL.
    """
    if len(embedding.vectors) == 1:
        return {embedding.name: next(iter(embedding.vectors.values())).detach().to("cpu", dtype).contiguous()}
    return {SDXL_KEYS[part]: x.detach().to("cpu", dtype).contiguous() for part, x in embedding.vectors.items()}


def file_hashes(embeddings: Iterable[Embedding], *texts: str) -> dict[str, str]:
    """Return name -> SHA-256 of the files of the embeddings that texts name."""
    return {own.name: own.file_hash for own in embeddings if own.file_hash and own.is_named(*texts)}


def read_ids(
    family: Family, text_encoder: nn.Module, ids_BT: Tensor, clip_skip: int, own_KD: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return what `Family.encode_ids` returns, for ids of which those beyond the vocabulary are vectors.

    own_KD: the vectors, of which the first has the number behind the vocabulary's last; gradients reach them. None: all
    ids are of the vocabulary.
    """
    if own_KD is None:
        return family.encode_ids(text_encoder, ids_BT, clip_skip)
    own_BT = ids_BT - text_encoder.config.vocab_size
    is_own = own_BT >= 0
    with _replacing(text_encoder, own_BT.clamp(min=0), is_own, own_KD):
        return family.encode_ids(text_encoder, ids_BT.masked_fill(is_own, _STAND_IN), clip_skip)


@contextlib.contextmanager
def _replacing(text_encoder: nn.Module, own_BT: Tensor, is_own_BT: Tensor, own_KD: Tensor) -> Iterator[None]:
    def replaced(module: nn.Module, arguments: tuple, found_BTD: Tensor) -> Tensor:
        return torch.where(is_own_BT[..., None], F.embedding(own_BT, own_KD).to(found_BTD.dtype), found_BTD)

    handle = text_encoder.get_input_embeddings().register_forward_hook(replaced)
    try:
        yield
    finally:
        handle.remove()
