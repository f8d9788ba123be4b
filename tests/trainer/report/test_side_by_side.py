"""Several runs on one page: what differs, what can be compared, which pictures belong together, where it is written."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest

from safelight.data.lock import FolderLock
from safelight.errors import UserError
from safelight.trainer.report.evaluation import OWN_AUTOENCODER, Evaluation
from safelight.trainer.report.run_reader import read_run_folder
from safelight.trainer.report.side_by_side import MAX_RUNS, build_side_by_side, render
from tests.called import call
from tests.trainer.report.charts import drawn_charts
from tests.trainer.report.chromium import SIZES, assert_sound
from tests.trainer.report.conftest import PROMPTS, write_json, write_metrics, write_run
from tests.trainer.report.evaluated_run import add_comparison, add_evaluation
from tests.trainer.report.hostile_run import keep_lines, make_hostile, rewrite

SMALL = {"edge_px": 32, "prompts": PROMPTS[:2], "num_examples": 1, "sample_every": 20, "scores": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two evaluated runs of 40 epochs that differ in two settings, and one of 20 epochs that only trained."""
    root = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        run = write_run(root / name, **SMALL)
        add_evaluation(run, add_comparison(run, prompts=PROMPTS[:2], edge_px=32))
    write_run(root / "three", num_epochs=20, **SMALL)
    for name in ("one", "two", "three"):
        write_json(root / name / "split.json", {"train": ["images/a-1.jpg"], "validation": ["images/b-2.jpg"]})
    change(root / "two", "batch_size = 8", "batch_size = 4")
    change(root / "two", "flip_p = 0.5", "flip_p = 0.0")
    return root


