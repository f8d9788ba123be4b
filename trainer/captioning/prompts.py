"""What a model is asked, made in a process of its own within bounds (prompt_child.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence

from safelight.untrusted import UnsafeFile, parse_json

MAX_MEMORY_BYTES = 2**32
# of the processor, and by the clock: the process may have to wait. Both include importing transformers
MAX_CPU_SECONDS, MAX_SECONDS = 20, 120


def tried(tokenizer, texts: Sequence[str], template: str | dict | None = None) -> list[str]:
    """Return texts, in which a chat template asks them of one photograph if there is one, and which can be tokenized.

    No process is started for what needs none: a tokenizer without regular expressions of its own.
    Raises ValueError if the template fails, or it or the tokenizer takes too much memory or time.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    has_regex = backend is not None and b'"Regex"' in _state(backend.pre_tokenizer)
    if template is None and not has_regex:
        return list(texts)
    request = {
        "limits": (MAX_MEMORY_BYTES, MAX_CPU_SECONDS),
        "texts": list(texts),
        "template": template,
        "special_tokens": tokenizer.special_tokens_map,
        "tokenizer": backend.to_str() if has_regex else None,
    }
    if importlib.util.find_spec("resource") is None:
        raise ValueError("its chat template or tokenizer is not tried on this system, which cannot limit its memory")
    what = "tokenizer" if template is None else "chat template or tokenizer"
    try:
        done = subprocess.run(
            # -P: the current folder is no place for modules
            [sys.executable, "-P", "-m", "safelight.trainer.captioning.prompt_child"],
            # tokens may be objects with settings
            input=json.dumps(request, default=str).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=MAX_SECONDS,
            # the modules that this process has; threads would reserve addresses, which count towards the limit
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        answer = parse_json(done.stdout)
    except (subprocess.TimeoutExpired, UnsafeFile):
        answer = {"error": "it does not end, or fills the memory"}
    if isinstance(answer.get("texts"), list):
        return answer["texts"]
    raise ValueError(f"its {what} makes no prompt: {answer['error'].strip().partition(chr(10))[0][:150]}")


def _state(pre_tokenizer) -> bytes:
    return b"" if pre_tokenizer is None else pre_tokenizer.__getstate__()
