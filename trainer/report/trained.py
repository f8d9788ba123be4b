"""What a run trained, in words, from its settings; they may be somebody else's, so nothing is taken for granted."""

from __future__ import annotations

from safelight.text import counted
from safelight.trainer.registry.adapters import ADAPTERS, AdapterSpec
from safelight.trainer.report.markup import shorten
from safelight.trainer.report.run_reader import RunFolder, number, table_of

MAX_NAMES = 8


def adapter_of_run(config: dict) -> AdapterSpec:
    """Return the adapter that a run trained; runs from before there were any trained the UNet."""
    kind = table_of(config, "adapter").get("kind")
    return ADAPTERS.get(kind if isinstance(kind, str) else "none", ADAPTERS["none"])


def trained_words(run: RunFolder) -> str:
    """Return what was trained, such as `a LoRA of rank 16 on attention`; '' if the run has no settings."""
    if not run.config:
        return ""
    adapter, word, spec = table_of(run.config, "adapter"), table_of(run.config, "embedding"), adapter_of_run(run.config)
    if spec.trains_word:
        num = number(word.get("vectors"))
        vectors = f" with {counted(int(num), 'vector')}" if num == num else ""
        kind = "the negative word" if word.get("negative") is True else "the word"
        return f"{kind} {shorten(word.get('word'), 100)}{vectors}" if word.get("word") else "a word"
    if spec.needs_base:
        num = number(adapter.get("rank"))
        rank = f" of rank {num:.0f}" if num == num else ""
        on = f" on {_listed(adapter.get('target'))}" if adapter.get("target") else ""
        quantized = adapter.get("base")
        held = f", the base in {quantized}" if quantized in ("8bit", "nf4") else ""
        return f"a {'DoRA' if adapter.get('dora') is True else 'LoRA'}{rank}{on}{held}"
    layers = table_of(run.config, "train").get("layers")
    trained = f"some of the UNet's layers ({_listed(layers)})" if layers else "the whole UNet"
    with_text = table_of(run.config, "text_encoder").get("train") is True
    return f"{trained} and the text encoder" if with_text else trained


def has_no_effect(config: dict, table: str, name: str) -> bool:
    """Return whether a setting belongs to something that the run did not train."""
    spec = adapter_of_run(config)
    if table == "adapter":
        return name not in ("kind", *spec.settings)
    if table == "embedding":
        return not spec.trains_word
    return table == "text_encoder" and table_of(config, "text_encoder").get("train") is not True


def _listed(names: object) -> str:
    names = names if isinstance(names, list) else [names]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(shorten(name, 60) for name in names[:MAX_NAMES]) + more
