"""What prompts have that does nothing, and what they lack: A1111's tags for LoRAs, the words of embeddings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from safelight.text import printable

# <lora:NAME>, <lora:NAME:0.8> and <lyco:...>, as A1111 reads them
_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]{1,200}>", re.IGNORECASE)
MAX_WORDS = 10_000


def tag_note(texts: Iterable[str], where: str) -> str:
    """Return a note about the first of A1111's tags in texts, '' if there is none. where: of the texts."""
    found = next((match[0] for text in texts if (match := _TAG.search(text))), "")
    if not found:
        return ""
    return (
        f"{where}: {printable(found[:80])} is read as words, as part of the prompt. Pictures of a run have the LoRA "
        "that it trained; `safelight sample RUN --lora-scale 0.8` says how much of it. Leave the tag out"
    )


def unnamed_note(name: str, texts: Sequence[str]) -> str:
    """Return a note about an embedding that no text names, with the word that is nearest to its name."""
    words = list(dict.fromkeys(re.findall(r"[^\s,()\[\]]+", " ".join(texts))))[:MAX_WORDS]
    by_lower = {word.lower(): word for word in words}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    hint = f"; the nearest word is {printable(by_lower[nearest[0]][:80])}" if nearest else ""
    return f"--embedding {name} has no effect: no prompt and no negative prompt names {name}{hint}"
