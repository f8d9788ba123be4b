"""A patched UNet against the original: output, gradients, memory order, kernels in aot.json."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from safelight.bench.counting.counters import Counter
from safelight.kernels.aot import compile_all as aot
from safelight.kernels.unet import patch
from safelight.trainer.models.architectures import RANDOM_MODELS
from tests.kernels.unet.unets import CONFIGS, inputs_of, make, one_block, run, worst_error


@pytest.mark.parametrize(("name", "recompute"), [("sd15", True), ("sd15", False), ("sd21", False), ("sdxl", True)])
def test_output_and_every_gradient_equal_the_originals(name, recompute):
    """In fp64, which leaves no room for a wrong formula; gradients of text and image included."""
    unet = make(CONFIGS[name], torch.float64)
    inputs = inputs_of(unet, torch.float64)
    truth = run(unet, inputs)
    result = patch.apply(unet, recompute=recompute)
    assert not result.unsupported
    results = run(unet, inputs)
    assert results.keys() == truth.keys()
    assert worst_error(results, truth) < 1e-9


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_errs_no_more_than_the_original(name):
    truth_unet = make(CONFIGS[name], torch.float64)
    truth = run(truth_unet, inputs_of(truth_unet, torch.float64))
    unet = make(CONFIGS[name])
    inputs = inputs_of(unet)
    allowed = 2 * worst_error(run(unet, inputs), truth) + 1e-6
    patch.apply(unet)
    assert worst_error(run(unet, inputs), truth) <= allowed


MODEL_WIDTHS = [
    pytest.param(320, 8, 768, id="320"),
    pytest.param(640, 8, 768, marks=pytest.mark.slow, id="640"),
    pytest.param(1280, 20, 2048, marks=pytest.mark.slow, id="1280"),
]


@pytest.mark.parametrize(("width", "heads", "text"), MODEL_WIDTHS)
def test_single_blocks_at_the_models_width(width, heads, text):
    config = one_block(width, heads, text)
    unet = make(config)
    inputs = inputs_of(unet, sides=(4, 4), batch=1)
    plain = run(unet, inputs)
    exact_unet = make(config, torch.float64)
    truth = run(exact_unet, inputs_of(exact_unet, torch.float64, sides=(4, 4), batch=1))
    del exact_unet
    result = patch.apply(unet)
    assert {kind for _, kind in result.swapped} >= {"ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock"}
    assert worst_error(run(unet, inputs), truth) <= 2 * worst_error(plain, truth) + 1e-6


def test_a_unet_on_the_kernels_themselves(device):
    """Kernels interpreted on the CPU or compiled on a GPU, where the other tests of this file run references."""
    config = {**one_block(16, 2, 8), "norm_num_groups": 4, "sample_size": 4, "mid_block_type": None}
    unet = make(config)
    inputs = inputs_of(unet, sides=(4, 4), batch=2)
    truth_unet = make(config, torch.float64)
    truth = run(truth_unet, inputs_of(truth_unet, torch.float64, sides=(4, 4), batch=2))
    allowed = 2 * worst_error(run(unet, inputs), truth) + 1e-6
    unet = unet.to(device)
    inputs = {k: v.detach().to(device).requires_grad_(v.requires_grad) for k, v in inputs.items()}
    patch.apply(unet)
    results = {name: x.cpu() for name, x in run(unet, inputs).items()}
    assert worst_error(results, truth) <= allowed


class ConvolutionLayouts(TorchDispatchMode):
    """Records whether the convolutions' inputs (images, weights, gradients) are channels-last."""

    def __init__(self):
        super().__init__()
        self.layouts = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name in ("convolution", "convolution_backward"):
            self.layouts += [x.is_contiguous(memory_format=torch.channels_last) for x in args[: 2 + (name[-1] == "d")]]
        return func(*args, **kwargs or {})


def test_it_is_channels_last_end_to_end():
    unet = make(CONFIGS["sd15"])
    patch.apply(unet)
    inputs = inputs_of(unet)
    inputs["sample"] = inputs["sample"].detach()
    with ConvolutionLayouts() as seen:
        y = unet(**inputs).sample
        y.backward(torch.ones_like(y))
    assert all(seen.layouts)
    # 52 convolutions, forward and backward; the 1x1 ones, in 16 transformers and 13 residual blocks, are matmuls
    assert len(seen.layouts) == 52 * (2 + 3)


def test_every_kernel_of_a_patched_sd15_step_is_covered_by_the_ahead_of_time_gate():
    def step(dtype):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**RANDOM_MODELS["sd15"]["unet"]).to(dtype).train()
        patch.apply(unet)
        inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape in ((1, 4, 64, 64), (1, 77, 768))]
        # makes convolutions on meta tensors return channels-last, as on a GPU
        with Counter("channels_last"):
            y = unet(inputs[0], torch.empty(1, dtype=torch.int64, device="meta"), inputs[1]).sample
            y.backward(torch.empty_like(y))

    for dtype, target in ((torch.bfloat16, 90), (torch.float16, 75)):
        cases = aot.cases_of(step, dtype)
        assert len(cases) > 50
        covered = aot.required_cases()[target]
        assert not [case.label for case in cases if case.label not in covered]


def test_text_projections_are_split_by_bytes(monkeypatch):
    monkeypatch.setattr(patch, "MAX_TEXT_BYTES", 30_000)
    unet = make(CONFIGS["sdxl"], torch.float64)
    inputs = inputs_of(unet, torch.float64)
    truth = run(unet, inputs)
    result = patch.apply(unet)
    sizes = [size for what, _, size in result.packed if "cross-attentions" in what]
    assert len(sizes) > 3
    assert max(sizes) <= 30_000
    assert worst_error(run(unet, inputs), truth) < 1e-9
