"""Fixtures for testing kernels: interpreted on the CPU, compiled on a GPU, with PyTorch's own error as the tolerance.

`@pytest.mark.grid(dtype=[...], shape=[...])` runs a test over the product of its factors. A subset that covers every
pair of values is part of `make test`; the other cases are marked slow.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

INTERPRETED_AND_COMPILED = [
    pytest.param("cpu", id="interpreted"),
    pytest.param(
        "cuda",
        id="compiled",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def pytest_configure(config):
    config.addinivalue_line("markers", "grid(**factors): their product; cases beyond a pairwise cover are slow")


def pairwise_cover(factors: list[list]) -> set[tuple[int, ...]]:
    """Return index tuples that together cover every pair of values of any two factors, chosen greedily."""
    cases = list(itertools.product(*(range(len(values)) for values in factors)))
    pairs = {
        case: {(i, j, case[i], case[j]) for i, j in itertools.combinations(range(len(factors)), 2)} for case in cases
    }
    missing, chosen = set().union(*pairs.values()), set()
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen or set(cases)


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("grid")
    if marker is None:
        return
    names, factors = list(marker.kwargs), [list(values) for values in marker.kwargs.values()]
    cover = pairwise_cover(factors)
    cases = []
    for indices in itertools.product(*(range(len(values)) for values in factors)):
        values = [factor[i] for factor, i in zip(factors, indices, strict=True)]
        label = "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in values)
        cases.append(pytest.param(*values, id=label, marks=[] if indices in cover else [pytest.mark.slow]))
    metafunc.parametrize(names, cases)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill torch.empty with NaN (or the largest integer), so that elements a kernel does not write are noticed."""

    def fill(make: Callable) -> Callable:
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            x.detach().fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)
            return x

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, fill(getattr(torch, name)))


def _round_bfloat16_like_hardware(monkeypatch) -> None:
    """Make Triton 3.7's interpreter round fp32 to bf16 to nearest even, as every GPU does; it truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
            return TensorHandle(rounded.view(np.uint16), tl.bfloat16)
        return original(self, src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)


@pytest.fixture(params=INTERPRETED_AND_COMPILED)
def device(request, monkeypatch, poisoned) -> Iterator[torch.device]:
    """The device that kernels run on: the CPU, interpreted, or a GPU, compiled."""
    if request.param == "cpu":
        request.getfixturevalue("interpreted")
        _round_bfloat16_like_hardware(monkeypatch)
    # masked lanes may overflow or divide by zero, about which numpy would warn
    with np.errstate(all="ignore"):
        yield torch.device(request.param)


def _leaves(inputs: dict, change: Callable) -> dict:
    """Return the inputs with `change` applied to each tensor; floating-point ones are leaves that require gradients."""
    leaves = {}
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor):
            x = change(x.detach())
            x = x.requires_grad_() if x.is_floating_point() else x
        leaves[name] = x
    return leaves


def _run(function: Callable, leaves: dict, gradients: list | None, seed: int) -> tuple[dict, list]:
    """Return outputs and gradients by name, and the upstream gradients used."""
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if gradients is None:
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
        # in the output's own memory order
        gradients = [torch.empty_like(y).copy_(g) for y, g in zip(outputs, gradients, strict=True)]
    trained = {name: x for name, x in leaves.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    computed = torch.autograd.grad(
        outputs, list(trained.values()), [g.to(y) for g, y in zip(gradients, outputs, strict=True)]
    )
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results |= {f"gradient of {name}": g for name, g in zip(trained, computed, strict=True)}
    return results, gradients


@pytest.fixture
def check_op(device) -> Callable[..., dict]:
    """A function that checks an op against plain PyTorch, forward and backward, and returns the op's results by name.

    check(ours, plain, inputs): both functions take the inputs by name. The truth is `plain` in fp64 on the same values,
    and max |ours - truth| <= 2 max |plain in the inputs' dtype - truth| + 1e-6 must hold for each result. Two runs must
    give the same bits, and no input or upstream gradient may be written to.
    """

    def check(ours: Callable, plain: Callable, inputs: dict, *, seed: int = 0) -> dict:
        inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
        first, upstream = _run(ours, _leaves(inputs, lambda x: x), None, seed)
        kept = [g.clone() for g in upstream]
        second, _ = _run(ours, _leaves(inputs, lambda x: x), upstream, seed)
        for name, x in before.items():
            assert torch.equal(inputs[name], x), f"{name} was written to"
        assert all(torch.equal(a, b) for a, b in zip(kept, upstream, strict=True)), (
            "an upstream gradient was written to"
        )
        same, _ = _run(plain, _leaves(inputs, lambda x: x), upstream, seed)
        truth, _ = _run(plain, _leaves(inputs, lambda x: x.double() if x.is_floating_point() else x), upstream, seed)
        for name, exact in truth.items():
            result = first[name]
            assert torch.equal(result, second[name]), f"{name} differs between two runs"
            assert result.dtype == same[name].dtype, f"{name} is {result.dtype}, PyTorch's {same[name].dtype}"
            assert torch.isfinite(result).all(), f"{name} has values that are not finite"
            allowed = 2 * (same[name].double() - exact).abs().max() + 1e-6
            error = (result.double() - exact).abs().max()
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
        return first

    return check
