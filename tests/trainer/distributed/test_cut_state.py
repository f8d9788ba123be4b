"""State of weights that are cut into rows: blocks are carried over bit for bit, or requantized within their bound."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from safelight.errors import UserError
from safelight.kernels.moment_blocks import BLOCK_SIZE
from safelight.kernels.optim.blockwise_8bit import dequantize, dynamic_map, in_memory_order, quantize
from safelight.trainer.distributed.sharded import whole_of
from safelight.trainer.optim.cut_state import cut_parts, is_aligned
from tests.trainer.distributed.several import optimizer_in, world_of_all


class Cut:
    """Stands for a weight of which the process of a rank has rows."""

    def __init__(self, shape: tuple[int, ...], num: int, rank: int):
        self.shape = torch.Size(shape)
        self.device_mesh = SimpleNamespace(size=lambda: num, get_local_rank=lambda: rank)

    def numel(self) -> int:
        return self.shape.numel()


def state_for(shape: tuple[int, ...], channels_last: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    like = torch.zeros(shape)
    like = like.to(memory_format=torch.channels_last) if channels_last else like
    state = {"step": torch.tensor(7), "remainder": torch.randint(-9, 9, shape, generator=generator).short()}
    for number in (1, 2):
        values = torch.randn(like.numel(), generator=generator)
        codes, absmax = quantize(values if number == 1 else values.abs(), number == 1)
        flat = torch.empty_like(like, dtype=torch.uint8)
        in_memory_order(flat).copy_(codes)
        state |= {f"state{number}": flat, f"absmax{number}": absmax}
    return state | ({"strides": torch.tensor(like.stride())} if channels_last else {})


@pytest.mark.parametrize(("shape", "num"), [((64, 96), 2), ((64, 96), 4), ((40, 512), 3), ((6, 1024), 8)])
def test_pieces_that_begin_with_a_block_are_carried_over_bit_for_bit(shape, num):
    state, cuts = state_for(shape), [Cut(shape, num, rank) for rank in range(num)]
    assert all(is_aligned(cut) for cut in cuts)
    pieces = [cut_parts(cut, state) for cut in cuts]
    for name in ("remainder", "state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), state[name]), name
    assert all(piece["step"] == 7 for piece in pieces)


@pytest.mark.parametrize(("shape", "num", "channels_last"), [((48, 4, 5, 5), 2, False), ((64, 32, 3, 3), 2, True)])
def test_other_pieces_are_requantized_within_half_a_gap(shape, num, channels_last):
    state, cuts = state_for(shape, channels_last), [Cut(shape, num, rank) for rank in range(num)]
    pieces = [cut_parts(cut, state) for cut in cuts]
    assert torch.equal(torch.cat([piece["remainder"] for piece in pieces]), state["remainder"])
    for number, signed in ((1, True), (2, False)):
        whole = torch.empty_like(state[f"state{number}"], dtype=torch.float32)
        flat = dequantize(in_memory_order(state[f"state{number}"]), state[f"absmax{number}"], signed)
        in_memory_order(whole).copy_(flat)
        gap = dynamic_map(signed).diff().max()
        first = 0
        for piece in pieces:
            codes, absmax = piece[f"state{number}"], piece[f"absmax{number}"]
            assert len(absmax) == -(-codes.numel() // BLOCK_SIZE)
            values = dequantize(codes.reshape(-1), absmax, signed)
            expected = whole[first : first + len(codes)].reshape(-1)
            bound = absmax.repeat_interleave(BLOCK_SIZE)[: len(values)] * gap / 2
            assert ((values - expected).abs() <= bound * 1.001).all()
            first += len(codes)


def test_state_of_another_weight_is_refused():
    state = state_for((64, 96))
    cut = Cut((64, 96), 2, 1)
    wrong = {"state1": state["state1"][:5], "absmax2": state["absmax2"][:3], "remainder": state["step"]}
    for name, part in wrong.items():
        with pytest.raises(UserError, match=name):
            cut_parts(cut, {**state, name: part})


def whole_weights() -> list[str]:
    """Return the names of cut weights that torch.distributed.checkpoint puts together otherwise than `whole_of`."""
    with world_of_all() as world:
        unet, _ = optimizer_in(world, {}, "bf16", "full")
        theirs = get_model_state_dict(unet, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        ours = {name: whole_of(p.detach()) for name, p in unet.named_parameters()}
        if not world.is_main:
            return list(theirs)
        assert theirs.keys() == ours.keys()
        return [name for name, x in ours.items() if not torch.equal(theirs[name], x)]


@pytest.mark.long
def test_whole_weights_are_those_of_torchs_state_dict(processes):
    """The other process gets none, as from `gathered`."""
    assert processes(whole_weights) == [[], []]
