"""The page of a profiling session: one HTML file with the step's flame chart, times, roofline and memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch.autograd import DeviceType

from safelight.bench.profile.analysis import IDLE, PHASES, Analysis, median_step
from safelight.bench.profile.profiling_session import STEP, TRACE_NAME, ProfileSession
from safelight.text import counted
from safelight.trainer.report.build import MARK
from safelight.trainer.report.chart import PART, Curve, chart, table_of
from safelight.trainer.report.markup import Markup, details, join, table, tag
from safelight.trainer.report.theme import THEME, page

WIDTH_PX = 1080
# flame chart: height of a row, nesting that is drawn, width of the smallest box, width of a letter
ROW_PX, MAX_DEPTH, MIN_WIDTH_PX, LETTER_PX = 19, 8, 0.3, 6.4
# rows of the tables
NUM_OPERATORS, NUM_BLOCKS = 20, 12
MIB = 2**20


@dataclass(frozen=True)
class Box:
    """An event in the flame chart. start, length: microseconds, from the beginning of the step."""

    name: str
    start: float
    length: float
    depth: int


def boxes(session: ProfileSession) -> list[Box]:
    """Return the events of the median step on its own thread, by nesting depth; those too short to see are left out."""
    step = median_step(session)
    began, whole = step.time_range.start, step.time_range.elapsed_us()
    inside = [
        e
        for e in session.events
        if e.device_type == DeviceType.CPU
        and e.thread == step.thread
        and began <= e.time_range.start
        and e.time_range.end <= step.time_range.end
    ]
    drawn, ends = [], []
    for event in sorted(inside, key=lambda e: (e.time_range.start, -e.time_range.end)):
        while ends and event.time_range.start >= ends[-1]:
            ends.pop()
        if len(ends) < MAX_DEPTH and event.time_range.elapsed_us() / whole * WIDTH_PX >= MIN_WIDTH_PX:
            box = Box(event.name, event.time_range.start - began, event.time_range.elapsed_us(), len(ends))
            drawn.append(box)
        ends.append(event.time_range.end)
    return drawn


def _fill(name: str) -> str:
    """Return the CSS class of a box: red for the step and its phases, amber for UNet blocks, grey for operators."""
    if name == STEP or name in PHASES:
        return "f-accent"
    return "f-amber" if "." in name and "::" not in name and "#" not in name else "f-faint"


def flame_chart(session: ProfileSession) -> Markup:
    """Return the median step as nested boxes over time; each shows its name and length under the pointer."""
    events = boxes(session)
    whole = max(box.start + box.length for box in events)
    drawn = []
    for box in events:
        x, width = box.start / whole * WIDTH_PX, box.length / whole * WIDTH_PX
        y = box.depth * ROW_PX
        opacity = {"f-accent": 0.78, "f-amber": 0.62, "f-faint": 1}[_fill(box.name)]
        rect = tag(
            "rect",
            tag("title", f"{box.name}: {box.length / 1e3:.2f} ms"),
            class_=_fill(box.name),
            x=f"{x:.2f}",
            y=y,
            width=f"{max(width - 0.4, 0.2):.2f}",
            height=ROW_PX - 1,
            opacity=opacity,
        )
        short = box.name.rpartition("evaluate_function: ")[2].removeprefix("aten::")
        room = int((width - 6) / LETTER_PX)
        text = short if len(short) <= room else f"{short[: room - 1]}…" if room > 4 else ""
        label = tag("text", text, class_="f-ink", x=f"{x + 3:.2f}", y=y + 13, **{"font-size": 11}) if text else None
        drawn.append(join(rect, label))
    height = (max(box.depth for box in events) + 1) * ROW_PX
    svg = tag(
        "svg",
        drawn,
        class_="graph",
        viewBox=f"0 0 {WIDTH_PX} {height}",
        width=WIDTH_PX,
        height=height,
        role="img",
        aria_label=f"Flame chart of a step of {whole / 1e3:.0f} ms",
    )
    return tag("div", svg, class_="scroll chart", tabindex=0)


def _timeline(points: list[tuple[float, int]], spans: list[tuple], title: str, group: str) -> Markup:
    """Return a chart of bytes over time. points: (ms, bytes). spans: (start ms, end ms, name) of named intervals."""
    # a number of bytes stands until the next one, and "steps" draws a value back to the point before it
    stood = [points[0][1], *(num_bytes for _, num_bytes in points[:-1])]
    curve = Curve("memory", [ms for ms, _ in points], [num_bytes / MIB for num_bytes in stood], look="steps")
    numbers = table_of([curve], "ms", "{:,.1f}")
    return chart(
        title, [curve], numbers, x_name="ms", group=group, unit="MiB", detail="MiB", spans=spans, from_zero=True
    )


def memory_section(session: ProfileSession) -> Markup:
    """Return the section with allocated and saved memory over time, and the blocks that save the most."""
    step = median_step(session)
    began, end = step.time_range.start / 1e3, step.time_range.end / 1e3
    marks = [
        (e.time_range.start / 1e3 - began, e.time_range.end / 1e3 - began, e.name)
        for e in session.events
        if e.name in ("forward", "backward", "optimizer")
        and began <= e.time_range.start / 1e3 <= end
        and e.device_type == DeviceType.CPU
    ]
    parts = []
    for kind, points in session.live.items():
        inside = [(1e3 * s - began, n) for s, n in points if began <= 1e3 * s <= end]
        if inside:
            base = inside[0][1]
            relative = [(ms, n - base) for ms, n in inside]
            peak = max(n for _, n in relative) / MIB
            device = {"cpu": "CPU", "cuda": "GPU"}.get(kind, kind)
            label = f"Allocated on the {device} during the step: up to {peak:,.1f} MiB more than at its start"
            parts.append(_timeline(relative, marks, label, "step"))
    saved = [(1e3 * s, n) for s, n in session.saved.points]
    if saved:
        peak = max(n for _, n in saved) / MIB
        label = f"Saved for the backward pass: up to {peak:,.1f} MiB"
        note = tag("p", "From a separate step that was traced tensor by tensor, which makes it slower.", class_="note")
        parts += [_timeline(saved, [], label, "traced step"), note]
        blocks = sorted(session.saved.by_block.items(), key=lambda item: -item[1])
        rows = [(name, f"{n / MIB:.2f}", f"{100 * n / (peak * MIB):.0f} %") for name, n in blocks[:NUM_BLOCKS]]
        parts.append(table(("block", "MiB saved", "of the peak"), rows, class_="figures"))
    return tag("section", tag("h2", "Memory"), parts, id="memory")


def _bar(share: float) -> Markup:
    width = max(0.0, min(1.0, share)) * 220
    rect = tag("rect", class_="f-accent", width=f"{width:.1f}", height=10)
    return tag("svg", rect, viewBox="0 0 220 10", width=220, height=10, aria_hidden="true")


def _shares(head: str, rows: dict[str, float]) -> Markup:
    total = sum(rows.values()) or 1.0
    cells = [(name, f"{ms:.2f}", f"{100 * ms / total:.1f} %", _bar(ms / total)) for name, ms in rows.items()]
    return table((head, "ms/step", "share", ""), cells, class_="figures barred")


def _tiles(pairs: list[tuple[str, str, str]]) -> Markup:
    items = [
        tag("div", tag("dt", name), tag("dd", value, " ", tag("small", unit), class_="value"))
        for name, value, unit in pairs
    ]
    return tag("dl", items, class_=f"tiles of-{len(items)}")


def _operator_rows(analysis: Analysis) -> list[tuple]:
    return [
        (
            o.name,
            o.kind,
            f"{o.calls:,.0f}",
            f"{o.ms:.2f}",
            f"{o.num_bytes / 1e9 / (o.ms / 1e3):.1f}" if o.num_bytes and o.ms else "",
            f"{o.flops / 1e9 / (o.ms / 1e3):,.1f}" if o.flops and o.ms else "",
            "" if o.share is None else f"{100 * o.share:.0f} %",
        )
        for o in analysis.operators[:NUM_OPERATORS]
    ]


def _batch_text(session: ProfileSession) -> str:
    """Return the size of a batch in words: `2 x 4 photographs, 64x64 latents`."""
    batch, _, height, width = session.shape
    times = f"{session.accumulate} x " if session.accumulate > 1 else ""
    return f"{times}{counted(batch, 'photograph')}, {height}x{width} latents"


def render(session: ProfileSession, analysis: Analysis, ceilings: dict, title: str, subtitle: str) -> str:
    """Return the page as HTML. title: the model and batch. subtitle: device, settings and versions."""
    rest = IDLE[session.device.type]
    saved = max((n for _, n in session.saved.points), default=0) / MIB
    tiles = _tiles(
        [
            ("Step time without profiler", f"{analysis.unprofiled_ms:,.1f}", "ms"),
            ("Throughput", f"{1e3 * session.shape[0] * session.accumulate / analysis.unprofiled_ms:,.1f}", "images/s"),
            (
                "Model FLOP utilization",
                f"{100 * analysis.model_flop_use:.1f}",
                f"% of {ceilings['matmul_tflops']:.2f} TFLOP/s",
            ),
            (
                "Kernel launches" if session.device.type == "cuda" else "Operators",
                f"{analysis.launches:,.0f}",
                "per step",
            ),
            ("Arithmetic", f"{analysis.flops / 1e9:,.1f}", "GFLOP per step"),
            ("Saved for backward", f"{saved:,.1f}", "MiB"),
        ]
    )
    body = join(
        tag(
            "header",
            tag("div", Markup(MARK), "Safelight · profile of a step", class_="mark"),
            tag("h1", title),
            tag("p", subtitle, class_="sub"),
            tiles,
        ),
        tag(
            "main",
            tag(
                "section",
                tag("h2", "Time by phase"),
                _shares("phase", analysis.phases),
                tag(
                    "p",
                    f"Host time, averaged over {counted(len(session.chosen), 'step')} of {_batch_text(session)}. "
                    f"Under the profiler a step takes {analysis.step_ms:,.1f} ms.",
                    class_="note",
                ),
                id="phases",
            ),
            tag(
                "section",
                tag("h2", "Flame chart"),
                tag(
                    "p",
                    f"One step. Point at a box to see its name and duration. Open {TRACE_NAME} in ui.perfetto.dev for "
                    "the full trace.",
                    class_="note",
                ),
                flame_chart(session),
                id="flame",
            ),
            tag(
                "section",
                tag("h2", "Time by class of operator"),
                _shares("class", analysis.kinds),
                tag("p", f"“{rest}” is time in which no operator ran.", class_="note"),
                id="classes",
            ),
            tag(
                "section",
                tag("h2", "Roofline"),
                tag(
                    "p",
                    f"Ceilings measured on this machine: {ceilings['matmul_tflops']:.2f} TFLOP/s of matrix "
                    f"multiplication and {ceilings['copy_gb_per_s']:.1f} GB/s of copies. An operator at 100 % takes "
                    "no longer than its FLOPs need, or reading its inputs and writing its outputs once. Above 100 %, "
                    "data came from a cache.",
                    class_="note",
                ),
                table(
                    ("operator", "class", "calls", "ms/step", "GB/s", "GFLOP/s", "of the roofline"),
                    _operator_rows(analysis),
                    class_="figures of-class",
                ),
                details(
                    "All operators",
                    table(
                        ("operator", "class", "calls", "ms/step"),
                        [(o.name, o.kind, f"{o.calls:,.0f}", f"{o.ms:.3f}") for o in analysis.operators],
                        class_="figures of-class",
                    ),
                ),
                id="roofline",
            ),
            memory_section(session),
        ),
        tag("footer", "Written by safelight profile."),
    )
    return page(f"{title}: profile", body, parts=(THEME, PART))