@pytest.fixture
def runs(made, tmp_path) -> Path:
    """A copy of the runs that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


def change(run: Path, old: str, new: str) -> None:
    text = (run / "config.toml").read_text()
    assert old in text
    (run / "config.toml").write_text(text.replace(old, new))


def page_of(root: Path, *names: str) -> str:
    return render([read_run_folder(root / name) for name in names])


def section(page: str, key: str) -> str:
    return re.search(rf'<section id="{key}">.*?</section>', page, re.DOTALL)[0]


def text_of(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup.replace("<wbr>", ""))).split())


def table_rows(markup: str) -> list[list[str]]:
    return [
        [text_of(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in re.findall(r"<tr>.*?</tr>", markup)
    ]


def test_settings_that_differ_have_a_row_and_equal_ones_are_folded_away(runs):
    part = section(page_of(runs, "one", "two", "three"), "settings")
    shown, folded = part.split("<details>")
    assert table_rows(shown) == [
        ["", "one", "two", "three"],
        ["data.flip_p", "0.5", "0", "0.5"],
        ["train.batch_size", "8", "4", "8"],
    ]
    assert "equal settings" in text_of(folded)
    assert ["optimizer.lr", "1e-6"] in table_rows(folded)
    # names of a run say nothing of how it was trained
    assert "run.dir" not in part


def test_a_setting_that_an_earlier_version_did_not_write_has_its_default(runs):
    change(runs / "two", "[model]", "[model]\nclip_skip = 0")
    change(runs / "two", "[train]", '[train]\nkernels = "off"')
    rows = table_rows(section(page_of(runs, "one", "two"), "settings").split("<details>")[0])
    assert ["train.kernels", "auto", "off"] in rows
    assert "model.clip_skip" not in [row[0] for row in rows]


def test_stages_are_compared_one_by_one_and_machines_too(runs):
    change(runs / "two", "epochs = 10\nlr = 5e-7", "epochs = 8\nlr = 5e-7\n\n[[stage]]\nepochs = 2")
    rewrite(runs / "two" / "environment.json", torch="2.11.0")
    rows = table_rows(section(page_of(runs, "one", "two"), "settings").split("<details>")[0])
    assert ["[[stage]] 2 epochs", "10", "8"] in rows
    assert ["[[stage]] 3 epochs", "", "2"] in rows
    assert ["torch", "2.13.0", "2.11.0"] in rows
    assert not [row for row in rows if row[0] in ("started", "device name")]


def test_runs_without_settings_are_named(runs):
    (runs / "two" / "config.toml").write_text("not TOML [")
    page = page_of(runs, "one", "two")
    assert "Unknown: those of two." in text_of(section(page, "settings"))
    assert "Parts of two could not be read: config.toml is not valid TOML" in text_of(page)


def test_headline_figures_stand_beside_each_other(runs):
    rewrite(runs / "three" / "data.json", num_photos=7, num_validation=2)
    rows = {row[0]: row[1:] for row in table_rows(section(page_of(runs, "one", "three"), "headline"))}
    assert rows["photographs"] == ["496 (50 held out)", "7 (2 held out)"]
    assert rows["ended"] == ["finished", "still running, or ended before its time, at epoch 20 of 40"]
    assert rows["trained"] == ["40 epochs, 2,200 steps", "20 epochs, 1,100 steps"]
    assert rows["lowest held-out loss"] == ["0.1302 (epoch 26)", "0.1307 (epoch 20)"]
    assert rows["change from the base"] == ["−6.0 %", "−5.7 %"]
    assert rows["last held-out loss"] == ["0.1346", "–"]
    text = text_of(section(page_of(runs, "one", "three"), "headline"))
    assert "one : Use epoch 26. held-out loss lowest; KID no worse than epoch 40's" in text
    assert "three : By held-out loss alone, epoch 20 (step 1,100). not evaluated" in text


def test_a_run_that_trains_is_told_from_one_that_was_killed(runs):
    out = runs / "page.html"
    with FolderLock(runs / "three", ""):
        build_side_by_side([runs / "one", runs / "three"], out)
    assert "training goes on, at epoch 20 of 40" in out.read_text()
    build_side_by_side([runs / "one", runs / "three"], out)
    assert "ended before its time, at epoch 20 of 40" in out.read_text()
    with (runs / "three" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"kind": "event", "step": 1100, "event": "diverged", "detail": "", "time": 1}) + "\n")
    assert "diverged at epoch 20 of 40" in text_of(page_of(runs, "one", "three"))


ALIKE = "Held-out loss is measured alike in all of these runs: same photographs, noise and timesteps."


def test_it_is_said_whether_held_out_losses_can_be_compared(runs):
    def said() -> str:
        return re.search(r"Held-out loss.*?</p>", section(page_of(runs, "one", "two"), "headline"))[0]

    assert ALIKE in said()
    (runs / "two" / "split.json").unlink()
    assert "which is not known here" in said()
    write_json(runs / "two" / "split.json", {"validation": ["images/c-3.jpg"]})
    assert "the runs hold out different photographs. Compare each run with its own base" in said()
    change(runs / "two", "seed = 20230817", "seed = 1")
    change(runs / "two", "[validate]", '[loss]\nkind = "huber"\n\n[validate]')
    assert "differ: run.seed, loss.kind; the runs hold out" in said()
    rewrite(runs / "two" / "model.json", base="another")
    assert "the base models differ" in said()


def test_curves_lie_over_each_other_in_the_colours_of_their_runs(runs):
    charts = drawn_charts(page_of(runs, "one", "two", "three"))
    assert len(charts) == 4
    for drawn in charts:
        assert [curve["name"] for curve in drawn["curves"]] == ["one", "two", "three"]
        assert [curve["color"] for curve in drawn["curves"]] == ["accent", "blue", "amber"]
        assert drawn["x"] == "epoch"
    held_out, training, change_, rate = charts
    assert [curve["x"][-1] for curve in held_out["curves"]] == [40, 40, 20]
    assert change_["curves"][0]["y"][0] == 0
    assert rate["curves"][0]["y"][-1] == pytest.approx(5e-7)
    # all are averaged over as many epochs: the shorter run's curve is the longer one's, as far as it goes
    long, short = training["curves"][0], training["curves"][2]
    by_epoch = dict(zip(long["x"], long["y"], strict=True))
    shared = [(y, by_epoch[x]) for x, y in zip(short["x"], short["y"], strict=True) if x in by_epoch and x < 18]
    assert len(shared) > 100
    assert all(y == pytest.approx(other) for y, other in shared)


def test_runs_without_a_step_have_no_curves(runs):
    for name in ("one", "two"):
        write_metrics(runs / name, [])
    assert "No step was logged." in section(page_of(runs, "one", "two"), "loss")


def revalue(run: Path, factor: float, **changes: object) -> None:
    """Multiply what a run measured of its checkpoints, and change its evaluation."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    for metric in evaluation["metrics"]:
        for value in metric["values"]:
            if value["model"] != "base":
                for key in ("value", "low", "high"):
                    value[key] *= factor
    Evaluation.model_validate_json(json.dumps({**evaluation, **changes}))
    (run / "evaluation.json").write_text(json.dumps({**evaluation, **changes}))


