"""Quantized frozen weights: bitsandbytes' own values, the results of the dense weights they stand for, what is held."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safelight.kernels.ops.norm_then_matmul import feed_forward, group_norm_linear, norm_linear, norm_silu_conv
from safelight.kernels.ops.packed_linear import norm_packed_linear, packed_linear
from safelight.kernels.ops.quantized_weight import (
    FORMATS,
    QuantizedWeight,
    held_tensors,
    quantizable_layers,
    quantize,
    quantize_layers,
    quantized_bytes,
)
from safelight.kernels.ops.upsample_conv import upsample_conv
from safelight.kernels.unet import patch
from safelight.kernels.unet.checkpointing import MODES, apply_checkpointing
from tests.kernels.unet.unets import CONFIGS, inputs_of, make

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, dtype=torch.float32, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(*shape: int, format: str, dtype=torch.float32, seed=0) -> QuantizedWeight:
    return quantize(0.1 * randn(*shape, seed=seed), format, dtype, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_has_the_values_of_bitsandbytes_linear_layer(dtype):
    weight = 0.1 * randn(96, 130)
    params = bnb.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=True, requires_grad=False).to(
        "cpu"
    )
    theirs = bnb.functional.dequantize_4bit(params.data, params.quant_state).to(dtype)
    ours = quantize(weight, "nf4", torch.float32, CPU).dequantize().to(dtype)
    assert torch.equal(ours, theirs)
    # rounded once to the dtype that is computed in
    difference = quantize(weight, "nf4", dtype, CPU).dequantize().float() - theirs.float()
    assert difference.abs().max() <= 2 * torch.finfo(dtype).eps * weight.abs().max()


def test_8bit_is_at_least_as_exact_as_bitsandbytes_linear_layer():
    weight = 0.1 * randn(320, 1280)
    weight[3, 5] = 2.0
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    theirs = codes.float() * scales.unsqueeze(1) / 127
    ours = quantize(weight, "8bit", torch.float32, CPU).dequantize()
    assert (ours - weight).square().mean() <= (theirs - weight).square().mean()
    # half a step of the block's largest value
    steps = weight.view(-1, 256).abs().amax(dim=1, keepdim=True) / 127
    assert ((ours - weight).view(-1, 256).abs() <= 0.51 * steps).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(96, 128), (64, 100), (33, 131), (16, 32, 3, 3), (64, 96, 1, 1)])
def test_what_is_held_is_what_is_planned(format, shape):
    weight = quantized(*shape, format=format)
    held = sum(x.numel() * x.element_size() for x in held_tensors(weight))
    assert held == quantized_bytes(weight.numel(), format)
    dense = weight.dequantize()
    assert (dense.shape, dense.dtype) == (weight.shape, weight.dtype)
    assert held < weight.numel() * {"8bit": 1.1, "nf4": 0.55}[format]
    error = (dense - 0.1 * randn(*shape)).square().mean().sqrt() / 0.1
    assert error < {"8bit": 0.01, "nf4": 0.1}[format]


@pytest.mark.parametrize("format", FORMATS)
def test_a_convolutions_values_do_not_depend_on_its_memory_order(format):
    weight = 0.1 * randn(16, 32, 3, 3)
    one, other = (
        quantize(x, format, torch.float32, CPU).dequantize()
        for x in (weight, weight.contiguous(memory_format=torch.channels_last))
    )
    assert torch.equal(one, other)


def projections(shape, num, **options):
    return [quantized(*shape, seed=seed, **options) for seed in range(num)]


CASES = {
    "linear": lambda x, w, b: F.linear(x, w(96, 64), b(96)),
    "packed": lambda x, w, b: torch.cat(packed_linear(x, [w(96, 64), w(96, 64)]), -1),
    "norm, packed": lambda x, w, b: torch.cat(norm_packed_linear(x, b(64), b(64), [w(96, 64), w(96, 64)])[1:], -1),
    "norm": lambda x, w, b: norm_linear(x, b(64), b(64), w(96, 64)),
    "feed forward": lambda x, w, b: feed_forward(x, b(64), b(64), w(256, 64), b(256), w(64, 128), b(64), residual=x),
}
IMAGES = {
    "convolution": lambda x, w, b: F.conv2d(x, w(96, 64, 3, 3), b(96), stride=2, padding=1),
    "norm, projection": lambda x, w, b: group_norm_linear(x, b(64), b(64), 8, w(96, 64, 1, 1), b(96))[1],
    "norm, convolution": lambda x, w, b: norm_silu_conv(x, b(64), b(64), 8, w(96, 64, 3, 3), b(96)),
    "upsampling": lambda x, w, b: upsample_conv(x, w(96, 64, 3, 3), b(96), (16, 16)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", [*CASES, *IMAGES])
def test_results_and_gradients_are_those_of_the_dense_weight_which_is_not_saved(case, format, dtype):
    is_image = case in IMAGES
    function, shape = {**CASES, **IMAGES}[case], (2, 64, 8, 8) if is_image else (2, 5, 64)

    def run(is_quantized: bool):
        x = randn(*shape, dtype=dtype, seed=5).requires_grad_()
        if is_image:
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        biases, saved = [], []

        def weight(*weight_shape: int):
            made = quantized(*weight_shape, format=format, dtype=dtype)
            return made if is_quantized else nn.Parameter(made.dequantize(), requires_grad=False)

        def bias(size: int):
            biases.append(randn(size, dtype=dtype, seed=9).requires_grad_())
            return biases[-1]

        if not is_quantized and "packed" in case:
            both = torch.cat([weight(96, 64), weight(96, 64)])
            parts = iter([nn.Parameter(part, requires_grad=False) for part in both.split(96)])

            def weight(*_):
                return next(parts)

        def pack(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = function(x, weight, bias)
        y.backward(randn(*y.shape, dtype=dtype, seed=7))
        return y.detach(), x.grad, [b.grad for b in biases], saved

    y, dx, dbiases, saved = run(True)
    dense_y, dense_dx, dense_dbiases, _ = run(False)
    assert torch.equal(y, dense_y)
    assert torch.equal(dx, dense_dx)
    for ours, theirs in zip(dbiases, dense_dbiases, strict=True):
        torch.testing.assert_close(ours, theirs)
    weights = {96 * 64, 256 * 64, 64 * 128, 96 * 64 * 9}
    assert not any(type(x) is torch.Tensor and x.numel() in weights and x.dim() in (2, 4) and len(x) > 2 for x in saved)


@pytest.mark.parametrize("checkpointing", MODES)
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.long
def test_a_unet_equals_one_with_the_dense_weights(format, patched, checkpointing):
    """Only biases and norms are trained: their gradients pass through every layer."""
    unet = make(CONFIGS["sdxl"], torch.float32)
    for p in unet.parameters():
        p.requires_grad_(p.dim() == 1)
    dense = copy.deepcopy(unet)
    if patched:
        patch.apply(unet)
        patch.apply(dense)
    apply_checkpointing(unet, checkpointing)
    num = quantize_layers(unet, format, torch.float32, CPU)
    assert num == len([x for x in unet.parameters() if isinstance(x, QuantizedWeight)]) > 30
    assert not quantizable_layers(dense)[0].weight.requires_grad
    unet.to(CPU, torch.float32)
    with torch.no_grad():
        for name, p in dense.named_parameters():
            p.copy_(unet.get_parameter(name))
    if patched:
        patch.repack(unet)
    outputs = []
    for module in (unet, dense):
        output = module.train()(**inputs_of(module, torch.float32), return_dict=False)[0]
        output.square().mean().backward()
        outputs.append(output.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    for name, p in unet.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, dense.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_it_moves_with_its_module_and_cannot_be_trained_or_replaced_by_a_dense_tensor():
    layer = nn.Linear(64, 96)
    layer.weight = quantized(96, 64, format="nf4", dtype=torch.bfloat16)
    before = layer.weight
    layer.to(CPU, torch.bfloat16)
    assert layer.weight is before
    assert layer(torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.to("meta")
    assert {x.device.type for x in held_tensors(layer.weight)} == {"meta"} == {layer.weight.device.type}
    with pytest.raises(ValueError, match="cannot be trained"):
        before.requires_grad_()
    with pytest.raises(ValueError, match="a dense tensor cannot take its place"):
        before.data = torch.zeros(96, 64)
    with pytest.raises(ValueError, match="use 8bit or nf4"):
        quantize(torch.zeros(4, 4), "fp4", torch.float32, CPU)
