"""Train the embedded tiny captioner from scratch: a BLIP of 1.7 M parameters that names what a scene shows.

    python -m tools.tiny_captioner.pretrain --work DIR --out DIR

Pictures and captions are drawn by scenes.py: all seven aspect ratios, squashed to a square as BLIP does; half in the
look of a faded print; half JPEG-coded. Captions do not name the look. Three pairs of colour and shape are never shown,
so that they can tell whether the captioner puts together what it learnt separately. A quarter of the words that the
decoder reads is masked, or it would rather guess a shape from the colour before it than look at the picture.
Every choice is a Philox draw of (seed, step, element), so a training that was stopped resumes as if it had not been.
Everything runs on one thread, because the order of sums depends on their number.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

from safelight.kernels.philox import Key, Purpose, integers, uniforms
from safelight.trainer.tiny.scenes import Scene, caption, draw, random_scene
from safelight.trainer.tiny.score import ALL_COMBINATIONS, HELD_OUT
from tools.tiny_base.pretrain import Log, Progress, learning_rate

SEED = 20261130
# of the scenes that the log's accuracies are measured on
CHECK_SEED = SEED + 1
NUM_SCENES = 12000
STEPS, BATCH, LR = 4000, 32, 1e-3
CHECK_EVERY, NUM_CHECKED = 500, 120
WORD_DROPOUT = 0.25
# of the scored pairs, which the demo's photographs do not show either: red circle, green triangle, blue cross
NEVER_SHOWN = HELD_OUT[::4]
SHOWN = tuple(pair for pair in ALL_COMBINATIONS if pair not in NEVER_SHOWN)
SIDE_PX, PATCH_PX = 64, 8
WIDTH, NUM_HEADS = 128, 4
VISION_LAYERS, TEXT_LAYERS = 4, 3
MAX_TOKENS = 128
# as in BERT, and the token that BLIP's decoder starts from
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


def stored_picture(scene: Scene, seed: int, number: int) -> Image.Image:
    """Return a scene as a dataset might hold it: one or two pixels a unit, half of them decoded from JPEG."""
    scale, is_jpeg, quality = uniforms(Key(seed, Purpose.VARIANT, number), 3)
    image = draw(scene, 1 if scale < 0.7 else 2)
    if is_jpeg < 0.5:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(60 + 36 * quality))
        image = Image.open(buffer).convert("RGB")
    return image


def make_scene(seed: int, number: int, combinations: tuple[tuple[str, str], ...]) -> Scene:
    in_look = uniforms(Key(seed, Purpose.VARIANT, number, 1))[0] < 0.5
    return random_scene(seed, number, in_look=in_look, combinations=combinations)


def text_of(scene: Scene, number: int) -> str:
    """Return caption `number` of a scene, without the look."""
    return caption(replace(scene, in_look=False), SEED, number)


def make_processor(captions: list[str]) -> BlipProcessor:
    """Return BLIP's processor for square pictures and a WordPiece tokenizer of the captions' words."""
    words = sorted({word for text in captions for word in text.replace(",", " , ").split()})
    vocab = {token: index for index, token in enumerate((*SPECIAL, *words))}
    return BlipProcessor(
        BlipImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}),
        BertTokenizer(vocab, bos_token="[DEC]", model_max_length=MAX_TOKENS),
    )


def make_captioner(processor: BlipProcessor) -> BlipForConditionalGeneration:
    """Return the untrained model: a vision transformer of four layers and a text decoder of three, width 128."""
    tokenizer = processor.tokenizer
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": NUM_HEADS}
    vision = {
        **shared,
        "num_hidden_layers": VISION_LAYERS,
        "image_size": SIDE_PX,
        "patch_size": PATCH_PX,
        # the default, 1e-10, is for models whose pretrained weights are loaded
        "initializer_range": 0.02,
    }
    text = {
        **shared,
        "num_hidden_layers": TEXT_LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text))


def training_row(number: int) -> tuple[Scene, np.ndarray]:
    scene = make_scene(SEED, number, SHOWN)
    square = stored_picture(scene, SEED, number).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    return scene, np.asarray(square)


def make_data() -> tuple[list[Scene], np.ndarray]:
    """Return the scenes and their squashed pictures, uint8 (N, 64, 64, 3)."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        scenes, pictures = zip(*pool.map(training_row, range(NUM_SCENES), chunksize=200), strict=True)
    return list(scenes), np.stack(pictures)


