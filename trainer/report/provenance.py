"""The report's sections on how a run was made: settings, machine, how to repeat it, and events."""

import base64
import datetime
import math
import re

from safelight.text import counted
from safelight.trainer.config.schema import Config
from safelight.trainer.report.facts import format_duration, format_percent, work_times_s
from safelight.trainer.report.markup import Markup, details, join, shorten, table, tag
from safelight.trainer.report.run_reader import RunFolder, number
from safelight.trainer.report.theme import Part, asset
from safelight.trainer.report.trained import has_no_effect

PART = Part(asset("provenance.css"))
# of an event
MAX_DETAIL_CHARACTERS = 300
MAX_LISTED = 500
GIB = 2**30
# settings that other parts of the page show
SHOWN_ELSEWHERE = (("run", "dir"), ("run", "title"), ("run", "notes"))
# of settings, and of values in one
MAX_ROWS = 200
MAX_VALUE_CHARACTERS = 4000


def parameters_section(run: RunFolder) -> Markup:
    """Return the settings: those that differ from the defaults, then all, folded, and the text of config.toml."""
    heading = tag("h2", "Settings")
    notes = run.model.get("notes")
    notes = [tag("li", shorten(note, 400)) for note in notes[:MAX_ROWS]] if isinstance(notes, list) else []
    if not run.config and not run.model:
        return tag("section", heading, tag("p", "Not recorded.", class_="note"), id="parameters")
    changed, everything = _changed_groups(run.config), _all_groups(run)
    quiet = "All settings have their defaults." if run.config else "Not recorded."
    return tag(
        "section",
        heading,
        tag("p", "Changed from the defaults:", class_="note") if changed else tag("p", quiet, class_="note"),
        tag("div", changed, class_="settings changed") if changed else None,
        details("What was chosen for this machine", tag("ul", notes)) if notes else None,
        details("All settings, and the model as loaded", tag("div", everything, class_="settings"), class_="in-file"),
        details("The whole config.toml", tag("pre", run.config_text), class_="in-file") if run.config_text else None,
        id="parameters",
    )


def _changed_groups(config: dict) -> list[Markup]:
    """Return the settings that differ from the defaults, by table; the stages whole."""
    defaults, groups = Config().model_dump(mode="json", by_alias=True), []
    for name, values in list(config.items())[:MAX_ROWS]:
        if _is_tables(values):
            stages = enumerate(values[:MAX_ROWS], start=1)
            groups += [_settings_group(f"[[{shorten(name, 120)}]] {i}", stage) for i, stage in stages]
        if not isinstance(values, dict):
            continue
        usual = defaults.get(name)
        usual = usual if isinstance(usual, dict) else {}
        rows = []
        for key, value in list(values.items())[:MAX_ROWS]:
            is_usual = key in usual and usual[key] == value
            if (name, key) in SHOWN_ELSEWHERE or is_usual or has_no_effect(config, name, key):
                continue
            default = tag("span", f"default {format_value(usual[key])}", class_="meta") if usual.get(key) else None
            rows.append(tag("div", tag("dt", shorten(key, 120)), tag("dd", format_value(value), default)))
        if rows:
            groups.append(tag("section", tag("h3", f"[{shorten(name, 120)}]"), tag("dl", rows, class_="rows")))
    return groups


def _all_groups(run: RunFolder) -> list[Markup]:
    groups = []
    if run.model:
        model = {_label(key): format_value(value, grouped=True) for key, value in run.model.items() if key != "notes"}
        groups.append(_settings_group("model, as loaded", model, "plain"))
    scalars = {key: value for key, value in run.config.items() if not isinstance(value, dict) and not _is_tables(value)}
    if scalars:
        groups.append(_settings_group("general", scalars))
    for name, value in list(run.config.items())[:MAX_ROWS]:
        if isinstance(value, dict):
            groups.append(_settings_group(f"[{shorten(name, 120)}]", value))
        elif _is_tables(value):
            tables = enumerate(value[:MAX_ROWS], start=1)
            groups += [_settings_group(f"[[{shorten(name, 120)}]] {i}", one) for i, one in tables]
    return groups


