"""`bench kernels`: ours and plain PyTorch compute the same; formulas match the launches; saved bytes are exact."""

import json

import pytest
import torch

from safelight.__main__ import main
from safelight.bench.core.harness import Prepared, interleave_prepared
from safelight.bench.core.layers import MODELS, Layer, layers, meta_model
from safelight.bench.core.results import read
from safelight.bench.measure import kernels
from safelight.bench.measure.kernel_ops import OPS, reduced
from safelight.kernels.triton.jit import record_launches

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPES = {
    "noising": (2, 4, 64, 64),
    "diffusion_loss": (8, 4, 64, 64),
    "geglu": (2, 256, 2560),
    "layer_norm": (8, 4096, 320),
    "add_layer_norm": (8, 4096, 320),
    "bias_residual": (8, 320, 64, 64),
    "norm_linear": (1, 64, 320, 960),
    "feed_forward": (1, 64, 320, 1280),
    "norm_silu_conv": (1, 64, 16, 16, 32),
}


def shape_of(op: str) -> tuple[int, ...]:
    return SHAPES.get(op, (1, 320, 64, 64))


@pytest.fixture(scope="module")
def layers_of() -> dict[str, tuple[Layer, ...]]:
    return {model: layers(model) for model in MODELS}


def test_the_layers_are_those_of_the_published_models(layers_of):
    numbers = {name: sum(p.numel() for p in meta_model(name).parameters()) for name in MODELS}
    assert numbers == {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}
    for model, blocks, resnets in (("sd15", 16, 22), ("sd21", 16, 22), ("sdxl", 70, 17)):
        counts = dict.fromkeys(OPS, 0)
        for layer in layers_of[model]:
            counts[layer.op] += layer.count
        assert counts["geglu"] == counts["layer_norm"] == counts["feed_forward"] == blocks
        assert counts["add_layer_norm"] == 2 * blocks
        # each residual block has two norms followed by a convolution
        assert counts["norm_silu_conv"] == 2 * resnets == 2 * counts["bias_residual"]
        # the first norm of each block, and the UNet's last norm
        assert counts["group_norm_silu"] == resnets + 1
    assert Layer("geglu", (1, 4096, 2560), 5) in layers_of["sd15"]
    assert Layer("geglu", (1, 1024, 10240), 60) in layers_of["sdxl"]


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.forward_bytes is not None])
def test_the_byte_formulas_agree_with_the_launched_tensors(op):
    """The formula is at most 12 % below the bytes of all launches, which include parameters and partial sums."""
    shape, dtype = shape_of(op), torch.bfloat16
    inputs = OPS[op].inputs(shape, dtype, META, torch.channels_last)
    with record_launches() as forward:
        outputs = kernels._outputs(OPS[op].ours(**inputs))
    passes = [(forward, OPS[op].forward_bytes)]
    if OPS[op].is_differentiable:
        with record_launches() as backward:
            kernels._backward(outputs, inputs, tuple(torch.empty_like(y) for y in outputs))
        if op == "bias_residual":
            # no kernel of ours: the gradient is passed on, and PyTorch sums it for the bias
            assert not backward
        else:
            passes.append((backward, OPS[op].backward_bytes))
    for launches, formula in passes:
        assert launches
        moved = 0
        for launch in launches:
            # an absent argument is given as another tensor of the launch, so count storages once
            storages = {
                x.untyped_storage()._cdata: x.numel() * x.element_size()
                for x in launch.arguments.values()
                if isinstance(x, torch.Tensor)
            }
            moved += sum(storages.values())
        assert formula(shape, dtype.itemsize) <= moved <= 1.12 * formula(shape, dtype.itemsize)


