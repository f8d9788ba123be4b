"""Batch independence, noise that depends on the sample alone, precisions."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from safelight.data.batches import Batch
from safelight.data.buckets import Bucket
from safelight.kernels.ops.noising import Noised, NoiseOptions
from safelight.kernels.optim.split_weights import split
from safelight.trainer.config.schema import Loss, Optimizer
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.models.noise_schedule import NoiseSchedule, make_schedule
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.step.step import (
    StepContext,
    StepSettings,
    accumulate,
    add_noise,
    sample_losses,
    to_device,
    train_step,
    upload,
)
from tests.trainer.checkpoints import state_tensors

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
CPU = torch.device("cpu")
SEED, SCALE, LR = 5, 0.7, 1e-4


def make_batch(number: int, size: int = 4, has_posterior: bool = True) -> Batch:
    """Return a batch of made-up rows; sample i of batch n has id 1000 n + i."""
    generator = torch.Generator().manual_seed(number)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return Batch(
        draw(size, 4, 8, 8),
        draw(size, 4, 8, 8) - 4 if has_posterior else None,
        TextConditioning(draw(size, 6, 16)),
        tuple(1000 * number + i for i in range(size)),
        (0,) * size,
        Bucket(32, 32),
    )


def make_noisy(
    batch: Batch, schedule: NoiseSchedule, scale: float, seed: int, epoch: int, offset: float = 0.0
) -> Noised:
    return add_noise(upload(batch, CPU, seed, epoch), schedule, scale, NoiseOptions(offset))


def halves(batch: Batch, size: int) -> list[Batch]:
    """Return the batch in pieces of `size`."""
    return [
        replace(
            batch[i : i + size],
            sample_ids=batch.sample_ids[i : i + size],
            occurrences=batch.occurrences[i : i + size],
        )
        for i in range(0, len(batch.sample_ids), size)
    ]


@pytest.mark.parametrize("loss", [Loss(), Loss(min_snr_gamma=5.0), Loss(offset_noise=0.1)])
def test_accumulated_micro_batches_equal_the_larger_batch(small_unet, loss):
    schedule = make_schedule(SCHEDULER)
    batch = make_batch(77)
    gradients = []
    for parts in ([batch], halves(batch, 2), halves(batch, 1)):
        unet = copy.deepcopy(small_unet)
        for part in parts:
            noisy = make_noisy(part, schedule, SCALE, SEED, 0, loss.offset_noise)
            accumulate(unet, noisy, part.conditioning, schedule, loss, 4, torch.tensor(1.0))
        gradients.append([p.grad for p in unet.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item() + 1e-9)


def test_noise_and_timesteps_depend_on_the_sample_alone():
    """The same bits in a batch of 4, 2 or 1, and in another order."""
    schedule = make_schedule(SCHEDULER)
    batch = make_batch(78)
    whole = make_noisy(batch, schedule, SCALE, SEED, 2)
    for size in (1, 2):
        parts = [make_noisy(part, schedule, SCALE, SEED, 2) for part in halves(batch, size)]
        assert torch.equal(torch.cat([p.noisy_BCHW for p in parts]), whole.noisy_BCHW)
        assert torch.equal(torch.cat([p.target_BCHW for p in parts]), whole.target_BCHW)
        assert torch.equal(torch.cat([p.timesteps_B for p in parts]), whole.timesteps_B)
    turned = replace(batch.map(lambda x: x.flip(0)), sample_ids=batch.sample_ids[::-1])
    assert torch.equal(make_noisy(turned, schedule, SCALE, SEED, 2).noisy_BCHW.flip(0), whole.noisy_BCHW)


def test_draws_change_with_epoch_occurrence_and_seed():
    schedule = make_schedule(SCHEDULER)
    batch = make_batch(79, 1)
    first = make_noisy(batch, schedule, SCALE, SEED, 0).target_BCHW
    again = make_noisy(replace(batch, occurrences=(1,)), schedule, SCALE, SEED, 0).target_BCHW
    for other in (
        again,
        make_noisy(batch, schedule, SCALE, SEED, 1).target_BCHW,
        make_noisy(batch, schedule, SCALE, SEED + 1, 0).target_BCHW,
    ):
        assert abs(np.corrcoef(first.flatten(), other.flatten())[0, 1]) < 0.3


def test_without_a_posterior_the_latent_is_the_row_itself():
    schedule = make_schedule(SCHEDULER)
    batch = make_batch(80, 2, has_posterior=False)
    noisy = make_noisy(batch, schedule, SCALE, SEED, 0)
    a = schedule.alphas_cumprod_T[noisy.timesteps_B].view(-1, 1, 1, 1)
    latents = (noisy.noisy_BCHW - (1 - a).sqrt() * noisy.target_BCHW) / a.sqrt()
    torch.testing.assert_close(latents, batch.mean_BCHW * SCALE, rtol=1e-3, atol=1e-3)


def test_a_short_batch_pulls_as_hard_as_its_samples(small_unet):
    """Two samples of a nominal four give half of the gradient of their mean."""
    schedule = make_schedule(SCHEDULER)
    batch = make_batch(81, 2)
    noisy = make_noisy(batch, schedule, SCALE, SEED, 0)
    short, mean = copy.deepcopy(small_unet), copy.deepcopy(small_unet)
    accumulate(short, noisy, batch.conditioning, schedule, Loss(), 4, torch.tensor(1.0))
    sample_losses(mean, noisy, batch.conditioning).mean().backward()
    for a, b in zip(short.parameters(), mean.parameters(), strict=True):
        torch.testing.assert_close(2 * a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "bnb_adamw8bit", "adamw8bit"])
def test_sixteen_bit_weights_follow_the_fp32_run(small_unet, dtype, name):
    """At lr 1e-6 a bare 16-bit weight would not move at all; with the fp32 master the run follows fp32's."""
    ends = {}
    for kind in (torch.float32, dtype):
        unet = copy.deepcopy(small_unet)
        optimizer = make_optimizer(unet, Optimizer(name=name, lr=1e-6), kind)
        schedule = make_schedule(SCHEDULER)
        for n in range(5):
            result = train_step(
                StepContext(unet, optimizer, schedule, SCALE, Loss()),
                [make_batch(n)],
                StepSettings(4, 1e-6, 0.01, 1.0),
                seed=SEED,
                epoch=0,
            )
            assert result.is_applied
        assert next(unet.parameters()).dtype == kind
        ends[kind] = torch.cat([optimizer.value(name).flatten() for name in optimizer.parameters]).clone()
        if kind == dtype:
            rounded = torch.cat([p.detach().flatten().float() for p in unet.parameters()])
            # ours rounds ties away from zero, the others to even
            nearest = split(ends[kind], dtype, "fp32")[0] if name == "adamw8bit" else ends[kind].to(dtype)
            assert torch.equal(rounded, nearest.float())
    # the master begins at the fp32 weights themselves, not at what 16 bits left of them
    start = torch.cat([p.detach().flatten() for p in small_unet.parameters()])
    moved, expected = ends[dtype] - start, ends[torch.float32] - start
    assert moved.abs().max() < 20 * 1e-6
    assert (moved != 0).float().mean() > 0.99
    cosine = F.cosine_similarity(moved, expected, dim=0)
    assert cosine > 0.8


