"""The same prompts over the epochs: a strip for each, which the page's script turns into one picture and a slider."""

from __future__ import annotations

import math

from safelight.trainer.registry.samplers import title_of
from safelight.trainer.report.facts import best_validation, evenly_chosen, format_epoch
from safelight.trainer.report.markup import Markup, nothing_yet, prompt_markup, shorten, tag
from safelight.trainer.report.models import put_forward
from safelight.trainer.report.pictures import Picture, embed_all
from safelight.trainer.report.run_reader import RunFolder, SampleSet, averages_note, inside, number
from safelight.trainer.report.theme import Part, asset

PART = Part(asset("samples.css"), asset("samples.js"))
TITLE = "The same prompts, epoch by epoch"
MAX_EPOCHS = 16
MAX_PROMPTS = 24
MAX_PICTURES = 288
MAX_PROMPT_CHARACTERS = 400
EDGES_PX = (448, 384, 288, 224, 160, 112)
BUDGET_BYTES = 6_000_000

PromptKey = tuple[str, int, float, float, str, str]


def samples_section(run: RunFolder) -> Markup:
    """Return a strip of pictures for each prompt that was sampled during training."""
    heading = tag("h2", TITLE)
    sets = [sample_set for sample_set in run.samples if sample_set.images]
    if not sets:
        quiet = "No pictures were sampled during training; the setting sample.every_epochs says how often to."
        return tag("section", heading, tag("p", quiet, class_="note"), id="samples")
    best = best_validation(run.metrics.validation["held_out"])
    best_step = best.step if best else None
    first = put_forward(run, [f"step-{sample.step}" for sample in sets if sample.step])
    first_step = int(first.removeprefix("step-")) if first else sets[-1].step
    keys = _prompt_keys(sets)
    shown_keys = keys[:MAX_PROMPTS]
    chosen = _choose_epochs(sets, first_step, min(MAX_EPOCHS, max(4, MAX_PICTURES // len(shown_keys))))
    images = {(sample.step, key_of(image)): (sample, image) for sample in chosen for image in sample.images}
    cells = [(sample.step, key) for key in shown_keys for sample in chosen if (sample.step, key) in images]
    files = [inside(run.path, images[cell][0].folder, images[cell][1].get("file")) for cell in cells]
    pictures = dict(zip(cells, embed_all(files, EDGES_PX, BUDGET_BYTES, run.work), strict=True))
    cuts = {key: cut_after_of(image) for (_, key), (_, image) in images.items()}
    strips = [
        tag(
            "figure",
            tag(
                "figcaption", prompt_markup(key[0], cuts.get(key, ""), MAX_PROMPT_CHARACTERS), " ", settings_markup(key)
            ),
            tag(
                "ol",
                [
                    _cell(picture, sample, place, key[0], best_step, first_step)
                    for place, sample in enumerate(chosen)
                    if (picture := pictures.get((sample.step, key)))
                ],
                class_="frames",
                tabindex="0",
                role="region",
                aria_label=f"Pictures over the epochs: {shorten(key[0], 120)}, seed {key[1]}",
            ),
            class_="sampled",
        )
        for key in shown_keys
    ]
    num_missing = sum(picture is None for picture in pictures.values())
    note = _note(sets, chosen, keys, shown_keys) + averages_note(run, "All but the base model's use")
    if num_missing:
        are = "is" if num_missing == 1 else "are"
        note += f" {num_missing:,} of {len(pictures):,} pictures {are} missing, damaged or too large for this page."
    return tag(
        "section",
        heading,
        tag("p", note, class_="note"),
        _slider(chosen, best_step, first_step),
        tag("div", strips, class_="prompts"),
        None if run.grids else nothing_yet("Pictures over cfg, steps and checkpoints:", "grid"),
        id="samples",
    )


def _slider(chosen: list[SampleSet], best_step: int | None, first_step: int) -> Markup | None:
    if len(chosen) < 2:
        return None
    names = [_name(sample, best_step) for sample in chosen]
    start = next((place for place, sample in enumerate(chosen) if sample.step == first_step), len(chosen) - 1)
    first, last = (tag("span", name, class_="meta", aria_hidden="true") for name in (names[0], names[-1]))
    slider = tag(
        "input",
        type="range",
        min=0,
        max=len(chosen) - 1,
        step=1,
        value=start,
        aria_label="Epoch",
        aria_valuetext=names[start],
        data_names="|".join(names),
    )
    return tag(
        "div",
        tag("output", names[start]),
        tag("div", first, slider, last, class_="track"),
        tag("button", "Show all epochs", type="button", aria_pressed="false"),
        class_="epoch-slider",
        hidden=True,
    )


def _cell(
    picture: Picture, sample: SampleSet, place: int, prompt: str, best_step: int | None, first_step: int
) -> Markup:
    where = _name(sample, None)
    image = picture.img(f"{where}: {shorten(prompt, 120)}", data_label=where)
    caption = tag("span", _name(sample, best_step), class_="epoch best" if sample.step == best_step else "epoch")
    zoom = f"{shorten(prompt, MAX_PROMPT_CHARACTERS)} — {where}, step {sample.step:,}"
    now = "now" if sample.step == first_step else None
    return tag("li", caption, image, data_zoom=zoom, data_place=place, class_=now)


def _choose_epochs(sets: list[SampleSet], kept_step: int, max_epochs: int) -> list[SampleSet]:
    chosen = set(evenly_chosen(len(sets), max_epochs))
    kept = next((i for i, sample in enumerate(sets) if sample.step == kept_step), None)
    if kept is not None and kept not in chosen:
        # it takes the place of its nearest neighbour, but never of the first or the last epoch
        inner = [i for i in chosen if 0 < i < len(sets) - 1]
        chosen -= {min(inner, key=lambda i: abs(i - kept))} if inner else set()
        chosen.add(kept)
    return [sets[i] for i in sorted(chosen)]


def _name(sample: SampleSet, best_step: int | None) -> str:
    if sample.step == 0:
        return "base model"
    return f"epoch {format_epoch(sample.epoch)}" + (" · best loss" if sample.step == best_step else "")


def _note(sets: list[SampleSet], chosen: list[SampleSet], keys: list, shown_keys: list) -> str:
    note = "A prompt starts from the same noise at every epoch, so what changes is what the model learnt."
    if len(chosen) < len(sets):
        note += f" Shown are {len(chosen)} of {len(sets)} epochs, with the first and the last."
    if len(shown_keys) < len(keys):
        note += f" Shown are {len(shown_keys)} of {len(keys)} prompts; the others are in the run's samples folder."
    return note


def key_of(image: dict) -> PromptKey:
    """Return what tells a sampled prompt from others: its text, seed, cfg, number of steps, sampler, negative prompt.

    Numbers that are unknown are -1, texts ''.
    """
    # a seed may have 64 bits, more than a float holds
    seed = image.get("seed")
    numbers = (number(image.get(key)) for key in ("cfg", "num_steps"))
    # NaN is not equal to itself: it would give every picture its own row
    return (
        str(image.get("prompt") or ""),
        seed if type(seed) is int and seed >= 0 else -1,
        *(-1.0 if math.isnan(value) else value for value in numbers),
        _sampler_of(image),
        str(image.get("negative_prompt") or ""),
    )


def _sampler_of(image: dict) -> str:
    sampler = image.get("sampler")
    return title_of(sampler, str(image.get("spacing", "trailing"))) if isinstance(sampler, str) else ""


def _prompt_keys(sets: list[SampleSet]) -> list[PromptKey]:
    return list(dict.fromkeys(key_of(image) for sample in sets for image in sample.images))


def settings_markup(key: PromptKey) -> Markup:
    _, seed, cfg, num_steps, sampler, negative = key
    parts = [f"seed {seed}"] * (seed >= 0) + [f"cfg {cfg:g}"] * (cfg >= 0)
    parts += ["1 step" if num_steps == 1 else f"{num_steps:g} steps"] * (num_steps >= 0)
    parts += [shorten(sampler, 40)] * bool(sampler) + [f"negative: {shorten(negative, 80)}"] * bool(negative)
    return tag("span", ", ".join(parts), class_="meta")


def cut_after_of(image: dict) -> str:
    """Return the end of what the text encoder read of a prompt, '' if it read all."""
    return image["cut_after"] if isinstance(image.get("cut_after"), str) else ""
