"""The report's sections with pictures: base and trained side by side, scores, and samples over the epochs."""

import math

from safelight.text import counted
from safelight.trainer.report.facts import evenly_chosen, format_epoch
from safelight.trainer.report.markup import Markup, empty_state, join, prompt_markup, shorten, table, tag
from safelight.trainer.report.pictures import Picture, embed_all, placeholder
from safelight.trainer.report.run_reader import RunFolder, SampleSet, averages_note, inside, number, rows_of

MAX_PAIRS = 24
MAX_LARGE_PAIRS = 6
MAX_EPOCHS = 12
MAX_PROMPTS = 24
MAX_PROMPT_CHARACTERS = 400
MAX_SCORES = 100
PAIR_EDGES_PX = (512, 384, 256, 160)
SAMPLE_EDGES_PX = (288, 224, 160, 112)
PAIRS_BUDGET_BYTES = 5_000_000
SAMPLES_BUDGET_BYTES = 5_000_000


def learned_section(run: RunFolder) -> Markup:
    """Return "Did it learn?": base and trained side by side, and the scores if the run has any."""
    return tag("section", tag("h2", "Did it learn?"), _pairs(run), _scores(run.scores), id="learned")


def samples_section(run: RunFolder, best_step: int | None) -> Markup:
    """Return the table of samples: one row per prompt, one column per epoch."""
    heading = tag("h2", "The same prompts, epoch by epoch")
    sets = [sample_set for sample_set in run.samples if sample_set.images]
    if not sets:
        return tag(
            "section",
            heading,
            empty_state("No sample images were generated during training (see sample.every_epochs)."),
            id="samples",
        )
    chosen = _choose_epochs(sets, best_step)
    keys = _prompt_keys(sets)
    shown_keys = keys[:MAX_PROMPTS]
    files = {
        (sample.step, _prompt_key(image)): inside(run.path, sample.folder, image.get("file"))
        for sample in chosen
        for image in sample.images
    }
    cuts = {_prompt_key(image): _cut_after(image) for sample in chosen for image in sample.images}
    cells = [(sample, key) for key in shown_keys for sample in chosen]
    pictures = embed_all(
        [files.get((sample.step, key)) for sample, key in cells], SAMPLE_EDGES_PX, SAMPLES_BUDGET_BYTES, run.work
    )
    by_cell = {(sample.step, key): picture for (sample, key), picture in zip(cells, pictures, strict=True)}
    head = [
        tag("th", _column_name(sample, best_step), scope="col", class_="best" if sample.step == best_step else None)
        for sample in chosen
    ]
    body = []
    for key in shown_keys:
        prompt, settings = key[0], _settings(key)
        caption = tag(
            "div", _prompt(prompt, cuts.get(key, "")), " ", tag("span", settings, class_="meta"), class_="prompt-row"
        )
        body.append(tag("tr", tag("th", caption, colspan=len(chosen), scope="rowgroup")))
        body.append(tag("tr", [_sample_cell(by_cell[sample.step, key], sample, prompt) for sample in chosen]))
    strip = tag("table", tag("thead", tag("tr", head)), tag("tbody", body), class_="strip")
    return tag(
        "section",
        heading,
        tag(
            "p",
            _samples_note(sets, chosen, keys, shown_keys)
            + averages_note(run, "All columns except the base model's use"),
            class_="note",
        ),
        tag("div", strip, class_="scroll", tabindex="0", role="region", aria_label="Samples over the epochs"),
        id="samples",
    )


