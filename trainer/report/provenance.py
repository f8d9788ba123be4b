"""The report's sections on what a run was made of: photographs, settings, machine and events."""

import datetime
import math
import re

from safelight.text import counted
from safelight.trainer.report.facts import format_duration, work_times_s
from safelight.trainer.report.markup import Markup, details, empty_state, join, shorten, table, tag
from safelight.trainer.report.pictures import embed_all, placeholder
from safelight.trainer.report.run_reader import RunFolder, inside, number, rows_of, table_of

MAX_EXAMPLES = 24
EXAMPLE_EDGES_PX = (360, 256, 160, 96)
EXAMPLES_BUDGET_BYTES = 1_500_000
MAX_CAPTION_CHARACTERS = 300
MAX_LISTED = 500
MAX_BUCKETS = 40
# of settings, and of values in one
MAX_ROWS = 200
MAX_VALUE_CHARACTERS = 4000


def data_section(data: dict | None, run: RunFolder) -> Markup:
    """Return the section on the dataset: counts, image sizes, example photographs and rejected files."""
    heading = tag("h2", "What it was trained on")
    if data is None:
        return tag(
            "section",
            heading,
            empty_state("The run folder has no data.json, so it is not known what the model was trained on."),
            id="data",
        )
    return tag(
        "section",
        heading,
        tag("p", _counts_sentence(data, run.config)),
        tag("h3", "Image sizes"),
        _buckets(rows_of(data, "buckets")),
        tag("h3", "Examples with their captions"),
        _examples(rows_of(data, "examples"), run),
        _credits(rows_of(data, "credits")),
        _rejected(rows_of(data, "rejected")),
        id="data",
    )


def parameters_section(run: RunFolder) -> Markup:
    """Return model and settings as tables, and the text of config.toml."""
    settings = []
    if run.model:
        model = {_label(key): format_value(value, grouped=True) for key, value in run.model.items() if key != "notes"}
        settings.append(_settings_group("model, as loaded", model, "plain"))
    scalars = {key: value for key, value in run.config.items() if not isinstance(value, dict) and not _is_tables(value)}
    if scalars:
        settings.append(_settings_group("general", scalars))
    for name, value in list(run.config.items())[:MAX_ROWS]:
        if isinstance(value, dict):
            settings.append(_settings_group(f"[{shorten(name, 120)}]", value))
        elif _is_tables(value):
            tables = enumerate(value[:MAX_ROWS], start=1)
            settings += [_settings_group(f"[[{shorten(name, 120)}]] {i}", one) for i, one in tables]
    notes = run.model.get("notes")
    notes = notes[:MAX_ROWS] if isinstance(notes, list) else []
    return tag(
        "section",
        tag("h2", "Settings"),
        tag("ul", [tag("li", shorten(note, 400)) for note in notes[:MAX_ROWS]])
        if isinstance(notes, list) and notes
        else None,
        tag("div", settings, class_="settings") if settings else empty_state("The settings of this run are unknown."),
        details("The whole config.toml", tag("pre", run.config_text)) if run.config_text else None,
        id="parameters",
    )


def environment_section(run: RunFolder) -> Markup:
    """Return the machine, its software, and how to repeat the run."""
    environment = run.environment
    heading = tag("h2", "Machine, and how to repeat this run")
    if not environment:
        return tag("section", heading, empty_state("The run folder has no environment.json."), id="environment")
    known = {_label(key): value for key, value in environment.items() if key not in ("command", "attention_choice")}
    if environment.get("cpu"):
        known["cpu"] = re.sub(r"(?<![\d,.])1 (core|thread)s\b", r"1 \1", str(environment["cpu"]))
    if environment.get("command"):
        known["started with"] = environment["command"]
    lines = []
    commit = str(environment.get("git_commit") or environment.get("commit") or "").strip()
    if commit and commit.lower() not in ("none", "unknown"):
        lines.append(f"git checkout {shorten(commit.split()[0], 80)}")
    if run.config_text:
        lines.append("safelight train config.toml --run.dir runs/again --data.path DATASET")
    return tag(
        "section",
        heading,
        tag("p", _repeating(run)),
        tag("pre", tag("code", "\n".join(lines))) if lines else None,
        tag("div", _rows(known), class_="settings plain"),
        id="environment",
    )


def events_section(run: RunFolder) -> Markup:
    """Return the table of events: stages, checkpoints, resumes, skipped steps."""
    events = run.metrics.events
    heading = tag("h2", "Events")
    if not events:
        return tag("section", heading, empty_state("No events were logged."), id="events")
    worked = work_times_s(run.metrics.times)
    rows = []
    for event, line in list(zip(events, run.metrics.event_lines, strict=True))[-MAX_LISTED:]:
        step, since = number(event.get("step")), worked[line]
        rows.append(
            [
                "–" if math.isnan(step) else f"{step:,.0f}",
                format_duration(since) if math.isfinite(since) else "–",
                shorten(event.get("event") or "", 80),
                shorten(event.get("detail") or "", MAX_CAPTION_CHARACTERS),
            ]
        )
    total = counted(len(events), "event") + (f" (the last {MAX_LISTED} shown)" if len(events) > MAX_LISTED else "")
    return tag("section", heading, details(total, table(["step", "run time", "event", "detail"], rows)), id="events")


