"""Optimizers of torch and bitsandbytes: they train, they say what they cannot continue, and paged moments stay
paged."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from safelight.kernels.ops.noising import Noised
from safelight.trainer.checkpoint.files import folder_of
from safelight.trainer.config.schema import Loss, Optimizer
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.registry.optimizers import OPTIMIZERS
from safelight.trainer.step.step import accumulate
from safelight.trainer.train import train
from tests.trainer.checkpoints import state_tensors

pytest.importorskip("bitsandbytes")
UNET_FILE = "diffusion_pytorch_model.safetensors"
PAGED = Optimizer(name="bnb_paged_adamw8bit", lr=1e-3)


@pytest.mark.parametrize(
    ("name", "lr", "options"),
    [
        ("adafactor", 1e-3, {}),
        ("bnb_lion8bit", 1e-4, {"betas": (0.9, 0.99)}),
        ("adamw", 1e-4, {}),
        # five steps are too few for its estimate to rise from 1e-6
        ("prodigy", 1.0, {"d0": 1e-4}),
        ("schedulefree_adamw", 1e-4, {}),
    ],
)
@pytest.mark.long
def test_the_tiny_base_learns(name, lr, options):
    """The loss of one batch falls in every one of a few steps on it."""
    unet = load_unet(resolve_base("tiny"), 0).train()
    optimizer = make_optimizer(unet, Optimizer(name=name, **options), torch.bfloat16)
    schedule = make_schedule(resolve_base("tiny").config_of("scheduler"))
    generator = torch.Generator().manual_seed(0)
    latents, target = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    text = torch.randn(2, 48, unet.config.cross_attention_dim, generator=generator)
    noised = Noised(latents, target, torch.tensor([100, 700]))
    conditioning = TextConditioning(text)
    losses = []
    for _ in range(5):
        losses.append(
            float(accumulate(unet, noised, conditioning, schedule, Loss(), 2, optimizer.loss_scale.scale).mean())
        )
        optimizer.set_hyper(lr, 0.01, 1.0)
        assert optimizer.step()[1]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("adafactor", 3e-3),
        ("bnb_lion8bit", 1e-4),
        ("prodigy", 1.0),
        ("schedulefree_adamw", 1e-3),
        ("schedulefree_radam", 1e-3),
    ],
)
@pytest.mark.long
def test_a_resumed_run_equals_one_that_never_stopped(small_config, tmp_path, name, lr, precision):
    averages = OPTIMIZERS[name].averages_weights
    ends = []
    for num_steps in ([4], [2, 4]):
        run_dir = tmp_path / f"{name} {len(num_steps)}"
        for place, max_steps in enumerate(num_steps):
            config = small_config(
                run={"dir": str(run_dir)},
                model={"precision": precision},
                optimizer={"name": name, "lr": lr},
                stage=[{"epochs": 2}],
                train={"max_steps": max_steps, "batch_size": 8, "ema_decay": 0.0 if averages else 0.9},
                save={"every_steps": 2, "every_epochs": 0},
                validate={"every_epochs": 0},
                sample={"every_epochs": 0},
            )
            train(config, resume=place > 0)
        folder = folder_of(run_dir, 4)
        ends.append([load_file(folder / file) for file in ("state.safetensors", f"unet/{UNET_FILE}")])
    for one, other in zip(*ends, strict=True):
        assert one.keys() == other.keys()
        assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_moments_of_another_kind_are_refused():
    """Lion's one moment is not AdamW's two, and blocks of channels-last memory are not those of contiguous memory."""
    states = {}
    for name in ("bnb_adamw8bit", "bnb_lion8bit", "adamw8bit"):
        conv = torch.nn.Conv2d(32, 32, 3).to(memory_format=torch.channels_last)
        optimizer = make_optimizer(conv, Optimizer(name=name))
        for p in conv.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        states[name] = state_tensors(optimizer)
    for name, state, message in (
        ("bnb_lion8bit", "bnb_adamw8bit", "moments of weight are not of the kind that bnb_lion8bit keeps"),
        ("bnb_adamw8bit", "bnb_lion8bit", "moments of weight are not of optimizer bnb_adamw8bit"),
        ("bnb_adamw8bit", "adamw8bit", "channels-last memory, which bnb_adamw8bit does not support"),
    ):
        with pytest.raises(ValueError, match=message):
            make_optimizer(torch.nn.Conv2d(32, 32, 3), Optimizer(name=name)).load_state_tensors(states[state])


class Net(torch.nn.Module):
    """Moments that bitsandbytes pages (from 100,000 elements), 8-bit moments that it does not page, and fp32
    moments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(400, 300)
        self.second = torch.nn.Linear(300, 20)


