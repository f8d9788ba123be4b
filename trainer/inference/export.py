"""`safelight export`: writes a run's model as a diffusers folder, or as one file for A1111 and ComfyUI.

The UNet's weights come from the checkpoint: the moving average if there is one, else the fp32 master if there is one.
So does the text encoder if the run trains it. The frozen parts are the run's. Either output is written under a
temporary name, and then renamed.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from safelight.data.atomic import atomic_write_text, remove, sync_folder
from safelight.data.lock import NoLocks, lock_file, unlock_file
from safelight.errors import UserError
from safelight.text import printable, size, storable
from safelight.trainer.adapters.counting import num_saved_values
from safelight.trainer.adapters.text_encoders import load_text_encoders
from safelight.trainer.adapters.trained import trained_of
from safelight.trainer.checkpoint.files import check_files, folder_of, max_bytes_of, noticing_replacement
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import load_config, require_run
from safelight.trainer.families.family import Family, tokenizer_folder
from safelight.trainer.families.original_layout import (
    to_original,
    unet_layout,
    vae_layout,
)
from safelight.trainer.families.registry import FAMILIES
from safelight.trainer.inference.draw import check_lora_scale
from safelight.trainer.inference.kept_folders import check_place
from safelight.trainer.inference.model_card import CARD_NAME, SAMPLES_NAME, CardFacts, write_card
from safelight.trainer.inference.modelspec import CUSTOM, modelspec, sign
from safelight.trainer.inference.which_checkpoint import pick_step, with_chosen
from safelight.trainer.models.base import PICKLES, Base, base_of
from safelight.trainer.models.device import DTYPES
from safelight.trainer.models.embeddings import FOLDER_FILES, NEGATIVE, file_tensors
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.models.single_file import ZERO_SNR_MARKER, schedule_markers
from safelight.trainer.models.tensor_files import is_finite, save_file
from safelight.trainer.models.weights import load_texts, load_unet, load_vae, meta_unet
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.run_log.course import doubt_about
from safelight.untrusted import check_links

# free space to leave: file systems become slow or fail before they are full
SPARE_BYTES = 64 << 20
# what a diffusers folder of ours consists of
_TEXT_ENCODERS = {part for family in FAMILIES.values() for part in family.text_encoders}
_TOKENIZERS = {tokenizer_folder(part) for part in _TEXT_ENCODERS}
_MODEL_FOLDER = "diffusers folder", "model_index.json"
_WRITTEN = {"model_index.json", "unet", "vae", "scheduler", *_TEXT_ENCODERS, *_TOKENIZERS, CARD_NAME, SAMPLES_NAME}


@dataclass
class Exported:
    """What was written. notes: what the user of the export should know, a line each. dtype: of the weights.

    is_word: whether it is the vectors of a word, and no model. layout: of a LoRA's own file, diffusers or kohya, '' for
    anything else. card_files: the model card and its samples, if they are beside a single file.
    """

    path: Path
    step: int
    num_bytes: int
    notes: list[str] = field(default_factory=list)
    dtype: str = "fp16"
    is_word: bool = False
    layout: str = ""
    card_files: list[Path] = field(default_factory=list)


@dataclass
class _Source:
    """A run's model, whose parts are loaded on request. schedule: what the UNet was trained under.

    weights: auto (the moving average if there is one), ema, or trained (those of the last step). lora_scale: what an
    adapter is multiplied by before it is merged.
    """

    config: Config
    base: Base
    checkpoint: Path
    step: int
    schedule: NoiseSchedule
    dtype: torch.dtype
    weights: str
    lora_scale: float = 1.0

    def unet(self) -> nn.Module:
        """Return the trained UNet in the dtype asked for. Its memory is allocated one tensor at a time."""
        unet = meta_unet(self.base)
        shapes = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
        convert = partial(_cast, dtype=self.dtype, source=f"{self.checkpoint}: ")
        needs_base = self.config.adapter.spec.needs_base
        trained = trained_of(load_unet(self.base, self.config.run.seed) if needs_base else unet, self.config)
        if self.lora_scale != 1:
            trained.set_factor(self.lora_scale)
        unet.load_state_dict(trained.merged(self.checkpoint, shapes, self.weights, convert), assign=True)
        return unet

    def vae(self) -> nn.Module:
        return load_vae(self.base, self.config.model.vae, self.config.run.seed)

    def texts(self) -> list[tuple[object, nn.Module]]:
        """Return tokenizers and text encoders: the checkpoint's if the run trains them, else the base's."""
        texts = load_texts(self.base, self.config.model.tokenizer, self.config.run.seed)
        if self.config.text_encoder.train:
            parts = dict(zip(self.base.family.text_encoders, (text_encoder for _, text_encoder in texts), strict=True))
            load_text_encoders(self.checkpoint, parts)
        return texts


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, source: str = "") -> Tensor:
    """Return a tensor in dtype. source: begins the message. Raises UserError if a value is not finite in dtype."""
    cast = tensor.to(dtype).contiguous()
    if not is_finite(cast):
        if not is_finite(tensor):
            raise UserError(
                f"{source}{name} has values that are not finite: the training has diverged, and the model would draw "
                "nothing but grey; export an earlier checkpoint with --checkpoint"
            )
        raise UserError(
            f"{name} has values up to {tensor.abs().max():.3g}, above fp16's limit of 65504; use --dtype bf16"
        )
    return cast


def _cast_all(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a module's floating-point tensors in dtype, and its integer tensors unchanged."""
    return {k: _cast(k, t, dtype) if t.is_floating_point() else t for k, t in module.state_dict().items()}