def _pairs(run: RunFolder) -> Markup:
    pairs = rows_of(run.compare, "pairs")
    if not pairs:
        command = tag("code", "safelight compare")
        return empty_state("Base and trained model have not been compared yet; ", command, " does that.")
    chosen = [pairs[i] for i in evenly_chosen(len(pairs), MAX_PAIRS)]
    paths = [inside(run.path, "compare", pair.get(side)) for pair in chosen for side in ("base", "trained")]
    pictures = embed_all(paths, PAIR_EDGES_PX, PAIRS_BUDGET_BYTES, run.work)
    base_name = "Base, untrained" if run.model.get("from_scratch") else "Base"
    step = number(run.compare.get("step"))
    trained_name = "Trained" if math.isnan(step) else f"Trained, step {step:,.0f}"
    cards = []
    for index, pair in enumerate(chosen):
        key = _prompt_key(pair)
        two = [
            _side(name, picture, key[0])
            for name, picture in zip((base_name, trained_name), pictures[2 * index : 2 * index + 2], strict=True)
        ]
        caption = [_prompt(key[0], _cut_after(pair)), tag("div", _settings(key), class_="meta")]
        zoom = f"{shorten(key[0], MAX_PROMPT_CHARACTERS)} — {_settings(key)}"
        cards.append(
            tag("figure", tag("div", two, class_="two"), tag("figcaption", caption), class_="pair", data_zoom=zoom)
        )
    note = "The model before and after training. Both images of a pair use the same prompt and the same initial noise."
    if len(chosen) < len(pairs):
        note += f" Shown are {len(chosen)} of {len(pairs)} pairs."
    note += averages_note(run, "The trained model's images use")
    is_tiny = any(picture and picture.is_tiny for picture in pictures)
    layout = "pairs small" if is_tiny else "pairs large" if len(chosen) <= MAX_LARGE_PAIRS else "pairs"
    return join(tag("p", note, class_="note"), tag("div", cards, class_=layout))


def _side(name: str, picture: Picture | None, prompt: str) -> Markup:
    alt = f"{name}: {shorten(prompt, 120)}"
    image = picture.img(alt, data_label=name) if picture else placeholder("image missing")
    return tag("figure", tag("figcaption", name), image)


def _sample_cell(picture: Picture | None, sample: SampleSet, prompt: str) -> Markup:
    if picture is None:
        return tag("td", placeholder("missing"))
    where = f"epoch {format_epoch(sample.epoch)}, step {sample.step:,}"
    text = shorten(prompt, MAX_PROMPT_CHARACTERS)
    return tag("td", picture.img(f"{where}: {shorten(prompt, 120)}"), data_zoom=f"{text} — {where}")


def _choose_epochs(sets: list[SampleSet], best_step: int | None) -> list[SampleSet]:
    chosen = set(evenly_chosen(len(sets), MAX_EPOCHS))
    best = next((i for i, sample in enumerate(sets) if sample.step == best_step), None)
    if best is not None and best not in chosen:
        # Readers look for the best epoch: it replaces its nearest neighbour, but never the first or the last epoch.
        inner = [i for i in chosen if 0 < i < len(sets) - 1]
        chosen -= {min(inner, key=lambda i: abs(i - best))} if inner else set()
        chosen.add(best)
    return [sets[i] for i in sorted(chosen)]


def _column_name(sample: SampleSet, best_step: int | None) -> str:
    if sample.step == 0:
        return "base model"
    return f"epoch {format_epoch(sample.epoch)}" + (" · best" if sample.step == best_step else "")


def _samples_note(sets: list[SampleSet], chosen: list[SampleSet], keys: list, shown_keys: list) -> str:
    note = "A row uses the same initial noise in every column, so all differences come from the model."
    if len(chosen) < len(sets):
        note += f" Shown are {len(chosen)} of {len(sets)} epochs, including the first and the last."
    if len(shown_keys) < len(keys):
        note += f" Shown are {len(shown_keys)} of {len(keys)} prompts; the others are in the run's samples folder."
    return note


PromptKey = tuple[str, int, float, float]


def _prompt_key(image: dict) -> PromptKey:
    # a seed may have 64 bits, more than a float holds
    seed = image.get("seed")
    numbers = (number(image.get(key)) for key in ("cfg", "num_steps"))
    # NaN is not equal to itself: it would give every image its own row
    return (
        str(image.get("prompt") or ""),
        seed if type(seed) is int and seed >= 0 else -1,
        *(-1.0 if math.isnan(value) else value for value in numbers),
    )


def _prompt_keys(sets: list[SampleSet]) -> list[PromptKey]:
    return list(dict.fromkeys(_prompt_key(image) for sample in sets for image in sample.images))


def _num_steps(num_steps: float) -> str:
    return "1 step" if num_steps == 1 else f"{num_steps:g} steps"


def _settings(key: PromptKey) -> str:
    _, seed, cfg, num_steps = key
    parts = [f"seed {seed}"] * (seed >= 0) + [f"cfg {cfg:g}"] * (cfg >= 0) + [_num_steps(num_steps)] * (num_steps >= 0)
    return ", ".join(parts)


def _cut_after(row: dict) -> str:
    """Return the end of what the text encoder read of a prompt, '' if it read all."""
    return row["cut_after"] if isinstance(row.get("cut_after"), str) else ""