@pytest.mark.parametrize("name", ["adamw", "bnb_adamw8bit", "adamw8bit"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing(small_unet, name, bad):
    unet = copy.deepcopy(small_unet)
    optimizer = make_optimizer(unet, Optimizer(name=name, lr=1e-3))
    context = StepContext(unet, optimizer, make_schedule(SCHEDULER), SCALE, Loss())

    def step(batch: Batch):
        return train_step(context, [batch], StepSettings(4, 1e-3, 0.01, 1.0), seed=SEED, epoch=0)

    step(make_batch(0))
    weights = {k: v.clone() for k, v in unet.state_dict().items()}
    state = state_tensors(optimizer)
    poisoned = make_batch(1)
    poisoned.mean_BCHW[0, 0, 0, 0] = bad
    result = step(poisoned)
    assert not result.is_applied
    assert all(torch.equal(v, weights[k]) for k, v in unet.state_dict().items())
    after = state_tensors(optimizer)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[k], state[k]) for k in state)
    assert step(make_batch(2)).is_applied


def test_fp16_overflow_halves_the_scale_and_training_goes_on(small_unet):
    unet = copy.deepcopy(small_unet).half()
    optimizer = make_optimizer(unet, Optimizer(name="adamw", lr=1e-4))
    optimizer.loss_scale.scale = torch.tensor(2.0**24)
    schedule = make_schedule(SCHEDULER)
    taken = []
    for n in range(14):
        result = train_step(
            StepContext(unet, optimizer, schedule, SCALE, Loss()),
            [make_batch(n)],
            StepSettings(4, 1e-4, 0.01, 1.0),
            seed=SEED,
            epoch=0,
        )
        taken.append(result.is_applied)
    assert not taken[0]
    assert taken[-1]
    assert optimizer.loss_scale.scale.item() == 2.0 ** (24 - taken.count(False))
    assert all(torch.isfinite(p).all() for p in unet.parameters())