def environment_section(run: RunFolder) -> Markup:
    """Return the machine, the planned memory against the measured, and how to repeat the run."""
    environment = run.environment
    heading = tag("h2", "Machine, and how to repeat this run")
    if not environment:
        text = "The machine is not recorded: the run folder has no environment.json."
        return tag("section", heading, tag("p", text, class_="note"), id="environment")
    known = {_label(key): value for key, value in environment.items() if not isinstance(value, dict | list)}
    known.pop("command", None)
    if environment.get("cpu"):
        known["cpu"] = re.sub(r"(?<![\d,.])1 (core|thread)s\b", r"1 \1", str(environment["cpu"]))
    if environment.get("command"):
        known["started with"] = environment["command"]
    # the settings have a section of their own
    tables = {key: value for key, value in environment.items() if isinstance(value, dict | list) and key != "settings"}
    detailed = {_label(key): value for key, value in tables.items() if value}
    lines = []
    commit = str(environment.get("git_commit") or environment.get("commit") or "").strip()
    if commit and commit.lower() not in ("none", "unknown"):
        lines.append(f"git checkout {shorten(commit.split()[0], 80)}")
    if run.config_text:
        # only if the recorded command has it: --gpus cannot start a run on several machines, torchrun did
        gpus = re.search(r" --gpus \d+$", str(environment.get("command") or ""))
        lines.append(f"safelight train config.toml --run.dir runs/again --data.path DATASET{gpus[0] if gpus else ''}")
    memory = _memory_sentence(run)
    return tag(
        "section",
        heading,
        tag("p", memory) if memory else None,
        tag("p", _repeating(run)),
        tag("pre", tag("code", "\n".join(lines))) if lines else None,
        _download(run.config_text),
        tag("div", _rows(known), class_="settings plain"),
        details("More about the machine", tag("div", _rows(detailed), class_="settings plain"), class_="in-file")
        if detailed
        else None,
        id="environment",
    )


def _memory_sentence(run: RunFolder) -> str:
    """Return the planned GPU memory against the measured, "" if either is unknown."""
    plan = run.environment.get("memory_plan")
    planned = number(plan.get("needed")) / GIB if isinstance(plan, dict) else math.nan
    measured = run.metrics.train["memory_gib"]
    measured = measured[measured > 0]
    if not planned > 0 or not len(measured):
        return ""
    peak = float(measured.max())
    return (
        f"GPU memory: {planned:.2f} GiB planned before the run, at most {peak:.2f} GiB measured "
        f"({format_percent(100 * (peak / planned - 1))})."
    )


def _download(config_text: str) -> Markup | None:
    """Return a link that saves config.toml: its text stands in the link."""
    if not config_text:
        return None
    encoded = base64.b64encode(config_text.encode("utf-8", "replace")).decode("ascii")
    return tag(
        "p",
        tag("a", "Save config.toml", href=f"data:text/plain;charset=utf-8;base64,{encoded}", download="config.toml"),
        class_="download",
    )


def events_section(run: RunFolder) -> Markup:
    """Return the table of events: stages, checkpoints, resumes, skipped steps."""
    events = run.metrics.events
    heading = tag("h2", "Events")
    if not events:
        return tag("section", heading, tag("p", "None were logged.", class_="note"), id="events")
    worked = work_times_s(run.metrics.times)
    rows = []
    for event, line in list(zip(events, run.metrics.event_lines, strict=True))[-MAX_LISTED:]:
        step, since = number(event.get("step")), worked[line]
        rows.append(
            [
                "–" if math.isnan(step) else f"{step:,.0f}",
                format_duration(since) if math.isfinite(since) else "–",
                shorten(event.get("event") or "", 80),
                shorten(event.get("detail") or "", MAX_DETAIL_CHARACTERS),
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
