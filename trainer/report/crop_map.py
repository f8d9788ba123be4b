"""Crop divergence: crops of things found in the base's pictures, the trained model's and the photographs, compared.

The map is drawn once, a path for each set and class; the page's script only switches them on and off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from safelight.trainer.report.evaluation import ClassDivergence, CropDivergence, CropGain, CropPoint, SetDivergence
from safelight.trainer.report.figures import Form, Z, form_of, form_of_kl, show_p
from safelight.trainer.report.markup import Markup, details, escape, join, shorten, table, tag
from safelight.trainer.report.models import name_of, put_forward
from safelight.trainer.report.run_reader import RunFolder
from safelight.trainer.report.theme import Part, asset

PART = Part(asset("crop_map.css"), asset("crop_map.js"))
TITLE = "How far are its things from the real ones?"
SETS = {"OD": "photographs", "BM": "base model", "TM": "trained model"}
COLORS = {"OD": "amber", "BM": "muted", "TM": "accent"}
MAX_CHECKPOINTS = 4
MAX_CLASSES = 60
# that can be chosen on the map; the rest is under "others"
MAX_MAP_CLASSES = 30
MAX_POINTS = 6000
WIDTH, HEIGHT, MARGIN = 720, 460, 14
MARK_PX = 5
MAX_P = 0.05
# what chance leaves of the figures at a few hundred crops
MMD_DECIMALS = 3
DOT = '<svg viewBox="0 0 12 12" aria-hidden="true"><circle class="f-{}" cx="6" cy="6" r="5"/></svg>'
EXPLANATION = (
    "A detector finds things in the pictures; the crop of each is described by numbers, and the sets of crops are "
    "compared class by class. KL, the Kullback-Leibler divergence, says how far apart two sets are, above what chance "
    "gives: 0 for sets that cannot be told apart. z counts standard deviations of chance: beyond about 3, the sets "
    "differ. p is the probability of such a difference by chance. MMD², the maximum mean discrepancy, is another "
    "distance, which sees weak changes better."
)


def crop_section(run: RunFolder) -> Markup | None:
    """Return the divergence of crops and their map, of the checkpoint that is put forward and of others folded."""
    heading = tag("h2", TITLE)
    crops = {one.model: one for one in run.evaluation.crops} if run.evaluation else {}
    if not crops:
        return None
    first = put_forward(run, crops) or next(iter(crops))
    others = [model for model in crops if model != first and _has_figures(crops[model])][:MAX_CHECKPOINTS]
    if not _has_figures(crops[first]) and not others:
        return tag("section", heading, _too_few(run, crops, first), id="crops")
    return tag(
        "section",
        heading,
        tag("p", EXPLANATION, class_="note"),
        _one(run, crops[first]),
        [details(f"The same of {name_of(run, model)}", _one(run, crops[model])) for model in others],
        id="crops",
    )


def _has_figures(crops: CropDivergence) -> bool:
    return any(one.pooled or one.classes for one in crops.divergences)


def _too_few(run: RunFolder, crops: Mapping[str, CropDivergence], first: str) -> Markup:
    """Return that no checkpoint's pictures show enough things, once, and the map of one, folded."""
    others = [name_of(run, model) for model in crops if model != first]
    alike = f" The same holds of {', '.join(others)}." if others else ""
    drawn = _map(crops[first].points)
    return join(
        tag("p", shorten(crops[first].sentence, 1000), alike),
        details(f"The few things that were found, with {name_of(run, first)}", drawn) if drawn else None,
    )


def _one(run: RunFolder, crops: CropDivergence) -> Markup:
    name = name_of(run, crops.model)
    measured = f"Trained model: {name}. Detector: {shorten(crops.detector, 120)}; crops described by "
    return tag(
        "div",
        tag("p", shorten(crops.sentence, 1000), class_="lead"),
        _pooled_table(crops.divergences, name),
        tag("p", _gain(crops.gain)) if crops.gain else None,
        _map(crops.points),
        _class_table(crops.divergences, name),
        tag("p", f"{measured}{shorten(crops.features, 120)}.", class_="note"),
    )


def _pooled_table(divergences: tuple[SetDivergence, ...], name: str) -> Markup | None:
    found = [one for one in divergences if one.pooled]
    forms = _forms([one.pooled for one in found])
    rows = [[_pair(one), *_figures(one.pooled, forms)] for one in found]
    if not rows:
        return tag("p", "No class has enough crops for a figure.", class_="note")
    return table(["", "KL", "z", "p", "MMD²", "z", "p", "crops"], rows, f"all crops, with {name}", class_="figures")


def _gain(gain: CropGain) -> str:
    """Return whether training moved the crops towards the photographs' or away, in figures."""
    way = "nearer to" if gain.value < 0 else "further from"
    sure = "" if gain.p < MAX_P else ", which chance may explain"
    return (
        f"After training, crops lie {way} the photographs' than the base's do: KL "
        f"{form_of_kl([gain.value]).show(gain.value, True)} (z {Z.show(gain.z)}, p {show_p(gain.p)}){sure}."
    )


