"""Prompts with A1111's tags, and embeddings that no prompt names, are told."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from safelight.errors import UserError
from safelight.trainer.adapters.lora import targeted
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.draw import OpenRun
from safelight.trainer.inference.prompt_file import read_prompt_file
from safelight.trainer.inference.prompt_words import tag_note
from safelight.trainer.loading.notes import notes
from safelight.trainer.models.embeddings import Embedding


def test_a_tag_of_a1111_is_told_wherever_prompts_are_given(tmp_path):
    text = "a barn <lora:barns:0.8>"
    assert tag_note(["a <b> c", "a barn"], "a prompt") == ""
    for table in ({"prompts": [text]}, {"negative_prompt": text}):
        told = notes(parse_config({"sample": table}, "f"), None, "cuda")
        assert any("<lora:barns:0.8> is read as words" in one and "--lora-scale" in one for one in told)
    file = tmp_path / "p.txt"
    file.write_text(f"a hen\n{text}\n")
    (note,) = read_prompt_file(file, 64).notes
    assert note.startswith(f"{file}: <lora:barns:0.8> is read as words")
    said, reader = [], SimpleNamespace(cuts=lambda texts: {})
    run = SimpleNamespace(encoder=SimpleNamespace(reading=lambda **_: reader))
    OpenRun.say_cuts(run, [text], "", said.append)
    assert said[0].startswith("note: a prompt: <lora:barns:0.8> is read as words")


def test_an_embedding_that_nothing_names_is_told_with_the_nearest_word():
    words = tuple(Embedding(name, {"text_encoder": torch.zeros(1, 4)}) for name in ("own", "badtiny"))
    run, said = SimpleNamespace(embeddings=words, given_words=("badtiny",)), []
    OpenRun.say_unnamed(run, ["a barn", "blurry, bad-tiny"], said.append)
    assert said == [
        "note: --embedding badtiny has no effect: no prompt and no negative prompt names badtiny; the nearest word is "
        "bad-tiny"
    ]
    OpenRun.say_unnamed(run, ["a barn", "blurry, badtiny"], said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ([], "expected 1 to 64 layers or patterns"),
        ([""], "it is empty; use attention, feed-forward"),
        (["attention,feed_forward"], "separate layers by spaces: --adapter.target attention feed_forward"),
    ],
)
def test_targets_that_name_nothing_are_refused(target, told):
    with pytest.raises(UserError, match=told):
        parse_config({"adapter": {"kind": "lora", "target": target}}, "f")


def test_a_target_may_be_written_as_in_train_layers_and_the_nearest_is_named():
    assert parse_config({"adapter": {"target": ["feed_forward"]}}, "f").adapter.target == ["feed-forward"]
    with pytest.raises(UserError, match="the nearest name is attention;"):
        targeted(nn.Sequential(nn.Linear(2, 2)), ["atention"])
