"""Prompts are parsed, cut into chunks and weighted by A1111's published rules."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safelight.errors import UserError
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.prompt_weights import (
    MAX_AFTER_COMMA,
    Span,
    apply_weights,
    escape,
    parse_weights,
    split_chunks,
)
from safelight.trainer.models.weights import load_texts

CPU = torch.device("cpu")
SHARED = Path(os.environ.get("SAFELIGHT_SHARED", Path(__file__).resolve().parents[4] / "shared"))
CLIP_TOKENIZER = SHARED / "weights" / "clip_tokenizer"
COMMA = 0


@pytest.fixture(scope="module")
def encoder():
    tiny = resolve_base("tiny")
    return CaptionEncoder.of(tiny, load_texts(tiny, "", 0), CPU)


def parsed(prompt: str) -> list:
    return [("BREAK",) if s.is_break else (s.text, round(s.weight, 6)) for s in parse_weights(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a word", [("a word", 1)]),
        ("a (word)", [("a ", 1), ("word", 1.1)]),
        ("a ((word))", [("a ", 1), ("word", 1.21)]),
        ("a [word]", [("a ", 1), ("word", 0.909091)]),
        ("a (word:1.5)", [("a ", 1), ("word", 1.5)]),
        ("a (word:0.25)", [("a ", 1), ("word", 0.25)]),
        ("a (word:.5)", [("a ", 1), ("word", 0.5)]),
        ("a (word:-1)", [("a ", 1), ("word", -1)]),
        (r"a \(word\)", [("a (word)", 1)]),
        (r"\[a\] \\ \b", [("[a] \\ b", 1)]),
        ("(word : 1.5 )", [("word ", 1.5)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[unbalanced (twice", [("unbalanced ", 0.909091), ("twice", 1.0)]),
        ("un]balanced)", [("un]balanced)", 1)]),
        ("12:30 and a:1.3)", [("12:30 and a:1.3)", 1)]),
        ("(a (b:1.2) c:0.5)", [("a ", 0.5), ("b", 0.6), (" c", 0.5)]),
        ("a BREAK b", [("a", 1), ("BREAK",), ("b", 1)]),
        ("(a BREAK b:1.3) BREAKFAST", [("a", 1.3), ("BREAK",), ("b", 1.3), (" BREAKFAST", 1)]),
        ("", []),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_weights_are_parsed_as_published(prompt, expected):
    assert parsed(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "reason"), [("(sun:1000)", "'sun' the weight 1000, beyond 100"), ("(" * 101 + "a", "more than 100")]
)
def test_weights_that_nothing_can_be_learnt_from_are_refused(prompt, reason):
    with pytest.raises(UserError, match=reason):
        parse_weights(prompt)


@settings(deadline=None)
@given(text=st.text(alphabet="ab ,:.1()[]\\-", max_size=30))
def test_an_escaped_text_is_read_as_it_is(text):
    assert parsed(escape(text)) == ([(text, 1)] if text else [])


@settings(deadline=None)
@given(text=st.text(alphabet="ab ,:.1()[]\\BREAK", max_size=40))
def test_no_text_breaks_the_parser(text):
    spans = parse_weights(text)
    assert all(span.text or span.is_break for span in spans)
    assert set("".join(span.text for span in spans)) <= set(text)


def chunk_ids(ids: list[int], length: int) -> list[list[int]]:
    chunks = split_chunks([Span("x")], lambda texts: [ids for _ in texts], length, COMMA)
    assert [len(chunk.ids) for chunk in chunks] == [len(chunk.weights) for chunk in chunks]
    return [chunk.ids for chunk in chunks]


def test_a_full_chunk_ends_after_a_comma_that_is_near():
    # 75 tokens fit exactly, and no empty chunk follows
    assert chunk_ids([1] * 75, 75) == [[1] * 75]
    assert chunk_ids([1] * 76, 75) == [[1] * 75, [1]]
    near = [1] * (74 - MAX_AFTER_COMMA + 1) + [COMMA] + [2] * 40
    first, second = chunk_ids(near, 75)
    assert first == near[: near.index(COMMA) + 1]
    assert second == [2] * 40
    far = [1] * (74 - MAX_AFTER_COMMA) + [COMMA] + [2] * 40
    assert [len(ids) for ids in chunk_ids(far, 75)] == [75, 20]
    # a comma that would be the first token of the next chunk
    assert chunk_ids([1] * 75 + [COMMA, 2], 75) == [[1] * 75, [COMMA, 2]]


def test_break_begins_a_chunk():
    spans = parse_weights("(a:1.5) BREAK b")
    chunks = split_chunks(spans, lambda texts: [[ord(c) for c in t.strip()] for t in texts], 75, COMMA)
    assert [(chunk.ids, chunk.weights) for chunk in chunks] == [([97], [1.5]), ([98], [1.0])]


def test_the_mean_is_kept():
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)) + 0.3
    weights = torch.ones(2, 5)
    weights[1, 2] = 1.6
    result = apply_weights(x, weights)
    assert torch.equal(result[0], x[0])
    torch.testing.assert_close(result[1].mean(), x[1].mean())
    ratio = result[1] / x[1]
    torch.testing.assert_close(ratio[2] / ratio[0], torch.full((7,), 1.6))


def test_a_prompt_without_syntax_is_encoded_as_before(encoder):
    texts = ["a red circle, on a grey background", "", "RED\n star"]
    assert torch.equal(encoder.reading(True, 1).encode(texts), encoder.encode(texts))
    reader = encoder.reading(True, 2)
    first, second = reader.encode(texts).chunk(2, dim=1)
    assert torch.equal(first, encoder.encode(texts))
    # what is missing is an empty chunk, not zeros
    assert torch.equal(second, encoder.encode(["", "", ""]))


def test_chunks_are_encoded_one_by_one(encoder):
    words = ["red"] * (encoder.chunk_tokens - 2) + ["blue"] * 5
    text = " ".join(words)
    reader = encoder.reading(True, 2)
    expected = torch.cat([encoder.encode([" ".join(words[:-5])]), encoder.encode(["blue " * 5])], dim=1)
    assert torch.equal(reader.encode([text]), expected)
    assert reader.cuts([text, text + " and more " * 40]).keys() == {text + " and more " * 40}


def test_a_weight_changes_its_own_token_only_in_proportion(encoder):
    reader = encoder.reading(True, 1)
    plain, weighted = reader.encode(["a red circle", "a (red:1.5) circle"])
    ratio = (weighted / plain).median(dim=1).values
    # start, a, red, circle
    torch.testing.assert_close(ratio[2] / ratio[1], torch.tensor(1.5))
    torch.testing.assert_close(ratio[3] / ratio[1], torch.tensor(1.0))
    torch.testing.assert_close(weighted.mean(), plain.mean())


def test_the_fingerprint_tells_how_texts_are_read(encoder):
    readers = [encoder.reading(weights, num) for weights in (False, True) for num in (1, 2)]
    assert readers[0].fingerprint == encoder.fingerprint
    assert len({reader.fingerprint for reader in readers}) == 4


@pytest.mark.skipif(not CLIP_TOKENIZER.is_dir(), reason=f"no tokenizer at {CLIP_TOKENIZER}; set SAFELIGHT_SHARED")
def test_clips_own_tokens(encoder):
    """Token by token with the tokenizer of Stable Diffusion 1.x: ids, weights and padding of each chunk."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(CLIP_TOKENIZER)
    reader = CaptionEncoder.of(resolve_base("tiny"), [(tokenizer, encoder.text_encoders[0])], CPU, weights=True)
    (chunk,) = reader.chunks("a (cat:1.3), [dog] \\(x\\)")
    names = tokenizer.convert_ids_to_tokens(chunk.ids)
    assert names == ["a</w>", "cat</w>", ",</w>", "dog</w>", "(</w>", "x</w>", ")</w>"]
    assert [round(weight, 3) for weight in chunk.weights] == [1, 1.3, 1, 0.909, 1, 1, 1]
    ids = reader._padded(tokenizer, chunk.ids)
    assert (len(ids), ids[0], ids[8], ids[-1]) == (77, 49406, 49407, 49407)
    tags = ", ".join(["a very long walk"] * 20)
    first, second = reader.chunks(tags)
    # 15 tags of 5 tokens fill a chunk exactly
    assert (len(first.ids), len(second.ids)) == (75, 24)
