"""Every value of every record of a run folder, replaced by something absurd: the report is written all the same."""

import json
import os
import random
import shutil
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image

from safelight.data.images import decode
from safelight.trainer.report import build, pictures, run_reader
from safelight.trainer.report.build import build_report, read_run_folder, render
from safelight.trainer.report.facts import run_time_s
from safelight.trainer.report.pictures import Work, embed_all
from tests.trainer.damaged_text import replaced, replaced_setting
from tests.trainer.report.conftest import PROMPTS, write_run
from tests.trainer.report.evaluated_run import (
    add_comparison,
    add_evaluation,
    add_grid,
    add_rate_test,
    add_requested,
)

RECORDS = ("environment.json", "model.json", "data.json", "compare/index.json", "scores.json", "evaluation.json")
RECORDS += ("grids/one/index.json", "find_lr/result.json", "samples/live/images.json")
SAMPLES = "samples/step-00000110/index.json"


@pytest.fixture
def little_run(tmp_path) -> Path:
    run = write_run(tmp_path / "run", prompts=PROMPTS[:2], num_epochs=4, edge_px=32, sample_every=2, num_examples=1)
    add_evaluation(run, add_comparison(run, prompts=PROMPTS[:2], edge_px=32, epochs=(26, 40)), num_points=30)
    add_grid(run, "one", edge_px=32)
    add_rate_test(run)
    add_requested(run, prompts=PROMPTS[:2], edge_px=32)
    return run


def assert_renders(run: Path) -> None:
    start = time.process_time()
    html = render(read_run_folder(run))
    assert time.process_time() - start < 20
    assert len(html) < 20_000_000
    assert "\x1b" not in html
    html.encode()


def damage_records(run: Path, num_rounds: int, seed: int, monkeypatch) -> None:
    """Replace a value in each record at a time, num_rounds times. The graphs are left out: they read none of these."""
    graphs = ("loss", "timesteps", "schedule")
    monkeypatch.setattr(build, "SECTIONS", tuple(section for section in build.SECTIONS if section[0] not in graphs))
    rng, names = random.Random(seed), (*RECORDS, SAMPLES, "config.toml")
    sound = {name: (run / name).read_text() for name in names}
    for _ in range(num_rounds):
        for name in names:
            change = replaced_setting if name == "config.toml" else replaced
            (run / name).write_bytes(change(sound[name], rng))
        assert_renders(run)


def damage_metrics(run: Path, num_rounds: int, seed: int) -> None:
    """Replace a value in every second line of the metrics, num_rounds times; config.toml as well, which graphs read."""
    rng = random.Random(seed)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    settings, data = (run / "config.toml").read_text(), (run / "data.json").read_text()
    for _ in range(num_rounds):
        damaged = [replaced(line, rng) if rng.random() < 0.5 else line.encode() for line in lines]
        (run / "metrics.jsonl").write_bytes(b"\n".join(damaged))
        is_config_sound, is_data_sound = rng.random() < 0.5, rng.random() < 0.5
        (run / "config.toml").write_bytes(settings.encode() if is_config_sound else replaced_setting(settings, rng))
        (run / "data.json").write_bytes(data.encode() if is_data_sound else replaced(data, rng))
        assert_renders(run)


def test_absurd_values_in_any_record_leave_a_report(little_run, monkeypatch):
    damage_records(little_run, 30, 1, monkeypatch)


