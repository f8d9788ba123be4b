"""`safelight evaluate`: is the fine-tuned model better than its base, at which checkpoint, and where does it burn?

Top to bottom: the pictures (RUN/compare), what is measured of each (features, boxes), the figures, the checkpoint to
use. Whatever was computed before is kept by content, so that a second call computes nothing again, and a call after a
kill goes on. The result is RUN/evaluation.json (trainer/report/evaluation.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from safelight.data.atomic import atomic_write_text
from safelight.errors import UserError
from safelight.text import counted
from safelight.trainer.distributed.together import together
from safelight.trainer.evaluation.burn import PictureMeasures, PictureSet, judge_burn, measures_of
from safelight.trainer.evaluation.crops import compare_crops, find_crops
from safelight.trainer.evaluation.flagged import check_folder, write_flagged
from safelight.trainer.evaluation.kept import Kept
from safelight.trainer.evaluation.memorisation import judge_memorisation
from safelight.trainer.evaluation.pictures import (
    Photographs,
    Picture,
    check_photographs,
    drawn_picture,
    drawn_pictures,
    groups_of,
    mirrored,
    photographs,
    reconstructed,
)
from safelight.trainer.evaluation.set_metrics import BASE, REAL, Features, diversity_metric, metrics_of
from safelight.trainer.evaluation.suggest import KidChange, suggest
from safelight.trainer.evaluation.wording import names_of
from safelight.trainer.features.cache import FeatureCache
from safelight.trainer.features.extractor import Extractor
from safelight.trainer.features.latents import open_latents
from safelight.trainer.features.lpips import Lpips
from safelight.trainer.features.open_extractor import open_extractor
from safelight.trainer.inference.compare import FOLDER as COMPARE_FOLDER
from safelight.trainer.inference.compare import compare
from safelight.trainer.inference.compared_prompts import Prompt
from safelight.trainer.inference.draw import OpenRun
from safelight.trainer.inference.gallery import read_key, save_png
from safelight.trainer.inference.pictures import Request, Say, Weights, draw_missing, hash_of
from safelight.trainer.inference.sampling import settings_of
from safelight.trainer.metrics.kid import kid_difference
from safelight.trainer.metrics.resampling import TooFewPictures
from safelight.trainer.report.comparison import Comparison, Record
from safelight.trainer.report.evaluation import (
    FAULTS,
    Burn,
    BurnScores,
    CropDivergence,
    EvaluatedModel,
    Evaluation,
    Fault,
    Memorisation,
    Metric,
    is_worse_than_base,
    num_over,
)
from safelight.trainer.report.run_reader import read_run_folder
from safelight.trainer.tagging.taggers import TaggerSource
from safelight.untrusted import check_kinds, read_bytes

RECORD_NAME, EVALUATION_FOLDER = "evaluation.json", "evaluation"
# the name of the extractor whose Fréchet distance is called FID
INCEPTION = "Inception v3 (FID)"
# photographs whose pairwise LPIPS distances are computed; each pair costs, so more take long
MAX_DIVERSE = 200
# photographs that say what is not burnt, each of which goes through the autoencoder
MAX_BURN_REFERENCE = 300


@dataclass(frozen=True)
class Means:
    """What to measure with, as the user names it; '' and () for none.

    features: extractors, the first of which gives the headline. The run's own autoencoder is always among them.
    detector: opens what finds the crops. crops: the extractor of crops, one of the others, '' for the first.
    """

    features: tuple[str, ...] = ()
    detector: AbstractContextManager[TaggerSource] | None = None
    lpips: str = ""
    crops: str = ""


class MetricList(Record):
    """The metrics by one extractor, and those that there are too few pictures for."""

    metrics: tuple[Metric, ...]
    lacking: tuple[str, ...]


class KidChanges(Record):
    """KID of one checkpoint minus another's: (model, other, change, p)."""

    rows: tuple[tuple[str, str, float, float], ...]


