"""LPIPS: the formula written out, real weights, pairs of groups, and files that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from safelight.errors import UserError
from safelight.trainer.features import lpips
from safelight.trainer.features.lpips import Lpips
from safelight.trainer.models.tensor_files import TensorFile, save_file

CPU = torch.device("cpu")
# (channels in, out, kernel) by the names of the lpips package
LAYERS = {"slice1.0": (3, 64, 11), "slice2.3": (64, 192, 5), "slice3.6": (192, 384, 3)} | {
    "slice4.8": (384, 256, 3),
    "slice5.10": (256, 256, 3),
}


def random_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {}
    for number, (name, (num_in, num_out, side)) in enumerate(LAYERS.items()):
        state[f"net.{name}.weight"] = torch.randn(num_out, num_in, side, side) * (2 / (num_in * side**2)) ** 0.5
        state[f"net.{name}.bias"] = torch.randn(num_out) * 0.1
        state[f"lin{number}.model.1.weight"] = torch.rand(1, num_out, 1, 1)
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def measure(state, tmp_path_factory) -> Lpips:
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(state, path)
    return Lpips(path, CPU)


def by_the_paper(state: dict[str, torch.Tensor], first: Image.Image, second: Image.Image) -> float:
    """Return the distance of two pictures of 256 px: differences squared place by place."""
    total, maps = 0.0, []
    for image in (first, second):
        x = torch.from_numpy(np.array(image)).double().permute(2, 0, 1)[None] / 255 * 2 - 1
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        maps.append((x - shift[:, None, None]) / scale[:, None, None])
    for number, name in enumerate(LAYERS):
        weight, bias = (state[f"net.{name}.{part}"].double() for part in ("weight", "bias"))
        if number in (1, 2):
            maps = [F.max_pool2d(x, 3, 2) for x in maps]
        stride, padding = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))[number]
        maps = [F.relu(F.conv2d(x, weight, bias, stride, padding)) for x in maps]
        first_unit, second_unit = (F.normalize(x, dim=1, eps=1e-10) for x in maps)
        difference = (first_unit - second_unit).square() * state[f"lin{number}.model.1.weight"].double()
        total += float(difference.sum(dim=1).mean())
    return total


def test_it_is_the_papers_formula(measure, state, pictures):
    squares = [picture.resize((256, 256)) for picture in pictures[:2]]
    found = measure.distances(2, squares.__getitem__)
    assert found[0, 1] == pytest.approx(by_the_paper(state, *squares), rel=1e-4)
    assert found == pytest.approx(np.array([[0, found[0, 1]], [found[0, 1], 0]]))


def test_pairs_do_not_depend_on_what_else_is_compared(measure, pictures, monkeypatch):
    all_pairs = measure.distances(4, pictures.__getitem__)
    assert all_pairs == pytest.approx(all_pairs.T)
    assert (all_pairs[~np.eye(4, dtype=bool)] > 0).all()
    monkeypatch.setattr(lpips, "NUM_HELD", 1)
    assert measure.distances(4, pictures.__getitem__) == pytest.approx(all_pairs, rel=1e-5, abs=1e-6)


def test_files_that_are_no_lpips(state, tmp_path):
    path = tmp_path / "x.safetensors"
    for changes, message in (
        ({"lin2.model.1.weight": -torch.ones(1, 384, 1, 1)}, "is negative"),
        ({"lin2.model.1.weight": torch.ones(384)}, r"F32 of \(384,\)"),
    ):
        save_file(state | changes, path)
        with pytest.raises(UserError, match=message):
            Lpips(path, CPU)
    with pytest.raises(UserError, match="cannot be read"):
        Lpips(tmp_path / "missing.safetensors", CPU)


def test_real_weights_see_more_blur_as_more_different(shared):
    path = shared / "weights" / "lpips_alex_fp16.safetensors"
    measure = Lpips(path, CPU)
    file = TensorFile(path)
    # the preparation that the file itself records
    shift, scale = (file.read(f"scaling_layer.{name}").flatten().tolist() for name in ("shift", "scale"))
    assert [*shift, *scale] == pytest.approx([*lpips._SHIFT, *lpips._SCALE], abs=1e-3)
    photo = Image.open(shared / "photos" / "dreambooth_071.jpg").convert("RGB").resize((256, 256))
    blurred = [photo, *(photo.filter(ImageFilter.GaussianBlur(radius)) for radius in (0.5, 1, 2, 4))]
    found = measure.distances(5, blurred.__getitem__)[0]
    assert (np.diff(found) > 0).all()
    assert found[1] < 0.05 < 0.2 < found[4]
