"""The model card of an export: README.md with the front matter that the Hugging Face hub reads, and a few samples.

It is written from the run folder alone, which may be somebody else's: every text is escaped, every file is bounded, and
what is missing or damaged is left out. Source of the fields: huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import safelight
from safelight.data.atomic import atomic_write_bytes, atomic_write_text
from safelight.errors import UserError
from safelight.text import counted, printable, shortened
from safelight.trainer.config.schema import Adapter, Config, Embedding
from safelight.trainer.models.base import EMBEDDED, Base
from safelight.trainer.models.model_folder import model_file
from safelight.trainer.registry.samplers import title_of
from safelight.trainer.report.evaluation import Evaluation
from safelight.trainer.report.facts import format_epoch
from safelight.trainer.report.run_reader import RunFolder, SampleSet, inside, read_run_folder, rows_of
from safelight.trainer.report.verdicts import estimate_of
from safelight.untrusted import UnsafeFile, parse_yaml, read_bytes

CARD_NAME, SAMPLES_NAME = "README.md", "samples"
MAX_CARD_BYTES = 2**20
MAX_SAMPLES, MAX_SAMPLE_BYTES = 6, 2**25
MAX_PROMPT_CHARS, MAX_PHOTOGRAPHERS, MAX_METRICS = 400, 20, 12
UNKNOWN = "unknown"
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.\-]{1,60}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class License:
    """The license of a base. id: as the hub lists it, `unknown`, or `other` with a name and a link, which may be empty.

    source: where it is stated, in words.
    """

    id: str
    source: str
    name: str = ""
    link: str = ""


def license_of(base: Base, fetch: Callable[[str], Path] | None = None) -> License:
    """Return the license of a run's base, as its own model card or its file's metadata states it.

    fetch: returns the model card of a hub id, None for what `fetch_card` does.
    """
    if base.from_scratch:
        return License(UNKNOWN, "the model was trained from random weights")
    if base.spec in EMBEDDED:
        return License("apache-2.0", "Safelight's built-in base")
    if base.file is not None:
        stated = " ".join(base.file.file.metadata.get("modelspec.license", "").split())[:200]
        if _LICENSE_ID.fullmatch(stated.lower()):
            return License(stated.lower(), "the metadata of the base's file")
        if stated:
            return License("other", "the metadata of the base's file", printable(stated))
        return License(UNKNOWN, "the base is a file that does not state it")
    found = None
    if base.folder is not None:
        with contextlib.suppress(UnsafeFile, OSError):
            found = _license_in(model_file(base.folder, CARD_NAME))
    if found is None and is_hub_id(base.spec):
        with contextlib.suppress(UserError, OSError):
            found = _license_in((fetch or fetch_card)(base.spec))
    return found or License(UNKNOWN, "the base has no model card that states it")


def is_hub_id(spec: str) -> bool:
    """Return whether a base is named by its id on the hub."""
    return bool(_HUB_ID.fullmatch(spec)) and not Path(spec).exists()


def fetch_card(spec: str) -> Path:
    """Return the model card of a hub id, from the local cache or the hub. Raises UserError if neither has it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    try:
        return Path(hf_hub_download(spec, CARD_NAME))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError) as error:
        raise UserError(f"{spec} has no model card here: {error}") from None


