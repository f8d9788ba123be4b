"""What a captioner is asked for: how it generates, and what is made of its words. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace

from safelight.errors import UserError
from safelight.text import collapse
from safelight.untrusted import MAX_INT

DEFAULT_MODEL = "Salesforce/blip-image-captioning-base"
# its text encoder is SD1's
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
# of what becomes a tag
MIN_CONFIDENCE, LEAST_CONFIDENCE = 0.5, 0.1
MAX_PROMPT_CHARACTERS = 2000
MAX_TOKENS = 1024
MAX_BEAMS = 64
MAX_PREVIEW_PHOTOS = 50


@dataclass(frozen=True)
class Generation:
    """How a captioner generates; names and meanings are transformers'.

    prompt: the question, task token or beginning that the model gets; "" means the usual one of its kind. num_beams:
    beams of the search; 1 is greedy. min_new_tokens, max_new_tokens: length in the model's tokens. repetition_penalty:
    divides the probability's logit of tokens that were there already; 1 is none. top_p: samples from the most likely
    tokens that together have this probability; 1 does not sample. seed: of the samples.
    """

    prompt: str = ""
    num_beams: int = 3
    min_new_tokens: int = 0
    max_new_tokens: int = 75
    repetition_penalty: float = 1.0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self):
        for name, low, high in (
            ("num_beams", 1, MAX_BEAMS),
            ("min_new_tokens", 0, MAX_TOKENS),
            ("max_new_tokens", 1, MAX_TOKENS),
            ("repetition_penalty", 0.1, 10),
            ("top_p", 0.01, 1),
            ("seed", 0, MAX_INT),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} {value} is outside {low} to {high}")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"--min-new-tokens {self.min_new_tokens} is more than --max-new-tokens {self.max_new_tokens}; "
                "raise the one or lower the other"
            )
        if self.samples and self.num_beams > 1:
            raise UserError(
                f"--top-p {self.top_p:g} samples and --num-beams {self.num_beams} searches; give one of them "
                "(--top-p 1, or --num-beams 1)"
            )
        if len(self.prompt) > MAX_PROMPT_CHARACTERS:
            raise UserError(
                f"--prompt has {len(self.prompt):,} characters, over the limit of {MAX_PROMPT_CHARACTERS:,}"
            )

    @property
    def samples(self) -> bool:
        return self.top_p < 1

    def record(self) -> dict:
        """Return the values that decide what is generated. The seed is one only if tokens are sampled."""
        return {name: value for name, value in asdict(self).items() if name != "seed" or self.samples}


PRESETS = {
    # EveryDream2's auto_caption: 16 beams, min_length 30 and max_length 48 in tokens, q_factor 1.4
    "everydream2": Generation(num_beams=16, min_new_tokens=30, max_new_tokens=48, repetition_penalty=1.4),
}


def asked_for(preset: str | None, given: dict, seed: int) -> Generation:
    """Return the settings of a preset, or the usual ones, changed by those that were given. Raises UserError."""
    base = PRESETS[preset] if preset else Generation()
    if given.get("top_p", 1) < 1 and "num_beams" not in given:
        given = {**given, "num_beams": 1}
    return replace(base, **given, seed=seed)


@dataclass(frozen=True)
class Wording:
    """What is made of a generated text. prefix, suffix: written before and behind it, without a space of their own.

    replace: pairs (old, new), in this order. old is found as whole words, in this letter case.
    """

    prefix: str = ""
    suffix: str = ""
    replace: tuple[tuple[str, str], ...] = ()

    def apply(self, text: str) -> str:
        """Return the caption of a generated text, white space collapsed."""
        for old, new in self.replace:
            # a word ends where a letter or digit meets something else, so that man is not found in woman
            start, end = (r"(?<!\w)" if old[0].isalnum() else ""), (r"(?!\w)" if old[-1].isalnum() else "")
            text = re.sub(f"{start}{re.escape(old)}{end}", lambda _, new=new: new, text)
        return collapse(f"{self.prefix}{collapse(text)}{self.suffix}")

    def record(self) -> dict:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}


def replacement(text: str) -> tuple[str, str]:
    """Return (A, B) of the text A=B; B may be empty. Raises UserError."""
    old, equals, new = text.partition("=")
    if not old or not equals:
        raise UserError(
            f"--replace {text!r} is not of the form OLD=NEW; for example --replace 'arafed=' removes a word"
        )
    return old, new


def canonical(record: dict) -> str:
    """Return a record as JSON that is equal for equal records."""
    return json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def key_of(record: dict) -> str:
    """Return 16 hex digits that name a record."""
    return hashlib.sha256(canonical(record).encode("utf-8", errors="backslashreplace")).hexdigest()[:16]