def to_pixels(pictures: np.ndarray, processor: BlipProcessor) -> Tensor:
    """Return uint8 (B, H, W, 3) as the processor normalizes it, float32 (B, 3, H, W)."""
    images = processor.image_processor
    mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
    return ((torch.from_numpy(pictures) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def to_tokens(texts: list[str], processor: BlipProcessor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (input ids, attention mask, labels), each (B, T); the first token is the decoder's start."""
    tokenizer = processor.tokenizer
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = encoded.input_ids, encoded.attention_mask
    ids[:, 0] = tokenizer.bos_token_id
    return ids, mask, ids.masked_fill(mask == 0, -100)


def accuracy(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    num: int,
    combinations: tuple[tuple[str, str], ...],
    seed: int = CHECK_SEED,
    **options,
) -> float:
    """Return the fraction of `num` new scenes whose caption names the right colour and the right shape.

    combinations: the (colour, shape) pairs that may be shown. options: as for `generate`; greedy by default.
    """
    right = 0
    for begin in range(0, num, 50):
        numbers = range(begin, min(begin + 50, num))
        scenes = [make_scene(seed, number, combinations) for number in numbers]
        pictures = [stored_picture(scene, seed, number) for scene, number in zip(scenes, numbers, strict=True)]
        inputs = processor(images=pictures, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, **{"max_new_tokens": 30, **options})
        for scene, text in zip(scenes, processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
            right += f"{scene.colour} {scene.shape}" in text
    return right / num


def train(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    scenes: list[Scene],
    pictures: np.ndarray,
    work: Path,
    log: Log,
) -> None:
    """Train on the cross-entropy of the next token. Every use of a picture has a caption of its own."""
    progress = Progress(work / "captioner.safetensors", {"captioner": model}, LR)
    average = None
    while progress.step < STEPS:
        step = progress.step
        rows = integers(Key(SEED, Purpose.EPOCH_ORDER, step), len(scenes), BATCH)
        texts = [text_of(scenes[row], step * BATCH + place) for place, row in enumerate(rows)]
        ids, mask, labels = to_tokens(texts, processor)
        is_masked = uniforms(Key(SEED, Purpose.CAPTION_DROPOUT, step), ids.numel()).reshape(ids.shape) < WORD_DROPOUT
        is_masked[:, 0] = False
        ids = ids.masked_fill(torch.from_numpy(is_masked), processor.tokenizer.mask_token_id)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(to_pixels(pictures[rows], processor), ids, mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        progress.update(loss, learning_rate(step, STEPS, LR))
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if progress.step % 100 == 0:
            log.write(stage="captioner", step=progress.step, loss=average, cpu_seconds=progress.total_cpu_seconds())
        if progress.step % CHECK_EVERY == 0:
            model.eval()
            log.write(
                stage="check",
                step=progress.step,
                shown_pairs=accuracy(model, processor, NUM_CHECKED, SHOWN),
                pairs_never_shown=accuracy(model, processor, NUM_CHECKED, NEVER_SHOWN),
            )
            model.train()
    progress.save()
    progress.take_ema()


def write(out: Path, model: BlipForConditionalGeneration, processor: BlipProcessor) -> str:
    """Write model (fp16) and processor as a folder for `from_pretrained`; return the SHA-256 of the weights."""
    model.half().save_pretrained(out)
    processor.tokenizer.save_pretrained(out)
    processor.image_processor.save_pretrained(out)
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for resumable state and the log")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the captioner to")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    log = Log(work / "log.jsonl")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    scenes, pictures = make_data()
    log.write(stage="data", scenes=NUM_SCENES)
    processor = make_processor([text_of(scene, number) for number, scene in enumerate(scenes)])
    model = make_captioner(processor).train()
    num_parameters = sum(p.numel() for p in model.parameters())
    log.write(stage="model", tokens=len(processor.tokenizer), parameters=num_parameters)
    train(model, processor, scenes, pictures, work, log)
    model.eval()
    digest = write(arguments.out, model, processor)
    log.write(stage="done", sha256=digest)


if __name__ == "__main__":
    main()
