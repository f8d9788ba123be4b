"""LPIPS with AlexNet: how different two pictures look.

The distance is the squared difference of AlexNet's activations, each place scaled to length 1 over its channels,
channels weighted by what was learnt from people's judgements, meaned over places and summed over five layers. As the
weights are not negative, it is the squared distance of two vectors, and all pairs are had from one look at each
picture.
Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric", arXiv:1801.03924,
version 0.1 of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.features.extractor import fingerprint_of
from safelight.trainer.features.weights_file import fill, open_weights
from safelight.trainer.models.weights import fingerprint

# pictures of other sizes are squashed to this
SIDE_PX = 256
# pictures of a chunk, of which two are held: at 256 px each picture has 640,000 numbers
NUM_HELD = 64
# channels in and out, kernel, stride and padding of each convolution, by its name in the lpips package
_CONVS = {
    "slice1.0": (3, 64, 11, 4, 2),
    "slice2.3": (64, 192, 5, 1, 2),
    "slice3.6": (192, 384, 3, 1, 1),
    "slice4.8": (384, 256, 3, 1, 1),
    "slice5.10": (256, 256, 3, 1, 1),
}
# layers before which the maps are halved
_POOLED = (1, 2)
# of ImageNet's pixels in -1 to 1
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class _Alex(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(*sizes) for sizes in _CONVS.values())
        self.lins = nn.ModuleList(nn.Conv2d(sizes[1], 1, 1, bias=False) for sizes in _CONVS.values())

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the vectors whose squared distance is LPIPS, (B, width), of pixels in -1 to 1."""
        shift, scale = (torch.tensor(values, device=pixels_BCHW.device)[:, None, None] for values in (_SHIFT, _SCALE))
        x, parts = (pixels_BCHW - shift) / scale, []
        for layer, (conv, lin) in enumerate(zip(self.convs, self.lins, strict=True)):
            x = F.relu(conv(F.max_pool2d(x, 3, 2) if layer in _POOLED else x))
            unit = x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
            parts.append((unit * (lin.weight / (x.shape[2] * x.shape[3])).sqrt()).flatten(1))
        return torch.cat(parts, dim=1)


class Lpips:
    """LPIPS with the weights of a .safetensors file. fingerprint: of weights and preparation. Raises UserError."""

    name = "LPIPS (AlexNet)"

    def __init__(self, path: Path, device: torch.device):
        with torch.device("meta"):
            module = _Alex()
        names = {}
        for layer, conv in enumerate(_CONVS):
            names |= {f"convs.{layer}.{part}": f"net.{conv}.{part}" for part in ("weight", "bias")}
            names[f"lins.{layer}.weight"] = f"lin{layer}.model.1.weight"
        self._module = fill(module, open_weights(path), "LPIPS with AlexNet", names)
        if any((lin.weight < 0).any() for lin in self._module.lins):
            raise UserError(f"{path}: a weight of a channel is negative, which is not LPIPS; get this file again")
        self.fingerprint = fingerprint_of(f"lpips, version 1, {SIDE_PX} px", fingerprint(self._module))
        self.device = device
        self._module.to(device)

    def distances(self, num: int, load: Callable[[int], Image.Image]) -> np.ndarray:
        """Return the distances of all pairs of `num` pictures: (num, num), fp64, 0 on the diagonal.

        load: returns picture i, more than once if they do not all fit memory.
        """
        found = np.zeros((num, num))
        chunks = [range(start, min(start + NUM_HELD, num)) for start in range(0, num, NUM_HELD)]
        for number, rows in enumerate(chunks):
            first = self._vectors([load(place) for place in rows])
            found[np.ix_(rows, rows)] = _squared(first, first)
            for columns in chunks[number + 1 :]:
                apart = _squared(first, self._vectors([load(place) for place in columns]))
                found[np.ix_(rows, columns)], found[np.ix_(columns, rows)] = apart, apart.T
        np.fill_diagonal(found, 0)
        return found

    @torch.inference_mode()
    def _vectors(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.cat([self._module(_pixels(image)[None].to(self.device)) for image in images])


def _pixels(image: Image.Image) -> Tensor:
    image = image.convert("RGB")
    if image.size != (SIDE_PX, SIDE_PX):
        image = image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def _squared(first_ND: Tensor, second_MD: Tensor) -> np.ndarray:
    """Return the squared distances of rows, fp64."""
    lengths = first_ND.square().sum(dim=1)[:, None] + second_MD.square().sum(dim=1)
    # of equal pictures it may be a little below 0
    return (lengths - 2 * first_ND @ second_MD.T).clamp_min(0).double().cpu().numpy()