def format_value(value: object, grouped: bool = False) -> str:
    """Return a setting as text. Lists with long items get one item per line. grouped: with thousands separators."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "–"
    if isinstance(value, int):
        return f"{value:,}" if grouped else str(value)
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, list):
        texts = [format_value(item) for item in value[:MAX_ROWS]]
        if any(len(text) > 16 for text in texts):
            return shorten("\n".join(f"· {text}" for text in texts), MAX_VALUE_CHARACTERS)
        return ", ".join(texts) or "–"
    if isinstance(value, dict):
        texts = [f"{key} = {format_value(item)}" for key, item in list(value.items())[:MAX_ROWS]]
        return shorten("\n".join(texts), MAX_VALUE_CHARACTERS) or "–"
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ", "seconds")
    return shorten(value, 2000)


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _settings_group(name: str, values: dict, css_class: str | None = None) -> Markup:
    return tag("section", tag("h3", name), _rows(values), class_=css_class)


def _label(key: object) -> str:
    """Return a field's name as words, with its unit in parentheses."""
    text = str(key).replace("_", " ")
    return f"{text[:-4]} (GiB)" if text.endswith(" gib") else text


def _rows(values: dict) -> Markup:
    shown = list(values.items())[:MAX_ROWS]
    rows = [tag("div", tag("dt", shorten(key, 120)), tag("dd", format_value(value))) for key, value in shown]
    if len(values) > MAX_ROWS:
        rows.append(tag("div", tag("dt", "…"), tag("dd", f"{len(values) - MAX_ROWS:,} more")))
    return tag("dl", rows, class_="rows")


def _repeating(run: RunFolder) -> Markup:
    """Return what is needed besides the commands to repeat this run."""
    if not run.config_text:
        return join("config.toml is missing from the run folder, so this run cannot be repeated.")
    name = str((run.data or {}).get("dataset") or "").strip()
    called = f" (for this run, “{shorten(name, 200)}”)" if name else ""
    return join(
        "Use this run's ",
        tag("code", "config.toml"),
        ", from the run folder or from Settings above; it includes everything that was set on the command line. The "
        "run folder does not contain the photographs: replace ",
        tag("code", "DATASET"),
        " by the dataset folder that ",
        tag("code", "safelight prepare"),
        f" wrote{called}.",
    )


def _count(data: dict, key: str) -> int | None:
    value = number(data.get(key))
    return None if math.isnan(value) else int(value)


def _counts_sentence(data: dict, config: dict) -> str:
    photos, train, validation = (_count(data, key) for key in ("num_photos", "num_train", "num_validation"))
    sentence = counted(photos, "photograph") if photos is not None else "An unknown number of photographs"
    if data.get("dataset"):
        sentence += f" from “{shorten(data['dataset'], 200)}”"
    if train is not None:
        sentence += f": {train:,} for training"
        sentence += f", {validation:,} held out for validation" if validation else ", none held out"
    captions, variants = _count(data, "num_captions"), _count(data, "variants")
    sentence += "."
    if captions is not None:
        sentence += f" {counted(captions, 'caption')}." if captions else " No captions."
    if tagged := _count(data, "num_tagged"):
        sentence += f" {counted(tagged, 'photograph')} {'has' if tagged == 1 else 'have'} tags, in several orders."
    if masks := _count(data, "num_masks"):
        have = "photograph has a loss mask" if masks == 1 else "photographs have loss masks"
        weight = number(table_of(config, "loss").get("mask_weight"))
        outside = f"errors weigh {weight:g}" if weight > 0 else "nothing is learned"
        sentence += f" {masks:,} training {have}, outside of which {outside}."
    if scales := _count(data, "num_loss_scales"):
        sentence += f" {scales:,} training photograph{' has its' if scales == 1 else 's have their'} own loss scale."
    if variants is not None and variants > 1:
        # held-out photographs have the centre crop only
        sentence += f" Each training photograph is used in {variants:,} variants{_differing_by(config)}."
    return sentence


def _differing_by(config: dict) -> str:
    settings = table_of(config, "data")
    crop, flip = number(settings.get("crop_jitter")), number(settings.get("flip_p"))
    augmentations = ["crop"] * (crop > 0) + ["flip"] * (flip > 0)
    if augmentations:
        return f" ({', '.join(augmentations)})"
    return ", all identical because data.crop_jitter and data.flip_p are 0" if crop == flip == 0 else ""


