"""How 8-bit optimizer moments are laid out, in bitsandbytes and in our kernel alike. Free of torch."""

from __future__ import annotations

# elements that share one fp32 scale (absmax)
BLOCK_SIZE = 256
# smaller tensors keep fp32 moments
MIN_8BIT_ELEMENTS = 4096


def num_blocks(num_elements: int) -> int:
    """Return the number of blocks, and so of scales, of a tensor."""
    return -(-num_elements // BLOCK_SIZE)
