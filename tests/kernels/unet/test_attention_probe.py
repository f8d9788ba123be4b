"""Which backend is chosen and why not the others, with fake backends on the CPU in place of a GPU's."""

import json
import re

import pytest
import torch

from safelight.kernels.unet import attention_backends, attention_probe, padded_attention
from safelight.kernels.unet.attention import Case, attend, choose_attention
from safelight.kernels.unet.attention_probe import device_name, probe, time_ms
from tests.kernels.unet.cpu_passes import CPU_PASSES

CPU = torch.device("cpu")
CASES = {Case(40, 2, 16, 16), Case(80, 2, 8, 8), Case(80, 2, 8, 77)}
works = attention_backends.CALLS["cpu-flash"]


class _Broken(torch.autograd.Function):
    """Identity whose backward pass returns NaN, or raises."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.how == "raises":
            raise RuntimeError("no kernel image is available for backward\nand more")
        return grad * float("nan"), None


def fails_backward(q, k, v, scale):
    return _Broken.apply(works(q, k, v, scale), "raises")


def returns_nan(q, k, v, scale):
    return _Broken.apply(works(q, k, v, scale), "nan")


def refuses_wide_heads(q, k, v, scale):
    if q.shape[-1] > 64:
        raise ValueError("head dim must be at most 64")
    return works(q, k, v, scale)


def computes_wrongly(q, k, v, scale):
    return works(q, k, v, 0.0)


def not_repeatable(q, k, v, scale):
    return works(q, k, v, scale) * (1 + 1e-3 * torch.rand(()))


@pytest.fixture
def fake_gpu(monkeypatch):
    """A function that replaces a GPU's backends and their times in ms; it returns the list of probes that are run."""

    def install(calls: dict, ms: dict | None = None) -> list:
        probed = []

        def watched(name, call):
            def watched_call(q, k, v, scale):
                probed.append((name, q.shape[-1]))
                return call(q, k, v, scale)

            return watched_call

        for name, call in calls.items():
            monkeypatch.setitem(attention_backends.CALLS, name, watched(name, call))
        monkeypatch.setattr(attention_probe, "backends_of", lambda device, dtype: tuple(calls))
        monkeypatch.setattr(attention_probe, "with_padded", lambda backends, head_dim: backends)
        monkeypatch.setattr(attention_probe, "can_time", lambda device: ms is not None)
        monkeypatch.setattr(attention_probe, "time_ms", lambda names, inputs: {name: ms[name] for name in names})
        return probed

    return install


def chosen(choice) -> dict[int, str]:
    return {case.head_dim: verdict.backend for case, verdict in choice.verdicts.items()}


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (fails_backward, "no kernel image is available for backward"),
        (returns_nan, "its gradient of q is not finite"),
        (refuses_wide_heads, "head dim must be at most 64"),
        (computes_wrongly, r"its output is wrong by \d+%"),
    ],
)
def test_a_backend_that_does_not_work_is_rejected_with_its_reason(fake_gpu, call, why):
    fake_gpu({"flash": call, "efficient": works, "math": works}, {"efficient": 1.0, "flash": 0.5})
    choice = choose_attention(CPU, torch.float32, CASES)
    verdict = choice.verdicts[Case(80, 2, 8, 8)]
    assert verdict.backend == "efficient"
    assert verdict.reasons.keys() == {"flash", "math"}
    assert re.fullmatch(why, verdict.reasons["flash"])
    assert verdict.reasons["math"] == "it materializes the attention matrix, and others work"
    # a backend is still used for head dims that it supports
    assert chosen(choice)[40] == ("flash" if call is refuses_wide_heads else "efficient")


def test_the_fastest_wins_and_ties_go_by_preference(fake_gpu):
    calls = {"flash": works, "cudnn": works, "efficient": works, "math": works}
    fake_gpu(calls, {"flash": 2.0, "cudnn": 1.0, "efficient": 1.2})
    verdict = choose_attention(CPU, torch.float32, CASES).verdicts[Case(40, 2, 16, 16)]
    assert verdict.backend == "cudnn"
    assert verdict.ms == {"flash": 2.0, "cudnn": 1.0, "efficient": 1.2}
    assert verdict.reasons["flash"] == "slower: 2.000 ms, 1.000 ms"
    fake_gpu(calls, {"flash": 1.04, "cudnn": 1.0, "efficient": 1.2})
    assert set(chosen(choose_attention(CPU, torch.float32, CASES)).values()) == {"flash"}