def evaluate(
    run: OpenRun,
    steps: Sequence[int],
    prompts: Sequence[Prompt],
    means: Means,
    device: torch.device,
    *,
    num_seeds: int = 1,
    guidance: Sequence[float] = (),
    flagged: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    say: Say = lambda text: None,
) -> tuple[Evaluation, int]:
    """Draw what is missing, measure it, write RUN/evaluation.json and return it, and how many results were computed.

    steps: of the checkpoints, beside the base. guidance: further scales at which the burn check draws all prompts.
    flagged: folder to which the pictures are copied that the burn check flags. device: where extractors and detectors
    run. progress: called with what is done, and how much of it. What cannot be computed is a line of `not_computed`,
    and the rest is computed. Raises UserError as `compare`, and if the dataset is not there.
    """
    check_kinds(run.run_dir, (EVALUATION_FOLDER,), (RECORD_NAME, "report.html"), "the run")
    run.check_writable(EVALUATION_FOLDER)
    if flagged is not None:
        check_folder(flagged)
    check_photographs(run)
    comparison = compare(
        run, steps, prompts, num_seeds=num_seeds, progress=functools.partial(progress, "drawing"), say=say
    )
    captions = {prompt.photo.sha256: prompt.text for prompt in prompts if prompt.photo is not None}
    photos = photographs(run, comparison.width, comparison.height, captions)
    work = _Work(run, comparison, photos, means, device, progress, say)
    work.share(guidance)
    with together(run.world):
        if run.world.is_main:
            evaluation = _measure(work, num_prompts=len(prompts), guidance=guidance, flagged=flagged)
            atomic_write_text(run.run_dir / RECORD_NAME, evaluation.model_dump_json(indent=1))
    if not run.world.is_main:
        evaluation = Evaluation.model_validate_json(read_bytes(run.run_dir / RECORD_NAME))
    return evaluation, work.kept.num_computed


def _measure(work: _Work, num_prompts: int, guidance: Sequence[float], flagged: Path | None) -> Evaluation:
    """Return the evaluation, in one process. Arguments as for `evaluate`."""
    comparison = work.comparison
    models = _models(work.run.run_dir, comparison)
    metrics, kid_changes = work.metrics()
    crops = work.crops()
    burn = work.burn(guidance)
    if flagged is not None:
        work.say(work.copy_flagged(guidance, flagged))
    memorisation = work.memorisation()
    headline = next((metric for metric in metrics if metric.id.startswith("kid_")), None)
    return Evaluation(
        models=tuple(models),
        num_prompts=num_prompts,
        num_real=len(work.photographs.all),
        width=comparison.width,
        height=comparison.height,
        num_steps=comparison.num_steps,
        cfg=comparison.cfg,
        sampler=comparison.sampler,
        metrics=tuple(metrics),
        crops=tuple(crops),
        burn=burn,
        memorisation=memorisation,
        suggestion=suggest(
            models,
            headline,
            kid_changes,
            _blemishes(burn, memorisation, comparison.cfg),
            _not_by_training(burn, comparison.cfg),
            _at_other_scales(burn, comparison.cfg),
        ),
        not_computed=tuple(work.not_computed),
    )


def _models(run_dir: Path, comparison: Comparison) -> list[EvaluatedModel]:
    """Return the models with the held-out losses that training logged."""
    losses = {point.step: point.loss for point in read_run_folder(run_dir).metrics.validation["held_out"]}
    return [
        EvaluatedModel(id=model.id, step=model.step, epoch=model.epoch, held_out_loss=losses.get(model.step))
        for model in comparison.models
    ]


def _blemishes(burn: Burn | None, memorisation: Memorisation | None, cfg: float) -> dict[str, dict[str, str]]:
    """Return what is wrong with models' pictures at the guidance scale cfg, if it is not so with the base's.

    model -> what, such as "burnt" -> how many, in words, "" if that is not known.
    """
    found: dict[str, dict[str, str]] = {}
    for model, score, own, base in _faulty(burn, cfg):
        if base is None or is_worse_than_base(own, base, score):
            count = f"{_num_of(own, score)}{f', {_num_of(base, score)} by the base' if base else ''}"
            found.setdefault(model, {})[FAULTS[score]] = count
    for model in memorisation.memorised if memorisation is not None else ():
        found.setdefault(model, {})["copies of training photographs"] = ""
    return found


