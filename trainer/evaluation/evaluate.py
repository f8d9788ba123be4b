"""`safelight evaluate`: is the fine-tuned model better than its base, at which checkpoint, and where does it burn?

Top to bottom: the pictures (RUN/compare), what is measured of each (features, boxes), the figures, the checkpoint to
use. Whatever was computed before is kept by content, so that a second call computes nothing again, and a call after a
kill goes on. The result is RUN/evaluation.json (trainer/report/evaluation.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.evaluation.burn import PictureMeasures, judge_burn, sets_of
from safelight.trainer.evaluation.crops import compare_crops, find_crops
from safelight.trainer.evaluation.kept import Kept
from safelight.trainer.evaluation.memorisation import judge_memorisation
from safelight.trainer.evaluation.pictures import Photographs, Picture, drawn_pictures, groups_of, photographs
from safelight.trainer.evaluation.set_metrics import BASE, REAL, Features, diversity_metric, metrics_of
from safelight.trainer.evaluation.suggest import KidChange, suggest
from safelight.trainer.features.cache import FeatureCache
from safelight.trainer.features.extractor import Extractor
from safelight.trainer.features.inception import Inception
from safelight.trainer.features.latents import open_latents
from safelight.trainer.features.lpips import Lpips
from safelight.trainer.features.open_extractor import open_extractor
from safelight.trainer.inference.compare import compare
from safelight.trainer.inference.compared_prompts import Prompt
from safelight.trainer.inference.draw import OpenRun
from safelight.trainer.inference.pictures import Progress, Say, hash_of
from safelight.trainer.metrics.kid import kid_difference
from safelight.trainer.metrics.resampling import TooFewPictures
from safelight.trainer.report.comparison import Comparison, Record
from safelight.trainer.report.evaluation import (
    Burn,
    CropDivergence,
    EvaluatedModel,
    Evaluation,
    Memorisation,
    Metric,
)
from safelight.trainer.report.run_reader import read_run_folder
from safelight.trainer.tagging.taggers import open_detector

RECORD_NAME = "evaluation.json"
# photographs whose pairwise LPIPS distances are computed; each pair costs, so more take long
MAX_DIVERSE = 200
