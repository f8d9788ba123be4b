"""The embedded tiny-xl base, of Stable Diffusion XL's kind: two text encoders, and conditioning on sizes and crops.

The autoencoder, the vocabulary and the first text encoder's first layers are the tiny base's; the rest is trained from
scratch. Its scenes are cut out of drawings of many sizes and aspect ratios, so that crop corners say something about
the picture. Small originals are enlarged, which the tiny autoencoder, itself as soft, hardly shows.
Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from safelight.kernels.philox import Key, Purpose, uniforms
from safelight.trainer.models.base import tiny_folder
from safelight.trainer.tiny.scenes import ASPECTS, Scene, caption, draw, pick, random_scene
from tools.tiny_base.architecture import make_xl_text_encoders, make_xl_unet
from tools.tiny_base.tiny import NUM_SCENES, draw_all, filler, make_scheduler, token_ids
from tools.tiny_base.training import SEED, Log, Size, Task, encode_all, log_models, train_unet, write_pipeline

UNET_STEPS, UNET_LR = 6500, 1.2e-3
# shares of the pictures that are cut out of another aspect ratio; enlarged; and exactly as large as they were drawn
CROPPED, ENLARGED, AS_DRAWN = 0.4, 0.25, 0.25
# sides of the originals relative to the picture
SMALLEST, LARGEST = 0.4, 4.0


def cut_out(scene: Scene, number: int) -> tuple[Image.Image, tuple[int, ...]]:
    """Return a picture of scene.width x scene.height px cut out of a drawing of another size, and its six sizes.

    Sizes are (original height, width, crop top, left, target height, width) in px, the crop's corner in the drawing as
    scaled to the target. An original larger than the target is drawn at the target's scale, which looks the same.
    """
    u = uniforms(Key(SEED, Purpose.CROP, number), 6)
    width, height = scene.width, scene.height
    others = [aspect for aspect in ASPECTS if aspect != (width, height)]
    frame = pick(others, u[1]) if u[0] < CROPPED else (width, height)
    whole = replace(scene, width=frame[0], height=frame[1])
    cover = max(width / frame[0], height / frame[1])
    if u[2] < ENLARGED:
        scale = cover * SMALLEST ** float(u[3])
    else:
        scale = cover if u[2] < ENLARGED + AS_DRAWN else cover * LARGEST ** float(u[3])
    original = [max(1, round(side * scale)) for side in frame]
    scaled = [
        max(side, round(target)) for side, target in zip((width, height), (s * cover for s in frame), strict=True)
    ]
    image = draw(whole, min(scale, cover))
    if image.size != scaled:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = int(u[4] * (scaled[0] - width + 1)), int(u[5] * (scaled[1] - height + 1))
    sizes = (original[1], original[0], top, left, height, width)
    return image.crop((left, top, left + width, top + height)), sizes


def draw_row(number: int) -> tuple[Size, np.ndarray, str, tuple[int, ...]]:
    """Return scene `number` as (width, height), pixels (H, W, 3), caption and the six sizes."""
    scene = random_scene(SEED, number)
    image, sizes = cut_out(scene, number)
    return image.size, np.asarray(image), caption(scene, SEED, number) + filler(number), sizes


def make_cut_scenes() -> tuple[dict[Size, np.ndarray], dict[Size, list[str]], dict[Size, Tensor]]:
    """Return (images, captions, sizes) by (width, height). images: uint8 (N, H, W, 3); sizes: float32 (N, 6)."""
    rows = draw_all(draw_row, NUM_SCENES)
    buckets = {key: [row for row in rows if row[0] == key] for key in sorted({row[0] for row in rows})}
    images = {key: np.stack([pixels for _, pixels, _, _ in bucket]) for key, bucket in buckets.items()}
    captions = {key: [text for _, _, text, _ in bucket] for key, bucket in buckets.items()}
    sizes = {key: torch.tensor([row[3] for row in bucket], dtype=torch.float32) for key, bucket in buckets.items()}
    return images, captions, sizes


def both_embeddings(
    first: CLIPTextModel, second: CLIPTextModelWithProjection, first_ids: Tensor, second_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the next to last hidden states of both encoders side by side, (B, T, D), and the pooled (B, P)."""
    one, two = (encoder(ids, output_hidden_states=True) for encoder, ids in ((first, first_ids), (second, second_ids)))
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


def text_and_sizes(
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    captions: dict[Size, list[str]],
    sizes: dict[Size, Tensor],
) -> Callable[[Size, np.ndarray, Tensor], dict]:
    """Return the `condition` of the task. A dropped caption's embeddings and pooled one are zeros."""
    tokens = {key: [token_ids(tokenizer, texts) for tokenizer in tokenizers] for key, texts in captions.items()}

    def condition(size: Size, rows: np.ndarray, dropped: Tensor) -> dict:
        embeddings, pooled = both_embeddings(*encoders, *(ids[rows] for ids in tokens[size]))
        kept = (~dropped).to(embeddings.dtype)[:, None]
        return {
            "encoder_hidden_states": embeddings * kept[:, :, None],
            "added_cond_kwargs": {"text_embeds": pooled * kept, "time_ids": sizes[size][rows]},
        }

    return condition


def start_from_tiny(first: CLIPTextModel) -> None:
    """Load the tiny base's text encoder. Its last layer, which the tiny base lacks, is unused and stays untrained."""
    weights = CLIPTextModel.from_pretrained(tiny_folder() / "text_encoder").state_dict()
    unknown = first.load_state_dict(weights, strict=False).unexpected_keys
    assert not unknown, unknown
    for name, parameter in first.named_parameters():
        parameter.requires_grad_(name in weights and "final_layer_norm" not in name)


def pretrain(work: Path, out: Path, log: Log) -> None:
    """Train UNet and text encoders and write the pipeline."""
    base = tiny_folder()
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    # the published second tokenizer pads with this
    tokenizer_2 = CLIPTokenizer.from_pretrained(base / "tokenizer", pad_token="!")
    unet = make_xl_unet()
    first, second = make_xl_text_encoders(tokenizer)
    start_from_tiny(first)
    images, captions, sizes = make_cut_scenes()
    log.write(stage="data", scenes=NUM_SCENES)
    modules = {"unet": unet, "text_encoder": first, "text_encoder_2": second}
    log_models(log, len(tokenizer), {"vae": vae, **modules})
    latents = encode_all(vae, images)
    log.write(stage="latents")
    task = Task(
        modules,
        text_and_sizes((first, second), (tokenizer, tokenizer_2), captions, sizes),
        latents,
        vae.config.scaling_factor,
        make_scheduler(),
        UNET_STEPS,
        UNET_LR,
    )
    train_unet(task, work, log)
    scheduler = EulerDiscreteScheduler.from_config(make_scheduler().config, steps_offset=1, timestep_spacing="leading")
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    log.write(stage="done", sha256=write_pipeline(out, pipeline))