def _not_by_training(burn: Burn | None, cfg: float) -> dict[str, list[str]]:
    """Return what is wrong with models' pictures at cfg, but with the base's too, or within noise: model -> clauses."""
    found: dict[str, list[str]] = {}
    for model, score, own, base in _faulty(burn, cfg):
        if base is None or is_worse_than_base(own, base, score):
            continue
        counts = f"{_num_of(own, score)} are {FAULTS[score]}, {_num_of(base, score)} of the base's"
        if getattr(base, f"is_{score}"):
            clause = f"pictures have a fault that training did not add: {counts}"
        else:
            clause = f"pictures have no more faults than the base's beyond noise: {counts}"
        found.setdefault(model, []).append(clause)
    return found


def _at_other_scales(burn: Burn | None, cfg: float) -> dict[str, list[str]]:
    """Return what is wrong with pictures at other guidance scales, which decide nothing: model -> clauses."""
    found: dict[str, list[str]] = {}
    scales = dict.fromkeys(scores.cfg for scores in burn.sets) if burn is not None else ()
    for scale in [scale for scale in scales if scale != cfg]:
        for model, score, own, base in _faulty(burn, scale):
            of_base = f", {_num_of(base, score)} of the base's" if base is not None else ""
            found.setdefault(model, []).append(
                f"pictures at cfg {scale:g} are {FAULTS[score]} more often than chance explains, {_num_of(own, score)}"
                f"{of_base}; checkpoints are chosen by those at cfg {cfg:g}"
            )
    return found


def _faulty(burn: Burn | None, cfg: float) -> Iterator[tuple[str, Fault, BurnScores, BurnScores | None]]:
    """Yield checkpoint, score, its and the base's figures where chance explains less at the guidance scale cfg."""
    sets = {scores.model: scores for scores in (burn.sets if burn is not None else ()) if scores.cfg == cfg}
    for model, scores in sets.items():
        for score in FAULTS:
            if model not in (REAL, BASE) and getattr(scores, f"is_{score}"):
                yield model, score, scores, sets.get(BASE)


def _num_of(scores: BurnScores, score: Fault) -> str:
    return f"{num_over(scores, score)} of {scores.num}"