def export(
    run_dir: Path,
    out: Path,
    checkpoint: str = "last",
    dtype: str = "",
    title: str = "",
    force: bool = False,
    weights: str = "auto",
    merge: bool = False,
    layout: str = "diffusers",
    lora_scale: float = 1.0,
    card: bool = False,
) -> Exported:
    """Write a run's model to `out`: one file if the name ends in .safetensors, a diffusers folder otherwise.

    Of a run that trained a word, its vectors alone: a file that A1111, Forge, ComfyUI and diffusers read, or a folder
    with those that diffusers' load_textual_inversion does. Of a run that trained a LoRA, the LoRA's own file, or with
    merge the whole model with it merged.

    checkpoint: last, best or a step. dtype: fp32 | fp16 | bf16, '' for fp16, or fp32 for a word. title: '' for the
    run's name and step.
    force: replace an earlier export. weights: auto (the moving average if there is one), ema or trained. layout: names
    in a LoRA's file, diffusers or kohya. lora_scale: what a LoRA is multiplied by before it is merged. card: write a
    model card beside a single file, too; a folder always has one.
    Raises UserError if the run cannot be exported or `out` may not be written.
    """
    require_run(run_dir)
    check_links(run_dir)
    config = load_config(run_dir / "config.toml")
    is_file = _check_output(out, force, is_word=config.trains_word)
    dtype = dtype or ("fp32" if config.trains_word else "fp16")
    if config.trains_word and weights == "ema":
        raise UserError("--weights ema: a run that trains an embedding has no moving average; leave it out")
    _check_not_needed(out, run_dir, config)
    _check_options(config, is_file, merge, layout, lora_scale)
    is_adapter_file = bool(config.adapter.spec.file_writer) and not merge
    base = base_of(config.model)
    card_places = _card_places(out) if card and is_file else None
    if card_places is not None and not force:
        for place in card_places:
            if os.path.lexists(place):
                raise UserError(f"{place}, where the model card goes, already exists; add --force")
    max_bytes = max_bytes_of(num_saved_values(config, base))
    schedule = base.noise_schedule(config.loss.prediction, config.loss.zero_terminal_snr)

    def write(step: int) -> tuple[int, list[str], int]:
        """Write the model of a step's checkpoint; return the step, notes, and the bytes that were written."""
        folder = folder_of(run_dir, step)
        with noticing_replacement(folder):
            check_files(folder, to_resume=False, max_bytes=max_bytes)
            source = _Source(config, base, folder, step, schedule, DTYPES[dtype], weights, lora_scale)
            describe = partial(_write_card, source, run_dir, out, title, [], is_adapter_file)
            if config.trains_word:
                notes = _export_word(source, out, is_file, title or f"{run_dir.resolve().name} step {step}", describe)
            elif is_adapter_file:
                notes = _export_adapter(source, out, layout, title or f"{run_dir.resolve().name} step {step}")
            elif is_file:
                notes = _export_file(source, out, title or f"{run_dir.resolve().name} step {step}")
            else:
                notes = _export_folder(source, out, describe)
        files = [out] if is_file else [path for path in out.rglob("*") if path.is_file()]
        return step, notes, sum(path.stat().st_size for path in files)

    # before anything is written
    pick_step(run_dir, checkpoint, allow_base=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        step, notes, num_bytes = with_chosen(lambda: pick_step(run_dir, checkpoint, allow_base=False), write)
    if doubt := doubt_about(run_dir, step):
        notes.append(doubt)
    if config.train.ema_decay > 0 or OPTIMIZERS[config.optimizer.name].averages_weights:
        averages = "the moving average" if config.train.ema_decay > 0 else f"{config.optimizer.name}'s average"
        which = "the weights of the last step" if weights == "trained" else f"{averages} of the weights"
        notes.append(f"exported {which}")
    if config.text_encoder.train:
        notes.append(f"exported the text encoder as trained{_averaged_or_not(config, weights)}")
    if skip := config.model.clip_skip:
        notes.append(_clip_skip_note(base.family, skip))
    layout = layout if is_adapter_file else ""
    done = Exported(out, step, num_bytes, notes, dtype, config.trains_word, layout)
    if card_places is not None:
        described = _Source(config, base, folder_of(run_dir, step), step, schedule, DTYPES[dtype], weights)
        done.card_files = _write_card(described, run_dir, out, title, notes, is_adapter_file, *card_places)
    return done


def _check_options(config: Config, is_file: bool, merge: bool, layout: str, lora_scale: float) -> None:
    """Raise UserError for options of adapters that have no effect on what is exported."""
    has_file = bool(config.adapter.spec.file_writer)
    if not has_file and (merge or layout != "diffusers"):
        given = "--merge" if merge else f"--layout {layout}"
        raise UserError(f"this run trained no LoRA, so there is no file of it: leave out {given}")
    if merge and layout != "diffusers":
        raise UserError(f"--layout {layout} is for the LoRA's own file, which --merge does not write; leave one out")
    if has_file and not merge and not is_file:
        raise UserError(
            "the LoRA of this run is one file: name a .safetensors file with -o, or add --merge for the whole model"
        )
    check_lora_scale(config, lora_scale)
    if lora_scale != 1 and not merge:
        raise UserError(
            f"--lora-scale {lora_scale:g} is for --merge: of the LoRA's own file, the program that draws sets it"
        )


def _card_places(out: Path) -> tuple[Path, Path]:
    """Return (model card, folder of its samples) beside a single file."""
    return out.with_suffix(".md"), out.with_name(f"{out.stem}-samples")


def _write_card(
    source: _Source,
    run_dir: Path,
    out: Path,
    title: str,
    notes: list[str],
    is_adapter: bool,
    card: Path,
    samples: Path | None = None,
) -> list[Path]:
    """Write the model card and its samples, and return the files. card: the card, or the folder that it goes into."""
    if samples is None:
        card, samples = card / CARD_NAME, card / SAMPLES_NAME
    elif samples.is_dir():
        # of an earlier export
        for path in samples.glob("[0-9][0-9].png"):
            path.unlink()
    facts = CardFacts(
        run_dir,
        source.config,
        source.base,
        source.step,
        storable(title or f"{run_dir.resolve().name} step {source.step}"),
        out.name,
        next(name for name, dtype in DTYPES.items() if dtype == source.dtype),
        card.name != CARD_NAME,
        tuple(notes),
        is_adapter,
    )
    names = write_card(facts, card, samples)
    return [card, *(samples.parent / name for name in names)]


def _clip_skip_note(family: Family, clip_skip: int) -> str:
    """Return what to set in other programs. Source: sd_hijack_clip.py and sd_hijack_open_clip.py of A1111."""
    counted = f"Clip skip {family.clip_skip_elsewhere(clip_skip)}"
    webui = f"{counted} in A1111" if family.heeds_clip_skip else f"{counted} in Forge"
    ignored = "" if family.heeds_clip_skip else f"; A1111 ignores it for {family.title} and draws as without"
    return f"trained with clip_skip {clip_skip}: use clip_skip={clip_skip} in diffusers, {webui}{ignored}"


def _averaged_or_not(config: Config, weights: str) -> str:
    is_averaged = config.train.ema_decay > 0 and weights != "trained"
    return "; of its weights there is no moving average" if is_averaged else ""


def _check_output(out: Path, force: bool, is_word: bool = False) -> bool:
    """Return whether `out` is to be one file. Raises UserError if it may not be written or replaced.

    is_word: whether the vectors of a word are written, and no model.
    """
    written = {*FOLDER_FILES.values(), CARD_NAME, SAMPLES_NAME} if is_word else _WRITTEN
    kind, mark = ("folder of an embedding", FOLDER_FILES["text_encoder"]) if is_word else _MODEL_FOLDER
    suffix = out.suffix.lower()
    if suffix in PICKLES:
        raise UserError(f"{out}: {suffix} files cannot be written; name a .safetensors file, or a folder")
    check_place(out)
    is_file = suffix == ".safetensors"
    if os.path.islink(out) and not out.exists():
        raise UserError(f"{out} is a link to {os.path.realpath(out)}, which does not exist; delete it, or name another")
    if out.exists():
        if not force:
            raise UserError(f"{out} already exists; name another with -o, or add --force")
        if is_file != out.is_file():
            raise UserError(f"{out} is a {'file' if out.is_file() else 'folder'}; name another with -o")
        if not is_file and any(out.iterdir()) and not (out / mark).is_file():
            raise UserError(f"{out} is not a {kind}, and --force replaces only those; name another with -o")
        if not is_file and (others := sorted({path.name for path in out.iterdir()} - written)):
            raise UserError(
                f"{out} contains {printable(others[0])}, which no export writes, and --force would delete it; move it "
                "away, or name another folder with -o"
            )
    return is_file


def _check_not_needed(out: Path, run_dir: Path, config: Config) -> None:
    """Raise UserError if writing `out` would replace the run, its dataset, or a model that the run is made of."""
    model = config.model
    needed = {
        "the run": run_dir,
        "the run's dataset": config.data.path,
        "model.base, which the run compares with": model.base,
        "model.vae": model.vae,
        "model.config": model.config,
        "model.tokenizer": model.tokenizer,
    }
    place = Path(os.path.realpath(out))
    for name, path in needed.items():
        # a hub id or a name such as tiny is no path that exists
        if path and os.path.lexists(path):
            real = Path(os.path.realpath(path))
            # new files may lie in the run's folder, but none of a model's own is replaced
            is_inside = real in place.parents and out.exists() and path not in (run_dir, config.data.path)
            if place == real or place in real.parents or is_inside:
                what = f"is {name}" if place == real else f"is in {name}" if is_inside else f"contains {name}"
                raise UserError(f"{out} {what}, which the export would replace; name another place with -o")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other exports away from a name: their temporary files have the same one. Raises UserError."""
    path = out.with_name(f".{out.name}.lock")
    try:
        file = lock_file(path)
    except NoLocks:
        yield
        return
    if file is None:
        raise UserError(f"another export to {out} is running; wait for it, or name another place with -o")
    try:
        yield
    finally:
        unlock_file(file, path)


def _check_free_space(out: Path, num_bytes: int, dtype: torch.dtype) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes + SPARE_BYTES:
        raise UserError(
            f"{out} takes {size(num_bytes)}, and {size(SPARE_BYTES)} must stay free, but {out.parent} has {size(free)} "
            f"free; free some space, or name another place with -o"
            f"{', or use --dtype fp16' if dtype.itemsize > 2 else ''}"
        )


# one file


def original_frozen(
    family: Family, vae: dict[str, Tensor], text_encoders: Mapping[str, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors of an AutoencoderKL and the text encoders under the names of a single file.

    text_encoders: by folder, as in family.text_encoders.
    """
    original = to_original(vae, vae_layout(vae))
    for part, state in text_encoders.items():
        num_tokens = next(len(t) for name, t in state.items() if name.endswith("position_embedding.weight"))
        original |= to_original(state, family.text_encoder_layout(part, state))
        original |= family.text_encoder_extras(part, num_tokens)
    return original


def _export_file(source: _Source, out: Path, title: str) -> list[str]:
    notes, title = [], storable(title)
    unet = source.unet()
    weights = unet.state_dict()
    tensors = to_original(weights, unet_layout(weights, unet.config.layers_per_block))
    vae = source.vae()
    if hasattr(vae, "quant_conv"):
        family = source.base.family
        states = [_cast_all(text_encoder, source.dtype) for _, text_encoder in source.texts()]
        text_encoders = dict(zip(family.text_encoders, states, strict=True))
        tensors |= original_frozen(family, _cast_all(vae, source.dtype), text_encoders)
    else:
        notes.append(
            f"the run's autoencoder is a {type(vae).__name__}, which single files cannot contain: {out.name} contains "
            "only the UNet"
        )
    base = source.base
    description = f"{Path(base.spec).name} ({base.family.title}) fine-tuned with Safelight, {source.step} steps"
    schedule = source.schedule
    # the specification has no field for it
    hint = "zero terminal SNR: rescale the noise schedule" if schedule.zero_terminal_snr else ""
    metadata = modelspec(
        unet.config, schedule.prediction_type, source.config.data.max_resolution, title, description, hint
    )
    tensors |= {name: torch.empty(0, dtype=source.dtype) for name in schedule_markers(schedule)}
    if metadata["modelspec.architecture"] == CUSTOM:
        notes.append(
            "this UNet has a size that A1111 and ComfyUI do not support; diffusers reads the file with config=FOLDER"
        )
    elif source.base.family.assumed_prediction not in ("", schedule.prediction_type):
        notes.append(
            "A1111 and ComfyUI assume that SD 1.x files predict epsilon, but this one predicts v: A1111 needs a .yaml "
            "next to it, ComfyUI the node ModelSamplingDiscrete"
        )
    if schedule.zero_terminal_snr:
        notes.append(
            f"trained with zero terminal SNR, which the file says by a tensor named {ZERO_SNR_MARKER}: A1111, Forge "
            "and `safelight train` heed it; in ComfyUI turn on zsnr in the node ModelSamplingDiscrete, in diffusers "
            "set rescale_betas_zero_snr"
        )
    _check_free_space(out, sum(tensor.nbytes for tensor in tensors.values()), source.dtype)
    _replace_file(out, tensors, metadata)
    return notes


def _export_adapter(source: _Source, out: Path, layout: str, title: str) -> list[str]:
    """Write a checkpoint's adapter as a file of its own. layout: of its names, diffusers or kohya. Return notes."""
    config, base = source.config, source.base
    unet = meta_unet(base)
    module, _, name = config.adapter.spec.file_writer.partition(":")
    writer = getattr(importlib.import_module(module), name)(trained_of(unet, config), config, base)
    origin = f"{source.checkpoint}: "
    values = writer.tensors(source.checkpoint, source.weights, layout)
    tensors = {name: _cast(name, tensor, source.dtype, origin) for name, tensor in values.items()}
    description = f"LoRA for {Path(base.spec).name} ({base.family.title}) trained with Safelight, {source.step} steps"
    metadata = modelspec(
        unet.config, source.schedule.prediction_type, config.data.max_resolution, storable(title), description
    )
    metadata["modelspec.architecture"] += "/lora"
    _check_free_space(out, sum(tensor.nbytes for tensor in tensors.values()), source.dtype)
    _replace_file(out, tensors, {**metadata, **writer.metadata(layout, source.step)})
    return []


def _replace_file(out: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a signed .safetensors file, whole or not at all, in the place of an earlier one."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        # what a killed export left, or a link that somebody planted there
        remove(partial)
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata)
        # safetensors creates files that only their owner may read
        partial.chmod(mode)
        sign(partial)
        os.replace(partial, out)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(partial)
        raise
    sync_folder(out.parent)


# a word


def _export_word(
    source: _Source, out: Path, is_file: bool, title: str, describe: Callable[[Path], object]
) -> list[str]:
    """Write the vectors of the word that a run trained and return notes. describe: as for `_export_folder`."""
    trained = trained_of(nn.Module(), source.config)
    trained.load(source.checkpoint)
    word, family = trained.embedding, source.base.family
    cast = {name: _cast(name, x, source.dtype) for name, x in file_tensors(word).items()}
    metadata = modelspec(
        source.base.config_of("unet"),
        source.schedule.prediction_type,
        source.config.data.max_resolution,
        storable(title),
        f"the word {word.name} for {Path(source.base.spec).name} ({family.title}), trained with Safelight, "
        f"{source.step} steps",
        "for negative prompts" if word.is_negative else "",
    )
    # as kohya's training writes it
    metadata["modelspec.architecture"] += "/textual-inversion"
    metadata |= {"modelspec.trigger_phrase": word.name, **({NEGATIVE: "true"} if word.is_negative else {})}
    _check_free_space(out, sum(x.nbytes for x in cast.values()), source.dtype)
    where = "negative prompt" if word.is_negative else "prompt"
    if is_file:
        _replace_file(out, cast, metadata)
        called = [f"A1111, Forge and ComfyUI know it by the name of the file: write {out.stem} into the {where}"]
    else:

        def write(partial: Path) -> None:
            for part, tensor in zip(word.vectors, cast.values(), strict=True):
                save_file({word.name: tensor}, partial / FOLDER_FILES[part], metadata)
            describe(partial)

        _replace_folder(out, write)
        called = [f"write {word.name} into the {where}"]
    return called


# a folder


def _scheduler(source: _Source):
    """Return the base's scheduler with the prediction type and the terminal SNR that were trained.

    It is a DDIMScheduler if the base's cannot have zero terminal SNR. Raises UserError if its config is not valid.
    """
    import diffusers

    # Stable Diffusion's values for what a config leaves out; diffusers' defaults differ
    defaults = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    own = source.base.config_of("scheduler")
    config = {**defaults, **own, "prediction_type": source.schedule.prediction_type}
    kind = getattr(diffusers, config.get("_class_name", "DDIMScheduler"), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UserError(f"{source.base.spec}: its scheduler is {own['_class_name']!r}, which diffusers does not have")
    if source.schedule.zero_terminal_snr:
        # Lin et al. 2023: sampling must start at the last timestep
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if "rescale_betas_zero_snr" not in inspect.signature(kind).parameters:
            kind = diffusers.DDIMScheduler
    try:
        return kind.from_config(config)
    # values that only this scheduler reads
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{source.base.spec}: its scheduler's config is not valid ({reason}); correct it") from error


def _load_in_fp32(config_path: Path) -> None:
    """Make fp32 the dtype that the text encoder is loaded in by default, which diffusers uses for all other parts.

    transformers 5 defaults to the stored dtype, so a pipeline opened without a dtype would mix the two and fail.
    """
    config = json.loads(config_path.read_text(encoding="utf-8"))
    name = "dtype" if "dtype" in config else "torch_dtype"
    atomic_write_text(config_path, json.dumps({**config, name: "float32"}, indent=2) + "\n")


def _export_folder(source: _Source, out: Path, describe: Callable[[Path], object]) -> list[str]:
    """Write the model as a diffusers folder and return notes.

    describe: called with the new folder before it gets its name, to write the card.
    """
    unet = source.unet()
    vae, texts = source.vae(), source.texts()
    frozen = [vae, *(text_encoder for _, text_encoder in texts)]
    for module in frozen:
        module.load_state_dict(_cast_all(module, source.dtype), assign=True)
    modules = (unet, *frozen)
    _check_free_space(out, sum(t.nbytes for module in modules for t in module.state_dict().values()), source.dtype)
    base = source.base
    pipeline = base.family.pipeline_of(unet, vae, _scheduler(source), texts, zeroes_empty_text=base.zeroes_empty_text)

    def write(partial: Path) -> None:
        pipeline.save_pretrained(partial, safe_serialization=True)
        for folder in base.family.text_encoders:
            _load_in_fp32(partial / folder / "config.json")
        describe(partial)

    _replace_folder(out, write)
    return []


def _replace_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, whole or not at all, in the place of an earlier one. write: writes into an empty folder."""
    partial, old = (out.with_name(f".{out.name}.{word}") for word in ("partial", "old"))
    # what a killed export left, or a link that somebody planted there
    remove(partial)
    partial.mkdir()
    try:
        write(partial)
        mode = partial.stat().st_mode & 0o666
        for path in sorted(partial.rglob("*"), reverse=True):
            if path.is_dir():
                sync_folder(path)
            else:
                path.chmod(mode)
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(partial)
        if out.exists():
            remove(old)
            out.rename(old)
        partial.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        with contextlib.suppress(OSError):
            remove(partial)
        raise
    sync_folder(out.parent)
    with contextlib.suppress(OSError):
        remove(old)
