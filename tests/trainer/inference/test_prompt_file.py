"""Prompt files: ours, EveryDream2's and kohya's, and what is refused."""

from __future__ import annotations

import json
import random

import pytest

from safelight.errors import UserError
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.prompt_file import (
    MAX_PICTURES,
    SamplePrompt,
    largest_size,
    pictures_of,
    prompts_of,
    read_prompt_file,
    record_of,
    recorded_prompts,
)
from tests.trainer.damaged_text import replaced


def read(folder, name: str, text: str, side: int = 512):
    (folder / name).write_text(text, encoding="utf-8")
    return read_prompt_file(folder / name, side)


def values(prompt: SamplePrompt) -> dict:
    return prompt.model_dump(exclude_defaults=True)


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    found = read(tmp_path, "p.txt", "\ufeffa red barn\n\n# no prompt\n  a hen, snow  \r\nété\n")
    assert [values(prompt) for prompt in found.prompts] == [{"prompt": t} for t in ("a red barn", "a hen, snow", "été")]


def test_kohyas_options_are_read(tmp_path):
    line = "a barn, (snow:1.2) --n blurry, dark --w 640 --h 768 --d 42 --l 7.5 --s 28 --ss k_euler_a"
    (prompt,) = read(tmp_path, "p.txt", line).prompts
    assert values(prompt) == {
        "prompt": "a barn, (snow:1.2)",
        "negative_prompt": "blurry, dark",
        "width": 640,
        "height": 768,
        "seed": 42,
        "cfg": 7.5,
        "steps": 28,
        "sampler": "euler-a",
    }
    # several guidance scales, which kohya has not; a negative prompt that is empty on purpose
    (prompt,) = read(tmp_path, "q.txt", "a hen --l 3,5 7 --n  --S 4").prompts
    assert (prompt.cfgs, prompt.negative_prompt, prompt.steps) == ((3, 5, 7), "", 4)


def test_kohyas_tables_are_read(tmp_path):
    toml = """
        [prompt]
        width = 512
        height = 640
        scale = 7
        sample_steps = 20
        negative_prompt = "blurry"
        [[prompt.subset]]
        prompt = "a barn"
        [[prompt.subset]]
        prompt = "a hen"
        seed = 3
        scale = 4
        sample_sampler = "dpmsolver++"
    """
    first, second = read(tmp_path, "p.toml", toml).prompts
    shared = {"width": 512, "height": 640, "steps": 20, "negative_prompt": "blurry"}
    assert values(first) == {**shared, "prompt": "a barn", "cfg": 7}
    assert values(second) == {**shared, "prompt": "a hen", "cfg": 4, "seed": 3, "sampler": "dpm++"}
    rows = [{"prompt": "a barn", "sample_steps": 9, "scale": 2}, {"prompt": "a hen", "sample_sampler": "euler_a"}]
    first, second = read(tmp_path, "p.json", json.dumps(rows)).prompts
    assert (first.steps, first.cfg, second.sampler) == (9, 2, "euler-a")


def test_everydreams_file_is_read(tmp_path):
    content = {
        "batch_size": 3,
        "seed": 555,
        "cfgs": [7, 4, 1.01],
        "scheduler": "dpm++_2m_k",
        "num_inference_steps": 15,
        "show_progress_bars": True,
        "generate_samples_every_n_steps": 200,
        "generate_pretrain_samples": False,
        "samples": [
            {"prompt": "ted bennet and a man", "negative_prompt": "distorted", "aspect_ratio": 1.77778},
            {"prompt": "a barn", "size": [640, 384], "seed": -1},
            {"random_caption": True},
        ],
    }
    found = read(tmp_path, "p.json", json.dumps(content))
    shared = {"seed": 555, "cfg": [7, 4, 1.01], "sampler": "dpm++-karras", "steps": 15}
    assert [values(prompt) for prompt in found.prompts] == [
        {**shared, "prompt": "ted bennet and a man", "negative_prompt": "distorted", "width": 704, "height": 384},
        # -1, their new seed each time, is the run's
        {**{k: v for k, v in shared.items() if k != "seed"}, "prompt": "a barn", "width": 640, "height": 384},
        {**shared, "caption": True},
    ]
    in_vain = {"batch_size", "show_progress_bars", "generate_samples_every_n_steps", "generate_pretrain_samples"}
    assert {note.partition(": ")[2].partition(" ")[0] for note in found.notes} == in_vain


