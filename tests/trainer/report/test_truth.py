"""What the report says about the course of a run: every sentence, against runs for which it is true and false."""

import json
import re
from pathlib import Path

import pytest

from safelight.trainer.report.build import render
from safelight.trainer.report.run_reader import read_run_folder

STEPS_PER_EPOCH = 10
SENTENCES = {
    "falling at the end": "It was still falling when training ended.",
    "falling when stopped": "It was still falling when the run was stopped, at epoch 4 of 40.",
    "level": "It has hardly changed since.",
    "level at the end": "It had become level by then.",
    "low rate": "The learning rate had come down",
    "rate 0": "The learning rate was 0 at every logged step, so the model did not learn.",
    "risen": "It has risen since.",
    "both risen": "It has risen since, and so has the loss on the training photographs.",
    "overfitting": "The model has been overfitting since.",
    "never below": "Loss on held-out photographs never fell below that of the base model.",
    "got worse": "the model got worse on photographs it was not trained on",
    "no improvement": "there was no measurable improvement",
    "one photograph": "One photograph does not show what the model learned.",
    "one to judge": "Overfitting cannot be judged from one held-out photograph.",
    "few": "Percentages are based on only",
    "percent below": " % below that of the base model",
    "not validated": "the base model was not validated",
    "measured once": "Held-out loss was measured once, at epoch",
    "base alone": "it has not been measured since",
    "none configured": "No validation was configured",
    "none logged": "No validation has been logged",
    "no step": "No training step has been logged so far.",
    "stopped": "The run was stopped at epoch 4 of 40.",
    "open": "the run is still going on, or was ended before its time",
    "diverged": "This run diverged",
    "not finite": "This run has a loss that is not a finite number.",
    "far above": "Held-out loss rose far above that of the base model.",
    "more training": "A little more training may still help.",
    "no overfitting": "and did not rise.",
    "not yet": ": no sign of overfitting until then.",
    "hardly": "No noticeable sign of overfitting",
    "gap": "The gap to the loss on training photographs (0.1200) widened, from +0.0000 at the start to +0.0300, which "
    "is no overfitting as long as held-out loss does not rise.",
    "use": "Use the checkpoint of epoch",
    "subset unknown": "Training photographs were not validated at the same steps",
    "improved unknown": "whether the model improved before that is not known",
    "two": "it takes at least three",
    "unjudged": "There was no validation on held-out photographs",
}
FALLING = (0.20, 0.18, 0.17, 0.16, 0.15)
LEVEL = (0.20, 0.17, 0.1502, 0.1501, 0.15)
RISING = (0.20, 0.17, 0.15, 0.16, 0.17)
# from scratch, loss falls so far at first that a later fall is small beside the whole
FROM_SCRATCH = (1.1, 0.30, 0.26, 0.25, 0.24)
ENDED = {"stopped": "on request at step 40", "diverged": "step 40: the loss is not finite"}


def event(name: str, step: int) -> dict:
    return {"kind": "event", "step": step, "event": name, "detail": ENDED.get(name, name)}


