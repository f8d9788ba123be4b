"""A run opened to draw with it, and `safelight sample`."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from safelight.data.atomic import check_writable
from safelight.errors import UserError
from safelight.kernels.ops.quantized_weight import quantize_layers
from safelight.kernels.unet import patch
from safelight.kernels.unet.attention import apply_attention, attention_cases, choose_attention
from safelight.text import storable
from safelight.trainer.adapters.counting import num_saved_values
from safelight.trainer.adapters.full import has_averages, load_averages
from safelight.trainer.adapters.text_encoders import load_text_encoders
from safelight.trainer.adapters.trained import trained_of
from safelight.trainer.checkpoint.files import (
    CheckpointGone,
    check_files,
    folder_of,
    max_bytes_of,
    noticing_replacement,
    read_record,
)
from safelight.trainer.config.schema import MAX_CHUNKS, Config
from safelight.trainer.config.toml import COMMAND_LINE, explain, load_config, require_run
from safelight.trainer.distributed.together import together
from safelight.trainer.distributed.world import World
from safelight.trainer.inference.gallery import (
    Drawn,
    check_folder,
    file_name,
    read_drawn,
    save_png,
    write_drawn,
    write_page,
)
from safelight.trainer.inference.kept_folders import check_place
from safelight.trainer.inference.pictures import Progress, Request, Weights, draw_pictures, drawn_of, followed, gathered
from safelight.trainer.inference.prompt_words import tag_note, unnamed_note
from safelight.trainer.inference.sampling import SAMPLE_BATCH_SIZE, Settings, check_size, check_spacing, settings_of
from safelight.trainer.inference.unet_graphs import UNetGraphs, unet_graphs
from safelight.trainer.inference.which_checkpoint import pick_step, with_chosen
from safelight.trainer.models.base import Base, base_of, encoder_widths, latent_factor, vae_bytes, vae_config
from safelight.trainer.models.base_record import UNET
from safelight.trainer.models.device import pick_device, pick_dtype
from safelight.trainer.models.embeddings import Embedding, file_hashes, open_embeddings
from safelight.trainer.models.encoders import CaptionEncoder, load_caption_encoder
from safelight.trainer.models.latent_codec import LatentCodec, decode_bytes, load_codec
from safelight.trainer.models.noise_schedule import NoiseSchedule
from safelight.trainer.models.weights import load_texts, load_unet, unet_fingerprint
from safelight.trainer.run_log.environment import AUTOENCODER, BASE, MEMORY_PLAN, recorded, recorded_attention
from safelight.untrusted import check_kinds, check_links

# images that a folder holds before their numbers are no longer counted on
MAX_NUMBER = 10**9
# far beyond what any picture survives
MAX_LORA_SCALE = 10.0
# more prompts at a time than any plan chooses
MAX_BATCH_SIZE = 1024


@dataclass
class OpenRun:
    """The models of a run, each loaded on first use. The dataset is not opened.

    embeddings: words from files that prompts may name. given_words: those of them that were given beside the run's own.
    world: whose processes draw together.

    What a checkpoint's record says is read once: a run that still trains may replace the checkpoint while its UNet, in
    memory, draws.
    """

    run_dir: Path
    config: Config
    base: Base
    device: torch.device
    schedule: NoiseSchedule
    embeddings: tuple[Embedding, ...] = ()
    given_words: tuple[str, ...] = ()
    world: World = World()  # noqa: RUF009  it is frozen
    _recorded_hashes: dict[int, dict[str, str]] = field(default_factory=dict)
    _weights_hashes: dict[Weights, str] = field(default_factory=dict)

    # the encoders stay in host memory and move to the GPU while they are used

    @functools.cached_property
    def codec(self) -> LatentCodec:
        return load_codec(self.config, self.base, torch.device("cpu"), self.device)

    @functools.cached_property
    def encoder(self) -> CaptionEncoder:
        encoder = load_caption_encoder(self.config, self.base, torch.device("cpu"))
        return encoder.knowing((*encoder.embeddings, *self.embeddings))

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype on this device."""
        return pick_dtype(self.config.model.precision, self.device)

    @property
    def weights_file(self) -> str:
        """The file of a checkpoint whose hash identifies it."""
        return self.config.adapter.spec.weights_file

    def unet(self, step: int | None, averaged: bool = True, lora_scale: float = 1.0) -> nn.Module:
        """Return the UNet of a checkpoint, of the base if step is None, on our kernels where training uses them.

        Arguments as in Weights. Raises CheckpointGone.
        """
        format = self.config.adapter.quantized_base
        # quantized from the same values as for training
        unet = load_unet(self.base, self.config.run.seed, torch.float32 if format else self.dtype)
        side = self.config.data.max_resolution // self.codec.factor
        # the backend that the run used if it works on this device, else one that does
        attention = choose_attention(
            self.device, self.dtype, attention_cases(unet, (side, side)), previous=recorded_attention(self.run_dir)
        )
        apply_attention(unet, attention)
        is_patched = patch.should_patch(self.config.train.kernels, self.device)
        if is_patched:
            patch.apply(unet, attention)
        if step is not None:
            folder = folder_of(self.run_dir, step)
            with noticing_replacement(folder):
                self._check_files(step)
                trained = trained_of(unet, self.config)
                trained.load(folder)
                if averaged:
                    load_averages(folder, unet)
                if lora_scale != 1:
                    trained.set_factor(lora_scale)
        unet.eval().requires_grad_(False)
        if format and step is not None:
            quantize_layers(unet, format, self.dtype, self.device)
        unet.to(self.device, self.dtype)
        if is_patched:
            patch.repack(unet)
        return unet

    def graphs(self, unet: nn.Module) -> UNetGraphs | None:
        """Return CUDA graphs of a UNet that `unet` has returned; None where the run's training has none either."""
        has_graphs = self.device.type == "cuda" and self.config.train.cuda_graphs != "off"
        # bitsandbytes may allocate in a stream of its own
        return unet_graphs(unet, self.device) if has_graphs and not self.config.adapter.quantized_base else None

    def _check_files(self, step: int) -> None:
        """Raise UserError if a file of a checkpoint is damaged. Each checkpoint is read once for that."""
        if step not in self._checked:
            max_bytes = max_bytes_of(num_saved_values(self.config, self.base))
            check_files(folder_of(self.run_dir, step), to_resume=False, max_bytes=max_bytes)
            self._checked.add(step)

    @functools.cached_property
    def _checked(self) -> set[int]:
        return set()

    def text_step(self, step: int | None) -> int | None:
        """Return the checkpoint whose text encoder, or trained word, reads the prompts of a checkpoint's pictures.

        step: of the checkpoint that draws, None for the base. None: the base's text encoder, and the word as it was
        before training.
        """
        return step if self.config.reads_captions_in_step else None

    def weights_hash(self, weights: Weights) -> str:
        """Return a hash of the weights of a UNet, and of the text encoder trained with it, 64 hex digits.

        Those of a checkpoint as its record tells them.
        """
        if weights.step is None or not self.config.adapter.spec.changes_unet:
            return self._base_hash
        if weights not in self._weights_hashes:
            recorded_hashes = self.recorded_hashes(weights.step)
            own = f"{self.weights_file.partition('/')[0]}/"
            names = sorted(name for name in recorded_hashes if name.startswith((own, "text_encoder")))
            names += ["state.safetensors"] * (weights.averaged and self.has_averages(weights.step))
            listed = "\n".join(f"{name} {recorded_hashes.get(name)}" for name in names)
            if self.config.adapter.spec.needs_base:
                listed += f"\nbase {self._base_hash} scale {weights.lora_scale}"
            if format := self.config.adapter.quantized_base:
                listed += f"\nbase in {format}"
            self._weights_hashes[weights] = hashlib.sha256(listed.encode()).hexdigest()
        return self._weights_hashes[weights]

    def recorded_hashes(self, step: int) -> dict[str, str]:
        """Return the SHA-256 of each of a checkpoint's files, as its record tells them. Raises as `read_record`."""
        if step not in self._recorded_hashes:
            self._recorded_hashes[step] = read_record(folder_of(self.run_dir, step), to_resume=False)["sha256"]
        return self._recorded_hashes[step]

    def has_averages(self, step: int) -> bool:
        """Return whether a checkpoint has moving averages of its weights. Raises CheckpointGone."""
        folder = folder_of(self.run_dir, step)
        with noticing_replacement(folder):
            return has_averages(folder)

    @functools.cached_property
    def _base_hash(self) -> str:
        return unet_fingerprint(self.base, self.config.run.seed)

    @property
    def base_doubt(self) -> str:
        """What is wrong with the base if its UNet is not the one that the run was started with; '' if nothing is.

        Runs that recorded nothing of their base are not doubted.
        """
        before = (recorded(self.run_dir, BASE) or {}).get(UNET)
        if before in (None, self._base_hash):
            return ""
        return (
            f"the UNet of model.base {self.config.model.base!r} is not the one that the run was started with, so "
            "pictures of the base are another model's; put the first one back"
        )

    def check_writable(self, *names: str) -> None:
        """Raise UserError if nothing can be written into the run's folder, or into those of these names in it."""
        for folder in (self.run_dir, *(self.run_dir / name for name in names)):
            check_writable(
                folder,
                "what is drawn and measured is kept in the run: make its folder writable, or copy it elsewhere",
            )

    def encoder_of(self, text_step: int | None, clip_skip: int) -> CaptionEncoder:
        """Return a text encoder, reading that many layers before the last one. Raises UserError if it has fewer.

        text_step: of the checkpoint that holds it, None for the base's.
        """
        if text_step is None or not self.config.text_encoder.train:
            if text_step is None and clip_skip == self.encoder.clip_skip:
                return self.encoder
            texts = list(zip(self.encoder.tokenizers, self.encoder.text_encoders, strict=True))
        else:
            texts = load_texts(self.base, self.config.model.tokenizer, self.config.run.seed)
            parts = dict(zip(self.base.family.text_encoders, (text_encoder for _, text_encoder in texts), strict=True))
            folder = folder_of(self.run_dir, text_step)
            with noticing_replacement(folder):
                self._check_files(text_step)
                load_text_encoders(folder, parts)
        encoder = CaptionEncoder.of(self.base, texts, self.encoder.device, clip_skip)
        return encoder.knowing(self.embeddings_at(text_step))

    def embeddings_at(self, step: int | None) -> tuple[Embedding, ...]:
        """Return the words that prompts may name: those from files, and the one that the run trains.

        step: of the checkpoint whose pictures are drawn, None for the base: the word as it was before training.
        """
        if step is None or not self.config.trains_word:
            return self.encoder.embeddings
        if step not in self._words:
            # the UNet is not needed to read the word
            trained, folder = trained_of(nn.Module(), self.config), folder_of(self.run_dir, step)
            with noticing_replacement(folder):
                self._check_files(step)
                trained.load(folder)
            self._words[step] = trained.embedding
        return (self._words[step], *self.embeddings)

    @functools.cached_property
    def _words(self) -> dict[int, Embedding]:
        return {}

    def named_embeddings(self, step: int | None, *texts: str) -> dict[str, str]:
        """Return name -> hash of the embeddings that texts name. step: as for `embeddings_at`."""
        return {own.name: own.fingerprint for own in self.embeddings_at(step) if own.is_named(*texts)}

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    def say_cuts(self, prompts: list[str], negative: str, say: Callable[[str], None] | None) -> dict[str, str]:
        """Return prompt -> the end of what is read of it, for those that are cut, after saying so.

        Also says what else the prompts have that does nothing.
        """
        if say is not None and (note := tag_note([*prompts, negative], "a prompt")):
            say(f"note: {note}")
        reader = self.encoder.reading(weights=True, num_chunks=MAX_CHUNKS)
        cuts = reader.cuts([*prompts, negative])
        names = ["the prompt"] if len(prompts) == 1 else [f"prompt {number + 1}" for number in range(len(prompts))]
        named = [(name, cuts[text]) for name, text in zip(names, prompts, strict=True) if text in cuts]
        named += [("the negative prompt", cuts[text]) for text in [negative] if text in cuts]
        if named and say is not None:
            say(f"note: {reader.describe_cuts(named)}")
        return cuts

    def say_unnamed(self, texts: list[str], say: Callable[[str], None] | None) -> None:
        """Say which words of --embedding no text names."""
        given = [one for one in self.embeddings if one.name in self.given_words]
        for own in given if say is not None else ():
            if not own.is_named(*texts):
                say(f"note: {unnamed_note(own.name, texts)}")

    def save(self, image: Image.Image, folder: Path, drawn: Drawn, clip_skip: int, key: str = "") -> None:
        """Write an image with its parameters, as the file that its record names. key: as `save_png`."""
        model, model_hash = Path(self.config.model.base).name, ""
        if drawn.step >= 0:
            model = f"{self.name} step {drawn.step}"
            model_hash = self.recorded_hashes(drawn.step).get(self.weights_file, "")[:10]
        elsewhere = self.base.family.clip_skip_elsewhere(clip_skip)
        words = file_hashes(self.embeddings, drawn.prompt, drawn.negative_prompt)
        save_png(image, folder / drawn.file, drawn.parameters(model, model_hash, elsewhere, words), key)

    def fit_to_memory(self, settings: Settings) -> tuple[torch.device, int]:
        """Return the device to decode on, by the GPU's free memory, and how many prompts to draw at a time, as planned
        for the run."""
        if self.device.type != "cuda":
            return self.device, SAMPLE_BATCH_SIZE
        plan = recorded(self.run_dir, MEMORY_PLAN) or {}
        between = plan.get("between")
        prompts = between.get("prompts") if isinstance(between, dict) else None
        prompts = prompts if type(prompts) is int and 0 < prompts <= MAX_BATCH_SIZE else SAMPLE_BATCH_SIZE
        vae = self.config.model.vae
        weights, config = vae_bytes(self.base, vae), vae_config(self.base, vae)
        needed = decode_bytes(settings.width, settings.height, weights, config)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + cached
        return self.device if needed < free else torch.device("cpu"), prompts


