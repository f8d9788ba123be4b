"""Prompts in A1111's syntax: weights, and texts longer than the text encoder reads at a time.

(word) counts 1.1 times, (word:1.3) 1.3 times, [word] 1 / 1.1 times; brackets nest, and \\( \\) \\[ \\] \\\\ are plain
characters. The tokens are cut into chunks of what the encoder reads at a time, between two words if possible after a
comma, and BREAK begins a new chunk. Each chunk is encoded by itself; then every token's embedding is multiplied by its
weight, and the chunk scaled so that its mean is as before.
Source: the documentation of AUTOMATIC1111's web UI, "Attention/emphasis" and "Infinite prompt length".
Letters: B batch, T tokens of a chunk, D embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor

from safelight.errors import UserError

ROUND, SQUARE = 1.1, 1 / 1.1
# beyond it an embedding says nothing any more, and might not fit 16 bits
MAX_WEIGHT = 100.0
# deeper brackets mean nothing any more, and would take long
MAX_DEPTH = 100
# how many tokens before the end of a chunk the last comma may be, for the chunk to end there
MAX_AFTER_COMMA = 20
# raise it when a change gives a text other embeddings
VERSION = 1

# an escaped character, a weight that closes a bracket, a bracket, anything else. Possessive, and never begun within
# white space: going back over n characters takes time of order n^2
_PIECE = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)|:\s*+(?P<weight>[+-]?(?:\d++\.?\d*+|\.\d++))\s*+\)|(?P<bracket>[()\[\]])|[^\\()\[\]:]+|:"
)
_BREAK = re.compile(r"(?:(?<!\s)\s*+)?\bBREAK\b\s*+")


@dataclass
class Span:
    """A part of a prompt. weight: what its embeddings are multiplied by. is_break: begin a new chunk here."""

    text: str
    weight: float = 1.0
    is_break: bool = False


@dataclass
class Chunk:
    """Token ids without start, end and padding, and the weight of each."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def split(self, length: int) -> Chunk:
        """Cut this chunk to a length and return the rest."""
        rest = Chunk(self.ids[length:], self.weights[length:])
        del self.ids[length:], self.weights[length:]
        return rest


def parse_weights(prompt: str) -> list[Span]:
    """Return the prompt's parts with their weights; neighbours of equal weight are one part.

    A closing bracket without an opening one is plain text; an opening one without a closing one lasts until the end.
    Raises UserError for a weight beyond MAX_WEIGHT, or brackets nested deeper than MAX_DEPTH.
    """
    spans: list[Span] = []
    # where open brackets began
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, weight: float) -> None:
        for span in spans[open_at[bracket].pop() :]:
            span.weight *= weight

    for piece in _PIECE.finditer(prompt):
        text, bracket = piece[0], piece["bracket"]
        if piece["escaped"] is not None:
            spans.append(Span(piece["escaped"]))
        elif bracket in ("(", "["):
            open_at[bracket].append(len(spans))
            if len(open_at[bracket]) > MAX_DEPTH:
                raise UserError(
                    f"the prompt has more than {MAX_DEPTH} brackets inside each other; write \\( and \\) for plain ones"
                )
        elif piece["weight"] is not None and open_at["("]:
            close("(", float(piece["weight"]))
        elif bracket == ")" and open_at["("]:
            close("(", ROUND)
        elif bracket == "]" and open_at["["]:
            close("[", SQUARE)
        else:
            first, *others = _BREAK.split(text)
            spans.append(Span(first))
            for other in others:
                spans += [Span("", is_break=True), Span(other)]
    for bracket, weight in (("(", ROUND), ("[", SQUARE)):
        while open_at[bracket]:
            close(bracket, weight)
    for span in spans:
        if not abs(span.weight) <= MAX_WEIGHT:
            raise UserError(
                f"the prompt gives {span.text.strip()!r:.60} the weight {span.weight:.4g}, beyond {MAX_WEIGHT:g}; use "
                "0.5 to 1.5, or write brackets that mean nothing as \\( and \\)"
            )
    return _merged(spans)


def _merged(spans: list[Span]) -> list[Span]:
    merged: list[Span] = []
    kept = (span for span in spans if span.text or span.is_break)
    for (is_break, weight), group in groupby(kept, lambda span: (span.is_break, span.weight)):
        texts = [span.text for span in group]
        merged += [Span("", is_break=True) for _ in texts] if is_break else [Span("".join(texts), weight)]
    return merged


def has_weights(prompt: str) -> bool:
    """Return whether a prompt is read in another way than a plain text."""
    return bool(prompt) and parse_weights(prompt) != [Span(prompt)]


def escape(text: str) -> str:
    """Return the prompt that is read as a text without weights, such as a caption."""
    return re.sub(r"([()\[\]\\])", r"\\\1", text)


def split_chunks(
    spans: list[Span],
    tokenize: Callable[[list[str]], list[list[int | tuple[int, ...]]]],
    length: int,
    comma: int | None,
) -> list[Chunk]:
    """Return the tokens of a prompt in chunks of at most `length`; at least one, which may be empty.

    tokenize: returns the token ids of each text, without start and end; a tuple is never cut. comma: id of the token
    `,`. Raises UserError for a tuple that is longer than a chunk.
    """
    chunks = [Chunk()]
    last_comma = -1
    for span, ids in zip(spans, tokenize([span.text for span in spans]) if spans else [], strict=True):
        if span.is_break:
            chunks.append(Chunk())
            last_comma = -1
        for token in ids:
            chunk, whole = chunks[-1], token if isinstance(token, tuple) else (token,)
            if len(whole) > length:
                raise UserError(f"an embedding has {len(whole)} vectors, and {length} are read at a time")
            if len(chunk.ids) + len(whole) > length:
                is_near = last_comma >= 0 and len(chunk.ids) - last_comma <= MAX_AFTER_COMMA and token != comma
                # what follows the comma may leave too little room for the vectors of an embedding
                is_near = is_near and len(chunk.ids) - (last_comma + 1) + len(whole) <= length
                chunks.append(chunk.split(last_comma + 1) if is_near else Chunk())
                last_comma = -1
            if token == comma:
                last_comma = len(chunks[-1].ids)
            chunks[-1].ids.extend(whole)
            chunks[-1].weights.extend([span.weight] * len(whole))
    return chunks


def apply_weights(embeddings_BTD: Tensor, weights_BT: Tensor) -> Tensor:
    """Return the embeddings times their weights, each row scaled so that its mean stays what it was.

    A row whose weights are all 1 keeps its bits.
    """
    weighted = embeddings_BTD * weights_BT[..., None]
    before, after = (x.mean(dim=(1, 2), keepdim=True) for x in (embeddings_BTD, weighted))
    scaled = weighted * (before / after)
    is_changed = (weights_BT != 1).any(dim=1)[:, None, None] & (after != 0)
    return scaled.where(is_changed, weighted)
