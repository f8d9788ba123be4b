"""Noising: the kernel's bits against numpy's, for all batches, memory orders and prediction types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelight.kernels.ops.noising import NoiseOptions, Purposes, draw_timesteps, key_words, noising, noising_reference
from safelight.kernels.philox import Key, Purpose, integers, normals, philox_numpy, words
from safelight.kernels.philox_triton import philox_normals, philox_words
from safelight.kernels.triton.jit import kernel
from safelight.trainer.models.noise_schedule import betas, rescale_zero_terminal_snr

if TYPE_CHECKING:
    import triton.language as tl

ALPHAS = torch.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000), 0)
SHAPES = [(1, 4, 8, 8), (3, 4, 9, 7), (2, 3, 5, 1), (1, 16, 33, 3)]
# name -> options; their values are exact neither in fp32 nor in binary
NOISES = {
    "plain": NoiseOptions(),
    "offset": NoiseOptions(offset=0.1),
    "perturbed": NoiseOptions(perturbation=0.1),
    "pyramid": NoiseOptions(pyramid_discount=0.3, pyramid_octaves=4),
    "all": NoiseOptions(offset=0.1, pyramid_discount=0.7, perturbation=0.2),
}
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


def normals_by_numpy(key, shape, options):
    """The noise that a target has, in numpy's scalar fp32 arithmetic, element by element for the pyramid."""
    f = np.float32
    noise = normals(key, shape)
    if options.pyramid_discount:
        noise = pyramid_by_numpy(key, noise, options)
    if options.offset:
        noise = noise + f(options.offset) * normals(key._replace(purpose=Purpose.OFFSET_NOISE), (shape[0], 1, 1))
    return noise


def pyramid_by_numpy(key, noise, options):
    f = np.float32
    _, height, width = noise.shape
    total, variance = noise * np.sqrt(f(2)), np.full((height, width), f(2))
    amplitude = f(1)
    for octave in range(1, options.pyramid_octaves):
        amplitude *= f(options.pyramid_discount)
        word = words(key._replace(purpose=Purpose.PYRAMID_SCALE), 4 * octave + 1)[-1]
        ratio = f(2) + f(word >> 8) / f(1 << 23)
        factor = np.prod(np.full(octave, ratio))
        rows, columns = max(1, int(f(height) / factor)), max(1, int(f(width) / factor))
        coarse = normals(key._replace(purpose=Purpose.PYRAMID_NOISE), (noise.shape[0], rows, columns), octave << 26)
        for y in range(height):
            for x in range(width):
                at_y, at_x = place(y, rows, height), place(x, columns, width)
                (low_y, high_y, part_y), (low_x, high_x, part_x) = at_y, at_x
                upper = (f(1) - part_x) * coarse[:, low_y, low_x] + part_x * coarse[:, low_y, high_x]
                lower = (f(1) - part_x) * coarse[:, high_y, low_x] + part_x * coarse[:, high_y, high_x]
                total[:, y, x] += amplitude * ((f(1) - part_y) * upper + part_y * lower)
                variance[y, x] += amplitude * amplitude * (spread(*at_y) * spread(*at_x))
        if 1 in (rows, columns):
            break
    return total / np.sqrt(variance)


def place(position, side, full):
    f = np.float32
    at = max((f(position) + f(0.5)) * (f(side) / f(full)) - f(0.5), f(0))
    return int(at), min(int(at) + 1, side - 1), at - f(int(at))


def spread(low, high, part):
    f = np.float32
    return f(1) if low == high else (f(1) - part) * (f(1) - part) + part * part


@pytest.mark.grid(
    shape=SHAPES,
    prediction_type=["epsilon", "v_prediction"],
    noise=["plain", "offset", "perturbed"],
    drawn=[True, False],
)
def test_the_kernels_bits_are_numpys(device, shape, prediction_type, noise, drawn):
    check_bits(device, shape, prediction_type, noise, drawn)


