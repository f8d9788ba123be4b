"""Which models draw copies of training photographs, from what `trainer/metrics/memorisation.py` measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import bdtrc

from safelight.text import counted
from safelight.trainer.evaluation.wording import listed, names_of
from safelight.trainer.metrics.exceedance import exceedance_p
from safelight.trainer.metrics.memorisation import TrainingPhotographs, fit_photographs
from safelight.trainer.report.comparison import ComparedRow, Comparison, ModelId
from safelight.trainer.report.evaluation import MAX_SHOWN_PICTURES, Memorisation, NearestPhoto

# pairs shown of a model
NUM_PAIRS = 8
# the probability that any model is said to copy by chance, and that one is said to copy more than the base
CHANCE_OF_A_CLAIM, CHANCE_AGAINST_BASE = 0.01, 0.05


def judge_memorisation(
    comparison: Comparison,
    pictures: Mapping[str, np.ndarray],
    training: np.ndarray,
    held_out: np.ndarray,
    photo_files: Sequence[str],
    features: str,
    mirrored: np.ndarray | None = None,
    groups: Sequence[str] = (),
) -> Memorisation:
    """Return which models copy training photographs, with the pairs most alike.

    pictures: features of each drawn picture by file, (D,); those without are left out. training: features of the
    training photographs, as the run crops them, (T, D). held_out: (H, D). photo_files: the names of their small copies
    in RUN/evaluation. features: the extractor's name. mirrored: features of the mirrored training photographs, if
    training mirrors. groups: `Photo.group` of each training photograph.
    """
    rows_of = {
        model.id: rows
        for model in comparison.models
        if (rows := [row for row in comparison.rows if row.images.get(model.id) in pictures])
    }
    try:
        photographs = fit_photographs(training, held_out, mirrored, groups)
    except ValueError as error:
        sentence = f"Whether training photographs were copied cannot be judged: {error}."
        return Memorisation(features=features, limit=1.0, num_flagged={}, num=0, sentence=sentence)
    pairs = {model: _pairs(model, rows, pictures, photographs, photo_files) for model, rows in rows_of.items()}
    flagged = {model: sum(pair.is_flagged for pair in found) for model, found in pairs.items()}
    trained = [model for model in pairs if model != "base"]
    memorised = tuple(
        model
        for model in trained
        if exceedance_p(flagged[model], len(pairs[model]), photographs.limit) < CHANCE_OF_A_CLAIM / len(trained)
        and _p_against_base(model, rows_of, pairs) < CHANCE_AGAINST_BASE
    )
    shown = [pair for found in pairs.values() for pair in sorted(found, key=lambda pair: -pair.similarity)[:NUM_PAIRS]]
    return Memorisation(
        features=features,
        limit=photographs.limit.value,
        chance=photographs.limit.chance,
        num_flagged=flagged,
        num=max(map(len, pairs.values()), default=0),
        memorised=memorised,
        pairs=tuple(sorted(shown, key=lambda pair: -pair.similarity)[:MAX_SHOWN_PICTURES]),
        sentence=_sentence(photographs, rows_of, flagged, memorised, names_of(comparison.models)),
    )


def _pairs(
    model: ModelId,
    rows: Sequence[ComparedRow],
    pictures: Mapping[str, np.ndarray],
    photographs: TrainingPhotographs,
    photo_files: Sequence[str],
) -> list[NearestPhoto]:
    """Return each picture of a model with the photograph nearest to it."""
    nearest = photographs.nearest(np.stack([pictures[row.images[model]] for row in rows]))
    pairs = []
    for row, place, similarity, is_mirrored in zip(
        rows, nearest.place, nearest.similarity, nearest.is_mirrored, strict=True
    ):
        base = pictures.get(row.images.get("base", ""))
        pairs.append(
            NearestPhoto(
                file=row.images[model],
                model=model,
                prompt=row.prompt,
                photo=photo_files[place],
                similarity=float(similarity),
                base_similarity=None
                if base is None or model == "base"
                else float(photographs.similarities(base[None])[0, :, place].max()),
                is_flagged=bool(similarity > photographs.limit.value),
                is_mirrored=bool(is_mirrored),
            )
        )
    return pairs


def _p_against_base(
    model: ModelId, rows_of: Mapping[ModelId, list[ComparedRow]], pairs: Mapping[ModelId, list[NearestPhoto]]
) -> float:
    """Return the p of a one-sided sign test over the rows in which one of model and base is flagged; 0 without a base.

    Both drew the row from the same prompt and noise.
    """
    if "base" not in pairs:
        return 0.0
    of_base = {id(row): pair.is_flagged for row, pair in zip(rows_of["base"], pairs["base"], strict=True)}
    both = [
        (pair.is_flagged, of_base[id(row)])
        for row, pair in zip(rows_of[model], pairs[model], strict=True)
        if id(row) in of_base
    ]
    only_model, only_base = both.count((True, False)), both.count((False, True))
    return float(bdtrc(only_model - 1, only_model + only_base, 0.5)) if only_model else 1.0


def _sentence(
    photographs: TrainingPhotographs,
    rows_of: Mapping[ModelId, list[ComparedRow]],
    flagged: Mapping[ModelId, int],
    memorised: Sequence[ModelId],
    names: Mapping[ModelId, str],
) -> str:
    trained = [model for model in rows_of if model != "base"]
    if not trained:
        return "No pictures of a trained model were there to be compared with the training photographs."

    def count(model: ModelId) -> str:
        return f"{flagged[model]} of {len(rows_of[model])} by {names[model]}"

    num = photographs.limit.num
    usual = f"than any of {counted(num, 'real photograph')} resembles another training photograph"
    if photographs.limit.num_above:
        usual = f"than 99.9 % of {counted(num, 'real photograph')} resemble another training photograph"
    if memorised:
        base = f"; {count('base')}" if "base" in flagged else ""
        copied = listed([count(model) for model in memorised])
        parts = [f"Training photographs seem to be copied: {copied} are more like one {usual}{base}."]
    else:
        p_of = {model: exceedance_p(flagged[model], len(rows_of[model]), photographs.limit) for model in trained}
        most = min(trained, key=p_of.__getitem__)
        if not flagged[most]:
            parts = [
                "No sign of copied training photographs: every picture is less like its nearest training photograph "
                f"than some of {counted(num, 'real photograph')} are like another."
            ]
        else:
            reason = "which may be chance"
            if p_of[most] < CHANCE_OF_A_CLAIM / len(trained):
                reason = f"but the difference from {count('base')} is too small to blame this training"
            parts = [
                f"No clear sign of copied training photographs: {count(most)} are more like one {usual}, {reason}."
            ]
        if all(row.held_out or not row.photo for row in rows_of[most]):
            parts.append(
                "None of the prompts is a training photograph's caption, with which copies would show first, so this "
                "does not rule them out."
            )
    parts.append("Similarity is no proof: look at the pairs.")
    return " ".join(parts)
