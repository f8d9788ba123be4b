"""The kernels of kernels/adamw8bit.py: one for tensors with 8-bit moments, one for those with fp32 moments.

Equal bits with the PyTorch reference: no fused multiply-add, quotients and roots correctly rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.kernels.blockwise import TINY, nearest_code
from safelight.kernels.jit import kernel
from safelight.kernels.remainder import draws_of_rows, join_bits, split_bits

if TYPE_CHECKING:
    import triton.language as tl

COLUMNS = 7  # of the table of tensors


@kernel(fp_fusion=False)
def _load(row, i, mask, WEIGHT: tl.constexpr, MEMORY: tl.constexpr):
    """Return the fp32 values of the weights at `i` of the tensor whose table row this is."""
    if WEIGHT == "fp32":
        value = tl.load(tl.load(row).to(tl.pointer_type(tl.float32)) + i, mask=mask, other=0.0)
    elif MEMORY == "fp32":
        value = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.float32)) + i, mask=mask, other=0.0)
    else:
        weight = tl.load(tl.load(row).to(tl.pointer_type(tl.int16)) + i, mask=mask, other=0)
        if MEMORY == "exact":
            left = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.int16)) + i, mask=mask, other=0).to(tl.int32)
        elif MEMORY == "near":
            left = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.int8)) + i, mask=mask, other=0).to(tl.int32)
        else:
            left = tl.full(i.shape, 0, tl.int32)
        value = join_bits(weight, left, WEIGHT, MEMORY)
    return value


@kernel(fp_fusion=False)
def _store(row, i, mask, value, words, WEIGHT: tl.constexpr, MEMORY: tl.constexpr):
    """Write the fp32 values as the tensor keeps them."""
    if WEIGHT == "fp32":
        tl.store(tl.load(row).to(tl.pointer_type(tl.float32)) + i, value, mask=mask)
    else:
        weight, left = split_bits(value, words, WEIGHT, MEMORY)
        tl.store(tl.load(row).to(tl.pointer_type(tl.int16)) + i, weight, mask=mask)
        if MEMORY == "fp32":
            tl.store(tl.load(row + 1).to(tl.pointer_type(tl.float32)) + i, value, mask=mask)
        elif MEMORY == "exact":
            tl.store(tl.load(row + 1).to(tl.pointer_type(tl.int16)) + i, left.to(tl.int16), mask=mask)
        elif MEMORY == "near":
            tl.store(tl.load(row + 1).to(tl.pointer_type(tl.int8)) + i, left.to(tl.int8), mask=mask)


@kernel(fp_fusion=False)
def _updated(weight, gradient, m, v, hyper_ptr, correction, beta1, beta2, one_minus_beta1, one_minus_beta2, eps):
    """Return the new (weight, m, v); hyper: lr, weight decay; correction: c_1, sqrt(c_2), gradient scale."""
    gradient = gradient * tl.load(correction + 2)
    m = m * beta1 + one_minus_beta1 * gradient
    v = v * beta2 + one_minus_beta2 * gradient * gradient
    update = tl.div_rn(m, tl.load(correction) * (tl.div_rn(tl.sqrt_rn(v), tl.load(correction + 1)) + eps))
    # the decay joins the update before the weight is touched: at lr 1e-6, weight * (1 - lr * decay) rounds to weight
    weight = weight - tl.load(hyper_ptr) * (update + tl.load(hyper_ptr + 1) * weight)
    return weight, m, v


@kernel(fp_fusion=False)
def _adamw8bit_kernel(
    tensors_ptr, gradients_ptr, programs_ptr, like_ptr, hyper_ptr, corrections_ptr, skips_ptr, steps_ptr, seed_ptr,
    map1_ptr, map2_ptr, bounds1_ptr, bounds2_ptr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
    WEIGHT: tl.constexpr, MEMORY: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """tensors: (tensors, 7) int64 addresses of weight, remainder, states, absmaxes, and the size; programs: (tensor, first block).

    corrections: (tensors, 3) float32; skips: (tensors,) int32; steps: (tensors,) int64 steps taken before this one.
    """
    program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(program).to(tl.int64)
    if tl.load(skips_ptr + tensor) == 0:
        row = tensors_ptr + tensor * COLUMNS
        state1_ptr = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
        state2_ptr = tl.load(row + 3).to(tl.pointer_type(tl.uint8))
        absmax1_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
        absmax2_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
        size = tl.load(row + 6)
        gradient_ptr = tl.load(gradients_ptr + tensor).to(tl.pointer_type(like_ptr.dtype.element_ty))
        first = tl.load(program + 1).to(tl.int64)
        block = first + tl.arange(0, ROWS)
        i = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
        mask = i < size
        in_range = block * BLOCK_SIZE < size
        weight = _load(row, i, mask, WEIGHT, MEMORY)
        gradient = tl.load(gradient_ptr + i, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(map1_ptr + tl.load(state1_ptr + i, mask=mask, other=0).to(tl.int32))
        v = tl.load(map2_ptr + tl.load(state2_ptr + i, mask=mask, other=0).to(tl.int32))
        m = m * tl.load(absmax1_ptr + block, mask=in_range, other=0.0)[:, None]
        v = v * tl.load(absmax2_ptr + block, mask=in_range, other=0.0)[:, None]
        correction = corrections_ptr + tensor * 3
        weight, m, v = _updated(
            weight, gradient, m, v, hyper_ptr, correction, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
        )
        words = tl.full(i.shape, 0, tl.uint32)
        if MEMORY == "near" or MEMORY == "rounded":
            words = draws_of_rows(first, tensor, tl.load(steps_ptr + tensor) + 1, seed_ptr, ROWS, BLOCK_SIZE)
        _store(row, i, mask, weight, words, WEIGHT, MEMORY)
        # code 0, which stands beyond the tensor's end, is no zero in the signed map
        m = tl.where(mask, m, 0.0)
        absmax1 = tl.reduce(tl.abs(m), 1, tl.standard._elementwise_max)
        absmax2 = tl.reduce(v, 1, tl.standard._elementwise_max)
        code1 = nearest_code(tl.div_rn(m, tl.maximum(absmax1, TINY)[:, None]), bounds1_ptr)
        code2 = nearest_code(tl.div_rn(v, tl.maximum(absmax2, TINY)[:, None]), bounds2_ptr)
        tl.store(state1_ptr + i, code1.to(tl.uint8), mask=mask)
        tl.store(state2_ptr + i, code2.to(tl.uint8), mask=mask)
        tl.store(absmax1_ptr + block, absmax1, mask=in_range)
        tl.store(absmax2_ptr + block, absmax2, mask=in_range)


@kernel(fp_fusion=False)
def _adamw32bit_kernel(
    tensors_ptr, gradients_ptr, programs_ptr, like_ptr, hyper_ptr, corrections_ptr, skips_ptr, steps_ptr, seed_ptr,
    beta1, beta2, one_minus_beta1, one_minus_beta2, eps,
    WEIGHT: tl.constexpr, MEMORY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """As above, without absmaxes (addresses 0); programs: (tensor, first chunk)."""
    program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
    tensor = tl.load(program).to(tl.int64)
    if tl.load(skips_ptr + tensor) == 0:
        row = tensors_ptr + tensor * COLUMNS
        state1_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        state2_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        gradient_ptr = tl.load(gradients_ptr + tensor).to(tl.pointer_type(like_ptr.dtype.element_ty))
        first = tl.load(program + 1).to(tl.int64)
        i = (first * CHUNK + tl.arange(0, CHUNK))[None, :]
        mask = i < tl.load(row + 6)
        weight = _load(row, i, mask, WEIGHT, MEMORY)
        gradient = tl.load(gradient_ptr + i, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(state1_ptr + i, mask=mask, other=0.0)
        v = tl.load(state2_ptr + i, mask=mask, other=0.0)
        correction = corrections_ptr + tensor * 3
        weight, m, v = _updated(
            weight, gradient, m, v, hyper_ptr, correction, beta1, beta2, one_minus_beta1, one_minus_beta2, eps
        )
        words = tl.full(i.shape, 0, tl.uint32)
        if MEMORY == "near" or MEMORY == "rounded":
            words = draws_of_rows(first, tensor, tl.load(steps_ptr + tensor) + 1, seed_ptr, 1, CHUNK)
        _store(row, i, mask, weight, words, WEIGHT, MEMORY)
        tl.store(state1_ptr + i, m, mask=mask)
        tl.store(state2_ptr + i, v, mask=mask)
