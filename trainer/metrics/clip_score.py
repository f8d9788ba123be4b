"""CLIPScore: how well a picture fits its prompt."""

from __future__ import annotations

import numpy as np

from safelight.trainer.metrics.mmd import unit_length


def clip_score(images_ND: np.ndarray, texts_ND: np.ndarray) -> np.ndarray:
    """Return 100 max(0, cos) of each picture and its prompt, from CLIP's features of both: (N,).

    The paper multiplies by 2.5 instead of 100, and puts "A photo depicts" before captions; prompts stay as they are.
    Source: Hessel et al. 2021, "CLIPScore: a reference-free evaluation metric for image captioning", arXiv:2104.08718.
    """
    return 100 * np.maximum(0, (unit_length(images_ND) * unit_length(texts_ND)).sum(axis=1))
