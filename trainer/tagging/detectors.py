"""Detectors of transformers: DETR, RT-DETR, D-FINE, YOLOS and others that return boxes, classes and confidences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.text import collapse, counted
from safelight.trainer.captioning.model_files import ModelFiles
from safelight.trainer.captioning.models import load_weights, made_of_files, read_config
from safelight.trainer.captioning.options import LEAST_CONFIDENCE
from safelight.trainer.models.device import pick_dtype
from safelight.trainer.tagging.boxes import Box, boxes_of, keep_best
from safelight.trainer.tagging.categories import MAX_NAME_CHARACTERS

MAX_CLASSES = 10_000
# names of classes that are none: numbers without a class in COCO, and those of a config that names nothing
NO_NAMES = ("n/a", "none", "background")
UNNAMED = "label_"


@dataclass(frozen=True)
class Detector:
    """A detector with its image processor. names: of its classes, "" for one without."""

    model: nn.Module
    processor: object
    names: list[str]
    device: torch.device
    dtype: torch.dtype

    @torch.inference_mode()
    def find(self, images: Sequence[Image.Image]) -> list[list[Box]]:
        """Return the boxes in each picture. Pictures whose inputs have one shape are one batch.

        Padding to one shape would move the boxes of some kinds.
        """
        inputs = [self.processor(images=[image.convert("RGB")], return_tensors="pt") for image in images]
        by_shape: dict[tuple, list[int]] = {}
        for index, values in enumerate(inputs):
            by_shape.setdefault(tuple(values["pixel_values"].shape), []).append(index)
        found: dict[int, list[Box]] = {}
        for indices in by_shape.values():
            batch = {
                name: torch.cat([inputs[index][name] for index in indices]).to(self.device)
                for name in ("pixel_values", "pixel_mask")
                if name in inputs[indices[0]]
            }
            batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
            outputs = self.model(**batch)
            outputs.logits, outputs.pred_boxes = outputs.logits.float().cpu(), outputs.pred_boxes.float().cpu()
            sizes = torch.ones(len(indices), 2)
            rows = self.processor.post_process_object_detection(outputs, LEAST_CONFIDENCE, sizes)
            found |= {index: self._boxes(row) for index, row in zip(indices, rows, strict=True)}
        return [found[index] for index in range(len(images))]

    def _boxes(self, row: dict[str, Tensor]) -> list[Box]:
        scores, classes, corners = (row[name].numpy() for name in ("scores", "labels", "boxes"))
        # these models are made to need none; where one finds a thing twice it is one thing all the same
        kept = keep_best(corners, scores, classes)
        return boxes_of(self.names, classes[kept], scores[kept], corners[kept])


def check_kind(files: ModelFiles, what: str) -> None:
    """Raise UserError if transformers has no such detector. what: the beginning of the message."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as NAMES

    kind = files.config.get("model_type")
    if not isinstance(kind, str) or kind not in NAMES:
        raise UserError(
            f"{what}, which finds no things in transformers; give a DETR, RT-DETR, D-FINE, YOLOS or other detector, "
            "or a YOLOX .onnx file"
        )
    if files.config.get("use_timm_backbone"):
        raise UserError(
            f"{files.folder} needs timm's layers, which are not used here; use a model without them, such as "
            "PekingU/rtdetr_v2_r18vd"
        )


def load_detector(files: ModelFiles, tensors: dict[str, Tensor], device: torch.device) -> Detector:
    """Return the detector of checked files on a device, in fp32 on a CPU and 16 bits on a GPU. Raises UserError."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING

    dtype, config = pick_dtype("auto", device), read_config(files)
    names = _names(files, config.id2label)
    model = load_weights(files, config, MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)], tensors, dtype)
    processor = made_of_files(files, lambda: _image_processor(files))
    return Detector(model.to(device), processor, names, device, dtype)


def _names(files: ModelFiles, id2label: dict) -> list[str]:
    """Return the names of the classes by their numbers."""
    numbers = [number for number in id2label if isinstance(number, int) and 0 <= number < MAX_CLASSES]
    names = [""] * (max(numbers, default=-1) + 1)
    for number in numbers:
        name = collapse(str(id2label[number]))[:MAX_NAME_CHARACTERS]
        is_name = any(map(str.isalpha, name)) and name.casefold() not in NO_NAMES and "|" not in name
        names[number] = name if is_name and not name.casefold().startswith(UNNAMED) else ""
    if not any(names):
        raise UserError(
            f"{files.folder}: its config.json names none of its {counted(len(id2label), 'class')}, in id2label; "
            "use another model"
        )
    return names


def _image_processor(files: ModelFiles):
    """Return the image processor, which works with Pillow and numpy alone and makes boxes of a model's outputs."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(
        files.staged, local_files_only=True, trust_remote_code=False, backend="pil"
    )
    if not hasattr(processor, "post_process_object_detection"):
        raise UserError(f"{type(processor).__name__} makes no boxes of outputs")
    return processor