def test_absurd_values_in_the_metrics_leave_a_report(little_run):
    damage_metrics(little_run, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_absurd_values_in_records_leave_a_report(little_run, seed, monkeypatch):
    damage_records(little_run, 10_000 // 4 // 7 + 1, 100 + seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_absurd_lines_of_metrics_leave_a_report(little_run, seed):
    damage_metrics(little_run, 100, 200 + seed)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.json", b"[" * 100_000, "data.json could not be read: it is nested too deeply"),
        ("data.json", b'{"num_photos": "x", "buckets": [3]}', "data.json: num_photos is not a count and is left out"),
        ("model.json", b'{"base": {"a": 1}}', "model.json: base is not text and is left out"),
        ("scores.json", b'{"rows": [1]}', "scores.json: rows is not a list of objects and is left out"),
        (SAMPLES, b'{"step": 1e999}', f"{SAMPLES} could not be read: "),
        ("config.toml", b"a = " + b"[" * 5000, "config.toml is not valid TOML: it is nested too deeply"),
        (
            "metrics.jsonl",
            b'{"kind": "train", "step": 1e999}\n{"kind": "train", "step": -3}\n',
            "metrics.jsonl: 2 of 2",
        ),
    ],
)
def test_damage_is_named_in_the_report(little_run, name, content, said):
    (little_run / name).write_bytes(content)
    html = build_report(little_run).read_text()
    top = html[: html.index("<main>")]
    assert "Parts of this run folder could not be read:" in top
    assert said in top


def test_records_of_very_many_values_are_named_and_not_held(little_run, monkeypatch):
    """Three bytes of text take 90 of memory, so that a run folder of 60 MB could take 6 GB."""
    lists = '{"x": [' + "[]," * 2_000_000 + "0]}"
    for name in RECORDS:
        (little_run / name).write_text(lists)
    samples = little_run / "samples"
    monkeypatch.setattr(run_reader, "MAX_SAMPLES_BYTES", 2**18)
    for step in range(1, 10):
        (samples / f"step-{step:08d}").mkdir()
        images = '[{"prompt": [' + "[]," * 15_000 + "0]}]"
        (samples / f"step-{step:08d}" / "index.json").write_text(f'{{"step": {step}, "images": {images}}}')
    start = time.process_time()
    tracemalloc.start()
    run = read_run_folder(little_run)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - start < 10
    assert held < 2**21
    assert peak < 2**24
    for name in RECORDS:
        assert any(problem.startswith(f"{name} could not be read: ") for problem in run.problems)
    assert any(problem.startswith("samples: only 6 of its 12 folders are read") for problem in run.problems)


def test_lines_of_the_metrics_that_are_too_long_or_too_many_are_named(little_run, monkeypatch):
    path = little_run / "metrics.jsonl"
    sound = len(read_run_folder(little_run).metrics.times)
    bands = '{"kind": "train", "step": 1, "loss_by_timestep": [' + "[]," * 3_000_000 + "0]}\n"
    short = '{"kind": "validation", "split": "held_out", "step": 1, "loss_by_timestep": [' + "[]," * 10**4 + "0]}\n"
    path.write_text(bands + path.read_text() + short * 20)
    tracemalloc.start()
    run = read_run_folder(little_run)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2**23
    assert peak < 2**23
    assert len(run.metrics.times) == sound + 20
    assert run.problems == [f"metrics.jsonl: 1 of {sound + 21} lines has more than 65,536 bytes and is left out"]
    monkeypatch.setattr(run_reader, "MAX_METRICS_VALUES", 50_000)
    path.write_text(short * 20)
    run = read_run_folder(little_run)
    assert run.problems == ["metrics.jsonl: only its first 2 lines are read"]


def test_a_loss_of_zero_divides_nothing(little_run):
    rows = [json.loads(line) for line in (little_run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "validation" and row["step"] in (0, 110):
            row["loss"] = 0.0
    (little_run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert_renders(little_run)


def test_pictures_are_opened_only_in_the_formats_of_a_run(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, which runs it. A picture of 400 megapixels is not decoded, a pipe not opened."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n%%EOF\n"
    for name, content in (("eps.png", eps), ("empty.png", b""), ("cut.png", b"\x89PNG\r\n\x1a\n")):
        (tmp_path / name).write_bytes(content)
    for name in ("GIF", "TIFF", "BMP", "ICNS", "PPM", "TGA", "PDF", "JPEG2000"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png", name)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "large.png")
    os.mkfifo(tmp_path / "pipe.png")
    bad = sorted(tmp_path.glob("*.png"))
    for name in ("PNG", "JPEG", "WEBP"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"good.{name}", name)
    start = time.process_time()
    found = embed_all([*bad, *sorted(tmp_path.glob("good.*"))], (32, 16), 10**6, Work())
    assert time.process_time() - start < 10
    assert [picture is None for picture in found] == [True] * len(bad) + [False] * 3


def test_pictures_that_cost_more_than_those_of_a_run_are_not_decoded(tmp_path, monkeypatch):
    """16-bit colour with transparency, many passes, files that are mostly holes."""
    pixels, rows = struct.pack(">2I", 64, 64), zlib.compress(bytes(64 * (1 + 8 * 64)))
    for name, head in (("rgba-16", b"\x10\x06"), ("rgb-16", b"\x10\x02"), ("grey-16", b"\x10\0"), ("bits", b"\1\0")):
        write_png(tmp_path / f"{name}.png", pixels + head + bytes(3), rows)
    for mode in ("RGBA", "LA"):
        Image.new(mode, (64, 64)).save(tmp_path / f"{mode}.png")
    Image.new("RGB", (1024, 1024)).save(tmp_path / "many-passes.png", "JPEG", progressive=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "holes.png")
    os.truncate(tmp_path / "holes.png", 2**26)
    bad = sorted(tmp_path.glob("*.png"))
    for mode in ("RGB", "L", "P"):
        Image.linear_gradient("L").convert(mode).save(tmp_path / f"good-{mode}.png")
    good = sorted(tmp_path.glob("good-*.png"))
    decoded = []
    monkeypatch.setattr(pictures, "decode", lambda content, **options: decoded.append(content) or decode(content))
    found = embed_all([*bad, *good], (32, 16), 10**6, Work())
    assert [picture is None for picture in found] == [True] * len(bad) + [False] * 3
    assert decoded == [path.read_bytes() for path in good]


def write_png(path: Path, header: bytes, rows: bytes) -> None:
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_the_pictures_of_all_sections_share_one_bound(little_run, monkeypatch):
    """Of 32 x 32 px each: a row of 4 and one of 3, 6 samples, an example, 24 of a grid, 4 burnt, 6 of nearest
    pairs, 4 drawn on request.

    Two of these are the same files and are decoded once.
    """
    decoded = []
    monkeypatch.setattr(pictures, "decode", lambda content, **options: decoded.append(content) or decode(content))
    render(read_run_folder(little_run))
    assert len(decoded) == 50
    decoded.clear()
    run = read_run_folder(little_run)
    run.work.num_pixels = 7 * 2000
    assert "missing" in render(run)
    assert 7 <= len(decoded) <= 14 * 1000 / 1024


def test_links_out_of_the_run_folder_are_not_followed(little_run, tmp_path):
    outside = Path(shutil.copytree(little_run, tmp_path / "outside"))
    (outside / "data.json").write_text('{"dataset": "private"}')
    (outside / SAMPLES).write_text('{"step": 110, "images": [{"file": "000.png", "prompt": "private"}]}')
    for name in ("data.json", "compare", "samples/step-00000110", "metrics.jsonl"):
        path = little_run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.symlink_to(outside / name)
    report = little_run / "report.html"
    (tmp_path / "precious").write_text("precious")
    report.symlink_to(tmp_path / "precious")
    html = build_report(little_run).read_text()
    assert (tmp_path / "precious").read_text() == "precious"
    assert "private" not in html
    for name in ("data.json", "compare/index.json", SAMPLES, "metrics.jsonl"):
        assert f"{name} could not be read: " in html


def test_a_clock_that_was_set_is_no_work_time():
    day = 86_400.0
    work = [(1e9 + 10 * number, "") for number in range(50)]
    assert run_time_s(work) == 490
    forwards = [(time + 3000 * day * (number >= 20), event) for number, (time, event) in enumerate(work)]
    assert run_time_s(forwards) == 480
    backwards = [(time - 3000 * day * (number >= 20), event) for number, (time, event) in enumerate(work)]
    assert run_time_s(backwards) == 480
    there_and_back = [(time + 3000 * day * (number == 20), event) for number, (time, event) in enumerate(work)]
    assert run_time_s(there_and_back) == 470