def test_metrics_stand_side_by_side_with_intervals(runs):
    revalue(runs / "two", 3.0)
    part = section(page_of(runs, "one", "two", "three"), "measures")
    text = text_of(part)
    assert text.startswith("Measured Measured alike in all runs: photographs 50, prompts 100, size 32 × 32 px,")
    rows = table_rows(part)
    assert ["one", "base model", "41.2", "", "37.0 to 45.4"] in rows
    assert ["one", "epoch 26", "11.8", "", "7.6 to 16.0"] in rows
    assert ["two", "epoch 26", "35.4", "", "22.8 to 48.0"] in rows
    assert ["one", "epoch 26", "28.0", "", "27.4 to 28.6", "+0.90 (+0.50 to +1.30)"] in rows
    assert "KID lower is better · by EfficientNet-Lite0" in text
    assert "By this metric one is best: its interval lies apart from two's." in text
    # LPIPS diversity has no better side, so no run is called best by it: of four metrics three
    assert text.count("By this metric") == 3


def test_intervals_that_overlap_make_no_run_better(runs):
    text = text_of(section(page_of(runs, "one", "two"), "measures"))
    assert text.count("No run is clearly better: one has the best value, but its interval overlaps with two's.") == 3
    assert "By this metric" not in text


def test_runs_that_were_measured_otherwise_are_not_compared(runs):
    revalue(runs / "two", 3.0, num_prompts=20, cfg=3.0)
    part = section(page_of(runs, "one", "two"), "measures")
    assert "These runs were not measured alike" in text_of(part)
    assert table_rows(part)[1:3] == [["prompts", "100", "20"], ["cfg", "7.5", "3"]]
    assert "is best" not in part
    assert "best value" not in part
    revalue(runs / "two", 1.0, num_prompts=100, cfg=7.5)
    write_json(runs / "two" / "split.json", {"validation": ["images/c-3.jpg"]})
    assert "They hold out different photographs." in section(page_of(runs, "one", "two"), "measures")


def test_no_run_is_best_against_other_photographs(runs):
    revalue(runs / "two", 3.0)
    for name, split in (("one", ["a"]), ("two", ["b"])):
        write_json(runs / name / "split.json", {"validation": ["v"], "train": split})
    page = page_of(runs, "one", "two")
    assert "measured against different photographs" in page
    assert "is best" not in page
    # not known by their names: the dataset must be the same, and known
    for name in ("one", "two"):
        (runs / name / "split.json").unlink()
    assert "is best" in page_of(runs, "one", "two")
    for name, said in (("other", "different photographs"), ("", "is not known.")):
        rewrite(runs / "two" / "data.json", dataset=name)
        page = page_of(runs, "one", "two")
        assert said in section(page, "measures")
        assert "is best" not in page


def test_runs_that_were_measured_by_no_shared_features_are_said_to_be(runs):
    evaluation = json.loads((runs / "two" / "evaluation.json").read_text())
    for metric in evaluation["metrics"]:
        metric["features"] = "another network"
    (runs / "two" / "evaluation.json").write_text(json.dumps(evaluation))
    text = text_of(section(page_of(runs, "one", "two"), "measures"))
    assert "by no features that they share" in text
    # each is shown against its own base instead
    for label in ("one", "two"):
        shown = text.partition(f"{label} against its own base")[2]
        assert re.search(rf"{label} base model .*{label} epoch 26 ", shown)
    assert "once two of the runs have been measured" not in text


def test_runs_that_share_no_prompt_are_said_to_share_none(runs):
    index = runs / "two" / "compare" / "index.json"
    compared = json.loads(index.read_text())
    for row in compared["rows"]:
        row["prompt"] += "!"
    index.write_text(json.dumps(compared))
    text = text_of(section(page_of(runs, "one", "two"), "pictures"))
    assert "none for the same prompt and seed as another" in text
    assert "as these commands draw them" not in text
    for label in ("one", "two"):
        shown = text.partition(f"{label} against its own base")[2]
        assert f"Photograph Base {label}, epoch 26" in shown


def test_few_pictures_are_said(runs):
    for name in ("one", "two"):
        evaluation = json.loads((runs / name / "evaluation.json").read_text())
        for metric in evaluation["metrics"]:
            for value in metric["values"]:
                value["num"] = 12
        (runs / name / "evaluation.json").write_text(json.dumps(evaluation))
    assert "From only 12 pictures a model, so read it with care." in page_of(runs, "one", "two")


def test_only_the_same_metric_by_the_same_features_is_compared(runs):
    evaluation = json.loads((runs / "two" / "evaluation.json").read_text())
    evaluation["metrics"][0]["features"] = "another network"
    del evaluation["metrics"][1:3]
    (runs / "two" / "evaluation.json").write_text(json.dumps(evaluation))
    text = text_of(section(page_of(runs, "one", "two"), "measures"))
    assert text.count("95 % interval") == 1
    assert "LPIPS diversity" in text
    assert "Measured of one run only: KID by EfficientNet-Lite0 (one);" in text
    assert "KID by another network (two)." in text