def open_run(
    run_dir: Path,
    embeddings: Sequence[str] = (),
    world: World = World(),  # noqa: B008  it is frozen
) -> OpenRun:
    """Return the models of a run. embeddings: files of more words for prompts, besides those of the run's settings.

    world: whose processes draw together. Raises UserError if the folder is not a run's, or a link in it leads out of
    it, and for a file that is no embedding of the run's base.
    """
    require_run(run_dir)
    # pictures are written into it
    check_links(run_dir)
    check_kinds(run_dir, ("compare", "images"), (), "the run")
    config = load_config(run_dir / "config.toml")
    device = pick_device(config.run.device)
    base = base_of(config.model)
    schedule = base.noise_schedule(config.loss.prediction, config.loss.zero_terminal_snr)
    encoded_in = (recorded(run_dir, AUTOENCODER) or {}).get("precision", "fp32")
    if config.model.vae_precision == "auto" and encoded_in == "fp32":
        # 16 bits were compared with fp32 only where the run encoded its photographs in them
        config.model.vae_precision = "fp32"
    own = open_embeddings(config.sample.embeddings, encoder_widths(base), "sample.embeddings")
    config.sample.negative_prompt = config.negative_text
    given = open_embeddings(embeddings, encoder_widths(base), "--embedding")
    # one that is given again replaces the run's
    names = {one.name.lower() for one in given}
    own = tuple(one for one in own if one.name.lower() not in names)
    return OpenRun(run_dir, config, base, device, schedule, (*own, *given), tuple(one.name for one in given), world)


