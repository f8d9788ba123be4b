"""The process that renders a model's chat template and tries its tokenizer; `prompts.py` starts it.

A template is a stranger's program, and so is a regular expression. transformers' sandbox keeps the one from files and
modules, but nothing keeps either from any amount of memory and time: those have a limit here. The request and the
answer are JSON.
"""

from __future__ import annotations

import json
import sys

from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

# the longest prompt of a user has 2,000
MAX_CHARACTERS = 2**14


def render(template: str | dict, prompt: str, tokens: dict) -> str:
    """Return the text that asks a prompt of one photograph. tokens: the tokenizer's special ones, by name."""
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    (text,), _ = render_jinja_template(
        [[{"role": "user", "content": content}]],
        chat_template=template if isinstance(template, str) else template["default"],
        add_generation_prompt=True,
        **tokens,
    )
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it makes a text of {len(text):,} characters, over the limit of {MAX_CHARACTERS:,}")
    return text


def main() -> None:
    # not on Windows, where the parent starts no such process
    import resource

    request = json.load(sys.stdin)
    for limit, value in zip((resource.RLIMIT_AS, resource.RLIMIT_CPU), request["limits"], strict=True):
        resource.setrlimit(limit, (value, value))
    try:
        texts = request["texts"]
        if request["template"] is not None:
            texts = [render(request["template"], text, request["special_tokens"]) for text in texts]
        if request["tokenizer"] is not None:
            tokenizer = Tokenizer.from_str(request["tokenizer"])
            for text in texts:
                tokenizer.encode(text)
        answer = {"texts": texts}
    # whatever a template raises
    except Exception as error:
        answer = {"error": str(error)[:1000] or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
