"""The report's sentences: singular and plural, caveats, augmentations, and how to repeat the run."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from safelight.options.parsing import parse_with_config
from safelight.text import counted
from safelight.trainer.report.build import build_report, render
from safelight.trainer.report.run_reader import read_run_folder
from tests.trainer.report.charts import drawn_charts


@pytest.fixture
def small_run(tmp_path: Path, write_run) -> Path:
    """A complete run of three epochs that a test may change."""
    return write_run(tmp_path / "run", num_epochs=3, edge_px=48, prompts=("a boat", "a fox"), num_examples=1)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def set_config(run: Path, old: str, new: str) -> None:
    text = (run / "config.toml").read_text()
    assert text.count(old) == 1
    (run / "config.toml").write_text(text.replace(old, new))


def change_validations(run: Path, change) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [change(row) if row["kind"] == "validation" else row for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(run: Path) -> str:
    return re.sub(r"<[^>]*>", "", render(read_run_folder(run)).partition("<body>")[2].partition("<script>")[0])


@pytest.mark.parametrize(("count", "text"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (1200, "1,200 steps")])
def test_counted(count: int, text: str) -> None:
    assert counted(count, "step") == text


def test_plurals_follow_the_sound():
    assert [counted(2, name) for name in ("epoch", "micro-batch", "process")] == [
        "2 epochs",
        "2 micro-batches",
        "2 processes",
    ]


def test_counts_of_one_are_singular(small_run: Path) -> None:
    row = {"width": 64, "height": 64, "num_train": 1, "num_validation": 0}
    rewrite(
        small_run / "data.json",
        num_photos=1,
        num_train=1,
        num_captions=1,
        num_validation=0,
        buckets=[{**row, "width": 64 + i} for i in range(41)],
    )
    rewrite(small_run / "environment.json", cpu="A CPU 1 threads, 1 cores, 1 threads used")
    rewrite(small_run / "scores.json", num_samples=1)
    change_validations(small_run, lambda row: {**row, "num_images": 1})
    rewrite(small_run / "compare" / "index.json", num_steps=1)
    for index in small_run.glob("samples/*/index.json"):
        rewrite(index, images=[{**row, "num_steps": 1} for row in json.loads(index.read_text())["images"]])
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "train")
    kept = [line for line in lines if line["kind"] == "validation" and line["step"] == 0]
    (small_run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*kept, {**first, "step": 1, "epoch": 1.0, "loss": None}])
    )
    text = words(small_run)
    nouns = (
        "photographs|captions|images|steps|epochs|pairs|buckets|sizes|files|lines|events|cores|threads|variants|bands"
    )
    assert not re.search(rf"(?<![\d.,])1 (?:\w+ )?(?:{nouns})\b", text)
    for wanted in (
        "1 core, 1 thread used",
        "1 photograph from",
        "1 caption.",
        "1 logged step had no",
        "1 generated image",
        "1 more size is listed in",
        "cfg 7.5, 1 step",
    ):
        assert wanted in text, wanted


@pytest.mark.parametrize(
    ("crop", "flip", "said"),
    [
        ("0.02", "0.5", "used in 4 variants (crop, flip)."),
        ("0.02", "0.0", "used in 4 variants (crop)."),
        ("0.0", "0.5", "used in 4 variants (flip)."),
        ("0.0", "0.0", "used in 4 variants, all identical because data.crop_jitter and data.flip_p are 0."),
    ],
)
def test_only_the_augmentation_that_is_on_is_named(small_run: Path, crop: str, flip: str, said: str) -> None:
    set_config(small_run, "crop_jitter = 0.05", f"crop_jitter = {crop}")
    set_config(small_run, "flip_p = 0.5", f"flip_p = {flip}")
    assert said in words(small_run)


def test_a_dataset_is_named_in_quotes(small_run: Path) -> None:
    rewrite(small_run / "data.json", dataset="with spaces")
    assert "496 photographs from “with spaces”: 446 for training" in words(small_run)


def test_it_is_repeated_from_its_own_settings(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(small_run / "environment.json", command="safelight train private.toml --resume")
    html = build_report(small_run).read_text()
    [block] = re.findall(r'id="environment".*?<pre><code>(.*?)</code></pre>', html, re.DOTALL)
    checkout, command = block.splitlines()
    assert checkout == "git checkout 7fb3adc5e0"
    assert "--resume" not in block
    assert "private" not in block
    # the command line takes it, standing in the run's own folder
    monkeypatch.chdir(small_run)
    program, name, *argv = shlex.split(command)
    assert (program, name) == ("safelight", "train")
    arguments, config = parse_with_config(argv, "train", "")
    assert not arguments.resume
    assert (config.run.dir, config.data.path) == ("runs/again", "DATASET")
    assert config.run.seed == tomllib.loads((small_run / "config.toml").read_text())["run"]["seed"]
    text = words(small_run)
    assert "replace DATASET by the dataset folder that safelight prepare wrote (for this run, “datasets/unspl" in text
    assert "started withsafelight train private.toml --resume" in text


def test_it_is_repeated_in_as_many_processes(small_run: Path) -> None:
    rewrite(small_run / "environment.json", command="safelight train private.toml --gpus 2", processes="2")
    assert "safelight train config.toml --run.dir runs/again --data.path DATASET --gpus 2" in words(small_run)


def test_a_prompt_that_is_cut_says_so(small_run: Path) -> None:
    assert "cut after" not in words(small_run)
    compared = small_run / "compare" / "index.json"
    rows = json.loads(compared.read_text())["rows"]
    rewrite(compared, rows=[{**rows[0], "cut_after": "...of the rows"}, rows[1]])
    for index in small_run.glob("samples/*/index.json"):
        rows = json.loads(index.read_text())["images"]
        rewrite(index, images=[{**rows[0], "cut_after": "...of the images"}, {**rows[1], "cut_after": 3}])
    text = words(small_run)
    assert text.count("(cut after “...of the rows”)") == 1
    assert text.count("(cut after “...of the images”)") == 1
    assert text.count("cut after") == 2


@pytest.mark.parametrize(
    ("num", "said"), [(1, ""), (2, "2 held-out images"), (9, "9 held-out images"), (10, ""), (0, "")]
)
def test_percentages_of_few_photographs_have_a_caveat(small_run: Path, num: int, said: str) -> None:
    rewrite(small_run / "data.json", num_validation=0)
    change_validations(small_run, lambda row: {**row, "num_images": num})
    text = words(small_run)
    assert (f"Percentages are based on only {said}: another split may" in text) is bool(said)
    assert ("Percentages are based" in text) is bool(said)


def test_a_band_that_got_worse_is_named(small_run: Path) -> None:
    def bands(*at_the_end: float):
        def change(row: dict) -> dict:
            at_start = [0.4, 0.3, 0.2, 0.1]
            first, held_out = row["step"] == 0, row["split"] == "held_out"
            loss = {} if not held_out else {"loss": 0.2 if first else 0.1}
            return {**row, **loss, "loss_by_timestep": at_start if first else list(at_the_end)}

        return change

    def section() -> str:
        html = render(read_run_folder(small_run))
        return html.partition('id="timesteps"')[2].partition("</section>")[0]

    change_validations(small_run, bands(0.3, 0.2, 0.1, 0.05))
    better = section()
    assert "higher than at step 0" not in better
    change_validations(small_run, bands(0.3, 0.2, 0.1, 0.107))
    worse = section()
    assert "loss is higher than at step 0 in 1 timestep band: 75–100 % (+7.0 %)." in worse
    by_band, change = drawn_charts(worse)
    assert [curve["y"] for curve in by_band["curves"]] == [[0.4, 0.3, 0.2, 0.1], [0.3, 0.2, 0.1, 0.107]]
    assert by_band["ticks"] == ["0–25", "25–50", "50–75", "75–100"]
    assert [(curve["name"], curve["y"]) for curve in change["curves"]] == [
        ("0–25 %", [0, -25]),
        ("25–50 %", [0, -33.3333]),
        ("50–75 %", [0, -50]),
        ("75–100 %", [0, 7]),
    ]


def test_a_moving_average_is_named_where_it_is_shown(small_run: Path) -> None:
    assert "moving average" not in words(small_run)
    set_config(small_run, "batch_size = 8\n", "batch_size = 8\nema_decay = 0.999\n")
    html = render(read_run_folder(small_run))
    average = "the moving average of the weights (train.ema_decay 0.999)."
    for name, said in (
        ("learned", "The checkpoints&#x27; pictures use"),
        ("samples", "All but the base model&#x27;s use"),
        ("loss", "After step 0, validation measures"),
        ("timesteps", "After step 0, validation measures"),
    ):
        section = re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL) or re.search(
            rf'id="{name}".*?(?=id="(?:samples|loss|timesteps|schedule)")', html, re.DOTALL
        )
        assert f"{said} {average}" in section[0], name


@pytest.mark.parametrize(
    ("counts", "weight", "wanted"),
    [
        ((0, 0), 0.0, ""),
        (
            (1, 1),
            0.0,
            "1 training photograph has a loss mask, outside of which nothing is learned. 1 training photograph "
            "has its own loss scale.",
        ),
        (
            (3, 2),
            0.25,
            "3 training photographs have loss masks, outside of which errors weigh 0.25. 2 training "
            "photographs have their own loss scale.",
        ),
    ],
)
def test_masks_and_loss_scales_are_counted(
    small_run: Path, counts: tuple[int, int], weight: float, wanted: str
) -> None:
    rewrite(small_run / "data.json", num_masks=counts[0], num_loss_scales=counts[1])
    config = (small_run / "config.toml").read_text()
    (small_run / "config.toml").write_text(f"{config}\n[loss]\nmask_weight = {weight}\n")
    text = words(small_run)
    assert wanted in text
    if not wanted:
        assert "loss mask" not in text


def test_captions_say_where_they_came_from_and_how_long_they_are(small_run: Path) -> None:
    rewrite(
        small_run / "data.json",
        caption_sources=[
            {"source": "captions.jsonl", "captioner": "", "num": 300},
            {"source": "BLIP", "captioner": '{"model": "blip"}', "num": 196},
            {"source": "x", "num": "many"},
        ],
        length_note="captions have 3 to 20 tokens",
    )
    text = words(small_run)
    assert "Captions: 300 from captions.jsonl; 196 from BLIP. Captions have 3 to 20 tokens." in text


def test_changed_settings_stand_before_all_of_them(small_run: Path) -> None:
    set_config(small_run, "[run]\n", '[run]\ntitle = "Foxes"\nnotes = "one\\ntwo"\n')
    html = render(read_run_folder(small_run))
    assert '<h1 dir="auto">Foxes</h1>' in html
    assert '<div class="author" dir="auto">one\ntwo</div>' in html
    section = html.partition('id="parameters"')[2].partition("</section><section id=")[0]
    changed, _, everything = section.partition("All settings, and the model as loaded")
    assert 'batch_size</dt><dd>8<span class="meta">default 4</span>' in changed
    assert "<dt>max_grad_norm</dt>" not in changed
    assert "<dt>max_grad_norm</dt>" in everything
    # what stands at the top of the page
    assert "<dt>title</dt>" not in changed


def test_planned_memory_stands_beside_what_was_measured(small_run: Path) -> None:
    assert "planned before the run" not in words(small_run)
    rewrite(small_run / "environment.json", memory_plan={"needed": 12 * 2**30})
    assert "GPU memory: 12.00 GiB planned before the run, at most 11.30 GiB measured (−5.8 %)." in words(small_run)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("", "trained the whole UNet"),
        ('[adapter]\nkind = "lora"\nrank = 8\ntarget = ["attention"]\n', "trained a LoRA of rank 8 on attention"),
        (
            '[adapter]\nkind = "embedding"\n[embedding]\nword = "hen"\nvectors = 1\n',
            "trained the word hen with 1 vector",
        ),
        ('[adapter]\nkind = 3\nrank = "x"\n', "trained the whole UNet"),
    ],
)
def test_the_header_says_what_was_trained(small_run: Path, settings: str, told: str) -> None:
    (small_run / "config.toml").write_text(f"{(small_run / 'config.toml').read_text()}\n{settings}")
    assert f"{told} · from" in re.sub(r"\s+", " ", words(small_run))


@pytest.mark.parametrize(
    ("device", "told"), [("CPU", "2 processes on the CPU"), ("NVIDIA A100", "2 processes on one NVIDIA A100 each")]
)
def test_the_header_says_how_many_processes_trained(small_run: Path, device: str, told: str) -> None:
    rewrite(small_run / "environment.json", device=device, device_name="", processes="2")
    assert told in re.sub(r"\s+", " ", words(small_run))


def test_what_has_no_effect_is_not_among_the_changes(small_run: Path) -> None:
    text = (small_run / "config.toml").read_text()
    changed = {}
    for kind in ("none", "lora"):
        (small_run / "config.toml").write_text(f'{text}\n[adapter]\nkind = "{kind}"\nbase = "nf4"\n')
        page = words(small_run)
        changed[kind] = page.partition("Changed from the defaults")[2].partition("All settings")[0]
        assert ("--layout kohya" in page) == (kind == "lora" and "To use it" in page)
    assert "nf4" in changed["lora"]
    assert "nf4" not in changed["none"]