def test_two_runs_autoencoders_are_not_the_same_features(runs):
    for name in ("one", "two"):
        evaluation = json.loads((runs / name / "evaluation.json").read_text())
        evaluation["metrics"] = [{**evaluation["metrics"][0], "features": OWN_AUTOENCODER, "warning": f"of {name}"}]
        (runs / name / "evaluation.json").write_text(json.dumps(evaluation))
    part = section(page_of(runs, "one", "two"), "measures")
    assert "by the run's autoencoder" in text_of(part)
    assert ">of one<" in part
    assert ">of two<" in part
    change(runs / "two", "[model]", '[model]\nvae = "another"')
    assert "by no features that they share" in text_of(section(page_of(runs, "one", "two"), "measures"))
    # without model.vae it is that of the base
    change(runs / "two", 'vae = "another"\n', "")
    assert "by no features that they share" not in text_of(section(page_of(runs, "one", "two"), "measures"))
    rewrite(runs / "two" / "model.json", base="another")
    assert "by no features that they share" in text_of(section(page_of(runs, "one", "two"), "measures"))


def figures(page: str) -> list[list[str]]:
    """Return the captions of each row of pictures."""
    rows = re.findall(r'<div class="across">.*?</div>', section(page, "pictures"), re.DOTALL)
    return [[text_of(caption) for caption in re.findall(r"<figcaption.*?</figcaption>", row)] for row in rows]


def test_pictures_of_the_same_prompts_stand_together(runs):
    page = page_of(runs, "one", "two")
    assert figures(page) == [
        ["Photograph", "Base", "one, epoch 26", "two, epoch 26"],
        ["Base", "one, epoch 26", "two, epoch 26"],
    ]
    text = text_of(section(page, "pictures"))
    assert "Each row is drawn from the same prompt and the same initial noise." in text
    assert section(page, "pictures").count('src="data:image/webp;base64,') == 7


def test_each_base_is_shown_where_they_differ(runs):
    rewrite(runs / "two" / "model.json", base="another")
    assert figures(page_of(runs, "one", "two"))[1] == ["Base of one", "Base of two", "one, epoch 26", "two, epoch 26"]
    # hashes of weights say more than names
    for name in ("one", "two"):
        comparison = json.loads((runs / name / "compare" / "index.json").read_text())
        comparison["models"][0]["weights"] = "abc"
        write_json(runs / name / "compare" / "index.json", comparison)
    assert figures(page_of(runs, "one", "two"))[1] == ["Base", "one, epoch 26", "two, epoch 26"]
    rewrite(runs / "two" / "compare" / "index.json", cfg=3.0)
    page = page_of(runs, "one", "two")
    assert figures(page)[1][:2] == ["Base of one", "Base of two"]
    assert "draw with different settings" in page


def test_only_the_same_prompt_and_seed_belong_together(runs):
    comparison = json.loads((runs / "two" / "compare" / "index.json").read_text())
    comparison["rows"][0]["seed"] += 1
    write_json(runs / "two" / "compare" / "index.json", comparison)
    assert len(figures(page_of(runs, "one", "two"))) == 1
    comparison["rows"][1]["place"] = 5
    write_json(runs / "two" / "compare" / "index.json", comparison)
    assert "the initial noise may differ" in page_of(runs, "one", "two")
    comparison["rows"][1]["prompt"] = "another"
    write_json(runs / "two" / "compare" / "index.json", comparison)
    assert "none for the same prompt and seed as another" in section(page_of(runs, "one", "two"), "pictures")


def test_samples_stand_in_for_a_comparison(runs):
    shutil.rmtree(runs / "two" / "compare")
    (runs / "two" / "evaluation.json").unlink()
    assert figures(page_of(runs, "one", "two"))[1][-1].startswith("two, epoch ")
    assert len(figures(page_of(runs, "one", "two"))) == 2


def test_equal_titles_are_told_apart_by_their_folders(runs):
    for name in ("one", "two"):
        change(runs / name, "[run]", '[run]\ntitle = "Faded print"')
    page = page_of(runs, "one", "two", "three")
    assert "<title>Runs side by side: Faded print (one), Faded print (two), three · Safelight</title>" in page
    (runs / "deep").mkdir()
    shutil.move(runs / "three", runs / "deep" / "one")
    change(runs / "one", 'title = "Faded print"', 'title = ""')
    assert "<title>Runs side by side: one, deep/one ·" in page_of(runs, "one", "deep/one").replace(
        "one (deep/one)", "deep/one"
    )