class _Work:
    """The parts of an evaluation over one comparison. Extractors are opened once, and only if their results are new."""

    def __init__(
        self,
        run: OpenRun,
        comparison: Comparison,
        photos: Photographs,
        means: Means,
        device: torch.device,
        progress: Callable[[str, int, int], None],
        say: Say,
    ):
        self.run, self.comparison, self.photographs, self.means, self.device = run, comparison, photos, means, device
        self.progress, self.say = progress, say
        self.drawn = drawn_pictures(run.run_dir, comparison)
        self.prompts = [row.prompt for row in comparison.rows]
        self.kept = Kept(run.run_dir)
        # by guidance scales; drawn by all processes, and read by one
        self._of_burn: dict[tuple, tuple[list[Picture], dict[tuple[str, float], list[Picture]]]] = {}
        self.not_computed: list[str] = []
        if photos.num_missing:
            self.not_computed.append(
                f"{counted(photos.num_missing, 'photograph')} that the run used, no longer in the dataset: left out"
            )
        if photos.num_small:
            self.not_computed.append(
                f"{counted(photos.num_small, 'photograph')} smaller than the drawn pictures, {comparison.width} x "
                f"{comparison.height} px: not compared with"
            )
        # the extractors that work, by what the user calls them; the run's autoencoder is ''
        self.extractors: dict[str, Extractor] = {}
        for spec in (*dict.fromkeys(means.features), ""):
            with self._or_not_computed():
                self.extractors[spec] = self._open(spec)

    def _open(self, spec: str) -> Extractor:
        return open_extractor(spec, self.device) if spec else open_latents(self.run.codec)

    @contextmanager
    def _or_not_computed(self) -> Iterator[None]:
        """Turn a UserError of the block into a line of not_computed."""
        try:
            yield
        except UserError as error:
            self.not_computed.append(str(error))
            self.say(f"note: not computed: {error}")

    def _keys(self, pictures: Sequence[Picture]) -> str:
        return hash_of({"pictures": [[picture.sha256, picture.group] for picture in pictures]})

    def _inputs(self, extractor: Extractor) -> dict:
        return {
            "features": extractor.fingerprint,
            "real": self._keys(self.photographs.all),
            "drawn": {model: self._keys(pictures) for model, pictures in self.drawn.items()},
        }

    def _features(self, extractor: Extractor, *sets: Sequence[Picture], what: str = "") -> list[np.ndarray]:
        """Return the features of each set of pictures."""
        cache = FeatureCache(self.run.run_dir, extractor)
        total, done = sum(map(len, sets)), 0

        def advance(num: int) -> None:
            nonlocal done
            done += num
            self.progress(what or f"looking: {extractor.name}", done, total)

        return [
            cache.features([p.sha256 for p in pictures], lambda i, pictures=pictures: pictures[i].decode(), advance)
            for pictures in sets
        ]

    def share(self, guidance: Sequence[float]) -> None:
        """Draw and look at pictures in all processes, so that the main one finds most of its work done."""
        world = self.run.world
        if world.size == 1:
            return
        pictures = [*self.photographs.all, *(picture for drawn in self.drawn.values() for picture in drawn)]
        looked = [*pictures, *map(mirrored, self.photographs.trained)] if self.run.config.data.flip_p > 0 else pictures
        burnt, drawn = self._burn_pictures(guidance)
        sets = [(extractor, looked) for extractor in self.extractors.values()]
        sets.append((PictureMeasures(), [*burnt, *(picture for pictures in drawn.values() for picture in pictures)]))
        for extractor, pictures in sets:
            # what cannot be computed is told where it is missed
            with contextlib.suppress(ValueError):
                FeatureCache(self.run.run_dir, extractor).share(
                    world,
                    [picture.sha256 for picture in pictures],
                    lambda place, pictures=pictures: pictures[place].decode(),
                    functools.partial(self.progress, f"looking: {extractor.name}"),
                )

    def _all_features(self, spec: str, extractor: Extractor) -> Features:
        real, *drawn = self._features(extractor, self.photographs.all, *self.drawn.values())
        texts = None
        if hasattr(extractor, "text_features"):
            texts = FeatureCache(self.run.run_dir, extractor).text_features(extractor, self.prompts)
        return Features(
            name=extractor.name,
            id=f"x{list(self.extractors).index(spec)}" if spec else "vae",
            real=real,
            real_groups=groups_of(self.photographs.all),
            drawn=dict(zip(self.drawn, drawn, strict=True)),
            groups=self.prompts,
            texts=texts,
        )

    # the parts

    def metrics(self) -> tuple[list[Metric], dict[tuple[str, str], KidChange]]:
        """Return all metrics, and how the headline KID differs between models."""
        metrics: list[Metric] = []
        changes: dict[tuple[str, str], KidChange] = {}
        for number, (spec, extractor) in enumerate(self.extractors.items()):
            with self._or_not_computed():
                inputs = {**self._inputs(extractor), "place": number}
                found = self.kept.of(MetricList, inputs, functools.partial(self._metrics_by, spec, extractor))
                metrics += found.metrics
                self.not_computed += found.lacking
                if not changes and any(metric.id.startswith("kid_") for metric in found.metrics):
                    rows = self.kept.of(KidChanges, inputs, functools.partial(self._kid_changes, spec, extractor)).rows
                    changes = {(model, other): KidChange(value, p) for model, other, value, p in rows}
        if self.means.lpips:
            with self._or_not_computed():
                metrics += self._diversity(Lpips(Path(self.means.lpips).expanduser(), self.device))
        return metrics, changes

    def _metrics_by(self, spec: str, extractor: Extractor) -> MetricList:
        metrics, lacking = metrics_of(self._all_features(spec, extractor), extractor.name == INCEPTION)
        return MetricList(metrics=tuple(metrics), lacking=tuple(lacking))

    def _kid_changes(self, spec: str, extractor: Extractor) -> KidChanges:
        features = self._all_features(spec, extractor)
        rows = []
        for model, other in permutations(features.drawn, 2):
            found = kid_difference(
                features.real, features.drawn[other], features.drawn[model], features.real_groups, features.groups
            )
            rows.append((model, other, found.interval.value, found.p))
        return KidChanges(rows=tuple(rows))

    def _diversity(self, lpips: Lpips) -> tuple[Metric, ...]:
        real = self.photographs.all[:: -(-len(self.photographs.all) // MAX_DIVERSE) or 1]
        drawn = {model: self._keys(pictures) for model, pictures in self.drawn.items()}
        # says: raised when its words change, which are kept with its figures
        inputs = {"says": 2, "lpips": lpips.fingerprint, "real": self._keys(real), "drawn": drawn}

        def compute() -> MetricList:
            def distances(pictures: Sequence[Picture], what: str) -> np.ndarray:
                self.progress(f"LPIPS of {what}", 0, len(pictures))
                return lpips.distances(len(pictures), lambda i: pictures[i].decode())

            try:
                found = diversity_metric(
                    {model: distances(pictures, model) for model, pictures in self.drawn.items()},
                    distances(real, "photographs"),
                    self.prompts,
                    lpips.name,
                )
            except TooFewPictures as error:
                return MetricList(metrics=(), lacking=(f"diversity: {error}",))
            return MetricList(metrics=tuple(found), lacking=())

        found = self.kept.of(MetricList, inputs, compute)
        self.not_computed += found.lacking
        return found.metrics

    def crops(self) -> list[CropDivergence]:
        """Return the crop divergence of each checkpoint."""
        if self.means.detector is None:
            self.not_computed.append("crop divergence: no detector is named; give one with --detector")
            return []
        spec = self.means.crops or next(iter(self.extractors), "")
        if spec not in self.extractors:
            return []
        found: list[CropDivergence] = []
        extractor = self.extractors[spec]
        with self._or_not_computed(), self.means.detector as detector:
            inputs = {**self._inputs(extractor), "detector": detector.record}
            find = functools.cache(functools.partial(self._find_crops, detector, extractor))
            for model in [model for model in self.drawn if model != BASE]:

                def compute(model: str = model) -> CropDivergence:
                    name = Path(detector.model).name
                    return compare_crops(model, find(REAL), find(BASE), find(model), name, extractor.name)

                try:
                    found.append(self.kept.of(CropDivergence, {**inputs, "model": model}, compute))
                except ValueError as error:
                    if isinstance(error, UserError):
                        raise
                    self.not_computed.append(f"crop divergence of {model}: {error}")
        return found

    def _find_crops(self, detector, extractor: Extractor, which: str):
        pictures = self.photographs.all if which == REAL else self.drawn[which]
        folder = self.run.run_dir / EVALUATION_FOLDER / "boxes"
        what = "photographs" if which == REAL else which
        return find_crops(
            pictures,
            detector,
            FeatureCache(self.run.run_dir, extractor),
            self.device,
            folder,
            lambda done, total: self.progress(f"looking for things: {what}", done, total),
            self.say,
        )

    def burn(self, guidance: Sequence[float]) -> Burn | None:
        """Return how burnt and smoothed out the pictures are, None if they are too small to tell.

        guidance: scales of classifier-free guidance at which all prompts are drawn, beside the comparison's.
        """
        extractor = PictureMeasures()
        photos, drawn = self._burn_pictures(guidance)

        def compute() -> Burn:
            real, sets = self._burn_sets(photos, drawn)
            return judge_burn(real, sets, names_of(self.comparison.models), len(self.photographs.all))

        inputs = {
            "features": extractor.fingerprint,
            "reference": self._keys(photos),
            "against": "the base, prompt by prompt",
            # raised when its words change, which are kept with its figures
            "says": 2,
            "photographs": len(self.photographs.all),
            "epochs": [model.epoch for model in self.comparison.models],
            "drawn": [[model, scale, self._keys(pictures)] for (model, scale), pictures in drawn.items()],
        }
        try:
            return self.kept.of(Burn, inputs, compute)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            self.not_computed.append(f"burn check: {error}")
            return None

    def copy_flagged(self, guidance: Sequence[float], folder: Path) -> str:
        """Copy the pictures that the burn check flags into a folder and return a line on them."""
        try:
            real, sets = self._burn_sets(*self._burn_pictures(guidance))
            return write_flagged(self.run.run_dir / COMPARE_FOLDER, folder, real, sets)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            return f"no pictures copied to {folder}: {error}"

    def _burn_pictures(self, guidance: Sequence[float]) -> tuple[list[Picture], dict[tuple[str, float], list[Picture]]]:
        """Return the photographs that say what is not burnt, and the drawn pictures by model and scale."""
        if (key := tuple(guidance)) in self._of_burn:
            return self._of_burn[key]
        every = -(-len(self.photographs.all) // MAX_BURN_REFERENCE) or 1
        photos = [reconstructed(picture, self.run.codec) for picture in self.photographs.all[::every]]
        scales = [self.comparison.cfg, *(scale for scale in dict.fromkeys(guidance) if scale != self.comparison.cfg)]
        drawn = {
            (model, scale): pictures if scale == self.comparison.cfg else self._draw_at(model, scale)
            for scale in scales
            for model, pictures in self.drawn.items()
        }
        self._of_burn[key] = photos, drawn
        return photos, drawn

    def _burn_sets(
        self, photos: Sequence[Picture], drawn: Mapping[tuple[str, float], list[Picture]]
    ) -> tuple[np.ndarray, list[PictureSet]]:
        """Return the measures of the photographs, (N, 6), and the drawn sets with theirs."""
        real, *rows = self._features(PictureMeasures(), photos, *drawn.values(), what="burn check")
        sets = [
            PictureSet(model, scale, [picture.name for picture in pictures], self.prompts, measures_of(found))
            for ((model, scale), pictures), found in zip(drawn.items(), rows, strict=True)
        ]
        return measures_of(real), sets

    def _draw_at(self, model: str, scale: float) -> list[Picture]:
        """Return a model's pictures of all rows at another guidance scale; those that are missing are drawn."""
        step = next(each.step for each in self.comparison.models if each.id == model)
        settings, negative = settings_of(self.run.config), self.run.config.sample.negative_prompt
        requests = {
            f"{model.replace('-', '')}-cfg{scale:g}-seed{row.seed}-{row.place:03d}.png": Request(
                Weights(step or None),
                row.prompt,
                row.place,
                replace(settings.with_seed(row.seed), cfg=scale),
                negative,
                self.run.config.model.clip_skip,
            )
            for row in self.comparison.rows
        }
        folder = self.run.run_dir / COMPARE_FOLDER
        progress = functools.partial(self.progress, f"drawing at cfg {scale:g}: {model}")
        draw_missing(self.run, requests, folder, progress=progress, say=self.say)
        return [
            drawn_picture(folder, name, row.prompt) for name, row in zip(requests, self.comparison.rows, strict=True)
        ]

    def memorisation(self) -> Memorisation | None:
        """Return which models copy training photographs, by the first extractor that works."""
        _spec, extractor = next(iter(self.extractors.items()))
        trained, held_out = self.photographs.trained, self.photographs.held_out
        is_mirrored = self.run.config.data.flip_p > 0
        # small copies of photographs, of which only those that are shown are written
        files = [f"photo-{picture.sha256[:16]}.png" for picture in trained]

        def compute() -> Memorisation:
            sets = [trained, held_out, *self.drawn.values()]
            of_trained, of_held_out, *drawn = self._features(extractor, *sets)
            of_mirrored = self._features(extractor, [mirrored(p) for p in trained])[0] if is_mirrored else None
            return judge_memorisation(
                self.comparison,
                {
                    picture.name: row
                    for pictures, rows in zip(self.drawn.values(), drawn, strict=True)
                    for picture, row in zip(pictures, rows, strict=True)
                },
                of_trained,
                of_held_out,
                files,
                extractor.name,
                of_mirrored,
                groups_of(trained),
            )

        with self._or_not_computed():
            inputs = {**self._inputs(extractor), "held out": self._keys(held_out), "mirrored": is_mirrored}
            found = self.kept.of(Memorisation, inputs, compute)
            self._write_photos({pair.photo for pair in found.pairs}, dict(zip(files, trained, strict=True)))
            return found
        return None

    def _write_photos(self, wanted: set[str], pictures: Mapping[str, Picture]) -> None:
        """Write the photographs that pairs are shown with into RUN/evaluation, as the report reads them."""
        folder = self.run.run_dir / EVALUATION_FOLDER
        folder.mkdir(exist_ok=True)
        for name in sorted(wanted):
            if read_key(folder / name) != (picture := pictures[name]).sha256:
                save_png(picture.decode(), folder / name, "", picture.sha256)
