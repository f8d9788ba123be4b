"""The crop and mirroring of one variant of one photo, drawn one at a time, to compare with the planned ones."""

from safelight.data.buckets import Bucket, check_flip_p, crop_box
from safelight.kernels.philox import Key, Purpose, uniforms


def crop_of_variant(
    width: int, height: int, bucket: Bucket, seed: int, sample_id: int, variant: int, crop_jitter: float
) -> tuple[int, int, int, int]:
    """Return the crop box of a variant: the canonical one for variant 0, a jittered one for the others."""
    draws = uniforms(Key(seed, Purpose.CROP, sample_id, occurrence=variant), 3) if variant else None
    return crop_box(width, height, bucket, draws, crop_jitter)


def is_flipped(seed: int, sample_id: int, variant: int, flip_p: float) -> bool:
    """Return whether a variant is mirrored: variant 0 never is, the others are with probability flip_p."""
    check_flip_p(flip_p)
    return variant > 0 and float(uniforms(Key(seed, Purpose.FLIP, sample_id, occurrence=variant))[0]) < flip_p