def test_where_the_page_is_written(runs, tmp_path, monkeypatch):
    two = [runs / "one", runs / "two"]
    assert build_side_by_side(two, None) == runs / "comparison.html"
    # its own page is replaced, whatever the runs
    build_side_by_side([*two, runs / "three"], None)
    (runs / "x.html").write_text("<title>Holiday</title>")
    with pytest.raises(UserError, match=r"x\.html exists and is not such a page; name another file"):
        build_side_by_side(two, runs / "x.html")
    build_side_by_side(two, runs / "x.html", force=True)
    assert "Runs side by side: " in (runs / "x.html").read_text()
    (tmp_path / "out").mkdir()
    assert build_side_by_side(two, tmp_path / "out") == tmp_path / "out" / "comparison.html"
    (tmp_path / "in").symlink_to(runs / "one")
    for path in (
        runs / "one" / "x.html",
        runs / "two" / "samples" / "x.html",
        runs / "one",
        tmp_path / "in" / "x.html",
    ):
        with pytest.raises(UserError, match="lies in one of the runs; it is not written into a run folder"):
            build_side_by_side(two, path)
    shutil.move(runs / "two", runs / "one" / "inner")
    with pytest.raises(UserError, match="lies in one of the runs"):
        build_side_by_side([runs / "one", runs / "one" / "inner"], runs / "one" / "inner" / "x.html")
    monkeypatch.chdir(runs)
    assert build_side_by_side([Path("one"), Path("three")], None) == Path("comparison.html")
    assert not list((runs / "one").glob("*.html"))


def test_which_runs_can_be_shown(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs / "one")
    (tmp_path / "empty").mkdir()
    for given, said in (
        ([runs / "one"], "1 runs given; a page shows 2 to 12 side by side"),
        ([runs / "one"] * (MAX_RUNS + 1), "13 runs given"),
        ([runs / "one", runs / "one"], "one is given twice"),
        ([runs / "one", runs / "two", tmp_path / "link"], "are the same run; give each run once"),
        ([runs / "one", tmp_path / "empty"], "empty is not a run folder: it has no config.toml"),
        ([runs / "one", tmp_path / "nothing"], "nothing is not a run folder"),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            build_side_by_side(given, None)
        assert "\n" not in str(caught.value)


def test_the_command_says_where_the_page_is(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    called = call("report", "runs/one", "runs/two", "runs/three")
    assert (called.status, called.out) == (0, "runs/comparison.html\n")
    assert call("report", "runs/one", "runs/two", "-o", "runs/y.html").out == "runs/y.html\n"
    call("report", "runs/one", "runs/nothing").assert_refused("report", "runs/nothing is not a run folder")
    call("report", "runs/one", "-o", "x.html").assert_refused("report", "-o is for the page about several runs")
    call("report", "runs/one", "--force").assert_refused("report", "--force is for the page about several runs")
    call("report", "runs/one", "runs/two", "--port", "1").assert_refused("report", "--port is for --serve")


@pytest.fixture(scope="module")
def pages(made, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    for name in ("one", "two"):
        shutil.copytree(made / name, root / "hostile" / f"<img src=x onerror=alert(1)> {name}")
        make_hostile(root / "hostile" / f"<img src=x onerror=alert(1)> {name}")
    for i in range(MAX_RUNS):
        shutil.copytree(made / ("one", "two", "three")[i % 3], root / "many" / f"run-{i}")
    for name in ("one", "two"):
        shutil.copytree(made / "three", root / "bare" / name)
        keep_lines(root / "bare" / name, lambda line: line["step"] == 0)
        shutil.rmtree(root / "bare" / name / "samples")
        shutil.rmtree(root / "bare" / name / "compare")
    shutil.copytree(made, root / "usual")
    return {folder.name: build_side_by_side(sorted(folder.iterdir()), None) for folder in root.iterdir()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["usual", "hostile", "many", "bare"])
@pytest.mark.long
def test_the_page_is_sound_in_chromium(open_report, pages, name, size):
    opened = open_report(pages[name], size)
    opened.page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert_sound(opened)
    assert opened.page.evaluate("window.pwned") is None
    if name == "usual":
        curve = opened.page.locator("#loss figure.chart").first.locator("button.curve", has_text="two")
        curve.click()
        assert curve.get_attribute("aria-pressed") == "false"
        opened.page.locator("#pictures .zoom").first.click()
        assert opened.page.locator("dialog img").count() == 1