def test_a_list_of_texts_is_enough(tmp_path):
    assert [p.prompt for p in read(tmp_path, "p.json", '["a", "b"]').prompts] == ["a", "b"]
    assert [p.prompt for p in read(tmp_path, "p.toml", 'prompts = ["a", "b"]\nsteps = 3').prompts] == ["a", "b"]
    (prompt,) = read(tmp_path, "q.toml", '[[prompts]]\nprompt = "a"\ncfg = [3, 7]\nsampler = "UniPC"').prompts
    assert (prompt.cfgs, prompt.sampler) == ((3, 7), "unipc")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "has no prompt; write one a line"),
        ("p.txt", "a\nb --q 3", "line 2: --q is not an option; use --n, --w"),
        ("p.txt", "b --w x", "line 1: width 'x' is not a number"),
        ("p.txt", "b --s 0", "line 1: steps = '0': input should be greater than or equal to 1"),
        ("p.txt", "b --s 1001", "line 1: steps = '1001': input should be less than or equal to 1000"),
        ("p.txt", "b --d -4", "line 1: seed = -4: input should be greater than or equal to 0"),
        ("p.txt", "b --l 101", "line 1: cfg = [101.0]: expected 0 to 100"),
        ("p.txt", "b --w 5000", "line 1: width = '5000': expected at most 4096"),
        ("p.txt", "b --ss plms", "line 1: sampler 'plms' is unknown; use ddim, dpm++"),
        ("p.json", "{", "it is not valid JSON"),
        ("p.json", "[" * 9999, "it is not valid JSON"),
        ("p.json", "3", "its prompts are a number, not a list"),
        ("p.json", "{}", "it has no list of prompts"),
        ("p.json", "[3]", "prompt 1 is a number, not a text or a table"),
        ("p.json", '[{"prompt": "a", "lora": 1}]', "prompt 1: lora is not a setting of a prompt; use prompt, "),
        ("p.json", '[{"prompt": 7}]', "prompt 1: prompt = 7: input should be a valid string"),
        ("p.json", '[{"prompt": "a", "size": [1]}]', "prompt 1: size [1] is not [width, height]"),
        ("p.json", '[{"prompt": "a", "aspect_ratio": 99}]', "prompt 1: aspect_ratio 99 is not a number from 0.1 to 10"),
        ("p.json", '{"prompts": ["a"], "steps": true}', "prompt 1: steps = True: expected a number or text"),
        ("p.json", json.dumps(["a"] * (MAX_PICTURES + 1)), "it has 513 prompts, more than 512"),
        ("p.toml", "x = ", "it is not valid TOML"),
        ("p.csv", "a", "is not a .txt, .json or .toml file"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, name, text, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, name, text)
    assert str(tmp_path / name) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["p.txt", "p.json"])
