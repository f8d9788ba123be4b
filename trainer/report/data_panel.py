"""What a run was trained on: counts, captions, example photographs, image sizes, credits and rejected files."""

import math
import re

from safelight.text import counted
from safelight.trainer.report.markup import Markup, details, join, shorten, table, tag
from safelight.trainer.report.pictures import embed_all
from safelight.trainer.report.run_reader import RunFolder, inside, number, rows_of, table_of
from safelight.trainer.report.theme import Part, asset

PART = Part(asset("data_panel.css"))
MAX_EXAMPLES = 24
EXAMPLE_EDGES_PX = (360, 256, 160, 96)
EXAMPLES_BUDGET_BYTES = 1_500_000
MAX_CAPTION_CHARACTERS = 300
MAX_TAGS = 40
MAX_CAPTION_SOURCES = 20
MAX_LISTED = 500
MAX_BUCKETS = 40
# in the place of a photographer's name that nobody has written
UNNAMED = "unnamed"


def data_section(run: RunFolder) -> Markup:
    """Return the section on the dataset: counts, image sizes, example photographs and rejected files."""
    heading, data = tag("h2", "What it was trained on"), run.data
    if data is None:
        return tag(
            "section",
            heading,
            tag("p", "Not recorded: the run folder has no data.json.", class_="note"),
            id="data",
        )
    return tag(
        "section",
        heading,
        tag("p", _counts_sentence(data, run.config)),
        _caption_sources(data),
        _examples("Examples with their captions", rows_of(data, "examples"), run),
        _class_images(data, run),
        _buckets(rows_of(data, "buckets"), bool(_count(data, "num_class_images"))),
        _credits(rows_of(data, "credits")),
        _rejected(rows_of(data, "rejected")),
        id="data",
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


def _caption_sources(data: dict) -> Markup | None:
    """Return where the captions came from and how long they are."""
    rows = [(row, number(row.get("num"))) for row in rows_of(data, "caption_sources")[:MAX_CAPTION_SOURCES]]
    parts = []
    for row, num in rows:
        if num >= 1:
            source = str(row.get("source") or "") or "without a source"
            parts.append(f"{num:,.0f} from {shorten(source, 160)}")
    texts = [f"Captions: {'; '.join(parts)}."] if parts else []
    if note := str(data.get("length_note") or ""):
        texts.append(f"{note[0].upper()}{shorten(note[1:], 300)}.")
    return tag("p", " ".join(texts), class_="note") if texts else None


def _buckets(buckets: list[dict], has_class_images: bool) -> Markup | None:
    keys = ("width", "height", "num_train", "num_validation")
    found = [([number(bucket.get(key)) for key in keys], number(bucket.get("crop_loss"))) for bucket in buckets]
    found = [(row, lost) for row, lost in found if all(map(math.isfinite, row))]
    known = [(*map(int, row), lost) for row, lost in found if min(row[:2]) >= 1 and min(row[2:]) >= 0]
    if not known:
        return None
    known.sort(key=lambda bucket: bucket[0] / bucket[1])
    max_photos = max(1, *(train + validation for _, _, train, validation, _ in known))
    largest = max(max(width, height) for width, height, *_ in known)
    rows = []
    for width, height, train, validation, lost in known[:MAX_BUCKETS]:
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
        crop = f"crops lose {100 * lost:.1f} %" if 0 <= lost <= 1 else ""
        cells = [tag("span", count, class_="count"), tag("span", crop, class_="meta crop")]
        rows.append(join(Markup(shape), tag("span", size, class_="nowrap"), Markup(bar), cells))
    trained = "training photographs and class images" if has_class_images else "training photographs"
    key = [
        tag(
            "li",
            Markup(
                f'<svg viewBox="0 0 24 10" aria-hidden="true"><rect class="f-{color}" width="24" height="10"/></svg>'
            ),
            text,
        )
        for color, text in (("accent", trained), ("amber", "held out"))
        if color == "accent" or any(held for *_, held, _ in known)
    ]
    more = len(known) - MAX_BUCKETS
    return join(
        tag("h3", "Image sizes"),
        tag("ul", key, class_="legend"),
        tag("div", rows, class_="buckets"),
        tag("p", f"{counted(more, 'more size')} {'is' if more == 1 else 'are'} listed in data.json.", class_="note")
        if more > 0
        else None,
    )


def _class_images(data: dict, run: RunFolder) -> Markup | None:
    """Return how many class images there are, where they are from, and a few of them; None without any."""
    num, num_drawn = (_count(data, key) for key in ("num_class_images", "num_drawn_class_images"))
    if not num:
        return None
    settings = table_of(run.config, "prior")
    sentence = f"{counted(num, 'class image')} kept what the base knows of the class"
    prompt = shorten(str(settings.get("prompt") or ""), 200)
    if num_drawn:
        sentence += f"; the base drew {'all' if num_drawn == num else f'{num_drawn:,}'} of them from “{prompt}”"
    weight = number(settings.get("weight"))
    weighed = f", their losses multiplied by {weight:g}" if math.isfinite(weight) else ""
    sentence += f". An epoch used them as often as photographs{weighed}; none is held out."
    return join(tag("p", sentence), _examples("Class images", rows_of(data, "class_examples"), run))


def _examples(heading: str, examples: list[dict], run: RunFolder) -> Markup | None:
    shown = examples[:MAX_EXAMPLES]
    pictures = embed_all(
        [inside(run.path, ".", example.get("file")) for example in shown],
        EXAMPLE_EDGES_PX,
        EXAMPLES_BUDGET_BYTES,
        run.work,
    )
    cards = []
    for example, picture in zip(shown, pictures, strict=True):
        if picture is None:
            continue
        caption = shorten(example.get("caption") or "", MAX_CAPTION_CHARACTERS)
        image = picture.img(f"Training photograph: {caption[:120]}")
        width, height = number(example.get("width")), number(example.get("height"))
        size = f"{width:.0f} × {height:.0f} px" if math.isfinite(width + height) else ""
        text = [tag("span", caption or "no caption", class_="prompt", dir="auto"), _tags(rows_of(example, "tags"))]
        text.append(tag("div", size, class_="meta"))
        cards.append(tag("figure", image, tag("figcaption", text), data_zoom=caption))
    missing = len(shown) - len(cards)
    are = "is" if missing == 1 else "are"
    note = f"{counted(missing, 'example picture')} {are} missing or damaged." if missing else ""
    if not cards:
        return tag("p", note, class_="note") if note else None
    return join(
        tag("h3", heading),
        tag("p", note, class_="note") if note else None,
        tag("div", cards, class_="examples"),
    )


def _tags(tags: list[dict]) -> Markup | None:
    names = []
    for one in tags[:MAX_TAGS]:
        weight = number(one.get("weight"))
        heavy = f" {weight:g}" if math.isfinite(weight) and weight != 1 else ""
        names.append(tag("span", shorten(one.get("name") or "", 60), heavy, class_="tag", dir="auto"))
    return tag("div", names, class_="tags") if names else None


def _credits(credits: list[dict]) -> Markup | None:
    """Return who took the photographs, with links to their pages; None if no photograph says so."""
    pages_of: dict[str, list[str]] = {}
    for row in credits:
        pages_of.setdefault(str(row.get("photographer") or UNNAMED), []).append(str(row.get("page") or ""))
    if not pages_of:
        return None
    ranked = sorted(pages_of.items(), key=lambda item: (-len(item[1]), item[0].casefold()))
    rows = []
    for name, pages in ranked[:MAX_LISTED]:
        links = [[", " if index else None, _link(page)] for index, page in enumerate(filter(None, pages))]
        rows.append([tag("bdi", shorten(name, 120)), len(pages), links])
    more = f" (the first {MAX_LISTED} shown)" if len(ranked) > MAX_LISTED else ""
    references = {name for name in pages_of if name != UNNAMED and not _is_name(name)}
    num_named = len(pages_of.keys() - {UNNAMED} - references)
    num_referenced = sum(len(pages_of[name]) for name in references)
    unnamed = f", {len(pages_of[UNNAMED])} unnamed" if UNNAMED in pages_of else ""
    unnamed += f", {num_referenced:,} with a note instead of a name" if num_referenced else ""
    return details(
        f"Credits: {counted(len(credits), 'photograph')} by {counted(num_named, 'photographer')}{unnamed}{more}",
        table(["photographer", "photographs", "pages"], rows, class_="credits"),
    )


def _is_name(credit: str) -> bool:
    """Return whether a credit reads as a name: not as the number of a picture or a path. A year is no such number."""
    words = re.findall(r"[^\W_]+", credit)
    has_number = any(word.isdigit() and not re.fullmatch(r"(19|20)\d\d", word) for word in words)
    return not has_number and bool(words) and ("/" not in credit or "@" in credit)


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
