"""Nothing that a command prints can control the terminal, whatever names files, captions and settings have."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from safelight.output.show import json_text, print_table
from safelight.trainer.models.hub import delayed_bar
from safelight.trainer.run_log.terminal import Terminal
from tests.called import call
from tests.small_base import small_base

# retitles the window, then turns text red; an 8-bit form of the same; rich's markup; a character that moves the cursor;
# words that would look like ours on a line of their own
EVIL = "\x1b]0;PWNED\x07\x1b[31m \x9b31m [red]\x7f\nSPOOF"
# settings refuse control characters in paths, and allow what turns the direction of writing
EVIL_PATH = " \u202e[red]"


def hostile_characters(text: str) -> set[str]:
    return {char for char in text if not char.isprintable() and char != "\n"}


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> dict[str, str]:
    """What each command prints that meets evil names in its files: command -> stdout and stderr."""
    root = tmp_path_factory.mktemp("evil")
    place = root / f"in {EVIL_PATH}"
    photos, dataset, run = place / "photos", place / f"ds{EVIL_PATH}", place / f"run{EVIL_PATH}"
    photos.mkdir(parents=True)
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 20, 90)).save(photos / f"{number}{EVIL}.png")
        (photos / f"{number}{EVIL}.txt").write_text(f"a caption {number} {EVIL}")
    Image.new("RGB", (64, 64)).save(photos / f"IMG_1{EVIL}.png")
    (photos / f"broken{EVIL}.png").write_bytes(b"no picture")
    (photos / "captions.jsonl").write_text(json.dumps({"file_name": f"gone{EVIL}.png", "text": EVIL}))
    shutil.copytree(small_base(), place / f"base{EVIL_PATH}")
    settings = {
        "run": {"dir": str(run), "device": "cpu"},
        "model": {"base": str(place / f"base{EVIL_PATH}")},
        "data": {"path": str(dataset), "resolution": 64, "caption_suffix": EVIL},
        "train": {"batch_size": 4, "max_steps": 1},
        "sample": {"prompts": [f"a cat {EVIL} {'word ' * 90}"], "negative_prompt": EVIL, "steps": 1},
        "validate": {"max_images": 1},
        "log": {"tensorboard": False},
    }
    toml = place / f"run{EVIL}.toml"
    toml.write_text(
        "\n".join(
            f"[{table}]\n" + "\n".join(f"{name} = {json_text(value)}" for name, value in values.items())
            for table, values in settings.items()
        )
    )
    results = place / f"results{EVIL}.jsonl"
    line = {"bench": f"step{EVIL}", "config": {"recipe": EVIL}, "figures": {"images_per_s": 1.0}}
    results.write_text(json.dumps({**line, "machine": {"device": EVIL}, "note": EVIL}) + "\n")
    printed: dict[str, str] = {}

    def go(*words: object, status: int = 0, name: str = "") -> None:
        called = call(*words)
        assert called.status == status, called.err
        printed[name or str(words[0])] = called.out + called.err

    go("init", "tiny", "-o", place / f"new{EVIL}.toml")
    go("prepare", photos, "-o", dataset)
    go("prepare", photos, "-o", dataset, "--json", name="prepare --json")
    go("cache", toml)
    go("plan", toml)
    go("plan", toml, "--json", name="plan --json")
    go("plan", toml, "--help", name="plan --help")
    go("train", toml)
    go("train", toml, status=2, name="train again")
    go("train", run, "--resume", "--train.max-steps", 1, name="train --resume")
    go("sample", run, "--prompt", EVIL, "--steps", 1)
    go("compare", run, "--num", 1)
    go("grid", run, "--x", "cfg=1", "--y", "prompt", "--prompt", EVIL, "--steps", 1)
    go("export", run, "-o", place / f"out{EVIL}.safetensors")
    go("export", run, "-o", place / f"out{EVIL}", name="export to a folder")
    go("report", run)
    go("bench", "compare", results, results)
    go("bench", "compare", results, results, "--json", name="bench --json")
    return printed


def test_no_command_sends_a_control_character(output):
    assert {name: hostile_characters(text) for name, text in output.items() if hostile_characters(text)} == {}
    assert [line for text in output.values() for line in text.splitlines() if line.strip().startswith("SPOOF")] == []
    # and the names are shown, escaped
    silent = {"init --help", "bench", "bench --json"}
    shown = ("PWNED", r"\u202e")
    is_shown = {name: any(word in text for word in shown) for name, text in output.items()}
    assert {name for name, value in is_shown.items() if not value} <= silent


def test_markup_in_names_is_text(output, capsys):
    print_table(f"title {EVIL}", ("a", "b"), [(f"cell {EVIL}", 1)])
    out = capsys.readouterr().out
    assert out.count("[red]") == 2
    assert hostile_characters(out) == set()
    assert all("[red]" in output[name] for name in ("prepare", "plan", "train", "export", "report"))


def test_json_is_printable_and_unchanged():
    values = {EVIL: [EVIL, "日本 \U0001f600", "\udce9", 1.5, None]}
    text = json_text(values)
    assert hostile_characters(text) == set()
    assert "日本 \U0001f600" in text
    assert json.loads(text) == values
    assert json_text(values, indent=1).count("\n") == json.dumps(values, indent=1).count("\n")


def test_progress_is_printable(monkeypatch):
    terminal, shown = Terminal(), io.StringIO()
    terminal.console = Console(file=shown, width=200)
    terminal.update(f"phase {EVIL}", 1, 2, note=f"loss {EVIL}")
    terminal.is_live = True
    terminal.console.print(terminal._line())
    terminal.say(EVIL)
    assert hostile_characters(shown.getvalue()) == set()
    assert shown.getvalue().count("PWNED") == 5


def test_a_download_is_named_in_printable_text():
    bar = delayed_bar()(desc=f"unet/{EVIL}", total=1, file=io.StringIO())
    assert hostile_characters(bar.desc) == set()
    bar.close()


def test_bugs_name_nothing_unprintable(tmp_path, monkeypatch):
    import safelight.data.prepare.ingest

    def fails(*_, **__):
        raise RuntimeError(EVIL)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(safelight.data.prepare.ingest, "ingest", fails)
    called = call("prepare", tmp_path, may_fail=True)
    assert called.status == 1
    (report,) = Path(tmp_path).glob("error-*.log")
    for text in (called.err, report.read_text()):
        assert "PWNED" in text
        assert hostile_characters(text) == set()
