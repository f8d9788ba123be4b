"""Captioners: transformers' models that describe a picture, loaded by what their own config says they are.

`load_captioner(spec, device)` returns a `Captioner`; its `caption` turns pictures into texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn

from safelight.errors import UserError, first_line
from safelight.text import collapse
from safelight.trainer.captioning.keyed_sampling import KeyedNucleus
from safelight.trainer.captioning.model_files import ModelFiles, opened
from safelight.trainer.captioning.options import Generation
from safelight.trainer.captioning.processors import load_processor
from safelight.trainer.captioning.prompts import tried
from safelight.trainer.models.build import build
from safelight.trainer.models.device import pick_dtype
from safelight.trainer.models.model_folder import bad_weights

# what each kind is asked if the user asks nothing else; others get USUAL_PROMPT
USUAL_PROMPT = "Describe this photograph in one sentence."
# BLIP describes without being asked; Florence-2 knows tasks by such tokens; PaliGemma a command and a language
USUAL_PROMPTS = {"blip": "", "blip-2": "", "git": "", "florence2": "<DETAILED_CAPTION>", "paligemma": "caption en"}
# kinds that read other things than photographs, or whose generation takes no options
NOT_CAPTIONERS = {"pi0", "udop", "evolla", "shieldgemma2", "diffusion_gemma", "instructblipvideo"}
# what to do if a model fails
HINT = "get this model again, or use another one"


@dataclass(frozen=True)
class Described:
    """What a captioner said of one picture. num_tokens: of the generated ones, without the end mark and padding."""

    text: str
    num_tokens: int


@dataclass
class Captioner:
    """A model that describes pictures, with its processor.

    name: the folder or hub id. kind: `model_type` of its config. dtype: of its inputs, and of its weights but those
    that a kind keeps in fp32. fingerprint: SHA-256 of its weights and settings. hint: what to do if it fails.
    """

    name: str
    kind: str
    model: nn.Module
    processor: object
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    hint: str = HINT
    # what is made of prompts
    _texts: dict[str, str] = field(default_factory=dict)

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    def caption(
        self, images: Sequence[Image.Image], generation: Generation, sample_ids: Sequence[int] = ()
    ) -> list[str]:
        """Return a text for each picture. sample_ids: the photos' ids, which key the draws if tokens are sampled."""
        return [described.text for described in self.describe(images, generation, sample_ids)]

    def describe(
        self, images: Sequence[Image.Image], generation: Generation, sample_ids: Sequence[int] = ()
    ) -> list[Described]:
        """Return what is generated for each picture, in one batch.

        Raises torch.OutOfMemoryError if it is too large, UserError if the model's files make it fail.
        """
        with blamed_on(self.name, "it cannot describe a picture", self.hint):
            return self._describe(images, generation, sample_ids)

    @torch.inference_mode()
    def _describe(
        self, images: Sequence[Image.Image], generation: Generation, sample_ids: Sequence[int]
    ) -> list[Described]:
        images = [image.convert("RGB") for image in images]
        inputs = self._inputs(images, generation.prompt or USUAL_PROMPTS.get(self.kind, USUAL_PROMPT))
        processors = []
        if generation.samples:
            processors = [KeyedNucleus(generation.top_p, generation.seed, sample_ids or range(len(images)))]
        ids = self.model.generate(
            **inputs,
            num_beams=generation.num_beams,
            # the draws are those of KeyedNucleus
            do_sample=False,
            min_new_tokens=generation.min_new_tokens or None,
            max_new_tokens=generation.max_new_tokens,
            repetition_penalty=generation.repetition_penalty,
            logits_processor=processors,
        )
        return [self._described(row) for row in self._generated(ids, inputs.get("input_ids")).tolist()]

    def _inputs(self, images: list[Image.Image], prompt: str) -> dict[str, Tensor]:
        """Return the model's inputs on its device, padded to the left, where generation goes on at the right."""
        processor, has_template = self.processor, self._template is not None
        if self.kind in ("blip", "git") and not prompt:
            inputs = processor(images=images, return_tensors="pt")
        else:
            if prompt not in self._texts:
                (self._texts[prompt],) = tried(self.tokenizer, [self._marked(prompt)], self._template)
            inputs = processor(
                images=[[image] for image in images] if has_template else images,
                text=[self._texts[prompt]] * len(images),
                padding=True,
                return_tensors="pt",
            )
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    @property
    def _template(self) -> str | dict | None:
        """The chat template, if this kind is asked by one."""
        is_chat = self.kind not in ("blip", "blip-2", "florence2")
        return getattr(self.processor, "chat_template", None) or None if is_chat else None

    def _marked(self, prompt: str) -> str:
        """Return a prompt with the mark for the photograph, where neither a template nor the processor adds it."""
        token = getattr(self.processor, "image_token", None)
        adds = self.kind in ("blip", "blip-2", "git", "florence2", "paligemma", "instructblip")
        if adds or self._template is not None or not token or str(token) in prompt:
            return prompt
        return f"{token}\n{prompt}"

    def _generated(self, ids: Tensor, prompt_ids: Tensor | None) -> Tensor:
        """Return the tokens behind the prompt, which decoders repeat and encoder-decoders do not."""
        if prompt_ids is None:
            return ids
        # BLIP replaces the first token by its start and leaves out the last
        skipped = prompt_ids.shape[1] - 1 if self.kind == "blip" else prompt_ids.shape[1]
        starts = 1 if self.kind == "blip" else 0
        is_repeated = ids.shape[1] >= skipped and torch.equal(
            ids[:, starts:skipped], prompt_ids[:, starts:skipped].to(ids.device)
        )
        return ids[:, skipped:] if is_repeated else ids

    def _described(self, ids: list[int]) -> Described:
        special = set(self.tokenizer.all_special_ids)
        kept = [token for token in ids if token not in special and token >= 0]
        # half a character, where generation ended within one
        text = self.tokenizer.decode(kept, skip_special_tokens=True).replace("\ufffd", "")
        return Described(collapse(text), len(kept))