@pytest.mark.parametrize(
    ("shape", "prediction_type", "noise"),
    [
        ((3, 4, 9, 7), "epsilon", "pyramid"),
        ((1, 3, 5, 1), "v_prediction", "pyramid"),
        ((2, 3, 6, 11), "v_prediction", "all"),
    ],
)
def test_the_kernels_pyramid_has_numpys_bits(device, shape, prediction_type, noise):
    check_bits(device, shape, prediction_type, noise, True)


def check_bits(device, shape, prediction_type, noise, drawn):
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
        options=NOISES[noise],
        timesteps_B=timesteps,
    )
    assert result.noisy_BCHW.is_contiguous()
    assert result.target_BCHW.is_contiguous()
    f = np.float32
    for i, key in enumerate(keys):
        t = int(integers(key._replace(purpose=Purpose.TIMESTEP), 1000)[0]) if drawn else int(timesteps[i])
        assert int(result.timesteps_B[i]) == t
        a = ALPHAS[t].numpy()
        signal, sigma = np.sqrt(a), np.sqrt(f(1) - a)
        drawn_noise = normals_by_numpy(key, shape[1:], NOISES[noise])
        latents = mean[i].numpy() * f(0.18215)
        expected = {"epsilon": drawn_noise, "v_prediction": signal * drawn_noise - sigma * latents}
        added = drawn_noise
        if NOISES[noise].perturbation:
            own = normals(key._replace(purpose=Purpose.INPUT_NOISE), shape[1:])
            added = drawn_noise + f(NOISES[noise].perturbation) * own
        assert equal_bits(result.noisy_BCHW[i], torch.from_numpy(signal * latents + sigma * added))
        assert equal_bits(result.target_BCHW[i], torch.from_numpy(expected[prediction_type]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_with_a_logvar_it_agrees_with_the_reference_to_rounding(device, dtype):
    """exp is the device's own, so the last bits may differ and 16-bit outputs may round the other way."""
    mean, logvar = posterior((3, 4, 9, 7), dtype)
    arguments = (key_words(make_keys(3)), ALPHAS)
    noise = NoiseOptions(offset=0.05, perturbation=0.1)
    options = {"prediction_type": "v_prediction", "scaling_factor": 0.18215, "options": noise}
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
    mean, logvar = (x.to(device) for x in posterior((3, 4, 4, 5)))
    words = key_words(make_keys(3), device)
    options = {"prediction_type": "v_prediction", "scaling_factor": 0.2, "options": NOISES["pyramid"]}
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


def test_pyramid_noise_is_the_sum_that_other_trainers_take_of_the_same_octaves():
    """By torch's own interpolation, in float64; and every element is a standard normal, at the edges as well."""
    shape, options = (2, 24, 17), NoiseOptions(pyramid_discount=0.6, pyramid_octaves=3)
    keys = [Key(SEED, Purpose.NOISE, 5 + i, 0, 0) for i in range(256)]
    result = noising_reference(
        torch.zeros(len(keys), *shape),
        None,
        key_words(keys),
        ALPHAS,
        prediction_type="epsilon",
        scaling_factor=1.0,
        options=options,
    ).target_BCHW
    for key, noise in zip(keys[:8], result, strict=False):
        total = torch.from_numpy(normals(key, shape)).double() * 2**0.5
        variance = torch.full(shape[1:], 2.0, dtype=torch.float64)
        for octave in (1, 2):
            ratio = 2 + 2 * (int(words(key._replace(purpose=Purpose.PYRAMID_SCALE), 12)[4 * octave]) >> 8) / 2**24
            size = tuple(max(1, int(side / ratio**octave)) for side in shape[1:])
            own = key._replace(purpose=Purpose.PYRAMID_NOISE)
            coarse = torch.from_numpy(normals(own, (shape[0], *size), octave << 26)).double()

            def enlarged(x):
                return torch.nn.functional.interpolate(x[None], size=shape[1:], mode="bilinear")[0]

            total += 0.6**octave * enlarged(coarse)
            # the variance of a sum of independent normals: the squares of the weights of each
            for unit in torch.eye(size[0] * size[1], dtype=torch.float64).reshape(-1, 1, *size):
                variance += 0.36**octave * enlarged(unit)[0].square()
        torch.testing.assert_close(noise.double(), total / variance.sqrt(), rtol=1e-4, atol=2e-6)
    # 512 draws of each element: its mean square is 1 within 0.0625 standard deviations, five of them are allowed
    assert (result.square().mean((0, 1)) - 1).abs().max() < 5 * (2 / 512) ** 0.5
    assert abs(float(result.square().mean()) - 1) < 0.02
    # neighbours are alike, which plain noise's are not
    assert float((result[..., 1:] * result[..., :-1]).mean()) > 0.1


def test_perturbation_is_in_the_input_and_not_in_the_target(device):
    mean, _ = posterior((2, 4, 8, 8))
    arguments = (mean.to(device), None, key_words(make_keys(2), device), ALPHAS.to(device))
    for prediction_type in ("epsilon", "v_prediction"):
        options = {"prediction_type": prediction_type, "scaling_factor": 0.5}
        plain = noising(*arguments, **options)
        perturbed = noising(*arguments, **options, options=NoiseOptions(perturbation=0.1))
        assert torch.equal(plain.target_BCHW, perturbed.target_BCHW)
        sigma = (1 - ALPHAS[plain.timesteps_B.cpu()]).sqrt()[:, None, None, None]
        own = [normals(key._replace(purpose=Purpose.INPUT_NOISE), (4, 8, 8)) for key in make_keys(2)]
        difference = (perturbed.noisy_BCHW - plain.noisy_BCHW).cpu()
        torch.testing.assert_close(difference, 0.1 * sigma * torch.from_numpy(np.stack(own)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 7, 1000])
def test_timesteps_are_looked_up_in_a_table(device, num_timesteps):
    """The kernel's halvings find what numpy's search finds, in a table with repeated entries."""
    generator = np.random.default_rng(3)
    table = np.sort(generator.integers(0, 1 << 32, num_timesteps))
    table[: num_timesteps // 3] = 0
    table[num_timesteps - max(1, num_timesteps // 4) :] = 1 << 32
    keys = [Key(SEED, Purpose.NOISE, 31 * i, 2, i) for i in range(40)]
    alphas = torch.linspace(0.9, 0.1, num_timesteps)
    result = noising(
        torch.zeros(40, 1, 1, 1, device=device),
        None,
        key_words(keys, device),
        alphas.to(device),
        prediction_type="epsilon",
        scaling_factor=1.0,
        timestep_cdf_T=torch.from_numpy(table).to(device),
    )
    drawn = [int(words(key._replace(purpose=Purpose.TIMESTEP), 1)[0]) for key in keys]
    expected = [next(t for t in range(num_timesteps) if table[t] > word) for word in drawn]
    assert result.timesteps_B.cpu().tolist() == expected
    from_cpu = draw_timesteps(key_words(keys), Purpose.TIMESTEP, num_timesteps, torch.from_numpy(table))
    assert from_cpu.tolist() == expected


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="strength below 0"):
        NoiseOptions(perturbation=-0.1)
    with pytest.raises(ValueError, match=r"17 octaves of pyramid noise are outside 2 \.\. 16"):
        NoiseOptions(pyramid_octaves=17)
    with pytest.raises(ValueError, match="a table of 3 timesteps does not fit 1000"):
        noising(
            torch.zeros(1, 1, 1, 1),
            None,
            key_words(make_keys(1)),
            ALPHAS,
            prediction_type="epsilon",
            scaling_factor=1.0,
            timestep_cdf_T=torch.tensor([0, 1, 1 << 32]),
        )