def test_math_is_the_last_resort_and_says_why(fake_gpu):
    fake_gpu({"flash": returns_nan, "math": attention_backends.CALLS["math"]}, {})
    choice = choose_attention(CPU, torch.float32, {Case(40)})
    assert chosen(choice) == {40: "math"}
    assert "falls back to math, which materializes the attention matrix" in str(choice)
    assert "flash: its gradient of q is not finite" in str(choice)


def test_only_backends_that_the_setting_allows_are_probed(fake_gpu):
    calls = {"flash": works, "xformers-flash": works, "xformers-cutlass": works, "efficient": works}
    times = {"flash": 1.0, "xformers-flash": 3.0, "xformers-cutlass": 2.0, "efficient": 1.5}
    probed = fake_gpu(calls, times)
    assert set(chosen(choose_attention(CPU, torch.float32, CASES, setting="xformers")).values()) == {"xformers-cutlass"}
    assert {name for name, _ in probed} == {"xformers-flash", "xformers-cutlass"}
    assert set(chosen(choose_attention(CPU, torch.float32, CASES, setting="efficient")).values()) == {"efficient"}
    assert set(chosen(choose_attention(CPU, torch.float32, CASES, setting="sdpa")).values()) == {"flash"}


def test_a_setting_whose_backends_all_fail_is_an_error_of_one_line(fake_gpu):
    fake_gpu({"flash": refuses_wide_heads, "efficient": works}, {"flash": 1.0, "efficient": 1.0})
    with pytest.raises(ValueError, match="head dim must be at most 64") as error:
        choose_attention(CPU, torch.float32, CASES, setting="flash")
    assert str(error.value) == (
        "model.attention = 'flash' does not work on cpu in float32 with head dim 80: "
        "flash: head dim must be at most 64; use another"
    )


def test_a_setting_that_a_device_lacks_is_an_error_of_one_line():
    with pytest.raises(ValueError, match="xformers has no CPU operator; use auto or sdpa"):
        choose_attention(CPU, torch.float32, CASES, setting="xformers")
    with pytest.raises(ValueError, match="it does not run on cpu"):
        choose_attention(CPU, torch.float32, CASES, setting="cudnn")
    with pytest.raises(ValueError, match=r"model\.attention 'quick' is unknown; use auto"):
        choose_attention(CPU, torch.float32, CASES, setting="quick")


def test_a_deterministic_run_takes_the_first_repeatable_backend_untimed(fake_gpu):
    calls = {"xformers-flash": works, "cudnn": works, "flash": not_repeatable, "efficient": works, "math": works}
    fake_gpu(calls, dict.fromkeys(calls, 1.0))
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        choice = choose_attention(CPU, torch.float32, {Case(40)})
    finally:
        torch.use_deterministic_algorithms(was)
    verdict = choice.verdicts[Case(40)]
    assert verdict.backend == "efficient"
    assert verdict.ms == {}
    assert verdict.reasons == {
        "xformers-flash": "its backward is not deterministic",
        "cudnn": "its backward is not deterministic",
        "flash": "two runs give different results",
    }


def test_a_resumed_run_keeps_its_backends(fake_gpu):
    calls = {"flash": works, "cudnn": works, "efficient": works}
    fake_gpu(calls, {"flash": 2.0, "cudnn": 1.0, "efficient": 3.0})
    first = choose_attention(CPU, torch.float32, CASES)
    saved = json.loads(json.dumps(first.to_dict()))
    # timings have changed since
    probed = fake_gpu(calls, {"flash": 1.0, "cudnn": 2.0, "efficient": 3.0})
    again = choose_attention(CPU, torch.float32, CASES, previous=saved)
    assert again.verdicts == first.verdicts
    assert {name for name, _ in probed} == {"cudnn"}
    assert again.notes == tuple(n for n in again.notes if "CPU operator" in n)
    assert json.loads(json.dumps(again.to_dict()))["cases"] == saved["cases"]
    # a new shape is chosen as usual
    more = choose_attention(CPU, torch.float32, {*CASES, Case(160)}, previous=saved)
    assert chosen(more) == {40: "cudnn", 80: "cudnn", 160: "flash"}