def _buckets(buckets: list[dict]) -> Markup:
    keys = ("width", "height", "num_train", "num_validation")
    known = [[number(bucket.get(key)) for key in keys] for bucket in buckets]
    known = [row for row in known if all(map(math.isfinite, row))]
    known = [[int(value) for value in row] for row in known if min(row[:2]) >= 1 and min(row[2:]) >= 0]
    if not known:
        return empty_state("No image sizes were recorded.")
    known.sort(key=lambda bucket: bucket[0] / bucket[1])
    max_photos = max(1, *(train + validation for _, _, train, validation in known))
    largest = max(max(width, height) for width, height, _, _ in known)
    rows = []
    for width, height, train, validation in known[:MAX_BUCKETS]:
        w, h = 36 * width / largest, 36 * height / largest
        shape = (
            f'<svg class="shape" viewBox="0 0 38 38" aria-hidden="true"><rect class="s-muted" fill="none" '
            f'x="{19 - w / 2:.1f}" y="{19 - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}" rx="1.5"/></svg>'
        )
        share, held = 100 * train / max_photos, 100 * validation / max_photos
        bar = (
            '<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="f-accent" width="{share:.2f}" height="12"/>'
            f'<rect class="f-amber" x="{share:.2f}" width="{held:.2f}" height="12"/></svg>'
        )
        size = join(f"{width} × {height}", tag("div", f"{width / height:.2f} : 1", class_="meta"))
        count = f"{train:,}" + (f" + {validation:,}" if validation else "")
        rows.append(
            join(Markup(shape), tag("span", size, class_="nowrap"), Markup(bar), tag("span", count, class_="count"))
        )
    key = [
        tag(
            "li",
            Markup(
                f'<svg viewBox="0 0 24 10" aria-hidden="true"><rect class="f-{color}" width="24" height="10"/></svg>'
            ),
            text,
        )
        for color, text in (("accent", "training photographs"), ("amber", "held out"))
        if color == "accent" or any(held for _, _, _, held in known)
    ]
    more = len(known) - MAX_BUCKETS
    return join(
        tag("ul", key, class_="legend"),
        tag("div", rows, class_="buckets"),
        tag("p", f"{counted(more, 'more size')} {'is' if more == 1 else 'are'} listed in data.json.", class_="note")
        if more > 0
        else None,
    )


def _examples(examples: list[dict], run: RunFolder) -> Markup:
    if not examples:
        return empty_state("No example photographs were saved.")
    shown = examples[:MAX_EXAMPLES]
    pictures = embed_all(
        [inside(run.path, ".", example.get("file")) for example in shown],
        EXAMPLE_EDGES_PX,
        EXAMPLES_BUDGET_BYTES,
        run.work,
    )
    cards = []
    for example, picture in zip(shown, pictures, strict=True):
        caption = shorten(example.get("caption") or "", MAX_CAPTION_CHARACTERS)
        image = picture.img(f"Training photograph: {caption[:120]}") if picture else placeholder("image missing")
        width, height = number(example.get("width")), number(example.get("height"))
        size = f"{width:.0f} × {height:.0f} px" if math.isfinite(width + height) else ""
        text = [tag("span", caption or "no caption", class_="prompt", dir="auto"), tag("div", size, class_="meta")]
        cards.append(tag("figure", image, tag("figcaption", text), data_zoom=caption))
    return tag("div", cards, class_="examples")


# in the place of a photographer's name that nobody has written
_UNNAMED = "unnamed"


def _credits(credits: list[dict]) -> Markup | None:
    """Return who took the photographs, with links to their pages; None if no photograph says so."""
    pages_of: dict[str, list[str]] = {}
    for row in credits:
        pages_of.setdefault(str(row.get("photographer") or _UNNAMED), []).append(str(row.get("page") or ""))
    if not pages_of:
        return None
    ranked = sorted(pages_of.items(), key=lambda item: (-len(item[1]), item[0].casefold()))
    rows = []
    for name, pages in ranked[:MAX_LISTED]:
        links = [[", " if index else None, _link(page)] for index, page in enumerate(filter(None, pages))]
        rows.append([tag("bdi", shorten(name, 120)), len(pages), links])
    more = f" (the first {MAX_LISTED} shown)" if len(ranked) > MAX_LISTED else ""
    num_named = len(pages_of.keys() - {_UNNAMED})
    unnamed = f", {len(pages_of[_UNNAMED])} unnamed" if _UNNAMED in pages_of else ""
    return details(
        f"Credits: {counted(len(credits), 'photograph')} by {counted(num_named, 'photographer')}{unnamed}{more}",
        table(["photographer", "photographs", "pages"], rows),
    )


def _link(address: str) -> Markup:
    """Return a link to a page, and only its text if it is no http or https address."""
    shown = shorten(address.removeprefix("https://"), 100)
    if not re.match(r"https?://[^/\s]", address):
        return tag("span", shown)
    return tag("a", shown, href=address, rel="noopener noreferrer nofollow")


def _rejected(rejected: list[dict]) -> Markup | None:
    if not rejected:
        return tag("p", "No files were rejected.", class_="note")
    rows = [[shorten(row.get("path", ""), 300), shorten(row.get("reason", ""), 300)] for row in rejected[:MAX_LISTED]]
    total = (
        "1 file or caption row was" if len(rejected) == 1 else f"{len(rejected):,} files or caption rows were"
    ) + " rejected"
    more = len(rejected) - MAX_LISTED
    return details(
        total + (f" (the first {MAX_LISTED} shown)" if more > 0 else ""), table(["file or row", "reason"], rows)
    )
