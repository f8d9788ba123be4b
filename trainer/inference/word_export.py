"""Export of the word that a run trained: a file that A1111, Forge, ComfyUI and diffusers read, or a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.adapters.trained import trained_of
from safelight.trainer.config.schema import Config
from safelight.trainer.inference.export_place import FolderKind, check_free_space, replace_file, replace_folder
from safelight.trainer.inference.export_source import Source, cast_to
from safelight.trainer.inference.model_card import CARD_NAME, SAMPLES_NAME, escaped
from safelight.trainer.inference.modelspec import modelspec
from safelight.trainer.models.embeddings import FOLDER_FILES, NEGATIVE, Embedding, file_tensors
from safelight.trainer.models.tensor_files import save_file

_NAMES = {*FOLDER_FILES.values(), CARD_NAME, SAMPLES_NAME}


class WordExport:
    """The vectors of a word, and no model; see Export."""

    folder = FolderKind("folder of an embedding", FOLDER_FILES["text_encoder"], frozenset(_NAMES))
    default_dtype = "fp32"
    relation, tag = "adapter", "textual_inversion"

    def write_file(self, source: Source, out: Path, title: str, layout: str) -> list[str]:
        word, tensors, metadata = _contents(source, title)
        check_free_space(out, sum(x.nbytes for x in tensors.values()), source.dtype)
        replace_file(out, tensors, metadata)
        where = _place(word.is_negative)
        return [f"A1111, Forge and ComfyUI know it by the name of the file: write {out.stem} into the {where}"]

    def write_folder(self, source: Source, out: Path, title: str, describe: Callable[[Path], object]) -> list[str]:
        word, tensors, metadata = _contents(source, title)
        check_free_space(out, sum(x.nbytes for x in tensors.values()), source.dtype)

        def write(partial: Path) -> None:
            for part, tensor in zip(word.vectors, tensors.values(), strict=True):
                save_file({word.name: tensor}, partial / FOLDER_FILES[part], metadata)
            describe(partial)

        replace_folder(out, write)
        return [f"write {word.name} into the {_place(word.is_negative)}"]

    def next_step(self, out: Path, layout: str, notes: list[str]) -> str:
        if out.is_dir():
            return f"in Python: pipeline.load_textual_inversion({str(out)!r})"
        return "copy it to A1111's embeddings or ComfyUI's models/embeddings"

    def trained(self, config: Config) -> str:
        return f"an embedding of the word {escaped(config.embedding.word)}"

    def usage(self, config: Config, name: str, is_file: bool, dtype: str) -> str:
        where = _place(config.embedding.negative)
        if is_file:
            return f"Copy `{name}` to A1111's `embeddings`, and write the file's name into the {where}."
        word = config.embedding.word.replace("`", "")
        load = 'pipeline.load_textual_inversion("PATH_OR_ID")'
        return f"```python\n{load}\n```\n\nThen write `{word}` into the {where}."


def _place(is_negative: bool) -> str:
    return "negative prompt" if is_negative else "prompt"


def _contents(source: Source, title: str) -> tuple[Embedding, dict[str, Tensor], dict[str, str]]:
    """Return (the word of a checkpoint, the tensors of its file, their metadata).

    Raises UserError for weights that do not exist, and if the checkpoint does not fit.
    """
    if source.weights == "ema":
        raise UserError("--weights ema: a run that trains an embedding has no moving average; leave it out")
    trained = trained_of(nn.Module(), source.config)
    trained.load(source.checkpoint)
    word, family = trained.embedding, source.base.family
    tensors = {name: cast_to(name, x, source.dtype) for name, x in file_tensors(word).items()}
    metadata = modelspec(
        source.base.config_of("unet"),
        source.schedule.prediction_type,
        source.config.data.max_resolution,
        title,
        f"the word {word.name} for {Path(source.base.spec).name} ({family.title}), trained with Safelight, "
        f"{source.step} steps",
        "for negative prompts" if word.is_negative else "",
    )
    # as kohya's training writes it
    metadata["modelspec.architecture"] += "/textual-inversion"
    metadata |= {"modelspec.trigger_phrase": word.name, **({NEGATIVE: "true"} if word.is_negative else {})}
    return word, tensors, metadata