def _license_in(path: Path) -> License | None:
    """Return the license that a model card states in its front matter, None if it states none."""
    text = read_bytes(path, MAX_CARD_BYTES).decode("utf-8", "replace")
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values = parse_yaml(match[1]) if match else None
    except UnsafeFile:
        return None
    stated = values.get("license") if isinstance(values, dict) else None
    if not isinstance(stated, str) or not _LICENSE_ID.fullmatch(stated.lower()):
        return None
    name, link = (" ".join(str(values.get(key) or "").split())[:300] for key in ("license_name", "license_link"))
    return License(stated.lower(), "its own model card", printable(name), printable(link))


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of. step: of the checkpoint. title: of the model. notes: lines on what was exported.

    trained, usage, relation, tag: what was trained, how to use it, what it is to the base, and the hub's tag for it, as
    the kind of export says them (export_source.py).
    """

    run_dir: Path
    config: Config
    base: Base
    step: int
    title: str
    trained: str
    usage: str
    relation: str
    tag: str = ""
    notes: Sequence[str] = ()


def write_card(facts: CardFacts, card: Path, samples: Path) -> list[str]:
    """Write a model card and copies of samples, and return the names of the copies.

    card: the file. samples: their folder, beside it; it is not made if the run has none.
    """
    run = read_run_folder(facts.run_dir)
    chosen = _choose_samples(run, facts.step)
    copied: list[tuple[str, dict]] = []
    for number, (sample_set, image) in enumerate(chosen):
        path = inside(run.path, sample_set.folder, image.get("file"))
        try:
            content = read_bytes(path, MAX_SAMPLE_BYTES) if path is not None else b""
        except (UnsafeFile, OSError):
            continue
        if not content.startswith(_PNG):
            continue
        samples.mkdir(exist_ok=True)
        name = f"{number:02d}.png"
        atomic_write_bytes(samples / name, content)
        copied.append((f"{samples.name}/{name}", {**image, "step": sample_set.step, "epoch": sample_set.epoch}))
    atomic_write_text(card, card_text(facts, run, copied, license_of(facts.base)))
    return [name for name, _ in copied]


def _choose_samples(run: RunFolder, step: int) -> list[tuple[SampleSet, dict]]:
    """Return the samples to show: of the checkpoint's step, else of the last step before it."""
    sets = [one for one in run.samples if one.images and 0 < one.step <= step]
    if not sets:
        return []
    newest = max(sets, key=lambda one: one.step)
    return [(newest, image) for image in newest.images[:MAX_SAMPLES]]