def test_all_bad_prompts_of_a_file_are_named_in_one_line(tmp_path, name):
    def text(num: int) -> str:
        if name == "p.txt":
            return "a hen\n" + "a barn --w 7000\na hen --q 1\n" * num
        rows = [{"prompt": "a barn", "width": 7000}, {"prompt": "a hen", "q": 1}] * num
        return json.dumps(["a hen", *rows])

    place = "line" if name == "p.txt" else "prompt"
    with pytest.raises(UserError) as error:
        read(tmp_path, name, text(1))
    first = f"{tmp_path / name}: {place} 2: width = "
    assert str(error.value).startswith(first)
    assert f"; {place} 3: {'--q' if name == 'p.txt' else 'q'} is not " in str(error.value)
    assert "more such" not in str(error.value)
    with pytest.raises(UserError) as error:
        read(tmp_path, name, text(4))
    assert str(error.value).endswith("; and 3 more such mistakes")
    assert str(error.value).count("; " + place) == 4
    assert "\n" not in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"p\.txt: No such file or directory; check the path"):
        read_prompt_file(tmp_path / "p.txt", 512)
    (tmp_path / "p.txt").mkdir()
    with pytest.raises(UserError, match="is not a regular file but a folder"):
        read_prompt_file(tmp_path / "p.txt", 512)
    (tmp_path / "big.txt").write_bytes(b"a\n" * 2**20)
    with pytest.raises(UserError, match="over the limit of 1,048,576"):
        read_prompt_file(tmp_path / "big.txt", 512)
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_prompt_file(tmp_path / "latin.txt", 512)


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path):
    rng = random.Random(4)
    row = {"prompt": "a", "seed": 3, "cfg": [3, 7.5], "size": [512, 640], "sampler": "euler", "steps": 9}
    for _ in range(400):
        (tmp_path / "p.json").write_bytes(replaced(json.dumps({"samples": [row, "b"], "cfgs": [3]}), rng))
        try:
            found = read_prompt_file(tmp_path / "p.json", 512)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert found.prompts


def config_of(folder, **sample):
    return parse_config(
        {"run": {"dir": str(folder / "run"), "seed": 5}, "data": {"resolution": 64}, "sample": sample}, "t"
    )


def test_each_prompt_is_drawn_with_each_cfg_from_the_same_noise(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb --d 77 --l 2 --n dark --s 3 --w 32 --ss ddim\n")
    config = config_of(tmp_path, prompts_file=str(tmp_path / "p.txt"), cfg=[3, 7], negative_prompt="blurry", steps=9)
    pictures = pictures_of(config, prompts_of(config), [], 8, step=4)
    told = [
        (p.number, p.stem, r.prompt, r.negative, r.place, r.settings.seed, r.settings.cfg, r.settings.steps)
        for p in pictures
        for r in [p.request]
    ]
    assert told == [
        (0, "", "a", "blurry", 0, 5, 3, 9),
        (0, "-cfg7", "a", "blurry", 0, 5, 7, 9),
        # its own seed alone keys its noise, wherever it stands
        (1, "", "b", "dark", 0, 77, 2, 3),
    ]
    assert (pictures[2].request.settings.width, pictures[2].request.settings.sampler) == (32, "ddim")
    assert {p.request.weights.step for p in pictures} == {4}
    assert largest_size(config) == (64, 64)
    with pytest.raises(UserError, match="width 36 is not a multiple of 8"):
        pictures_of(config, [SamplePrompt(prompt="a", width=36)], [], 8)


def test_captions_stand_for_prompts_that_are_captions(tmp_path):
    config = config_of(tmp_path)
    prompts = [SamplePrompt(caption=True), SamplePrompt(prompt="a"), SamplePrompt(caption=True)]
    texts = [picture.request.prompt for picture in pictures_of(config, prompts, ["x", "y"], 8)]
    assert texts == ["x", "a", "y"]
    assert [picture.request.prompt for picture in pictures_of(config, prompts, [], 8)] == ["a"]


def test_what_was_read_last_stands_for_a_file_that_is_broken_now(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a --d 3 --l 4,5\nb\n")
    config = config_of(tmp_path, prompts_file=str(file))
    found = read_prompt_file(file, 64)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prompts.json").write_text(json.dumps(record_of(str(file), found)))
    file.write_text("a --q")
    file.write_text("a --q 3")
    assert prompts_of(config) == found.prompts
    file.unlink()
    assert prompts_of(config) == found.prompts
    for damage in ("{", "[]", '{"file": 3}', json.dumps({**record_of(str(file), found), "prompts": [{"seed": -2}]})):
        (tmp_path / "run" / "prompts.json").write_text(damage)
        assert recorded_prompts(tmp_path / "run", str(file)) is None
        with pytest.raises(UserError, match="No such file"):
            prompts_of(config)