def sample(
    run: OpenRun,
    prompts: list[str],
    checkpoint: str,
    out: Path,
    changes: dict[str, int | float | str | list[float]],
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    lora_scale: float = 1.0,
) -> list[Path]:
    """Draw prompts with a checkpoint and return the new files, in the folder `out`, or the one file that it names.

    changes: settings of the [sample] table, or seed, that replace the run's. say: called with a message, for example
    where a prompt is cut. lora_scale: see Weights. A folder also gets a page of all its images. Raises UserError if a
    setting is invalid, or `out` may not be written.
    """
    if not prompts:
        raise UserError('there is no prompt to draw; give --prompt "..."')
    check_place(out)
    check_lora_scale(run.config, lora_scale)
    config = run.config.model_copy(deep=True)
    for name, value in changes.items():
        try:
            setattr(config.run if name == "seed" else config.sample, name, value)
        except ValidationError as error:
            raise UserError(*explain(error, COMMAND_LINE)) from None
    is_file = _names_file(out, len(prompts) * len(config.sample.cfgs))
    settings, negative = settings_of(config), config.sample.negative_prompt
    # before anything is loaded
    pick_step(run.run_dir, checkpoint)
    check_size(settings, latent_factor(vae_config(run.base, config.model.vae)))
    check_spacing(settings.spacing, run.schedule.zero_terminal_snr)
    folder = out.parent if is_file else out
    check_writable(folder, "name another place with -o")
    if not is_file:
        check_folder(folder)
    earlier = [] if is_file else read_drawn(folder)
    prompts = list(map(storable, prompts))
    run.say_unnamed([*prompts, negative], say)
    cuts = run.say_cuts(prompts, negative, say)

    def draw(step: int | None) -> tuple[int | None, list[Request], dict[int, Image.Image]]:
        requests = [
            Request(
                Weights(step, lora_scale=lora_scale),
                prompt,
                place,
                replace(settings, cfg=cfg),
                negative,
                config.model.clip_skip,
            )
            for place, prompt in enumerate(prompts)
            for cfg in config.sample.cfgs
        ]
        if step is not None:
            # written into the images, and read before they are drawn
            run.recorded_hashes(step)
        with together(run.world, CheckpointGone) as others:
            images = dict(draw_pictures(run, requests, progress=followed(others, progress), say=say))
        return step, requests, gathered(run.world, requests, images)

    step, requests, images = with_chosen(lambda: run.world.from_main(pick_step(run.run_dir, checkpoint)), draw, say)
    stem = f"{'base' if step is None else f'step{step}'}-seed{settings.seed}"
    first = next_number(folder, stem, len(requests))
    names = [out.name] if is_file else [file_name(stem, n, one.prompt) for n, one in enumerate(requests, first)]
    drawn = [
        drawn_of(name, request, cuts.get(request.prompt, "")) for name, request in zip(names, requests, strict=True)
    ]
    for number, record in enumerate(drawn if run.world.is_main else ()):
        run.save(images[number], folder, record, config.model.clip_skip)
    if run.world.is_main and not is_file:
        write_drawn(folder, [*earlier, *drawn])
        write_page(folder, f"{run.name}: samples", [*earlier, *drawn])
    return [folder / name for name in names]


