"""The registry of adapters: every value of `adapter.kind` and what it trains. Does not import torch.

Training, checkpoints, sampling, export and the planner read this registry instead of comparing names. A new adapter is
a row here and a class that implements `Trained` (trainer/adapters/trained.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is.

    name: as in adapter.kind. help: its line in the config's help. implementation: the Trained, "module:class".
    weights_file: where a checkpoint holds what is trained. settings: those of [adapter] that it reads besides kind.
    needs_base: whether a checkpoint holds only what is added to the base, whose own weights are frozen.
    is_scalable: whether pictures can be drawn with less or more of it. exporter: "module:class" of the Export
    (trainer/inference/export_source.py) that writes it alone, '' if only the whole model is exported.
    memory_modes: the values of optimizer.memory that make sense for it, None for all of the optimizer's.
    trains_text_encoder: whether text_encoder.train can be true beside it.
    min_usual_lr: learning rates below it hardly train it; 0: no such limit is known.
    changes_unet: whether its checkpoints have another UNet than the base. is_fp32: whether what it trains is fp32 in
    every precision of the UNet, and is stepped after backward. reads_captions_in_step: whether gradients pass through
    the text encoders, so that captions are read inside the step. trains_word: whether it has the settings of
    [embedding], whose word captions and prompts name.
    """

    name: str
    help: str
    implementation: str
    weights_file: str
    settings: tuple[str, ...] = ()
    needs_base: bool = False
    is_scalable: bool = False
    exporter: str = ""
    memory_modes: tuple[str, ...] | None = None
    trains_text_encoder: bool = True
    min_usual_lr: float = 0.0
    changes_unet: bool = True
    is_fp32: bool = False
    reads_captions_in_step: bool = False
    trains_word: bool = False


_SPECS = (
    AdapterSpec(
        name="none",
        help="the weights of the UNet themselves",
        implementation="safelight.trainer.adapters.full:FullFineTune",
        weights_file="unet/diffusion_pytorch_model.safetensors",
    ),
    AdapterSpec(
        name="lora",
        help="low-rank matrices beside the frozen weights of the layers in target; a file of a few MB",
        implementation="safelight.trainer.adapters.lora:LoRA",
        weights_file="adapter/pytorch_lora_weights.safetensors",
        settings=("rank", "alpha", "dropout", "target", "dora", "rslora", "base"),
        needs_base=True,
        is_scalable=True,
        exporter="safelight.trainer.inference.lora_export:LoRAExport",
        memory_modes=("auto", "exact", "near", "rounded", "fp32"),
        trains_text_encoder=False,
        min_usual_lr=1e-5,
    ),
    AdapterSpec(
        name="embedding",
        help="the vectors of a new word (textual inversion), see [embedding]; the model itself stays as it is",
        implementation="safelight.trainer.adapters.embedding:WordVectors",
        weights_file="embedding/learned_embeds.safetensors",
        exporter="safelight.trainer.inference.word_export:WordExport",
        changes_unet=False,
        is_fp32=True,
        reads_captions_in_step=True,
        trains_word=True,
    ),
)

# values of adapter.base besides `full`: formats of kernels/ops/quantized_weight.py
QUANTIZED_FORMATS = ("8bit", "nf4")

ADAPTERS: dict[str, AdapterSpec] = {spec.name: spec for spec in _SPECS}

# values of adapter.target that stand for many layers, and which
TARGETS = {
    "attention": "the projections of self- and cross-attention",
    "feed-forward": "the two projections of each feed-forward block",
    "linear": "all linear layers",
    "convolution": "all convolutions",
}


def help_text() -> str:
    """Return the help of adapter.kind, which describes each adapter."""
    return "What is trained. " + ";\n".join(f"{spec.name}: {spec.help}" for spec in _SPECS) + "."
