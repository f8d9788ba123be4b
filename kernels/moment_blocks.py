"""How blockwise optimizer moments are laid out: 8-bit in bitsandbytes and in our kernel alike, 4-bit in ours. Free of
torch."""

from __future__ import annotations

# elements that share one fp32 scale (absmax)
BLOCK_SIZE = 256
# smaller tensors keep fp32 moments
MIN_8BIT_ELEMENTS = 4096
# bytes of an element's codes of both moments, by the value of optimizer.moments
CODE_BYTES = {"8bit": 2, "4bit": 1}


def num_blocks(num_elements: int) -> int:
    """Return the number of blocks, and so of scales, of a tensor."""
    return -(-num_elements // BLOCK_SIZE)
