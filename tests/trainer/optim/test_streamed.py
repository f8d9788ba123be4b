"""Memory mode streamed on a small SDXL: the bits of paged in every checkpointing mode, when it resumes, too."""

import copy
import itertools

import pytest
import torch

from safelight.kernels.unet import patch
from safelight.kernels.unet.checkpointing import MODES, apply_checkpointing
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.optim.optimizer import make_optimizer
from tests.trainer.families.small_sdxl import SECOND_WIDTH, small_unet


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return small_unet()


def make(unet, memory, checkpointing="full", patched=False, dtype=torch.bfloat16):
    unet = copy.deepcopy(unet)
    if patched:
        patch.apply(unet)
    apply_checkpointing(unet, checkpointing)
    optimizer = make_optimizer(unet, Optimizer(fused_backward=True, memory=memory), dtype, 3)
    if patched:
        patch.repack(unet)
    return unet, optimizer


def predict(unet, number, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(number)
    sample, text, pooled = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((2, 4, 8, 8), (2, 6, 96), (2, SECOND_WIDTH))
    )
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2, dtype=dtype)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return unet(sample, torch.tensor([100, 700]), text, added_cond_kwargs=added).sample


def step(unet, optimizer, number, micro_steps=1):
    optimizer.set_hyper(1e-3, 0.01, 0.5)
    for micro in range(micro_steps):
        is_last = micro == micro_steps - 1
        if is_last:
            optimizer.prepare_backward()
        with optimizer.buffers.micro_step(micro == 0, is_last):
            predict(unet, 10 * number + micro).float().square().mean().backward()
    return optimizer.step()[0]


@torch.no_grad()
def validated(unet):
    unet.eval()
    predicted = predict(unet, 99)
    unet.train()
    return predicted


def everything(unet, optimizer) -> dict:
    """Return copies of weights and state."""
    # the state first: it waits for weights on their way to host memory
    state = {name: x.clone() for name, x in optimizer.live_state().items()}
    return state | {name: x.clone() for name, x in unet.state_dict().items()}


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


WAYS = list(itertools.product(MODES, (False, True)))


@pytest.mark.parametrize(
    ("checkpointing", "patched"),
    [pytest.param(*way, marks=() if way == ("offload", True) else pytest.mark.slow) for way in WAYS],
)
def test_streamed_has_the_bits_of_paged(unet, checkpointing, patched):
    ends = []
    for memory in ("paged", "streamed"):
        copied, optimizer = make(unet, memory, checkpointing, patched)
        norms, predicted = [], []
        for number in range(2):
            norms.append(step(copied, optimizer, number))
            predicted.append(validated(copied))
        ends.append({"norms": torch.stack(norms), "predicted": torch.stack(predicted), **everything(copied, optimizer)})
    assert_equal(*ends)
    stream = optimizer.stream
    assert stream.num_bytes > 0.5 * sum(2 * p.numel() for p in copied.parameters())
    # each block came in for forward, backward and validation, except those that were still there, and out once a step
    assert 5 * stream.num_bytes < stream.bytes_inward <= 6 * stream.num_bytes
    assert stream.bytes_outward == pytest.approx(2 * stream.num_bytes, rel=0.01)


@pytest.mark.slow
def test_gradients_are_accumulated_as_paged_does(unet):
    ends = []
    for memory in ("paged", "streamed"):
        copied, optimizer = make(unet, memory)
        for number in range(2):
            step(copied, optimizer, number, micro_steps=2)
        ends.append(everything(copied, optimizer))
    assert_equal(*ends)


def test_a_run_goes_on_from_streamed_to_paged_and_back(unet):
    whole, optimizer = make(unet, "paged")
    for number in range(3):
        step(whole, optimizer, number)
    expected, saved = everything(whole, optimizer), None
    for number, memory in enumerate(("streamed", "paged", "streamed")):
        copied, following = make(unet, memory)
        if saved is not None:
            copied.load_state_dict({name: saved[name] for name in copied.state_dict()})
            following.load_state_tensors({name: x for name, x in saved.items() if "/" in name})
        step(copied, following, number)
        # a second time, after its weights have been in use
        saved = everything(copied, following)
        following.load_state_tensors({name: x for name, x in saved.items() if "/" in name})
        assert_equal(saved, everything(copied, following))
    assert_equal(saved, expected)


def test_what_streamed_cannot_do_is_refused(unet):
    for settings, reason in (
        ({"fused_backward": False}, "set optimizer.fused_backward to true"),
        ({"clipping": "global"}, "optimizer.clipping to auto"),
        ({"name": "adamw"}, "memory streamed needs adamw8bit"),
    ):
        with pytest.raises(ValueError, match=reason):
            make_optimizer(unet, Optimizer(memory="streamed", **settings), torch.bfloat16)
    with pytest.raises(ValueError, match="is for 16-bit weights"):
        make_optimizer(unet, Optimizer(memory="streamed"), torch.float32)
    with pytest.raises(ValueError, match="paged or streamed: the average"):
        parse_config({"optimizer": {"memory": "streamed"}, "train": {"ema_decay": 0.9}}, "here")
    # it steps inside backward without being told
    assert Optimizer(memory="streamed").is_fused
