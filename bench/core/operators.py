"""The class of each operator and the number of CUDA kernels it launches: the model behind `safelight bench count`.

The numbers are assumptions about cuDNN and ATen, not taken from a profile. They are collected here so that they can be
checked against the profiler on a GPU (`bench count --profile`).
"""

from __future__ import annotations

from collections.abc import Sequence

CLASSES = ("conv", "matmul", "attention", "norm", "elementwise", "copy/cast", "optimizer")

_CLASS_OF = {
    "conv": (
        "convolution",
        "conv2d",
        "cudnn_convolution",
        "mkldnn_convolution",
        "slow_conv2d",
        "_convolution",
        "thnn_conv2d",
    ),
    "matmul": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "addmv", "mv", "dot", "_addmm_activation"),
    "attention": (
        "attention",
        "scaled_dot_product",
        "efficient_attention",
        "flash_attention",
        "cudnn_attention",
        "fmha",
    ),
    "norm": ("native_group_norm", "native_layer_norm", "group_norm", "layer_norm", "native_batch_norm"),
    "copy/cast": (
        "clone",
        "_to_copy",
        "copy_",
        "cat",
        "stack",
        "index",
        "index_select",
        "contiguous",
        "_foreach_copy_",
    ),
    "optimizer": ("_fused_adamw_", "_fused_adam_", "adamw8bit", "optimizer_update"),
}
_EXACT = {name: kind for kind in ("matmul", "copy/cast") for name in _CLASS_OF[kind]}
_SUBSTRING = [(part, kind) for kind in ("attention", "conv", "norm", "optimizer") for part in _CLASS_OF[kind]]

# operators that launch no kernel: they only allocate memory or return a view
_NO_WORK = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "lift_fresh",
    "alias",
    "resize_",
    "set_",
    "_local_scalar_dense",
    "is_same_size",
    "sym_size",
    "record_stream",
}
# operators for which the host waits for the device
SYNC_OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "item",
    "equal",
    "unique_dim",
    "_unique2",
}

# kernels per operator, where it is not one
_KERNELS = {
    "native_layer_norm_backward": 3,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 3,
    "_scaled_dot_product_cudnn_attention_backward": 3,
    # called by xformers
    "_flash_attention_backward": 3,
    "_efficient_attention_backward": 3,
}
_KERNELS_BY_LAYOUT = {
    # input and weight are converted to NHWC, then the convolution with bias, then the output is converted back
    "nchw": {
        "convolution": 4,
        "convolution_backward": 8,
        "native_group_norm": 3,
        "native_group_norm_backward": 5,
    },
    # ATen's GroupNorm has no channels-last CUDA path and runs 5 and 7 kernels. One of each is a copy to NCHW, which is
    # dispatched, and so counted, as an operator of its own; the copy back is not.
    "channels_last": {
        "convolution": 2,
        "convolution_backward": 3,
        "native_group_norm": 4,
        "native_group_norm_backward": 6,
    },
}

# class of our own kernels, by a part of their module's name
_CLASS_OF_KERNEL = {"norm": "norm", "adamw8bit": "optimizer", "ema": "optimizer"}

# ATen's multi_tensor_apply: tensors per launch by number of tensor lists; blocks per launch; elements per block
_FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_FOREACH_BLOCKS = 320
_FOREACH_CHUNK = 65536


def class_of(name: str) -> str:
    """Return the class of an operator by its name without overload: `convolution_backward` -> conv.

    Reductions count as elementwise.
    """
    if name in _EXACT:
        return _EXACT[name]
    return next((kind for part, kind in _SUBSTRING if part in name), "elementwise")


def class_of_kernel(module: str) -> str:
    """Return the class of one of our kernels by the name of its module: `layer_norm` -> norm."""
    return next((kind for part, kind in _CLASS_OF_KERNEL.items() if part in module), "elementwise")


def does_work(name: str, is_view: bool) -> bool:
    """Return whether an operator launches a kernel."""
    return not is_view and name not in _NO_WORK


def num_kernels(name: str, layout: str, has_bias: bool = True) -> int:
    """Return the number of CUDA kernels of one call; see num_foreach_kernels for `_foreach_*` and `_fused_*`.

    has_bias: a channels-last convolution adds its bias, or sums the bias gradient, in a separate kernel.
    """
    num = _KERNELS_BY_LAYOUT[layout].get(name) or _KERNELS.get(name, 1)
    return num - (layout == "channels_last" and not has_bias and class_of(name) == "conv")


def num_foreach_kernels(sizes: Sequence[int], num_lists: int) -> int:
    """Return the launches of a multi-tensor operator by ATen's chunking. sizes: number of elements of each tensor."""
    max_tensors = _FOREACH_TENSORS[min(max(num_lists, 1), 5)]
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        for chunk in range(-(-size // _FOREACH_CHUNK)):
            blocks += 1
            is_last_chunk = (chunk + 1) * _FOREACH_CHUNK >= size
            if blocks == _FOREACH_BLOCKS or (tensors == max_tensors and is_last_chunk):
                launches += 1
                # a tensor with chunks left is listed again in the next launch
                blocks, tensors = 0, 0 if is_last_chunk else 1
    return launches + (blocks > 0)


def moves_memory(kind: str) -> bool:
    """Return whether operators of this class are memory-bound: all but matrix multiplications and convolutions."""
    return kind not in ("conv", "matmul")


def layout_factor(name: str, layout: str) -> float:
    """Return the bytes of layout copies inside an operator, as a multiple of the bytes of its inputs and outputs."""
    if layout == "nchw":
        # every tensor of a convolution is read and written once more by its conversion
        return 2 if class_of(name) == "conv" else 0
    # the result is read and written once more by the copy back to NHWC: one of 2 large tensors forward, of 3 backward
    return {"native_group_norm": 1, "native_group_norm_backward": 2 / 3}.get(name, 0)
