"""Who owns which part with distributed.shard = states, and where full cuts: what docs/decisions.md says of both."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from safelight.kernels.moment_blocks import BLOCK_SIZE, MIN_8BIT_ELEMENTS
from safelight.trainer.models.base import resolve_base
from safelight.trainer.optim.base import part_of
from safelight.trainer.optim.reduction import owners_of

NUM_PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}


@pytest.fixture(scope="module", params=NUM_PARAMETERS)
def unet(request) -> tuple[str, dict[str, torch.Size]]:
    """The kind of a UNet, and the shapes of its weights."""
    with torch.device("meta"):
        made = UNet2DConditionModel.from_config(resolve_base(f"random:{request.param}").config_of("unet"))
    return request.param, {name: p.shape for name, p in made.named_parameters()}


def sizes_of(shapes: dict[str, torch.Size]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + shape.numel()
    return sizes


def test_owners_have_nearly_equal_shares(unet):
    kind, shapes = unet
    sizes = sizes_of(shapes)
    assert sum(sizes.values()) == NUM_PARAMETERS[kind]
    # at 2 bytes each
    assert max(sizes, key=sizes.get) == "up_blocks.0.resnets.0"
    assert round(2 * sizes["up_blocks.0.resnets.0"] / 2**20) == 94
    most = {2: 1.00008, 8: 1.0043, 16: 1.16 if kind == "sd15" else 1.061}
    for num, limit in most.items():
        owner_of = owners_of(sizes, num)
        assert owner_of.keys() == sizes.keys()
        loads = [sum(sizes[part] for part, owner in owner_of.items() if owner == rank) for rank in range(num)]
        assert max(loads) <= limit * sum(loads) / num


def test_equal_parts_go_round_in_their_order():
    assert owners_of({"a": 3, "b": 3, "c": 3, "d": 9}, 2) == {"a": 1, "b": 1, "c": 1, "d": 0}
    assert owners_of({"a": 1}, 4) == {"a": 0}


def test_few_weights_are_cut_inside_a_block(unet):
    kind, shapes = unet
    expected = {2: 2, 4: 2, 8: 7 if kind == "sd15" else 12}
    large = {name: shape for name, shape in shapes.items() if shape.numel() >= MIN_8BIT_ELEMENTS}
    for num, count in {**expected, 3: None}.items():
        rows = {name: -(-shape[0] // num) for name, shape in large.items()}
        inside = [n for n, shape in large.items() if rows[n] * (shape.numel() // shape[0]) % BLOCK_SIZE]
        share = sum(large[name].numel() for name in inside) / NUM_PARAMETERS[kind]
        if count is None:
            assert round(100 * share) == (9 if kind == "sd15" else 3)
            continue
        assert len(inside) == count
        assert share < 6e-5
        if num < 8:
            assert inside == ["conv_in.weight", "conv_out.weight"]
