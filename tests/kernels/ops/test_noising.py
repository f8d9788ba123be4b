"""Noising: the kernel's bits against numpy's, for all batches, memory orders and prediction types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.kernels.ops.noising import Purposes, key_words, noising, noising_reference
from safelight.kernels.philox import Key, Purpose, integers, normals, philox_numpy
from safelight.kernels.philox_triton import philox_normals, philox_words
from safelight.kernels.triton.jit import kernel
from safelight.trainer.models.noise_schedule import betas, rescale_zero_terminal_snr

if TYPE_CHECKING:
    import triton.language as tl

ALPHAS = torch.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000), 0)
SHAPES = [(1, 4, 8, 8), (3, 4, 9, 7), (2, 3, 5, 1), (1, 16, 33, 3)]
SEED = 0xF122334455667788


def make_keys(batch):
    return [Key(SEED, Purpose.NOISE, 0xAABBCCDDEEFF00 + 977 * i, 3 + i, i) for i in range(batch)]


def posterior(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(11)
    return torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype) - 3


def equal_bits(a, b):
    return torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


@kernel(fp_fusion=False)
def _words_kernel(counter_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + i).to(tl.uint32)
    c1 = tl.load(counter_ptr + BLOCK + i).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * BLOCK + i).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * BLOCK + i).to(tl.uint32)
    k0 = tl.load(counter_ptr + 4 * BLOCK + i).to(tl.uint32)
    k1 = tl.load(counter_ptr + 5 * BLOCK + i).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr + i, w0.to(tl.int64))
    tl.store(out_ptr + BLOCK + i, w1.to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + i, w2.to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + i, w3.to(tl.int64))


@kernel(fp_fusion=False)
def _normals_kernel(words_ptr, out_ptr, BLOCK: tl.constexpr):
    block = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    c1 = tl.load(words_ptr).to(tl.uint32)
    c2 = tl.load(words_ptr + 1).to(tl.uint32)
    c3 = tl.load(words_ptr + 2).to(tl.uint32)
    k0 = tl.load(words_ptr + 3).to(tl.uint32)
    k1 = tl.load(words_ptr + 4).to(tl.uint32)
    z = philox_normals(block, c1, c2, c3, k0, k1, BLOCK)
    tl.store(out_ptr + tl.program_id(0) * 4 * BLOCK + tl.arange(0, 4 * BLOCK), z)


def test_philox_words_equal_numpys(device):
    """For random counters and keys, and for the all-zeros and all-ones known-answer vectors."""
    words = np.random.default_rng(12).integers(0, 1 << 32, (6, 512), dtype=np.int64)
    words[:, 0], words[:, 1] = 0, 0xFFFFFFFF
    out = torch.zeros(4, 512, dtype=torch.int64, device=device)
    _words_kernel[(1,)](torch.from_numpy(words).to(device), out, BLOCK=512)
    for i in range(512):
        expected = philox_numpy(tuple(words[:4, i].tolist()), tuple(words[4:, i].tolist()))
        assert out[:, i].tolist() == [int(w) for w in expected]
    assert out[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert out[:, 1].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_a_quarter_million_normals_equal_numpys(device):
    key = Key(SEED, Purpose.POSTERIOR, 0xAABBCCDDEEFF11, 0x1234, 0x5678)
    k0, k1, c1, c2, c3 = key.words()
    out = torch.zeros(1 << 18, device=device)
    _normals_kernel[(8,)](torch.tensor([c1, c2, c3, k0, k1], device=device), out, BLOCK=1 << 13)
    assert np.array_equal(out.cpu().numpy().view(np.int32), normals(key, (1 << 18,)).view(np.int32))


@pytest.mark.grid(
    shape=SHAPES,
    prediction_type=["epsilon", "v_prediction"],
    offset_noise=[0.0, 0.1],
    drawn=[True, False],
    memory_format=[torch.contiguous_format, torch.channels_last],
)
def test_the_kernels_bits_are_numpys(device, shape, prediction_type, offset_noise, drawn, memory_format):
    mean, _ = posterior(shape)
    keys = make_keys(len(mean))
    timesteps = None if drawn else torch.tensor([999, 0, 500][: len(keys)], device=device)
    result = noising(
        mean.to(device),
        None,
        key_words(keys, device),
        ALPHAS.to(device),
        prediction_type=prediction_type,
        scaling_factor=0.18215,
        offset_noise=offset_noise,
        timesteps_B=timesteps,
        memory_format=memory_format,
    )
    assert result.noisy_BCHW.is_contiguous(memory_format=memory_format)
    assert result.target_BCHW.is_contiguous(memory_format=memory_format)
    f = np.float32
    for i, key in enumerate(keys):
        t = int(integers(key._replace(purpose=Purpose.TIMESTEP), 1000)[0]) if drawn else int(timesteps[i])
        assert int(result.timesteps_B[i]) == t
        a = ALPHAS[t].numpy()
        signal, sigma = np.sqrt(a), np.sqrt(f(1) - a)
        noise = normals(key, shape[1:])
        if offset_noise:
            offset = normals(key._replace(purpose=Purpose.OFFSET_NOISE), (shape[1], 1, 1))
            noise = noise + f(offset_noise) * offset
        latents = mean[i].numpy() * f(0.18215)
        expected = {"epsilon": noise, "v_prediction": signal * noise - sigma * latents}
        assert equal_bits(result.noisy_BCHW[i].contiguous(), torch.from_numpy(signal * latents + sigma * noise))
        assert equal_bits(result.target_BCHW[i].contiguous(), torch.from_numpy(expected[prediction_type]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_with_a_logvar_it_agrees_with_the_reference_to_rounding(device, dtype):
    """exp is the device's own, so the last bits may differ and 16-bit outputs may round the other way."""
    mean, logvar = posterior((3, 4, 9, 7), dtype)
    arguments = (key_words(make_keys(3)), ALPHAS)
    options = {"prediction_type": "v_prediction", "scaling_factor": 0.18215, "offset_noise": 0.05}
    expected = noising_reference(mean, logvar, *arguments, **options)
    result = noising(mean.to(device), logvar.to(device), *(x.to(device) for x in arguments), dtype=dtype, **options)
    assert result.noisy_BCHW.dtype == dtype
    assert result.target_BCHW.dtype == torch.float32
    torch.testing.assert_close(result.target_BCHW.cpu(), expected.target_BCHW, rtol=1e-6, atol=1e-6)
    ulp = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(result.noisy_BCHW.cpu().float(), expected.noisy_BCHW, rtol=ulp, atol=ulp)


