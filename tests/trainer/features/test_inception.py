"""FID's Inception: its preparation and pooling by hand, the names in its files, and torch-fidelity where it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from safelight.errors import UserError
from safelight.trainer.features.inception import MARK, Inception, open_inception, tensorflow_resize
from safelight.trainer.features.open_extractor import open_extractor
from safelight.trainer.features.weights_file import open_weights
from safelight.trainer.models.tensor_files import save_file

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as pytorch-fid's conversion: random weights, with the last layer and without counters."""
    torch.manual_seed(0)
    module = Inception()
    for tensor in module.state_dict().values():
        if tensor.dim() == 4:
            nn.init.kaiming_normal_(tensor)
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file({name: tensor.half() for name, tensor in state.items()}, path)
    return path


def test_it_has_the_size_and_the_names_of_the_published_one():
    with torch.device("meta"):
        module = Inception()
    names = dict(module.named_parameters())
    # torchvision's Inception v3 has 27,161,264, of which 3,326,696 belong to the auxiliary and 2,049,000 to the last
    # layer
    assert sum(tensor.numel() for tensor in names.values()) == 27_161_264 - 3_326_696 - 2_049_000
    assert sum(name.endswith("conv.weight") for name in names) == 94
    assert names["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert names["Mixed_6c.branch7x7dbl_4.bn.bias"].shape == (160,)


def test_pictures_are_resized_as_tensorflow_1_did():
    found = tensorflow_resize(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), 4)
    assert found[0].tolist() == [[1, 1.5, 2, 2], [2, 2.5, 3, 3], [3, 3.5, 4, 4], [3, 3.5, 4, 4]]
    # shrinking takes every second pixel, and smooths nothing
    assert tensorflow_resize(torch.arange(16.0).reshape(1, 4, 4), 2)[0].tolist() == [[0, 2], [8, 10]]


def test_padding_is_not_averaged_and_the_last_block_takes_the_largest():
    with torch.device("meta"):
        module = Inception()
    x = torch.rand(1, 1, 3, 3)
    for name, corner in (
        ("Mixed_5b", x[0, 0, :2, :2].mean()),
        ("Mixed_7b", x[0, 0, :2, :2].mean()),
        ("Mixed_7c", None),
    ):
        block = module.get_submodule(name)
        block.branch_pool, block._chains = nn.Identity(), ()
        expected = x[0, 0, :2, :2].max() if corner is None else corner
        assert block(x)[0, 0, 0, 0] == pytest.approx(float(expected))


def test_features_are_those_of_pictures_one_by_one(weights):
    extractor = open_inception(open_weights(weights), CPU)
    draws = np.random.default_rng(0)
    pictures = [Image.fromarray(draws.integers(0, 255, (40, width, 3), dtype=np.uint8)) for width in (30, 50)]
    together = extractor.features(pictures)
    assert together.shape == (2, 2048)
    assert (together[1:] == extractor.features(pictures[1:])).all()
    assert (together >= 0).all()
    assert (together[0] != together[1]).any()


def test_files_that_are_no_inception(tmp_path):
    first, mark = "Conv2d_1a_3x3.conv.weight", {MARK: torch.zeros(192, 2048, 1, 1)}
    for tensors, message in (
        ({}, f"it has no tensor {first}"),
        ({first: torch.zeros(3)}, rf"{first} is F32 of \(3,\), not floats of \(32, 3, 3, 3\)"),
        ({first: torch.full((32, 3, 3, 3), float("nan"))}, f"{first} has values that are not finite"),
        ({first: torch.full((32, 3, 3, 3), 1e300, dtype=torch.float64)}, f"{first} has values beyond fp32"),
    ):
        save_file(mark | tensors, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=message) as error:
            open_extractor(str(tmp_path / "x.safetensors"), CPU)
        assert "\n" not in str(error.value)


def test_torch_fidelity_agrees(weights, tmp_path, shared):
    module = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is not installed"
    )
    file = open_weights(weights)
    state = {name: file.read(name).float() for name in file.entries}
    counters = [name.replace("running_mean", "num_batches_tracked") for name in state if name.endswith("running_mean")]
    torch.save(state | dict.fromkeys(counters, torch.tensor(0)), tmp_path / "weights.pth")
    theirs = module.FeatureExtractorInceptionV3("x", ["2048"], str(tmp_path / "weights.pth"))
    picture = Image.open(shared / "photos" / "dreambooth_071.jpg").convert("RGB")
    (expected,) = theirs(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
    assert open_inception(file, CPU).features([picture]) == pytest.approx(expected.numpy(), rel=1e-5)
