"""What a captioner is asked for, and what is made of its words."""

from __future__ import annotations

import pytest

from safelight.errors import UserError
from safelight.trainer.captioning.options import PRESETS, Generation, Wording, asked_for, canonical, key_of, replacement


def test_the_preset_has_the_source_reports_settings():
    report = PRESETS["everydream2"]
    assert (report.num_beams, report.min_new_tokens, report.max_new_tokens, report.repetition_penalty) == (
        16,
        30,
        48,
        1.4,
    )
    assert asked_for("everydream2", {"num_beams": 4}, 1).record() == {**report.record(), "num_beams": 4}


def test_sampling_takes_one_beam_unless_told_otherwise():
    assert asked_for(None, {}, 1) == Generation()
    sampled = asked_for("everydream2", {"top_p": 0.9}, 7)
    assert (sampled.num_beams, sampled.top_p, sampled.seed) == (1, 0.9, 7)
    with pytest.raises(UserError, match=r"--top-p 0.9 samples and --num-beams 4 searches"):
        asked_for(None, {"top_p": 0.9, "num_beams": 4}, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 0}, "--num-beams 0 is outside 1 to 64"),
        ({"num_beams": 65}, "outside 1 to 64"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 is outside"),
        ({"min_new_tokens": -1}, "--min-new-tokens -1 is outside"),
        ({"min_new_tokens": 80}, "--min-new-tokens 80 is more than --max-new-tokens 75"),
        ({"repetition_penalty": 0}, "--repetition-penalty 0 is outside 0.1 to 10"),
        ({"repetition_penalty": float("nan")}, "outside"),
        ({"top_p": 0}, "--top-p 0 is outside"),
        ({"top_p": 1.5}, "--top-p 1.5 is outside"),
        ({"prompt": "x" * 3000}, "--prompt has 3,000 characters"),
    ],
)
def test_settings_out_of_range_name_the_limit(values, message):
    with pytest.raises(UserError, match=message):
        asked_for(None, values, 1)


def test_the_seed_counts_only_if_tokens_are_sampled():
    assert Generation(seed=1).record() == Generation(seed=2).record()
    assert Generation(seed=1, top_p=0.9, num_beams=1).record() != Generation(seed=2, top_p=0.9, num_beams=1).record()


def test_wording_replaces_whole_words_and_adds_affixes():
    wording = Wording("photo of ", " unsplash photography", (("man", "person"), ("arafed", ""), ("a  ", "x")))
    assert wording.apply("arafed man  and a woman, man") == "photo of person and a woman, person unsplash photography"
    assert Wording(replace=(("a.b", r"\1"),)).apply("axb a.b") == r"axb \1"
    assert Wording(replace=((", ", " and "),)).apply("red, blue") == "red and blue"
    assert Wording().apply(" plain\ttext\n") == "plain text"


def test_replacements_are_pairs():
    assert replacement("a=b=c") == ("a", "b=c")
    assert replacement("arafed=") == ("arafed", "")
    for text in ("=b", "ab", ""):
        with pytest.raises(UserError, match="is not of the form OLD=NEW"):
            replacement(text)


def test_equal_records_have_one_name():
    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'
    assert key_of({"b": 1, "a": 2}) == key_of({"a": 2, "b": 1}) != key_of({"a": 2, "b": 2})
    assert len(key_of({"prompt": "\ud800"})) == 16
