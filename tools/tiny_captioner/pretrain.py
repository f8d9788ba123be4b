"""Train the embedded tiny captioner from scratch: a BLIP of 1.7 M parameters that names what a scene shows.

    python -m tools.tiny_captioner.pretrain --work DIR --out DIR

Pictures and captions are drawn by scenes.py: all seven aspect ratios, squashed to a square as BLIP does; half in the
look of a faded print; half JPEG-coded. Captions do not name the look. Three pairs of colour and shape are never shown,
so that they can tell whether the captioner puts together what it learnt separately.

Colours are learnt at once and shapes slowly, so four things help with shapes: patches start whitened and positions as
waves; a linear layer reads the shape from the class token; a quarter of the words that the decoder reads is masked, or
it would guess the shape from the colour before it; and some pictures have their channels permuted, with the colour left
out of the loss, or each colour would have shapes of its own.

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
from itertools import permutations
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
from safelight.trainer.tiny.scenes import COLOURS, SHAPES, Scene, caption, draw, random_scene
from safelight.trainer.tiny.score import ALL_COMBINATIONS, HELD_OUT
from tools.tiny_base.training import Log, Progress, learning_rate

SEED = 20261130
# of the scenes that the log's accuracies are measured on
CHECK_SEED = SEED + 1
NUM_SCENES = 10000
STEPS, BATCH, LR = 6000, 32, 1e-3
CHECK_EVERY, NUM_CHECKED = 500, 60
WORD_DROPOUT = 0.25
PERMUTED_SHARE = 0.3
SHAPE_LOSS_WEIGHT = 0.5
# added to the patches' variances, or the whitening would amplify noise
WHITENING_EPS = 0.01
POSITION_WAVELENGTH = 64.0
MIRRORED = {"on the left": "on the right", "on the right": "on the left"}
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
    """Return a scene as a dataset might hold it: half of them decoded from JPEG."""
    is_jpeg, quality = uniforms(Key(seed, Purpose.VARIANT, number), 2)
    image = draw(scene)
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


def start_embeddings(model: BlipForConditionalGeneration, pixels: Tensor) -> None:
    """Set the patch embedding to whiten the patches of pixels (B, 3, H, W), and the positions to waves in x and y."""
    patches = torch.nn.functional.unfold(pixels, PATCH_PX, stride=PATCH_PX).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    weight = (directions[:, -WIDTH:] / (variances[-WIDTH:] + WHITENING_EPS).sqrt()).T
    embeddings = model.vision_model.embeddings
    side = SIDE_PX // PATCH_PX
    frequencies = POSITION_WAVELENGTH ** -torch.linspace(0, 1, WIDTH // 4)
    waves = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([waves.sin(), waves.cos()], dim=1)
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], dim=2)
    with torch.no_grad():
        embeddings.patch_embedding.weight.copy_(weight.reshape(embeddings.patch_embedding.weight.shape))
        embeddings.patch_embedding.bias.copy_(-weight @ mean)
        embeddings.position_embedding[0, 1:].copy_(grid.flatten(0, 1))


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


def make_batch(step: int, scenes: list[Scene], pictures: np.ndarray) -> tuple[list[Scene], np.ndarray, np.ndarray]:
    """Return a step's scenes, pictures (B, 64, 64, 3) and which of these have their channels permuted, (B,).

    Half of the pictures are mirrored.
    """
    chosen, squares = [], []
    rows = integers(Key(SEED, Purpose.EPOCH_ORDER, step), len(scenes), BATCH)
    u = uniforms(Key(SEED, Purpose.FLIP, step), 3 * BATCH).reshape(BATCH, 3)
    orders = list(permutations(range(3)))[1:]
    for row, (mirror, permute, order) in zip(rows, u, strict=True):
        scene, square = scenes[row], pictures[row]
        if mirror < 0.5:
            scene, square = replace(scene, position=MIRRORED.get(scene.position, scene.position)), square[:, ::-1]
        if permute < PERMUTED_SHARE:
            square = square[..., orders[int(order * len(orders))]]
        chosen.append(scene)
        squares.append(square)
    return chosen, np.stack(squares), u[:, 1] < PERMUTED_SHARE


def train(
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    scenes: list[Scene],
    pictures: np.ndarray,
    work: Path,
    log: Log,
) -> None:
    """Train on the cross-entropy of the next token and of the shape. Every use of a picture has its own caption."""
    shape_head = torch.nn.Linear(WIDTH, len(SHAPES))
    progress = Progress(work / "captioner.safetensors", {"captioner": model, "shape_head": shape_head}, LR)
    tokenizer = processor.tokenizer
    colour_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(COLOURS)))
    cross_entropy = torch.nn.functional.cross_entropy
    average = None
    while progress.step < STEPS:
        step = progress.step
        shown, squares, is_permuted = make_batch(step, scenes, pictures)
        texts = [text_of(scene, step * BATCH + place) for place, scene in enumerate(shown)]
        ids, mask, labels = to_tokens(texts, processor)
        is_unknown = torch.isin(ids, colour_ids) & torch.from_numpy(is_permuted)[:, None]
        dropped = uniforms(Key(SEED, Purpose.CAPTION_DROPOUT, step), ids.numel()).reshape(ids.shape) < WORD_DROPOUT
        dropped[:, 0] = False
        ids = ids.masked_fill(is_unknown | torch.from_numpy(dropped), tokenizer.mask_token_id)
        labels = labels.masked_fill(is_unknown, -100)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(to_pixels(squares, processor), ids, mask)
            shapes = shape_head(output.last_hidden_state[:, 0])
        word_loss = cross_entropy(output.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        shape_loss = cross_entropy(shapes.float(), torch.tensor([SHAPES.index(scene.shape) for scene in shown]))
        progress.update(word_loss + SHAPE_LOSS_WEIGHT * shape_loss, learning_rate(step, STEPS, LR))
        losses = np.array([word_loss.item(), shape_loss.item()])
        average = losses if average is None else 0.98 * average + 0.02 * losses
        if progress.step % 100 == 0:
            log.write(
                stage="captioner",
                step=progress.step,
                loss=float(average[0]),
                shape_loss=float(average[1]),
                cpu_seconds=progress.total_cpu_seconds(),
            )
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
    start_embeddings(model, to_pixels(pictures[:2000], processor))
    num_parameters = sum(p.numel() for p in model.parameters())
    log.write(stage="model", tokens=len(processor.tokenizer), parameters=num_parameters)
    train(model, processor, scenes, pictures, work, log)
    model.eval()
    digest = write(arguments.out, model, processor)
    log.write(stage="done", sha256=digest)


if __name__ == "__main__":
    main()