def card_text(facts: CardFacts, run: RunFolder, samples: Sequence[tuple[str, Mapping]], licence: License) -> str:
    """Return the text of a card. samples: (path beside it, what index.json says of the picture)."""
    parts = [
        f"---\n{_front_matter(facts, samples, licence)}---\n",
        f"# {escaped(facts.title)}\n",
        _summary(facts, run),
        _samples(samples),
        f"## Use\n\n{facts.usage}\n",
        _training(facts, run),
        _data(run),
        _evaluation(run.evaluation, facts.step),
        _license(facts, licence),
        f"*Written by Safelight {safelight.__version__}.*\n",
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(facts: CardFacts, samples: Sequence[tuple[str, Mapping]], licence: License) -> str:
    import yaml

    family = facts.base.family.title
    tags = ["safelight", "stable-diffusion", "text-to-image", "diffusers", "fine-tuned"]
    tags += ["stable-diffusion-xl"] if "XL" in family else []
    tags += [facts.tag] if facts.tag else []
    values: dict = {"license": licence.id}
    values |= {"license_name": re.sub(r"[^a-z0-9]+", "-", licence.name.lower()).strip("-")} if licence.name else {}
    values |= {"license_link": licence.link} if licence.link else {}
    values |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if is_hub_id(facts.base.spec):
        values |= {"base_model": facts.base.spec, "base_model_relation": facts.relation}
    values["tags"] = tags
    if samples:
        values["widget"] = [
            {"text": _plain(image.get("prompt"), MAX_PROMPT_CHARS) or " ", "output": {"url": name}}
            for name, image in samples
        ]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _summary(facts: CardFacts, run: RunFolder) -> str:
    epoch = next((one.epoch for one in reversed(run.samples) if one.step == facts.step), None)
    after = f"{facts.step:,} steps" + (f" ({format_epoch(epoch)} epoch{'s' * (epoch != 1)})" if epoch else "")
    if facts.base.spec in EMBEDDED:
        base = f"`{facts.base.spec}`, Safelight's built-in toy model"
    elif is_hub_id(facts.base.spec):
        base = f"[{escaped(facts.base.spec)}](https://huggingface.co/{quote(facts.base.spec)})"
    else:
        base = escaped(Path(facts.base.spec).name)
    text = f"{facts.base.family.title}, fine-tuned from {base}: {facts.trained}, after {after}."
    notes = "".join(f"\n* {escaped(note)}" for note in facts.notes)
    return f"{text}\n{notes}\n" if notes else f"{text}\n"


def _samples(samples: Sequence[tuple[str, Mapping]]) -> str:
    if not samples:
        return ""
    rows = ["## Samples\n", "| | prompt and settings |", "|---|---|"]
    for name, image in samples:
        settings = [f"seed {image['seed']}"] if type(image.get("seed")) is int else []
        settings += [f"cfg {image['cfg']:g}"] if isinstance(image.get("cfg"), int | float) else []
        settings += [f"{image['num_steps']} steps"] if type(image.get("num_steps")) is int else []
        settings += [title_of(_plain(image["sampler"], 40))] if isinstance(image.get("sampler"), str) else []
        negative = _plain(image.get("negative_prompt"), MAX_PROMPT_CHARS)
        prompt = escaped(_plain(image.get("prompt"), MAX_PROMPT_CHARS))
        against = f"<br>negative: {escaped(negative)}" if negative else ""
        rows.append(f"| ![]({name}) | {prompt}{against}<br>step {image['step']:,}; {escaped(', '.join(settings))} |")
    note = "\nDrawn while training, from Safelight's own noise: other programs draw other pictures with these seeds.\n"
    return "\n".join(rows) + "\n" + note


def _training(facts: CardFacts, run: RunFolder) -> str:
    config = facts.config
    stages = "; ".join(
        f"{counted(stage.epochs, 'epoch')} at {stage.lr:g} {stage.schedule}, batch {stage.batch_size}"
        + (f" x {stage.accumulate}" if stage.accumulate > 1 else "")
        for stage in config.stages()
    )
    loss = config.loss
    rows = {
        "resolution": f"{', '.join(map(str, config.data.resolutions))} px, aspect ratios kept in buckets",
        "stages": stages,
        "LoRA": _lora(config.adapter) if config.adapter.spec.needs_base else "",
        "word": _word(config.embedding) if config.trains_word else "",
        "trained layers": ", ".join(config.train.layers),
        "optimizer": f"{config.optimizer.name}, weight decay {config.optimizer.weight_decay:g}",
        "precision": _plain(run.model.get("precision"), 40) or config.model.precision,
        "loss": f"{loss.kind}, weighting {loss.chosen_weighting}",
        "prediction": _plain(run.model.get("prediction_type"), 40) or loss.prediction,
        "zero terminal SNR": "yes" if loss.zero_terminal_snr else "",
        "offset noise": f"{loss.offset_noise:g}" if loss.offset_noise else "",
        "moving average": f"decay {config.train.ema_decay:g}" if config.train.ema_decay else "",
        "caption dropout": f"{config.data.caption_dropout:g}",
        "caption suffix": config.data.caption_suffix,
        "clip skip": str(config.model.clip_skip) if config.model.clip_skip else "",
        "text encoder": f"trained, lr {config.text_encoder.lr:g}" if config.text_encoder.train else "frozen",
        "seed": str(config.run.seed),
        "device": _plain(run.environment.get("device"), 80),
        "Safelight": _plain(run.environment.get("safelight"), 40),
        "torch": _plain(run.environment.get("torch"), 40),
    }
    table = "\n".join(f"| {name} | {escaped(value)} |" for name, value in rows.items() if value)
    return f"## Training\n\n| setting | value |\n|---|---|\n{table}\n"


def _lora(adapter: Adapter) -> str:
    """Return what a LoRA is made of."""
    parts = [f"rank {adapter.rank}", f"alpha {adapter.alpha or adapter.rank:g}"]
    parts += [f"dropout {adapter.dropout:g}"] if adapter.dropout else []
    parts += ["DoRA"] if adapter.dora else []
    parts += ["rank-stabilized"] if adapter.rslora else []
    parts += [f"on {', '.join(adapter.target)}"]
    parts += [f"base in {adapter.base}"] if adapter.quantized_base else []
    return ", ".join(parts)


def _word(word: Embedding) -> str:
    """Return what a word is made of, and what it was trained on in place of captions."""
    begun = f"from {word.initial_text!r}"
    return f"{word.word}, {counted(word.vectors, 'vector')} {begun}, trained on {'; '.join(word.templates)}"


def _data(run: RunFolder) -> str:
    data = run.data
    if not data:
        return ""
    lines = []
    numbers = {name: data.get(name) for name in ("num_photos", "num_train", "num_validation", "num_captions")}
    if type(numbers["num_photos"]) is int:
        held = numbers["num_validation"]
        text = f"{counted(numbers['num_photos'], 'photograph')}"
        text += f", of which {held:,} were held out of training" if type(held) is int else ""
        text += f"; {counted(numbers['num_captions'], 'caption')}" if type(numbers["num_captions"]) is int else ""
        lines.append(f"{text}.")
    if sources := rows_of(data, "caption_sources"):
        said = [
            f"{row['num']:,} by {escaped(_plain(row.get('captioner') or row.get('source'), 80) or 'unknown')}"
            for row in sources[:6]
            if type(row.get("num")) is int
        ]
        lines.append(f"Captions: {', '.join(said)}.")
    if credited := _credits(rows_of(data, "credits")):
        lines.append(credited)
    return "## Data\n\n" + "\n\n".join(lines) + "\n" if lines else ""


def _credits(rows: Sequence[Mapping]) -> str:
    """Return a line on whose photographs were used, '' if none says."""
    names = Counter(_plain(row.get("photographer"), 100) for row in rows)
    names.pop("", None)
    if not names:
        return ""
    shown = [f"{escaped(name)} ({num:,})" for name, num in names.most_common(MAX_PHOTOGRAPHERS)]
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return (
        f"With thanks to {counted(len(names), 'photographer')} of {counted(sum(names.values()), 'photograph')}: "
        f"{', '.join(shown)}{more}."
    )


def _evaluation(evaluation: Evaluation | None, step: int) -> str:
    """Return the figures of the checkpoint beside the base's, '' if it was not evaluated."""
    model = f"step-{step}"
    if evaluation is None or model not in {one.id for one in evaluation.models}:
        return ""
    rows = []
    for metric in evaluation.metrics[:MAX_METRICS]:
        base, own = estimate_of(metric, "base"), estimate_of(metric, model)
        if own is None:
            continue
        before = f"{base.value:.4g} [{base.low:.4g}, {base.high:.4g}]" if base is not None else ""
        better = f" ({metric.better} is better)" if metric.better else ""
        by = f", by {escaped(metric.features)}" if metric.features else ""
        rows.append(
            f"| {escaped(metric.title)}{by}{better} | {before} | {own.value:.4g} [{own.low:.4g}, {own.high:.4g}] |"
        )
    if not rows:
        return ""
    head = (
        f"{counted(evaluation.num_prompts, 'prompt')}, {counted(evaluation.num_real, 'photograph')} to compare with, "
        f"{evaluation.width}x{evaluation.height} px, {evaluation.num_steps} steps, cfg {evaluation.cfg:g}; in brackets "
        "bootstrap intervals.\n"
    )
    return "\n".join(["## Evaluation\n", head, "| measure | base | this model |", "|---|---|---|", *rows, ""])


def _license(facts: CardFacts, licence: License) -> str:
    name = licence.name or licence.id
    if licence.id == UNKNOWN:
        text = (
            f"The license of the base is not known here: {licence.source}. Whoever publishes this model has to "
            "find out, and state, what the base allows."
        )
    else:
        link = f" ([text]({quote(licence.link, safe=':/#?&=%')}))" if licence.link else ""
        text = (
            f"{escaped(name)}{link}, the license of the base, as {licence.source} states it. The photographs that the "
            "model was trained on may have terms of their own."
        )
    return f"## License\n\n{text}\n"


def _plain(value: object, max_chars: int) -> str:
    """Return a value as one line of bounded length, '' for anything but texts."""
    return shortened(printable(" ".join(value.split())), max_chars) if isinstance(value, str) else ""


def escaped(text: str) -> str:
    """Return a text of a stranger that Markdown and HTML show as it is, on one line."""
    one_line = printable(" ".join(text.split()))
    shown = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$])", r"\\\1", shown)