@given(
    seed=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 2**56 - 1),
    epoch=st.integers(0, 65535),
    times=st.integers(0, 65535),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_key_gives_the_references_bits(device, seed, sample, epoch, times):
    mean, _ = posterior((1, 4, 3, 3))
    words = key_words([Key(seed, Purpose.NOISE, sample, epoch, times)])
    options = {"prediction_type": "epsilon", "scaling_factor": 1.0}
    expected = noising_reference(mean, None, words, ALPHAS, **options)
    result = noising(mean.to(device), None, words.to(device), ALPHAS.to(device), **options)
    assert equal_bits(result.noisy_BCHW, expected.noisy_BCHW)
    assert torch.equal(result.timesteps_B.cpu(), expected.timesteps_B)


def test_a_samples_draws_do_not_depend_on_its_batch(device):
    mean, logvar = (x.to(device) for x in posterior((3, 4, 8, 8)))
    words = key_words(make_keys(3), device)
    options = {"prediction_type": "v_prediction", "scaling_factor": 0.2, "offset_noise": 0.1}
    together = noising(mean, logvar, words, ALPHAS.to(device), **options)
    single = noising(mean[1:2], logvar[1:2], words[1:2], ALPHAS.to(device), **options)
    for a, b in zip(together, single, strict=True):
        assert torch.equal(a[1:2], b)


def test_zero_terminal_snr(device):
    alphas = rescale_zero_terminal_snr(ALPHAS)
    assert alphas[-1] == 0
    mean, _ = posterior((1, 4, 8, 8))
    result = noising(
        mean.to(device),
        None,
        key_words(make_keys(1), device),
        alphas.to(device),
        prediction_type="v_prediction",
        scaling_factor=0.5,
        timesteps_B=torch.tensor([999], device=device),
    )
    assert torch.equal(result.noisy_BCHW[0].cpu(), torch.from_numpy(normals(make_keys(1)[0], (4, 8, 8))))
    assert torch.equal(result.target_BCHW.cpu(), -0.5 * mean)


def test_validation_uses_its_own_purposes(device):
    mean, _ = posterior((1, 4, 8, 8))
    purposes = Purposes(noise=Purpose.VALIDATION_NOISE, timestep=Purpose.VALIDATION_TIMESTEP)
    result = noising(
        mean.to(device),
        None,
        key_words(make_keys(1), device),
        ALPHAS.to(device),
        prediction_type="epsilon",
        scaling_factor=1.0,
        purposes=purposes,
    )
    key = make_keys(1)[0]._replace(purpose=Purpose.VALIDATION_NOISE)
    assert torch.equal(result.target_BCHW[0].cpu(), torch.from_numpy(normals(key, (4, 8, 8))))
    assert int(result.timesteps_B) == integers(key._replace(purpose=Purpose.VALIDATION_TIMESTEP), 1000)[0]


def test_bad_arguments_are_refused():
    mean, _ = posterior((2, 4, 3, 3))
    words = key_words(make_keys(2))
    with pytest.raises(ValueError, match="prediction type 'x0' is unknown"):
        noising(mean, None, words, ALPHAS, prediction_type="x0", scaling_factor=1.0)
    with pytest.raises(ValueError, match=r"key words of \(1, 5\) do not fit"):
        noising(mean, None, words[:1], ALPHAS, prediction_type="epsilon", scaling_factor=1.0)
    with pytest.raises(ValueError, match="logvar has shape"):
        noising(mean, mean[:1], words, ALPHAS, prediction_type="epsilon", scaling_factor=1.0)