def test_a_resumed_run_that_cannot_keep_its_backends_says_why(fake_gpu):
    calls = {"flash": works, "cudnn": works}
    fake_gpu(calls, {"flash": 2.0, "cudnn": 1.0})
    saved = choose_attention(CPU, torch.float32, CASES).to_dict()
    fake_gpu({"flash": works, "cudnn": refuses_wide_heads}, {"flash": 2.0, "cudnn": 1.0})
    choice = choose_attention(CPU, torch.float32, CASES, previous=saved)
    assert chosen(choice) == {40: "cudnn", 80: "flash"}
    why = "does not work now: head dim must be at most 64"
    assert f"cudnn, so far the run's backend for head dim 80, {why}" in str(choice)
    fake_gpu(calls, {"flash": 2.0, "cudnn": 1.0})
    choice = choose_attention(CPU, torch.float32, CASES, setting="flash", previous=saved)
    assert "is not allowed by the setting now" in str(choice)
    other = choose_attention(CPU, torch.float32, CASES, previous={**saved, "device": "NVIDIA T4"})
    assert "the run's attention was chosen on NVIDIA T4 in float32; chosen again" in str(other)
    for damaged in ({"cases": 3}, {**saved, "cases": [{}]}):
        choice = choose_attention(CPU, torch.float32, CASES, previous=damaged)
        assert "does not say which attention it used" in str(choice)


def test_the_cpu_uses_sdpa_and_says_why_not_xformers():
    choice = choose_attention(CPU, torch.bfloat16, CASES)
    assert str(choice) == "attention on cpu, bfloat16: sdpa for head dim 40, 80 (xformers has no CPU operator)"
    assert chosen(choice) == {40: "cpu-flash", 80: "cpu-flash"}
    assert choice.to_dict()["device"] == device_name(CPU) == "cpu"


def test_meta_tensors_get_the_backend_of_a_gpu():
    meta = torch.device("meta")
    assert set(chosen(choose_attention(meta, torch.bfloat16, CASES)).values()) == {"flash"}
    assert set(chosen(choose_attention(meta, torch.float32, CASES)).values()) == {"efficient"}
    choice = choose_attention(meta, torch.float16, CASES, setting="xformers")
    q = torch.empty(1, 16, 2, 40, dtype=torch.float16, device=meta, requires_grad=True)
    assert attend(q, q, q, choice).shape == q.shape


def test_two_backends_of_one_head_dim_are_listed_with_their_lengths(fake_gpu):
    def no_short(q, k, v, scale):
        if k.shape[1] > q.shape[1]:
            raise RuntimeError("not for so few queries")
        return works(q, k, v, scale)

    fake_gpu({"flash": no_short, "efficient": works}, {"flash": 1.0, "efficient": 2.0})
    text = str(choose_attention(CPU, torch.float32, CASES))
    assert "sdpa efficient for head dim 80 (8 x 77)" in text
    assert "sdpa flash for head dim 40, 80 (8 x 8)" in text


def test_long_sequences_and_batches_are_capped_for_the_probe():
    gpu = torch.device("cuda")
    capped, batch = attention_probe._capped(Case(40, 8, 9216, 9216), gpu, 64)
    assert capped == Case(40, 8, 4096, 4096)
    assert batch == 2
    capped, batch = attention_probe._capped(Case(40, 8, 9216, 77), gpu, 64)
    assert capped == Case(40, 8, 4096, 77)
    assert batch == 64
    assert attention_probe._capped(Case(64, 20, 256, 256), CPU, 1)[0] == Case(64, 20, 64, 64)


def test_the_probe_is_cheap():
    """Less than two seconds for the twelve shapes of SD1.5 and SDXL."""
    sd15 = {Case(40 * 2**level, 8, 4096 >> 2 * level, keys) for level in range(3) for keys in (77, 4096 >> 2 * level)}
    sdxl = {Case(64, 10 * 2**level, 4096 >> 2 * level, keys) for level in range(2) for keys in (77, 4096 >> 2 * level)}
    choice = choose_attention(CPU, torch.float32, {*sd15, *sdxl, Case(160, 8, 64, 64), Case(160, 8, 64, 77)})
    assert len(choice.verdicts) == 12
    assert 0 < choice.probe_s < 2
    assert choice.to_dict()["probe_s"] == choice.probe_s


def test_the_probe_leaves_the_generator_alone():
    before = torch.get_rng_state()
    choose_attention(CPU, torch.float32, CASES)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", ["xformers-cutlass", "xformers-flash", "xformers-flash3", "cudnn", "flash"])
def test_gpu_backends_fail_the_probe_on_a_cpu_with_a_reason(backend):
    """With the real libraries, which refuse."""
    reason = probe(backend, attention_probe.make_inputs(Case(40), 1, CPU, torch.float32), False)
    assert reason
    assert "\n" not in reason