def write(
    folder: Path,
    held_out: tuple = FALLING,
    subset: tuple = (),
    *,
    events: tuple[str, ...] = (),
    event_step: int = 40,
    planned: int = 4,
    rates: tuple = (),
    first_epoch: int = 0,
    num_images: int = 40,
    loss: float | None = 0.2,
    late: int = 0,
    settings: str = "",
) -> str:
    """Write a run that is validated every epoch and return what its page says.

    late: epochs without validation after the last one. rates: learning rate by epoch, 1e-4 by default.
    """
    last = first_epoch + len(held_out) - 1 + late
    lines = [
        {"kind": "train", "step": step, "epoch": step / STEPS_PER_EPOCH, "stage": 0, "loss": loss}
        | {"lr": rates[(step - 1) // STEPS_PER_EPOCH] if rates else 1e-4}
        for step in range(5, last * STEPS_PER_EPOCH + 1, 5)
    ]
    for split, losses in (("held_out", held_out), ("train_subset", subset)):
        for epoch, value in enumerate(losses, first_epoch):
            point = {"kind": "validation", "split": split, "step": epoch * STEPS_PER_EPOCH, "epoch": float(epoch)}
            lines.append(point | {"loss": value, "num_images": num_images, "loss_by_timestep": [value, value]})
    lines += [event(name, event_step) for name in events]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text(
        f"[train]\nbatch_size = 1\nepochs = {planned}\n[optimizer]\nlr = 1e-4\n{settings}"
    )
    (folder / "data.json").write_text(json.dumps({"buckets": [{"num_train": STEPS_PER_EPOCH, "num_validation": 1}]}))
    html = render(read_run_folder(folder)).partition("<body>")[2].partition("<script>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html)).replace("&#x27;", "'").replace("\u00a0", " ")


NAN = float("nan")
# a run -> what the report says about it; it says no other of the sentences
CASES = {
    "still falls at its end": ({}, "falling at the end, percent below, more training, no overfitting"),
    "stopped while falling": (
        {"planned": 40, "events": ("stopped",)},
        "falling when stopped, percent below, more training, no overfitting",
    ),
    "stopped when level": (
        {"held_out": LEVEL, "planned": 40, "events": ("stopped",)},
        "level at the end, percent below, hardly, stopped",
    ),
    "stopped, resumed and at its end": (
        {"events": ("stopped", "resumed")},
        "falling at the end, percent below, more training, no overfitting",
    ),
    "running or killed": ({"planned": 40}, "percent below, not yet, open"),
    "diverged while falling": ({"planned": 40, "events": ("diverged",)}, "percent below, not yet, diverged"),
    "diverged and resumed": ({"planned": 40, "events": ("diverged", "resumed")}, "percent below, not yet, open"),
    "trained on without validation": ({"late": 2, "planned": 6}, "percent below, more training, no overfitting"),
    "falls while the rate decays to 0": (
        {"rates": (1e-4, 1e-4, 1e-4, 1e-7)},
        "percent below, no overfitting, low rate",
    ),
    "falls until a schedule has ended": (
        {"rates": (1e-4, 1e-4, 1e-4, 1e-4, 1e-9), "held_out": (*FALLING, 0.14), "planned": 5},
        "percent below, no overfitting, low rate",
    ),
    "falls while the gap widens": (
        {"subset": (0.20, 0.17, 0.15, 0.13, 0.12)},
        "falling at the end, percent below, more training, no overfitting, gap",
    ),
    "falls with the loss on training photographs": (
        {"subset": FALLING},
        "falling at the end, percent below, more training, no overfitting",
    ),
    "level at its end": ({"held_out": LEVEL}, "level at the end, percent below, hardly"),
    "level because the rate is 0": (
        {"held_out": LEVEL, "rates": (1e-4, 1e-4, 0.0, 0.0)},
        "level at the end, percent below, hardly, low rate",
    ),
    "level since": ({"held_out": (*LEVEL[:3], 0.1501, 0.1503)}, "level, percent below, hardly"),
    "still falls, from scratch": (
        {"held_out": FROM_SCRATCH},
        "falling at the end, percent below, more training, no overfitting",
    ),
    "rises, from scratch": ({"held_out": (1.1, 0.3, 0.24, 0.25, 0.26)}, "risen, percent below, subset unknown"),
    "rate 0 throughout": ({"held_out": (0.2,) * 5, "rates": (0.0,) * 4}, "rate 0"),
    "risen, training unknown": ({"held_out": RISING}, "risen, percent below, subset unknown"),
    "overfits": (
        {"held_out": RISING, "subset": (0.2, 0.17, 0.15, 0.14, 0.13)},
        "overfitting, percent below, use",
    ),
    "both rise, held-out more": (
        {"held_out": RISING, "subset": (0.2, 0.17, 0.15, 0.152, 0.154)},
        "risen, both risen, percent below",
    ),
    "never better": ({"held_out": (0.2, 0.2001, 0.2, 0.2, 0.2001)}, "never below, no improvement"),
    "worse than the base": ({"held_out": (0.2, 0.21, 0.22, 0.23, 0.25)}, "never below, got worse"),
    "one photograph held out": ({"num_images": 1}, "one photograph, one to judge"),
    "nine photographs held out": (
        {"num_images": 9},
        "few, falling at the end, percent below, more training, no overfitting",
    ),
    "base not validated, level": (
        {"held_out": (0.15, 0.1501, 0.15), "first_epoch": 2},
        "not validated, improved unknown",
    ),
    "base not validated, falling": (
        {"held_out": FALLING[2:], "first_epoch": 2},
        "not validated, more training, no overfitting",
    ),
    "measured once, late": ({"held_out": (0.2,), "first_epoch": 4}, "measured once, two"),
    "measured once, at the start": ({"held_out": (0.2,), "late": 4}, "base alone, two"),
    "no validation configured": (
        {"held_out": (), "late": 5, "settings": "[validate]\nevery_epochs = 0\n"},
        "none configured, unjudged",
    ),
    "no validation yet": ({"held_out": (), "late": 3, "planned": 40}, "none logged, unjudged, open"),
    "not begun": ({"held_out": (0.2,)}, "no step, base alone"),
    "no loss is finite": ({"loss": None}, "not finite, percent below, not yet"),
    "the last held-out loss is not finite": (
        {"held_out": (*FALLING[:4], NAN), "planned": 40},
        "not finite, percent below, not yet",
    ),
    "far above the base": (
        {"held_out": (0.2, 0.3, 0.4, 0.5, 0.6), "events": ("held-out loss rose",)},
        "far above, never below, got worse",
    ),
    "far above, and back": (
        {"held_out": (0.2, 0.5, 0.19, 0.17, 0.15), "events": ("held-out loss rose",), "event_step": 10},
        "falling at the end, percent below, more training, no overfitting",
    ),
}
# these contain another of the sentences, or are said in one breath with it
IMPLIED = {"both risen": {"risen"}, "no step": {"base alone"}, "measured once": {"not validated"}}


def said_by(text: str) -> set[str]:
    text = text.lower()
    return {key for key, sentence in SENTENCES.items() if sentence.lower() in text}


@pytest.mark.parametrize("case", CASES)
def test_the_report_says_what_is_so_and_nothing_else(tmp_path: Path, case: str) -> None:
    options, expected = CASES[case]
    wanted = set(expected.split(", "))
    assert wanted <= set(SENTENCES)
    implied = set().union(*(IMPLIED.get(key, set()) for key in wanted))
    said = said_by(write(tmp_path / "run", **options))
    assert wanted - implied <= said | implied
    assert said - wanted - implied == set()


def test_every_sentence_is_tested_where_it_is_true_and_where_it_is_false() -> None:
    wanted = [set(expected.split(", ")) for _, expected in CASES.values()]
    for key in SENTENCES:
        assert any(key in case for case in wanted), f"{key} is true of no case"
        assert not all(key in case for case in wanted), f"{key} is false of no case"


def test_one_held_out_photograph_gives_no_percentage(tmp_path: Path) -> None:
    text = write(tmp_path / "run", (*FALLING[:4], 0.3), num_images=1)
    assert "change from step 0" not in text
    before_the_data = text.partition("The noise schedule is divided")[0]
    assert not re.search(r"\d %", re.sub(r"\d+–\d+ %", "", before_the_data))


def test_a_divergence_is_the_first_thing_said(tmp_path: Path) -> None:
    for number, options in enumerate(({"events": ("diverged",)}, {"loss": None}, {"held_out": (0.2, 0.19, NAN)})):
        text = write(tmp_path / str(number), **options)
        first = min(text.index(word) for word in ("This run diverged", "This run has a loss") if word in text)
        assert first < text.index("was lowest at")
