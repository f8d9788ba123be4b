"""Inception v3 as FID was defined on it: the 2,048 means of its last feature maps.

It is TensorFlow's classifier of 2015-12-05, which differs from torchvision's: 1,008 classes, average pooling that does
not count padding, and max pooling in the last block. The weights are a .safetensors file with the names of pytorch-fid
and torch-fidelity, converted from their pt_inception-2015-12-05-6726825d.pth.
Pictures are squashed to 299 x 299 as TensorFlow 1 did it: bilinear, the corner of a pixel taken as its place, and
without smoothing, so that shrinking skips pixels; then (x - 128) / 128.
Sources: Szegedy et al. 2015, "Rethinking the Inception architecture", arXiv:1512.00567; Heusel et al. 2017,
arXiv:1706.08500; Parmar et al. 2022, "On aliased resizing", arXiv:2104.11222.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from safelight.trainer.features.extractor import PictureModel, fingerprint_of
from safelight.trainer.features.weights_file import fill
from safelight.trainer.models.tensor_files import TensorFile
from safelight.trainer.models.weights import fingerprint

SIDE_PX = 299
WIDTH = 2048
# a tensor that tells such a file from others
MARK = "Mixed_7c.branch_pool.conv.weight"


class _Conv(nn.Module):
    """Convolution, batch normalization, ReLU."""

    def __init__(self, num_in: int, num_out: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(num_in, num_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(num_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Branches side by side, their channels joined. The last one pools first.

    chains: of each branch the names of its convolutions; a tuple of two at the end is both, joined. pool: "mean" or
    "max" of 3 x 3, "shrink" for max with stride 2 and no convolution behind it.
    """

    def __init__(self, convs: dict[str, _Conv], chains: Sequence[Sequence[str | tuple[str, str]]], pool: str):
        super().__init__()
        for name, conv in convs.items():
            self.add_module(name, conv)
        self._chains, self._pool = chains, pool

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self._chains:
            y = x
            for part in chain:
                names = part if isinstance(part, tuple) else (part,)
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        if self._pool == "shrink":
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], dim=1)
        mean = self._pool == "mean"
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if mean else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*outputs, self.get_submodule("branch_pool")(pooled)], dim=1)


def _block_35(num_in: int, num_pooled: int) -> _Block:
    convs = {
        "branch1x1": _Conv(num_in, 64, 1),
        "branch5x5_1": _Conv(num_in, 48, 1),
        "branch5x5_2": _Conv(48, 64, 5),
        "branch3x3dbl_1": _Conv(num_in, 64, 1),
        "branch3x3dbl_2": _Conv(64, 96, 3),
        "branch3x3dbl_3": _Conv(96, 96, 3),
        "branch_pool": _Conv(num_in, num_pooled, 1),
    }
    chains = (
        ("branch1x1",),
        ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    )
    return _Block(convs, chains, "mean")


def _shrink_to_17() -> _Block:
    convs = {
        "branch3x3": _Conv(288, 384, 3, 2, padded=False),
        "branch3x3dbl_1": _Conv(288, 64, 1),
        "branch3x3dbl_2": _Conv(64, 96, 3),
        "branch3x3dbl_3": _Conv(96, 96, 3, 2, padded=False),
    }
    return _Block(convs, (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")), "shrink")


def _block_17(num: int) -> _Block:
    """num: channels within the branches of 7 x 1 and 1 x 7."""
    convs = {
        "branch1x1": _Conv(768, 192, 1),
        "branch7x7_1": _Conv(768, num, 1),
        "branch7x7_2": _Conv(num, num, (1, 7)),
        "branch7x7_3": _Conv(num, 192, (7, 1)),
        "branch7x7dbl_1": _Conv(768, num, 1),
        "branch7x7dbl_2": _Conv(num, num, (7, 1)),
        "branch7x7dbl_3": _Conv(num, num, (1, 7)),
        "branch7x7dbl_4": _Conv(num, num, (7, 1)),
        "branch7x7dbl_5": _Conv(num, 192, (1, 7)),
        "branch_pool": _Conv(768, 192, 1),
    }
    chains = (
        ("branch1x1",),
        tuple(f"branch7x7_{number}" for number in (1, 2, 3)),
        tuple(f"branch7x7dbl_{number}" for number in (1, 2, 3, 4, 5)),
    )
    return _Block(convs, chains, "mean")


def _shrink_to_8() -> _Block:
    convs = {
        "branch3x3_1": _Conv(768, 192, 1),
        "branch3x3_2": _Conv(192, 320, 3, 2, padded=False),
        "branch7x7x3_1": _Conv(768, 192, 1),
        "branch7x7x3_2": _Conv(192, 192, (1, 7)),
        "branch7x7x3_3": _Conv(192, 192, (7, 1)),
        "branch7x7x3_4": _Conv(192, 192, 3, 2, padded=False),
    }
    chains = (("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{number}" for number in (1, 2, 3, 4)))
    return _Block(convs, chains, "shrink")


def _block_8(num_in: int, pool: str) -> _Block:
    convs = {
        "branch1x1": _Conv(num_in, 320, 1),
        "branch3x3_1": _Conv(num_in, 384, 1),
        "branch3x3_2a": _Conv(384, 384, (1, 3)),
        "branch3x3_2b": _Conv(384, 384, (3, 1)),
        "branch3x3dbl_1": _Conv(num_in, 448, 1),
        "branch3x3dbl_2": _Conv(448, 384, 3),
        "branch3x3dbl_3a": _Conv(384, 384, (1, 3)),
        "branch3x3dbl_3b": _Conv(384, 384, (3, 1)),
        "branch_pool": _Conv(num_in, 192, 1),
    }
    chains = (
        ("branch1x1",),
        ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    )
    return _Block(convs, chains, pool)


class Inception(nn.Module):
    """The classifier without its last layer."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_35(192, 32), _block_35(256, 64), _block_35(288, 64)
        self.Mixed_6a = _shrink_to_17()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_block_17, (128, 160, 160, 192))
        self.Mixed_7a = _shrink_to_8()
        self.Mixed_7b, self.Mixed_7c = _block_8(1280, "mean"), _block_8(2048, "max")

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return (B, 2048) of pixels (B, 3, 299, 299) in -1 to 1."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels_BCHW)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


def open_inception(file: TensorFile, device: torch.device) -> PictureModel:
    """Return FID's extractor with the weights of a file. Raises UserError if it does not have them."""
    with torch.device("meta"):
        module = Inception()
    module = fill(module, file, "FID's Inception v3").to(device)

    @torch.inference_mode()
    def look(image: Image.Image) -> np.ndarray:
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
        resized = tensorflow_resize(pixels, SIDE_PX)
        return module((resized[None].to(device) - 128) / 128)[0].cpu().numpy()

    return PictureModel("Inception v3 (FID)", fingerprint_of("inception, version 1", fingerprint(module)), WIDTH, look)


def tensorflow_resize(pixels_CHW: Tensor, side: int) -> Tensor:
    """Return pixels resized to (C, side, side) as tf.image.resize_bilinear of TensorFlow 1 does, fp32."""
    rows, columns = (_places(size, side) for size in pixels_CHW.shape[1:])
    x = pixels_CHW
    x = x[:, :, columns[0]] + (x[:, :, columns[1]] - x[:, :, columns[0]]) * columns[2]
    return x[:, rows[0]] + (x[:, rows[1]] - x[:, rows[0]]) * rows[2][:, None]


def _places(size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (first pixel, second pixel, weight of the second) of each of `side` places along a side of `size`."""
    places = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    first = places.long()
    return first, (first + 1).clamp_max(size - 1), places - first