@dataclass(frozen=True)
class CaptionerSource:
    """A captioner's files, before the model is built from them. fingerprint: SHA-256 of its weights and settings."""

    name: str
    fingerprint: str
    _files: ModelFiles
    _tensors: dict[str, Tensor]

    def build(self, device: torch.device, generation: Generation) -> Captioner:
        """Return the captioner on a device, in fp32 on a CPU and 16 bits on a GPU.

        It has described a grey picture as it is going to describe photos. Raises UserError if its files do not make a
        model that can.
        """
        try:
            with blamed_on(self.name, "it cannot be loaded", _hint(self._files)):
                captioner = _load(self, self._files, self._tensors, device)
            captioner.describe([Image.new("RGB", (64, 64), "grey")], generation)
        except torch.OutOfMemoryError:
            raise UserError(
                f"--model {self.name!r} does not fit the GPU's memory; close other programs, choose a smaller model, "
                "lower --num-beams and --max-new-tokens, or add --device cpu"
            ) from None
        return captioner


@contextmanager
def blamed_on(name: str, what: str, hint: str = HINT) -> Iterator[None]:
    """Raise whatever a model raises as a UserError of one line, which names the model and what it cannot do.

    Its files come from anybody: sizes that it was not made for, settings of another kind, a prompt without the mark for
    the picture. torch.OutOfMemoryError is left as it is.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # tokenizers' panics are no Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{name}: {what} ({first_line(error)}); {hint}") from error


def _hint(files: ModelFiles) -> str:
    # Microsoft's repositories hold a model that transformers cannot build without the code beside it
    is_old = files.config.get("model_type") == "florence2" and "davit" in str(files.config.get("vision_config"))
    return "use florence-community/Florence-2-base" if is_old else HINT


@contextmanager
def open_captioner(spec: str) -> Iterator[CaptionerSource]:
    """Yield the source of the captioner in a local folder or a hub repository, which is downloaded if need be.

    Raises UserError if it is missing, no model that describes pictures, damaged, or would run code of its own.
    """
    with opened(spec) as files:
        _kind_of(spec, files)
        tensors, fingerprint = files.read_weights()
        yield CaptionerSource(spec, fingerprint, files, tensors)


def load_captioner(spec: str, device: torch.device) -> Captioner:
    """Return the captioner in a local folder or a hub repository, on a device. Raises UserError."""
    with open_captioner(spec) as source:
        return source.build(device, Generation(num_beams=1, max_new_tokens=1))


def _kind_of(spec: str, files: ModelFiles) -> str:
    """Return `model_type` of a config. Raises UserError if transformers has no such model that describes pictures."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    kind = files.config.get("model_type")
    if not isinstance(kind, str) or kind not in NAMES or kind in NOT_CAPTIONERS:
        raise UserError(
            f"--model {spec!r} is of the kind {str(kind)[:60]!r}, which does not describe pictures in transformers; "
            "give a BLIP, BLIP-2, Florence-2 or another image-text-to-text model"
        )
    return kind


def _load(source: CaptionerSource, files: ModelFiles, tensors: dict[str, Tensor], device: torch.device) -> Captioner:
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind, dtype = files.config["model_type"], pick_dtype("auto", device)
    config = read_config(files)
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    model = load_weights(files, config, model_class, tensors, dtype, generation_config=GenerationConfig())
    processor = made_of_files(files, lambda: load_processor(files.staged, config, files.values))
    _complete(model, processor, config, files.generation())
    return Captioner(source.name, kind, model.to(device), processor, device, dtype, source.fingerprint, _hint(files))


def read_config(files: ModelFiles):
    """Return the config of a kind that transformers has. Raises UserError."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[files.config["model_type"]].from_dict(files.config)
    # what transformers makes of values that contradict each other
    except Exception as error:
        raise bad_weights(files.folder, error) from error


def load_weights(
    files: ModelFiles, config, model_class: type, tensors: dict[str, Tensor], dtype: torch.dtype, **options
) -> nn.Module:
    """Return a model with the weights of its files, for inference, on the CPU. Raises UserError if they do not fit."""
    meta = build(lambda: model_class(config), files.folder)
    files.check_size(sum(tensor.numel() for tensor in meta.parameters()), sum(t.numel() for t in tensors.values()))
    try:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:
        raise bad_weights(files.folder, error) from error
    if lacking := sorted(info["missing_keys"]):
        raise bad_weights(files.folder, f"they lack {lacking[0]} and {len(lacking) - 1} more")
    return model.requires_grad_(False).eval()


def made_of_files(files: ModelFiles, make: Callable):
    """Return the processor that `make` makes. Raises UserError whatever it raises.

    Files may contradict each other, and a processor may want a library that is not here.
    """
    try:
        return make()
    except Exception as error:
        raise UserError(
            f"{files.folder}: no processor can be made of its files ({first_line(error)}); use another model"
        ) from error


def _complete(model: nn.Module, processor, config, generation: dict) -> None:
    """Set what a folder may leave out: how generation ends, padding, and how many tokens stand for a picture."""
    decoders = [model, getattr(model, "text_decoder", None), getattr(model, "language_model", None)]
    for decoder in decoders:
        if (settings := getattr(decoder, "generation_config", None)) is None:
            continue
        for name, value in generation.items():
            setattr(settings, name, value)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if hasattr(processor, "num_query_tokens") and processor.num_query_tokens is None:
        processor.num_query_tokens = config.num_query_tokens