@pytest.mark.parametrize("op", [name for name in OPS if name != "noising"])
def test_ours_equals_plain_pytorch_and_saves_the_counted_bytes(op):
    shape = reduced(shape_of(op))
    inputs = OPS[op].inputs(shape, torch.float32, CPU, torch.channels_last)
    ours, plain = (kernels._outputs(f(**inputs)) for f in (OPS[op].ours, OPS[op].plain))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    parameters = set(OPS[op].parameters(shape))
    for function in (OPS[op].ours, OPS[op].plain):
        on_meta = OPS[op].inputs(shape, torch.float32, META, torch.channels_last)
        real = kernels.saved_bytes(function, inputs, parameters)
        counted = kernels.saved_bytes(function, on_meta, parameters)
        assert counted == real
    assert kernels.saved_bytes(OPS[op].ours, on_meta, parameters) <= real


def test_bytes_moved_by_plain_pytorch_counted_by_hand():
    layer = Layer("bias_residual", (1, 320, 8, 8), 1)
    n, b = 320 * 64, 2
    # x + bias reads and writes n elements, + residual reads 2n and writes n; backward sums the bias gradient
    assert kernels.plain_bytes(OPS[layer.op], layer, torch.bfloat16) == (5 * n * b + 320 * b, n * b + 320 * b)


def test_every_timed_run_gets_its_own_preparation():
    prepared = []

    def prepare():
        prepared.append(torch.randn(256, 256).matmul(torch.randn(256, 256)))
        return len(prepared)

    seen = []
    times = interleave_prepared({"a": Prepared(prepare, seen.append), "b": Prepared(lambda: 0, lambda _: None)}, CPU, 3)
    assert seen == [1, 2, 3, 4, 5]
    assert len(times["a"]) == len(times["b"]) == 3


def test_on_a_cpu_only_bytes_are_printed_and_appended(tmp_path, capsys):
    assert main(["bench", "kernels", "--ops", "geglu", "--append", str(tmp_path / "r"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "No times: the kernels need a GPU" in out
    assert " ms" not in out
    (record,) = read(tmp_path / "r")
    step = record["figures"]["step"]
    # 5 blocks at each of three resolutions and one in the middle; 3/2 of the projection forward, 5/2 backward, in bf16
    projections = 5 * (4096 * 2560 + 1024 * 5120 + 256 * 10240) + 64 * 10240
    assert step["geglu"]["gb"] == pytest.approx(projections * 4 * 2 / 1e9, rel=1e-3)
    assert step["geglu"]["saved_mib"] == pytest.approx(projections * 2 / 2**20, rel=1e-3)
    assert main(["bench", "kernels", "--ops", "gelu"]) == 2
    assert "'gelu'" in capsys.readouterr().err


def test_times_on_a_cpu_are_marked_as_those_of_the_references(monkeypatch, tmp_path, capsys):
    def no_compiler(*args, **kwargs):
        def fail(**inputs):
            raise RuntimeError("No working C++ compiler found\nmore")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    words = "bench kernels --ops layer_norm norm_linear --times yes --shapes 1 --repeats 1 --device cpu --json"
    assert main([*words.split(), "--append", str(tmp_path / "r")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == read(tmp_path / "r")
    timed = [line for line in lines if line["config"]["what"] == "time"]
    assert [line["config"]["op"] for line in timed] == ["layer_norm", "norm_linear"]
    for line in timed:
        figures = line["figures"]
        assert line["note"] == kernels.CPU_NOTE
        assert figures["compiled_cannot"] == "No working C++ compiler found"
        for direction in kernels.PASSES:
            assert set(figures[direction]) == {"ours_ms", "plain_ms"}
            assert min(figures[direction]["plain_ms"]) > 0
    assert "compiled" not in kernels.time_rows(timed)[0]
    assert kernels.failures(timed) == ["compiled was not timed: No working C++ compiler found"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_kernel_comes_near_the_copy_bandwidth():
    lines = list(
        kernels.bench_kernels(
            ("sd15",), (8,), torch.float16, torch.device("cuda"), ops=("geglu",), num_shapes=1, with_compile=False
        )
    )
    figures = lines[-1]["figures"]
    for direction in kernels.PASSES:
        assert 0.2 < figures[direction]["share_of_limit"] < 3
        assert figures[direction]["ours_ms"][1] > 0