def check_lora_scale(config: Config, scale: float, option: str = "--lora-scale") -> None:
    """Raise UserError for a scale of the adapter that is out of bounds, or in a run that has none."""
    if scale != 1 and not config.adapter.spec.is_scalable:
        raise UserError(f"{option}: this run trains no LoRA; leave this out")
    if not -MAX_LORA_SCALE <= scale <= MAX_LORA_SCALE:
        raise UserError(f"{option} {scale:g} is not from {-MAX_LORA_SCALE:g} to {MAX_LORA_SCALE:g}; 1 is as trained")


def _names_file(out: Path, num_images: int) -> bool:
    """Return whether `out` names an image. Raises UserError if it cannot be written, or there are several images."""
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        raise UserError(f"{out}: images are saved as .png, with their prompts inside; name a .png file, or a folder")
    if out.suffix.lower() != ".png" or out.is_dir():
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file; name a folder for the images, or one image NAME.png")
        return False
    if num_images > 1:
        raise UserError(f"{out} is one image, and there are {num_images} to draw; name a folder with -o")
    if out.exists():
        raise UserError(f"{out} already exists; name another image, or a folder, with -o")
    return True


def next_number(folder: Path, stem: str, num: int) -> int:
    """Return the first of `num` numbers after those of earlier images, which may be of other prompts.

    Far larger ones, which are not ours, are only avoided: the number after them could be too long for a name.
    """
    matches = (re.fullmatch(rf"{re.escape(stem)}-([0-9]{{3,}})(-.*)?\.png", path.name) for path in folder.iterdir())
    numbers = {int(match[1]) for match in matches if match}
    first = 1 + max((number for number in numbers if number < MAX_NUMBER), default=-1)
    while taken := numbers.intersection(range(first, first + num)):
        first = 1 + max(taken)
    return first