def take_steps(net, optimizer, first: int, last: int) -> None:
    optimizer.set_hyper(1e-3, 0.01, 0.5)
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


def paged_moments(optimizer) -> dict[str, bool]:
    """Return whether each parameter's first moment is in managed memory."""
    states = {name: optimizer.parameter_state(name)["state1"] for name in optimizer.parameters}
    return {name: getattr(state, "is_paged", False) for name, state in states.items()}


LARGE_ONLY = {"first.weight": True, "first.bias": False, "second.weight": False, "second.bias": False}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resume_fills_the_buffers_that_bitsandbytes_makes(monkeypatch, dtype):
    """Ordinary memory with the mark that bitsandbytes gives to managed memory."""
    import bitsandbytes.optim

    def buffer(self, p, dtype=torch.float32):
        made = torch.zeros_like(p, dtype=dtype)
        made.is_paged = p.numel() >= 100_000
        return made

    monkeypatch.setattr(bitsandbytes.optim.PagedAdamW8bit, "get_state_buffer", buffer)
    monkeypatch.setattr("bitsandbytes.functional.prefetch_tensor", lambda *a, **k: None)
    monkeypatch.setattr("safelight.trainer.optim.optimizer.memory_mode", lambda *_: "fp32")
    net = Net()
    optimizer = make_optimizer(net, PAGED, dtype)
    take_steps(net, optimizer, 0, 3)
    other = copy.deepcopy(net)
    resumed = make_optimizer(other, PAGED, dtype)
    resumed.load_state_tensors(state_tensors(optimizer))
    assert paged_moments(resumed) == LARGE_ONLY
    for one, its_optimizer in ((net, optimizer), (other, resumed)):
        take_steps(one, its_optimizer, 3, 6)
    found, expected = state_tensors(resumed), state_tensors(optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {x.dtype for key, x in found.items() if key.startswith("state1/")} == {torch.uint8, torch.float32}
    with pytest.raises(
        ValueError, match=r"moments of first\.weight are not of the kind that bnb_paged_adamw8bit keeps"
    ):
        resumed.load_state_tensors({**expected, "state1/first.weight": torch.zeros(300, 400)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_moments_are_paged_before_and_after_a_resume(dtype):
    ends = []
    for last in (6, 3):
        net = Net().cuda()
        optimizer = make_optimizer(net, PAGED, dtype)
        take_steps(net, optimizer, 0, last)
        ends.append((net, optimizer))
    other = copy.deepcopy(ends[1][0])
    resumed = make_optimizer(other, PAGED, dtype)
    resumed.load_state_tensors(state_tensors(ends[1][1]))
    assert paged_moments(resumed) == LARGE_ONLY
    take_steps(other, resumed, 3, 6)
    found, expected = state_tensors(resumed), state_tensors(ends[0][1])
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_adamw_takes_the_step_of_torchs_own():
    """Bit for bit, also where tensors have taken unequal numbers of steps before, with a gradient that is clipped and
    one that is not."""
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    optimizer = make_optimizer(module, Optimizer(name="adamw", betas=(0.8, 0.95)))
    theirs = copy.deepcopy(module)
    library = torch.optim.AdamW(theirs.parameters(), betas=(0.8, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)

    def step(size: float) -> None:
        for p, q in zip(module.parameters(), theirs.parameters(), strict=True):
            p.grad = size * torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.set_hyper(1e-2, 0.1, 1.0)
        norm, _ = optimizer.step()
        if norm > 1:
            torch._foreach_mul_([q.grad for q in theirs.parameters()], 1 / (norm + 1e-6))
        library.param_groups[0].update(lr=1e-2, weight_decay=0.1)
        library.step()
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), theirs.parameters(), strict=True))

    step(10)
    step(1e-3)
    state = state_tensors(optimizer)
    steps = [key for key in state if key.startswith("step/")]
    assert len({state[key].data_ptr() for key in steps}) == len(steps) == 4
    state[steps[1]] = torch.tensor(7.0)
    optimizer.load_state_tensors(state)
    name = steps[1].removeprefix("step/")
    library.state[dict(theirs.named_parameters())[name]]["step"].fill_(7)
    step(10)
    step(1e-3)
    assert state_tensors(optimizer)[steps[1]] == 9
    assert state_tensors(optimizer)[steps[0]] == 4
