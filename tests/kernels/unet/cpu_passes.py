"""The passes of PyTorch's CPU attention in place of a GPU operator's."""

import torch

from safelight.kernels.unet.padded_attention import Passes

aten = torch.ops.aten


def _forward(q, k, v, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, log_sums = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, scale=scale)
    # as GPU operators do: numbers and undefined tensors among what backward needs
    return out.transpose(1, 2), (log_sums, None, 7)


def _backward(grad, q, k, v, out, needed, scale):
    log_sums, *others = needed
    assert others == [None, 7]
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        grad, q, k, v, out, log_sums, 0.0, False, scale=scale
    )
    return tuple(x.transpose(1, 2) for x in grads)


CPU_PASSES = Passes(_forward, _backward)