def _prompt(prompt: str, cut: str) -> Markup:
    return prompt_markup(prompt, cut, MAX_PROMPT_CHARACTERS)


def _scores(scores: dict | None) -> Markup | None:
    rows = rows_of(scores, "rows")[:MAX_SCORES]
    if not rows:
        return None
    interval = shorten(scores.get("interval") or "interval", 40)
    num_samples = number(scores.get("num_samples"))
    on = "" if not math.isfinite(num_samples) else f" on {counted(int(num_samples), 'generated image')}"
    body = [
        [
            [shorten(row.get("what", ""), 120), tag("div", shorten(row.get("explanation") or "", 300), class_="meta")],
            _interval_bars(row),
            # a phone shows no table header, so each value carries its own label there
            *(
                join(tag("span", side, class_="side"), _estimate(row.get(side), signed=side == "difference"))
                for side in ("base", "trained", "difference")
            ),
        ]
        for row in rows
    ]
    notes = scores.get("notes")
    notes = notes[:MAX_SCORES] if isinstance(notes, list) else []
    key = [
        tag(
            "li",
            Markup('<svg viewBox="0 0 24 10" aria-hidden="true"><circle class="f-muted" cx="12" cy="5" r="4"/></svg>'),
            "base",
        ),
        tag(
            "li",
            Markup('<svg viewBox="0 0 24 10" aria-hidden="true"><circle class="f-accent" cx="12" cy="5" r="4"/></svg>'),
            "trained",
        ),
        tag(
            "li",
            Markup(
                '<svg viewBox="0 0 24 10" aria-hidden="true">'
                '<path class="s-muted" stroke-dasharray="2 2" d="M12 0V10"/></svg>'
            ),
            "chance level",
        ),
    ]
    return join(
        tag("h3", f"Measured{on}"),
        tag("ul", key, class_="legend"),
        table(["", f"with the {interval} interval", "base", "trained", "difference"], body, class_="scores"),
        [
            tag("p", shorten(note, 400), class_="note")
            for note in (notes[:MAX_SCORES] if isinstance(notes, list) else [])
        ],
    )


def _estimate(values: object, signed: bool = False) -> Markup:
    mean, low, high = _three(values)
    if math.isnan(mean):
        return tag("span", "not measured", class_="meta")
    form = "{:+.3g}" if signed else "{:.3g}"
    texts = [form.format(value).replace("-", "−") for value in (mean, low, high)]
    return join(tag("strong", texts[0]), tag("div", f"{texts[1]} to {texts[2]}", class_="meta nowrap"))


def _three(values: object) -> tuple[float, float, float]:
    if isinstance(values, list) and len(values) == 3:
        return tuple(number(value) for value in values)
    return (math.nan, math.nan, math.nan)


def _interval_bars(row: dict) -> Markup:
    """Return base and trained as points with their intervals, on an axis from 0 to 1, or over their range if larger."""
    base, trained, chance = _three(row.get("base")), _three(row.get("trained")), number(row.get("chance"))
    known = [value for value in (*base, *trained, chance) if math.isfinite(value)]
    if not known:
        return Markup("")
    low, high = (0.0, 1.0) if min(known) >= 0 and max(known) <= 1 else (min(known), max(known))
    scale = 200 / ((high - low) or 1)

    def x(value: float) -> str:
        return f"{10 + (value - low) * scale:.1f}"

    parts = ['<path class="s-grid" d="M10 36H210"/>']
    for value, anchor in ((low, "start"), (high, "end")):
        parts.append(
            f'<text class="f-muted" font-size="11" x="{x(value)}" y="48" text-anchor="{anchor}">{value:g}</text>'
        )
    if math.isfinite(chance):
        parts.append(f'<path class="s-muted" stroke-dasharray="2 2" d="M{x(chance)} 2V36"/>')
    for (mean, left, right), y, name in ((base, 11, "muted"), (trained, 26, "accent")):
        if math.isfinite(mean + left + right):
            parts.append(f'<path class="s-{name}" stroke-width="2" d="M{x(left)} {y}H{x(right)}"/>')
            parts.append(f'<circle class="f-{name}" cx="{x(mean)}" cy="{y}" r="4"/>')
    return Markup(f'<svg viewBox="0 0 220 50" aria-hidden="true">{"".join(parts)}</svg>')