def test_clipping_bounds_the_gradient_that_adam_sees(small_unet):
    """With beta1 = 0 the first moment is the clipped gradient itself."""
    unet = copy.deepcopy(small_unet)
    optimizer = make_optimizer(unet, Optimizer(name="adamw", lr=1e-4, betas=(0.0, 0.9)))
    result = train_step(
        StepContext(unet, optimizer, make_schedule(SCHEDULER), SCALE, Loss()),
        [make_batch(3)],
        StepSettings(4, 1e-4, 0.0, 0.01),
        seed=SEED,
        epoch=0,
    )
    assert result.grad_norm > 0.05
    state = state_tensors(optimizer)
    seen = torch.linalg.vector_norm(torch.cat([v.flatten() for k, v in state.items() if k.startswith("exp_avg/")]))
    assert seen.item() == pytest.approx(0.01, rel=1e-3)


def test_gradient_checkpointing_gives_the_same_gradients(small_unet):
    """Recomputing runs the same operations: equal bits, and fewer tensors saved for backward."""
    schedule = make_schedule(SCHEDULER)
    batch = make_batch(4)
    noisy = make_noisy(batch, schedule, SCALE, SEED, 0)
    gradients, saved = [], []
    for is_checkpointed in (False, True):
        unet = copy.deepcopy(small_unet)
        if is_checkpointed:
            unet.enable_gradient_checkpointing()
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = sample_losses(unet, noisy, batch.conditioning)
        losses.mean().backward()
        gradients.append([p.grad for p in unet.parameters()])
        saved.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert saved[1] < 0.7 * saved[0]


@pytest.mark.parametrize(("where", "expected"), [("cuda", ["pin", ("cuda", True)]), ("cpu", [("cpu", True)])])
def test_rows_go_to_a_gpu_by_way_of_pinned_memory(where, expected):
    class Host:
        device = torch.device("cpu")

        def __init__(self):
            self.calls = []

        def pin_memory(self):
            self.calls.append("pin")
            return self

        def to(self, device, non_blocking):
            self.calls.append((device.type, non_blocking))
            return self

    assert to_device(Host(), torch.device(where)).calls == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_rows_are_the_hosts():
    x = torch.randn(33, 77, 768)
    device = torch.device("cuda")
    assert torch.equal(to_device(x, device).cpu(), x)
    assert torch.equal(to_device(x.to(device), device).cpu(), x)
