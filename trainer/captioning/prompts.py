"""Renders a captioner's chat template in a process of its own (prompt_child.py), within bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from safelight.untrusted import UnsafeFile, parse_json

MAX_MEMORY_BYTES = 2**31
# of the processor, and by the clock: the process may have to wait. Both include importing transformers
MAX_CPU_SECONDS, MAX_SECONDS = 20, 120


def rendered(processor, prompt: str) -> str:
    """Return the text in which a processor's chat template asks a prompt of one photograph.

    Raises ValueError if it makes none: it fails, or takes too much memory or time.
    """
    request = {
        "limits": (MAX_MEMORY_BYTES, MAX_CPU_SECONDS),
        "template": processor.chat_template,
        "prompt": prompt,
        "tokens": processor.tokenizer.special_tokens_map,
    }
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
            | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        answer = parse_json(done.stdout)
    except (subprocess.TimeoutExpired, UnsafeFile):
        answer = {"error": "it does not end, or fills the memory"}
    if isinstance(answer.get("text"), str):
        return answer["text"]
    raise ValueError(f"its chat template makes no prompt: {answer['error'].strip().partition(chr(10))[0][:150]}")