def test_an_xformers_built_for_another_cuda_says_so(monkeypatch):
    """As beside a torch for CUDA 13; xformers' operators would only say that they were not built with CUDA."""
    from xformers import _cpp_lib

    try:
        try:
            raise OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
        except OSError as error:
            raise OSError("Could not load this library: _C.so") from error
    except OSError as error:
        broken = _cpp_lib.xFormersInvalidLibException(None)
        broken.__cause__ = error
    inputs = attention_probe.make_inputs(Case(40), 1, CPU, torch.float16)
    attention_backends._xformers_operators.cache_clear()
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", broken)
    reason = probe("xformers-cutlass", inputs, False)
    assert reason.startswith("its library fails to load: libcudart.so.12: cannot open shared object file")
    monkeypatch.setattr(_cpp_lib, "_cpp_library_load_exception", None)
    assert "device=cpu" in probe("xformers-cutlass", inputs, False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_a_gpu_something_better_than_math_is_chosen_in_time(dtype):
    gpu = torch.device("cuda")
    cases = {Case(40, 8, 4096, 4096), Case(40, 8, 4096, 77), Case(80, 8, 1024, 1024), Case(160, 8, 64, 64)}
    choice = choose_attention(gpu, dtype, cases)
    assert all(verdict.backend != "math" for verdict in choice.verdicts.values())
    assert choice.probe_s < 2
    for case, verdict in choice.verdicts.items():
        inputs = attention_probe.make_inputs(case, 1, gpu, dtype)
        assert probe(verdict.backend, inputs, False) == ""
        assert time_ms([verdict.backend], inputs)[verdict.backend] > 0
        q, k, v, _ = inputs
        assert attend(q, k, v, choice).is_contiguous()


def test_heads_are_padded_where_that_is_faster(monkeypatch):
    """A width of a backend's tiles, if the head does not fill it; a draw goes to the plain backend."""
    backends = ("flash", "cudnn", "efficient")
    for name in backends:
        monkeypatch.setitem(attention_backends.CALLS, name, works)
    for name in ("flash", "cudnn"):
        monkeypatch.setitem(padded_attention.PASSES, name, CPU_PASSES)
    monkeypatch.setattr(attention_probe, "backends_of", lambda device, dtype: backends)
    monkeypatch.setattr(attention_probe, "can_time", lambda device: True)
    ms = {"flash": 1.0, "flash@64": 0.9, "flash@96": 0.96, "cudnn": 2.0, "cudnn@64": 2.0, "cudnn@128": 0.5}
    timed = []

    def times(names, inputs):
        timed.append(names)
        return {name: ms.get(name, 3.0) for name in names}

    monkeypatch.setattr(attention_probe, "time_ms", times)
    cases = {Case(40, 2, 16, 16), Case(80, 2, 8, 77), Case(64, 2, 16, 16)}
    choice = choose_attention(CPU, torch.float32, cases)
    assert chosen(choice) == {40: "flash@64", 64: "flash", 80: "cudnn@128"}
    assert timed == [
        ["flash", "flash@64", "cudnn", "cudnn@64", "efficient"],
        ["flash", "cudnn", "efficient"],
        ["flash", "flash@96", "cudnn", "cudnn@128", "efficient"],
    ]
    assert "sdpa flash padded to 64 for head dim 40" in str(choice)
    # a resumed run keeps what it began with, though another one is faster now
    ms |= {"flash": 0.1}
    again = choose_attention(CPU, torch.float32, cases, previous=json.loads(json.dumps(choice.to_dict())))
    assert chosen(again) == chosen(choice)
    # unless the setting does not allow it any more
    other = choose_attention(CPU, torch.float32, cases, setting="efficient", previous=choice.to_dict())
    assert set(chosen(other).values()) == {"efficient"}
    assert "flash@64, so far the run's backend for head dim 40, is not allowed by the setting now" in str(other)
    # and a made-up width is not run
    record = json.loads(json.dumps(choice.to_dict()).replace("flash@64", "flash@65"))
    assert chosen(choose_attention(CPU, torch.float32, cases, previous=record))[40] == "flash"


def test_flash_attention_4_is_named_where_it_is_missing():
    inputs = attention_probe.make_inputs(Case(40, 2, 16, 16), 1, CPU, torch.float32)
    for name in ("flash4", "flash4@64"):
        assert probe(name, inputs, False) == "flash-attn-4 is not installed"


def test_flash_attention_2_is_not_taken_for_4(tmp_path, monkeypatch):
    """Its package has the same name, flash_attn."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    inputs = attention_probe.make_inputs(Case(40, 2, 16, 16), 1, CPU, torch.float32)
    assert probe("flash4", inputs, False) == "flash-attn-4 is not installed"