def _class_table(divergences: tuple[SetDivergence, ...], name: str) -> Markup | None:
    rows, forms = [], _forms([found for one in divergences for found in one.classes])
    for one in divergences:
        ranked = sorted(one.classes, key=lambda c: -min(c.num_first, c.num_second))[:MAX_CLASSES]
        for found in ranked:
            grey = "few" if found.is_grey else None
            cells = [tag("span", cell, class_=grey) for cell in (shorten(found.name, 60), *_figures(found, forms))]
            rows.append([tag("span", _pair(one), class_=grey), *cells])
    if not rows:
        return None
    note = "Grey: 20 to 49 crops in a set, too few to trust the figure."
    grey = tag("p", note, class_="note") if any(c.is_grey for one in divergences for c in one.classes) else None
    head = ["", "class", "KL", "z", "p", "MMD²", "z", "p", "crops"]
    return details(
        "Class by class", table(head, rows, f"crops class by class, with {name}", class_="figures of-class"), grey
    )


def _pair(one: SetDivergence) -> str:
    return f"{SETS[one.first]} and {SETS[one.second]}"


def _forms(rows: Sequence[ClassDivergence]) -> tuple[Form, Form]:
    """Return how KL and MMD² are written in the rows of a table."""
    return form_of_kl([one.kl for one in rows]), form_of([one.mmd for one in rows], most=MMD_DECIMALS)


def _figures(found: ClassDivergence, forms: tuple[Form, Form]) -> list[str]:
    kl, mmd = forms
    return [
        kl.show(found.kl),
        Z.show(found.z),
        show_p(found.p),
        mmd.show(found.mmd),
        Z.show(found.mmd_z),
        "–" if found.mmd_p is None else show_p(found.mmd_p),
        f"{found.num_first:,} and {found.num_second:,}",
    ]


def _names(which: str, classes: list[str], index: int) -> str:
    """Return what a dot of the map is: of which set, and of which class."""
    return f"{SETS[which]} · {shorten(classes[index], 60) if index >= 0 else 'another class'}"


def _map(points: tuple[CropPoint, ...]) -> Markup | None:
    if len(points) < 2:
        return None
    points = points[:: -(-len(points) // MAX_POINTS)]
    counts = Counter(point.name for point in points)
    classes = [name for name, _ in counts.most_common(MAX_MAP_CLASSES)]
    place = {name: index for index, name in enumerate(classes)}
    xs, ys = [point.x for point in points], [point.y for point in points]
    low_x, low_y = min(xs), min(ys)
    scale_x = (WIDTH - 2 * MARGIN) / ((max(xs) - low_x) or 1)
    scale_y = (HEIGHT - 2 * MARGIN) / ((max(ys) - low_y) or 1)
    paths: dict[tuple[str, int], list[str]] = {}
    for point in points:
        x = MARGIN + (point.x - low_x) * scale_x
        y = HEIGHT - MARGIN - (point.y - low_y) * scale_y
        # a line of no length with round ends is a dot
        paths.setdefault((point.set, place.get(point.name, -1)), []).append(f"M{x:.0f} {y:.0f}h0")
    drawn = "".join(
        f'<path class="s-{COLORS[which]}" data-set="{which}" data-class="{index}" '
        f'data-name="{escape(_names(which, classes, index))}" d="{"".join(dots)}"/>'
        for which in SETS
        for (of, index), dots in paths.items()
        if of == which
    )
    label = escape(f"Map of {len(points):,} crops: photographs, base model and trained model")
    svg = Markup(
        f'<svg class="crop-map" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" '
        f'stroke-width="{MARK_PX}" stroke-linecap="round" fill="none">{drawn}</svg>'
    )
    switches = [
        tag(
            "label",
            tag("input", type="checkbox", value=which, checked=True, disabled=True),
            Markup(DOT.format(COLORS[which])),
            name,
        )
        for which, name in SETS.items()
        if any(of == which for of, _ in paths)
    ]
    options = [tag("option", f"all classes ({len(points):,})", value="all")]
    options += [tag("option", f"{shorten(name, 60)} ({counts[name]:,})", value=i) for i, name in enumerate(classes)]
    chooser = tag("label", "class ", tag("select", options), class_="of-class", hidden=True)
    caption = (
        "Every dot is a crop; dots near each other look alike to the features (two first principal components). Where "
        "the trained model's dots lie among the photographs', its things look like the real ones."
    )
    return tag(
        "figure",
        tag("div", switches, chooser, class_="map-switches"),
        svg,
        tag("p", "Point at a dot to read what it is.", class_="map-said note", hidden=True, aria_live="polite"),
        tag("figcaption", caption),
        class_="crops",
    )
