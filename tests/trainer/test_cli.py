"""A run from `init` to `report` by commands alone, their output, and training in a separate process."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from safelight.trainer.checkpoint.files import list_checkpoints
from safelight.trainer.config.presets import preset
from safelight.trainer.config.toml import load_config
from safelight.trainer.inference import after_training
from safelight.trainer.report.comparison import Comparison
from tests.called import Called, call
from tests.small_base import small_base

NUM_STEPS = 5
SMALL = (
    f"--train.max-steps {NUM_STEPS} --train.batch-size 4 --log.every-steps 2 --validate.max-images 4 "
    "--sample.steps 2 --sample.num-prompts 2 --data.variants 1"
).split()

QUICK = "--sample.every-epochs 0 --validate.every-epochs 0 --save.every-epochs 0 --log.every-steps 1".split()

LONG = "a red circle, " * 100 + "and the end"


@dataclass
class Journey:
    """The folder of a run made by commands alone, and the output of each command."""

    root: Path
    called: dict[str, Called]

    @property
    def run(self) -> Path:
        return self.root / "run"


@pytest.fixture(scope="module")
def journey(tiny_dataset, tmp_path_factory) -> Journey:
    root = tmp_path_factory.mktemp("journey")
    photos = shutil.copytree(tiny_dataset.parent / "photos", root / "photos")
    shutil.copy(photos / "000.png", photos / "again.png")
    (photos / "broken.png").write_bytes(b"this is no picture")
    toml = root / "run.toml"
    small = [*SMALL, "--run.dir", root / "run", "--data.path", root / "dataset"]
    called = {}

    def go(name: str, *argv: object) -> None:
        called[name] = call(*argv)
        assert called[name].status == 0, called[name].err

    go("init", "init", "tiny", "-o", toml)
    go("prepare", "prepare", photos, "-o", root / "dataset", "--json")
    go("prepare again", "prepare", photos, "-o", root / "dataset")
    go("cache", "cache", toml, *small, "--json")
    go("cache again", "cache", toml, *small)
    go("plan", "plan", toml, *small, "--json")
    go("train", "train", toml, *small)
    go("sample", "sample", root / "run", "--prompt", "a red circle", "a blue star", "--seed", 3)
    go(
        "sample again",
        "sample",
        root / "run",
        "--prompt",
        "a red circle",
        "a blue star",
        "--seed",
        3,
        "-o",
        root / "again",
    )
    go("sample alone", "sample", root / "run", "--prompt", "a red circle", "--seed", 3, "-o", root / "alone")
    go("sample base", "sample", root / "run", "--prompt", "a red circle", "--seed", 3, "--checkpoint", "base")
    go("sample wide", "sample", root / "run", "--prompt", "x", "--width", 80, "--height", 48, "-o", root / "wide")
    go("sample cut", "sample", root / "run", "--prompt", "x", LONG, "--negative-prompt", LONG, "-o", root / "cut")
    go("sample file", "sample", root / "run", "--prompt", "a red circle", "--seed", 3, "-o", root / "circle.png")
    go("compare", "compare", root / "run", "--num", 2)
    go("export", "export", root / "run", "-o", root / "mine.safetensors", "--title", "Mine")
    go("export folder", "export", root / "run", "-o", root / "mine", "--dtype", "bf16")
    (root / "run" / "report.html").unlink()
    go("report", "report", root / "run")
    return Journey(root, called)


def test_init_writes_the_preset_and_what_to_do_next(journey):
    assert load_config(journey.root / "run.toml") == preset("tiny")
    assert "safelight prepare PHOTOS" in journey.called["init"].out
    assert "safelight train" in journey.called["init"].out


def test_init_leaves_a_file_that_is_there_alone(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("mine")
    refused = call("init", "tiny", "-o", path)
    assert refused.status == 2
    assert (
        refused.err
        == f"safelight init: {path} already exists; choose another file with -o, or add --force to overwrite it\n"
    )
    assert path.read_text() == "mine"
    assert call("init", "sd15", "-o", path, "--force").status == 0
    assert load_config(path) == preset("sd15")


def test_prepare_counts_and_names_what_it_left_out(journey):
    printed = json.loads(journey.called["prepare"].out)
    assert (printed["photos"], printed["duplicates"], printed["copied"]) == (24, 1, 24)
    assert [Path(row["path"]).name for row in printed["rejected"]] == ["again.png", "broken.png"]
    again = journey.called["prepare again"]
    assert again.out.startswith(f"24 photographs in {journey.root / 'dataset'} (24 copied unchanged, 0 shrunk, ")
    assert f"left out {journey.root / 'photos' / 'broken.png'}: " in again.err


def test_cache_makes_what_is_missing_once(journey):
    printed = json.loads(journey.called["cache"].out)
    assert printed["made"] == printed["rows"] > 24
    assert sum(row["num_train"] for row in printed["buckets"]) == 21
    assert sum(row["num_validation"] for row in printed["buckets"]) == 3
    assert f"0 rows encoded, {printed['rows']} in the cache" in journey.called["cache again"].out
    row = next(row for row in printed["buckets"] if (row["width"], row["height"]) == (64, 64))
    line = next(line for line in journey.called["cache again"].out.splitlines() if line.startswith("64 x 64"))
    assert line.split()[3:5] == [str(row["num_train"]), str(row["num_validation"])]


@pytest.mark.parametrize("command", ["prepare", "cache", "plan"])
def test_names_in_json_are_lower_case(journey, command):
    names = re.findall(r'"([^"]+)":', journey.called[command].out)
    assert names
    assert all(re.fullmatch("[a-z0-9_]+", name) for name in names)


def test_plan_knows_the_dataset(journey):
    printed = json.loads(journey.called["plan"].out)
    assert printed["dataset"]["photographs"] == 24
    assert printed["bytes"]["weights"] == 4 * printed["unet_parameters"]


def test_train_leaves_a_whole_run(journey):
    run = journey.run
    config = load_config(run / "config.toml")
    assert (config.train.max_steps, config.train.batch_size) == (NUM_STEPS, 4)
    assert config.run.dir == str(run)
    assert list_checkpoints(run) == [NUM_STEPS]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 5]
    assert {row["step"] for row in rows if row["kind"] == "validation"} == {0, NUM_STEPS}
    lines = [line for line in journey.called["train"].err.splitlines() if "held-out loss" in line]
    losses = [f"{row['loss']:.4f}" for row in rows if row["kind"] == "validation"]
    assert [re.findall(r"held-out loss ([\d.]+).*photographs ([\d.]+)$", line) for line in lines] == [
        [(losses[0], losses[1])],
        [(losses[2], losses[3])],
    ]
    for step in (0, NUM_STEPS):
        folder = run / "samples" / f"step-{step:08d}"
        index = json.loads((folder / "index.json").read_text())
        assert len(index["images"]) == 2
        for image in index["images"]:
            assert Image.open(folder / image["file"]).size == (64, 64)
    for name in ("environment.json", "model.json", "data.json", "split.json"):
        assert json.loads((run / name).read_text())
    assert list((run / "tensorboard").glob("events.*"))
    assert journey.called["train"].out.splitlines()[0].startswith(f"trained {NUM_STEPS} steps; report: {run}")
    assert f"safelight compare {run}" in journey.called["train"].out


def test_each_command_says_what_comes_next(journey):
    def output_of(name: str) -> str:
        return journey.called[name].out + journey.called[name].err

    run = journey.run
    for name, words in {
        "init": "next: safelight prepare",
        "prepare again": "then safelight train run.toml --data.path",
        "cache again": f"next: safelight train {journey.root / 'run.toml'}",
        "train": f"next: safelight compare {run}",
        "compare": f"safelight export {run} -o run.safetensors",
        "export folder": f"next: in Python: DiffusionPipeline.from_pretrained('{journey.root / 'mine'}')",
        "report": "next: open it in a browser",
    }.items():
        assert words in output_of(name), name
    # advice goes to stderr: other programs read stdout
    assert journey.called["report"].out == f"{run / 'report.html'}\n"
    train = journey.called["train"].out.splitlines()[0]
    (best,) = re.findall(r"best held-out loss ([\d.]+) at step \d+$", train)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert best == f"{min(r['loss'] for r in rows if r.get('split') == 'held_out'):.4f}"


def test_captions_without_a_photograph_and_captions_all_the_same(tmp_path, tiny_dataset):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, path in enumerate(sorted((tiny_dataset.parent / "photos").glob("*.png"))[:3]):
        shutil.copy(path, photos / f"lake_{number}.png")
    rows = [{"file_name": f"gone{number}.png", "text": "x"} for number in range(7)]
    (photos / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    called = call("prepare", photos, "-o", tmp_path / "dataset")
    assert called.status == 0
    assert "3 photographs in" in called.out
    assert "0 left out, 7 caption rows)" in called.out
    assert "example of a caption from a file name: photos/lake_0.png is 'lake'" in called.out
    assert called.err.count("left out ") == 5
    assert "and 2 more caption rows; all are listed in" in called.err
    assert "note: the file names of 3 photographs give them all this caption; write IMG_1.txt" in called.err


def test_sample_gives_the_same_image_for_the_same_seed(journey):
    files = [Path(line) for line in journey.called["sample"].out.splitlines()]
    assert [path.parent for path in files] == [journey.run / "images"] * 2
    circle, star = (Image.open(path) for path in files)
    assert circle.size == star.size == (64, 64)
    assert circle.tobytes() != star.tobytes()
    again = journey.called["sample again"].out.splitlines()
    assert [Path(path).parent for path in again] == [journey.root / "again"] * 2
    assert [Image.open(path).tobytes() for path in again] == [circle.tobytes(), star.tobytes()]
    # the noise of an image does not depend on the batch; its rounding may
    (alone,) = journey.called["sample alone"].out.splitlines()
    assert np.abs(np.int16(Image.open(alone)) - np.int16(circle)).max() <= 2
    assert np.abs(np.int16(star) - np.int16(circle)).max() > 20
    (base,) = journey.called["sample base"].out.splitlines()
    assert Image.open(base).tobytes() != circle.tobytes()
    (wide,) = journey.called["sample wide"].out.splitlines()
    assert Image.open(wide).size == (80, 48)


def parameters(path: Path) -> str:
    return Image.open(path).text["parameters"]


def test_images_hold_what_they_were_drawn_with(journey):
    circle, star = (Path(line) for line in journey.called["sample"].out.splitlines())
    assert circle.name == f"step{NUM_STEPS}-seed3-000-a-red-circle.png"
    prompt, settings = parameters(star).split("\n")
    assert prompt == "a blue star"
    assert settings.startswith(
        "Steps: 2, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 4, Seed: 3, Size: 64x64, "
    )
    weights = journey.run / "checkpoints" / f"step-{NUM_STEPS:08d}" / "unet" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"Model hash: {digest[:10]}, Model: run step {NUM_STEPS}, " in settings
    (base,) = journey.called["sample base"].out.splitlines()
    assert Path(base).name == "base-seed3-000-a-red-circle.png"
    assert "Model hash" not in parameters(base)
    assert "Model: tiny, " in parameters(base)
    for folder in (journey.run / "compare", journey.run / "samples" / f"step-{NUM_STEPS:08d}"):
        # neither photographs nor contact sheets
        paths = list(folder.glob("[bs]*.png"))
        assert paths
        assert all(re.search(rf"(base|step{NUM_STEPS})-00[01]-\w", path.name) for path in paths)
        assert all("\nSteps: 2, Sampler: " in parameters(path) for path in paths)


def test_a_folder_of_images_has_a_page(journey):
    page = (journey.run / "images" / "index.html").read_text()
    assert f"open {journey.run / 'images' / 'index.html'} in a browser" in journey.called["sample base"].err
    # drawn by two calls: the base's column, and the checkpoint's
    assert re.findall(r'<th scope="col"><div>([^<]*)<', page) == ["base model", f"step {NUM_STEPS}"]
    assert page.count("<img") == 3
    assert (journey.run / "compare" / "index.html").read_text().count("<img") == 6


def test_prompts_that_are_cut_are_told(journey):
    line = journey.called["sample cut"].line("cut after")
    assert line.startswith("note: prompt 2 is cut after '...")
    assert ", the negative prompt after '..." in line
    assert line.endswith(": the text encoder reads 368 tokens")
    assert (journey.root / "cut" / "index.html").read_text().count("(cut after “") == 1
    assert "cut after" not in journey.called["sample"].err


def test_one_image_can_be_named(journey):
    assert journey.called["sample file"].out == f"{journey.root / 'circle.png'}\n"
    assert Image.open(journey.root / "circle.png").size == (64, 64)
    assert "open" not in journey.called["sample file"].err
    (journey.root / "a file").touch()
    for out, prompts, expected in (
        ("circle.png", ["x"], "circle.png already exists; name another image, or a folder, with -o"),
        ("new.png", ["x", "y"], "new.png is one image, and there are 2 to draw; name a folder with -o"),
        ("new.jpg", ["x"], "images are saved as .png, with their prompts inside"),
        ("a file", ["x"], "a file is a file; name a folder for the images, or one image NAME.png"),
    ):
        call("sample", journey.run, "--prompt", *prompts, "-o", journey.root / out).assert_refused("sample", expected)


def test_a_comparison_replaces_the_one_before(journey, tmp_path):
    run = shutil.copytree(journey.run, tmp_path / "run")
    for name in ("base-007.png", "trained-007-x.png", "step3-007-x.png", "mine.png", "base-x.png"):
        (run / "compare" / name).write_bytes(b"old")
    assert call("compare", run, "--num", 1).status == 0
    index = json.loads((run / "compare" / "index.json").read_text())
    (row,) = index["rows"]
    ours = {"index.json", "index.html", "contact-sheet.png", row["photo"], *row["images"].values()}
    # of the journey's second prompt, which a larger comparison would need again
    second = {path.name for path in (run / "compare").glob("*-001-*.png")}
    assert len(second) == 3
    assert {path.name for path in (run / "compare").iterdir()} == {*ours, *second, "mine.png", "base-x.png"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--checkpoint 7", "checkpoint '7' is not in"),
        ("--checkpoint newest", "checkpoint 'newest' is not in"),
        ("--width 63", "width 63 is not a multiple of 4; use 60 or 64"),
        ("--width -8", "width = -8: "),
        ("--steps 0", "steps = 0: "),
        ("--steps 2000", "steps = 2000: "),
        ("--cfg nan", "cfg = [nan]: "),
    ],
)
def test_sample_refuses_invalid_settings(journey, words, expected):
    refused = call("sample", journey.run, "--prompt", "x", *words.split())
    assert refused.status == 2
    assert refused.err.startswith("safelight sample: ")
    assert expected in refused.err
    assert refused.err.count("\n") == 1


def test_compare_samples_pairs_from_the_same_noise(journey):
    folder = journey.run / "compare"
    comparison = Comparison.model_validate_json((folder / "index.json").read_bytes())
    sampled = json.loads((journey.run / "samples" / f"step-{NUM_STEPS:08d}" / "index.json").read_text())
    assert [(model.step, model.epoch) for model in comparison.models] == [(0, 0), (NUM_STEPS, sampled["epoch"])]
    assert 0 < sampled["epoch"] < 1
    assert len(comparison.rows) == 2
    for row in comparison.rows:
        base, trained = (Image.open(folder / row.images[name]) for name in ("base", f"step-{NUM_STEPS}"))
        assert base.size == trained.size == (64, 64)
        assert base.tobytes() != trained.tobytes()
        assert row.held_out
        assert Image.open(folder / row.photo).size == (64, 64)
    assert f"2 rows of 2 models in {folder}" in journey.called["compare"].out


def test_training_ends_with_a_comparison_of_its_samples(journey):
    """What training sampled with the base and at the end is what the comparison shows; nothing is drawn twice."""
    line = journey.called["train"].line("compared 2 models on 2 prompts in ")
    assert re.fullmatch(r"compared 2 models on 2 prompts in \d+ s", line)
    assert "comparing base and trained" not in journey.called["train"].err
    assert "sampling" not in journey.called["compare"].err
    for place in (0, 1):
        for step, name in ((0, "base"), (NUM_STEPS, f"step{NUM_STEPS}")):
            (sample,) = (journey.run / "samples" / f"step-{step:08d}").glob(f"step{step}-00{place}-*.png")
            (compared,) = (journey.run / "compare").glob(f"{name}-00{place}-*.png")
            assert Image.open(sample).tobytes() == Image.open(compared).tobytes()


@pytest.mark.slow
def test_a_sample_is_the_picture_that_its_checkpoint_draws(journey, tmp_path):
    """So that it may stand for it: but for rounding, and cached embeddings in half precision."""
    run = shutil.copytree(journey.run, tmp_path / "run")
    before = {path.name: np.asarray(Image.open(path), np.int16) for path in (run / "compare").glob("[bs]*-00?-*.png")}
    for name in before:
        (run / "compare" / name).unlink()
    assert call("compare", run, "--num", 2).status == 0
    assert len(before) == 4
    for name, pixels in before.items():
        assert np.abs(np.asarray(Image.open(run / "compare" / name), np.int16) - pixels).max() <= 3


def test_ctrl_c_while_comparing_leaves_a_finished_run_and_says_how_to_go_on(journey, tmp_path, monkeypatch):
    run = shutil.copytree(journey.run, tmp_path / "run")
    (run / "report.html").unlink()

    def interrupted(run_dir, last_step, progress, say, world):
        os.kill(os.getpid(), signal.SIGINT)
        progress(1, 10)

    monkeypatch.setattr(after_training, "compare_after_training", interrupted)
    called = call("train", run / "config.toml", "--resume", "--train.max-steps", NUM_STEPS + 1, *QUICK)
    assert called.status == 130
    assert called.line("stopped comparing").endswith(f"this draws the rest: safelight compare {run}")
    assert called.out.startswith(f"trained {NUM_STEPS + 1} steps; report: {run / 'report.html'}")
    assert (run / "report.html").is_file()


def test_report_is_one_file(journey):
    assert journey.called["report"].out == f"{journey.run / 'report.html'}\n"
    text = (journey.run / "report.html").read_text()
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert str(NUM_STEPS) in text


def test_export_writes_either_form_and_says_where(journey):
    file, folder = journey.root / "mine.safetensors", journey.root / "mine"
    size = file.stat().st_size / 2**20
    assert journey.called["export"].out == f"wrote {file}: step {NUM_STEPS}, fp16, {size:.1f} MiB\n"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.title"] == "Mine"
        description = f"tiny (Stable Diffusion 1.x) fine-tuned with Safelight, {NUM_STEPS} steps"
        assert opened.metadata()["modelspec.description"] == description
    assert journey.called["export"].err.startswith("note: this UNet has a size that A1111 and ComfyUI do not support")
    assert journey.called["export folder"].out.startswith(f"wrote {folder}: step {NUM_STEPS}, bf16, ")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    refused = call("export", journey.run, "-o", file)
    assert (refused.status, refused.err) == (
        2,
        f"safelight export: {file} already exists; name another with -o, or add --force\n",
    )


def test_train_into_a_run_that_is_there_is_refused(journey):
    before = (journey.run / "metrics.jsonl").read_bytes()
    refused = call("train", journey.run / "config.toml")
    assert refused.status == 2
    assert refused.err == (
        f"safelight train: {journey.run} already holds a run (at step {NUM_STEPS}); "
        "add --resume, or name another --run.dir\n"
    )
    assert (journey.run / "metrics.jsonl").read_bytes() == before


OWN_LINES = [
    r"note: sample\.every_epochs 0: the run draws nothing; .*",
    r"captions \d+/\d+",
    r"latents \d+/\d+",
    r"\d+ photographs to train on, \d+ held out; \d+ steps(: train.max_steps \d+ ends the run| in) .*epochs?\b.*",
    r"note: .* buckets have fewer photographs than batch_size .*",
    r"note: \d+ photographs held out .* and never validated, .*",
    r"note: stage 2 is never reached: .*",
    r"attention on cpu, bfloat16: .* for head dim .*xformers has no CPU operator.*",
    r"training \d+/\d+(  [\d:]+ left)?  first step",
    r"training \d+/\d+  ([\d:]+ left  )?loss \d\.\d+  [\d.]+ img/s  \d+\.\d GiB",
    r"resumed at step \d+, epoch \d+",
    r"",
    r"stopping after this step; press Ctrl-C again to leave at once",
    r"saved at step \d+; continue with: safelight train .*/config.toml --resume",
]


def foreign_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if not any(re.fullmatch(own, line) for own in OWN_LINES)]


def start(*argv: object) -> subprocess.Popen:
    """Start a command as a user would, without environment variables that silence libraries."""
    quieting = ("TQDM", "TRANSFORMERS", "DIFFUSERS", "HF_", "TF_", "TORCH_", "PYTHONWARNINGS", "PYTEST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(quieting)}
    return subprocess.Popen(
        [sys.executable, "-W", "default", "-m", "safelight", *(str(word) for word in argv)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_ctrl_c_saves_resume_completes_and_libraries_print_nothing(journey):
    run = journey.root / "interrupted"
    options = ["--run.dir", run, "--data.path", journey.root / "dataset", "--model.precision", "bf16"]
    options += ["--model.base", small_base()]
    process = start("train", journey.root / "run.toml", *SMALL, *options, *QUICK, "--train.max-steps", 40)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("training "):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=300)
    err = "".join(lines) + err
    assert process.returncode == 130, err
    assert foreign_lines(err) == []
    assert out == ""
    (step,) = list_checkpoints(run)
    assert 0 < step < 40
    assert (
        err.splitlines()[-1] == f"saved at step {step}; continue with: safelight train {run / 'config.toml'} --resume"
    )

    more = step + 2
    process = start("train", run / "config.toml", "--resume", "--train.max-steps", more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert foreign_lines(err) == []
    assert out.splitlines()[0].startswith(f"trained {more} steps; report: ")
    assert list_checkpoints(run)[-1] == more
    assert not (run / "compare").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, more + 1))


def test_a_moved_run_resumes_from_another_folder(journey, tmp_path, monkeypatch):
    """A run's folder is the one that holds its config.toml, whatever run.dir in it says."""
    moved = shutil.copytree(journey.run, tmp_path / "moved")
    step = list_checkpoints(moved)[-1]
    monkeypatch.chdir(tmp_path)
    called = call("train", "moved/config.toml", "--resume", "--train.max-steps", step + 1)
    assert called.status == 0, called.err
    assert f"resumed at step {step}," in called.err
    assert list_checkpoints(moved)[-1] == step + 1
    assert list_checkpoints(journey.run)[-1] == step
    assert load_config(moved / "config.toml").run.dir == "moved"
