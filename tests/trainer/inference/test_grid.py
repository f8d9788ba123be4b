"""Grids: which pictures there are, that only what differs is drawn, and what lies beside the pictures."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from safelight.errors import UserError
from safelight.trainer.checkpoint.files import Position, folder_of, read_identity, save_checkpoint
from safelight.trainer.distributed.together import Stopped
from safelight.trainer.inference.axes import parse_axes
from safelight.trainer.inference.draw import OpenRun, open_run
from safelight.trainer.inference.gallery import read_key
from safelight.trainer.inference.grid import draw_grid
from safelight.trainer.inference.grid_plan import plan_grid
from safelight.trainer.inference.grid_sheet import EDGES_PX, write_grid_sheets
from safelight.trainer.inference.pictures import Weights
from safelight.trainer.models.encoders import CaptionEncoder
from safelight.trainer.models.tensor_files import TensorFile
from safelight.trainer.optim.ema import PREFIX as EMA_PREFIX
from safelight.trainer.report.grid_record import Grid, GridAxis, GridCell
from safelight.trainer.report.records import read_grids
from tests.called import call
from tests.trainer.checkpoints import writes
from tests.trainer.inference.exported_runs import STEP, make_run

PROMPT = "a red circle, left"
SMALL = {"width": 32, "height": 32, "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with the checkpoints of steps 7, which is best, and 9."""
    folder = make_run(tmp_path_factory.mktemp("grid") / "run", sample={"prompts": ["a blue star", "a hen"]})
    return make_run(folder, step=9, sample={"prompts": ["a blue star", "a hen"]})


@pytest.fixture
def run(folder) -> OpenRun:
    return open_run(folder)


def plan(run, *axes, prompts=(PROMPT,), **options):
    texts = dict(zip("xyz", [*axes, None, None], strict=False))
    options["changes"] = {**SMALL, **options.get("changes", {})}
    return plan_grid(run, parse_axes(texts), prompts=prompts, **options)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, np.int16)


def test_an_embedding_that_no_cell_names_is_told(folder, run, tmp_path):
    width = run.encoder.text_encoders[0].config.hidden_size
    save_file({"x": torch.ones(1, width)}, tmp_path / "faded.safetensors")
    opened, said = open_run(folder, [str(tmp_path / "faded.safetensors")]), []
    plan(opened, "cfg=3,5", say=said.append)
    assert said == ["note: --embedding faded has no effect: no prompt and no negative prompt names faded"]
    plan(opened, "negative-embedding=none,faded", say=said.append)
    assert len(said) == 1


def test_every_combination_is_a_cell_and_nothing_else_differs(run):
    drawn = plan(run, "cfg=3,5", "steps=2-4", "checkpoint=base,last", changes={"negative-prompt": "blurry"})
    assert [axis.labels for axis in drawn.axes] == [("3", "5"), ("2", "3", "4"), ("base", "epoch 0 (step 9)")]
    assert [cell.place for cell in drawn.cells] == [(x, y, z) for z in range(2) for y in range(3) for x in range(2)]
    for cell in drawn.cells:
        x, y, z = cell.place
        request, settings = cell.request, cell.request.settings
        assert (settings.cfg, settings.steps, request.weights.step) == ((3, 5)[x], y + 2, (None, 9)[z])
        # one seed and one place: the same noise
        assert replace(settings, cfg=3, steps=2) == drawn.cells[0].request.settings
        assert (request.prompt, request.negative, request.place) == (PROMPT, "blurry", 0)
    assert drawn.prompt == PROMPT
    assert dict(drawn.fixed) == {
        "sampler": "DPM++ 2M",
        "seed": str(run.config.run.seed),
        "negative-prompt": "blurry",
        "size": "32 x 32 px",
    }


def test_each_axis_changes_its_own_setting(run):
    def requests(axis, **options):
        return [cell.request for cell in plan(run, axis, **options).cells]

    assert [one.settings.sampler for one in requests("sampler=ddim,EULER")] == ["ddim", "euler"]
    assert [one.settings.seed for one in requests("seed=1,18446744073709551615")] == [1, 2**64 - 1]
    assert [one.prompt for one in requests('prompt="a, b",c', prompts=())] == ["a, b", "c"]
    assert [one.prompt for one in requests("prompt", prompts=("d", "e"))] == ["d", "e"]
    assert [one.prompt for one in requests("prompt", prompts=())] == ["a blue star", "a hen"]
    assert [one.negative for one in requests('negative-prompt="",blurry')] == ["", "blurry"]
    assert [one.clip_skip for one in requests("clip-skip=0,1")] == [0, 1]
    assert [one.weights.step for one in requests("checkpoint=best,base,all", prompts=("x",))] == [7, None, 9]
    assert [one.settings.cfg for one in requests("cfg=1-2 [3]", checkpoint="base")] == [1, 1.5, 2]
    assert {one.prompt for one in requests("cfg=1", prompts=())} == {"a blue star"}


def test_replaced_texts(run):
    both = plan(run, "replace=red,blue", "replace=circle,star,ring", changes={"negative-prompt": "no red circle"})
    assert [cell.request.prompt for cell in both.cells[:3]] == [PROMPT, "a blue circle, left", "a red star, left"]
    assert both.cells[-1].request.prompt == "a blue ring, left"
    assert both.cells[-1].request.negative == "no blue ring"
    assert both.prompt == ""
    assert both.fixed[0] == ("prompt", f"“{PROMPT}”")
    with pytest.raises(UserError, match="--x replace: 'green' is not in the prompt 'a red circle, left'"):
        plan(run, "replace=green,red")


MISTAKES = {
    "steps=0": "--x steps: steps = 0: expected 1 or more",
    "cfg=101": "--x cfg: cfg = 101.0: expected",
    "seed=18446744073709551616": "--x seed: seed = ",
    "sampler=plms": "--x sampler: sampler 'plms' is unknown; use ddim, dpm++, dpm++-karras, euler",
    "clip-skip=12": "--x clip-skip: clip_skip = 12: expected",
    "clip-skip=9": "clip-skip 9 leaves none of the",
    "checkpoint=8": "checkpoint '8' is not in ",
    "ema=on,off": "--x ema: the checkpoint of step 9 has no moving average of its weights (train.ema_decay makes one)",
    "seed=1-101": "101 cells are more than 100; give fewer values, or --max-cells 101",
}


@pytest.mark.parametrize("axis", MISTAKES)
def test_a_value_that_makes_no_picture_is_one_line(run, axis):
    with pytest.raises(UserError) as refused:
        plan(run, axis, max_cells=100)
    assert MISTAKES[axis] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_more_prompts_than_one_need_an_axis(run):
    with pytest.raises(UserError, match="--prompt has 2 prompts and no axis is for them; add --y prompt"):
        plan(run, "cfg=3", prompts=("a", "b"))
    with pytest.raises(UserError, match="--x prompt has values, and --prompt has others"):
        plan(run, "prompt=a,b", prompts=("a", "b"))
    with pytest.raises(UserError, match=r"1 x 200 x 200 = 40,000 cells are more than 5,000; give fewer values$"):
        plan(run, "cfg=3", "seed=1-200", "steps=1-200", max_cells=10**9)


def test_a_grid_goes_on_where_it_was_stopped_and_its_pictures_serve_a_larger_one(run, monkeypatch):
    monkeypatch.setattr(OpenRun, "fit_to_memory", lambda self, settings: (self.device, 2))
    loaded, encoded = [], []
    unet, encode = OpenRun.unet, CaptionEncoder.encode
    monkeypatch.setattr(OpenRun, "unet", lambda self, *which: loaded.append(which) or unet(self, *which))
    monkeypatch.setattr(CaptionEncoder, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    small = plan(run, "cfg=3,5,7", "checkpoint=base,last")
    folder = run.run_dir / "grids" / "cfg-checkpoint"

    def stop(done, total):
        # in the second batch, of the base's third picture
        if done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        draw_grid(run, small, progress=stop)
    assert len(list(folder.iterdir())) == 2
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    said = []
    assert draw_grid(run, small, say=said.append) == folder
    assert said == [
        "3 (cfg) x 2 (checkpoint): 6 cells, 6 pictures",
        "2 pictures of 6 are there already",
    ]
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    # each UNet once, and each text once, before the stop and after it
    assert loaded == [(None, True, 1.0)] * 2 + [(9, True, 1.0)]
    assert sorted(encoded) == sorted([PROMPT, ""] * 2)
    loaded.clear()
    draw_grid(run, small, say=said.append)
    assert loaded == []
    assert said[-1] == "all of them are there already: nothing was drawn"
    (saved,) = (one for one in read_grids(run.run_dir, []) if one.name == "cfg-checkpoint")
    # with other values, in another order, on other axes: only what is new is drawn
    drawn = []
    other = plan(run, "checkpoint=last", "cfg=7,9,3")
    draw_grid(run, other, "cfg-checkpoint", progress=lambda done, total: drawn.append(total))
    assert drawn[-1] == SMALL["steps"]
    (larger,) = (one for one in read_grids(run.run_dir, []) if one.name == "cfg-checkpoint")
    assert {cell.file for cell in larger.grid.cells} & {cell.file for cell in saved.grid.cells}
    assert [axis.name for axis in (larger.grid.x, larger.grid.y)] == ["checkpoint", "cfg"]


def test_pictures_are_those_of_their_settings_however_they_are_batched(run):
    """cfg, negative prompt, prompt and clip skip share batches; each picture is that drawn alone."""
    several = plan(run, "cfg=1,3,5", "negative-prompt=blurry,old", "clip-skip=0,1")
    folder = draw_grid(run, several, "batched")
    grid = next(one.grid for one in read_grids(run.run_dir, []) if one.name == "batched")
    for number in (1, 8):
        alone = replace(several, cells=several.cells[number : number + 1], axes=several.axes[:1])
        alone = replace(alone, cells=(replace(alone.cells[0], place=(0, 0, 0)),))
        draw_grid(run, alone, "alone")
        (single,) = (one.grid for one in read_grids(run.run_dir, []) if one.name == "alone")
        first = pixels(folder / grid.cells[number].file)
        second = pixels(folder.parent / "alone" / single.cells[0].file)
        assert np.abs(first - second).max() <= 1
    drawn = [pixels(folder / cell.file) for cell in grid.cells]
    # without guidance nothing is read of the negative prompt: both cells have one picture
    assert grid.cells[0].file == grid.cells[3].file
    assert len({cell.file for cell in grid.cells}) == 10
    assert all(np.abs(drawn[1] - drawn[number]).max() > 1 for number in (2, 4, 7))


def test_moving_averages_are_an_axis_of_a_run_that_has_them(tmp_path):
    folder = make_run(tmp_path / "run")
    run = open_run(folder)
    state, unet = TensorFile(folder_of(folder, STEP) / "state.safetensors"), run.unet(STEP)
    tensors = {name: state.read(name) for name in state.entries}
    tensors |= {f"{EMA_PREFIX}{name}": value.detach() * 0.5 for name, value in unet.named_parameters()}
    save_checkpoint(folder, writes(unet), tensors, Position(step=8), read_identity(folder, STEP)[0])
    drawn = plan(run, "ema=on,off", "checkpoint=base,last")
    assert [cell.request.weights for cell in drawn.cells[2:]] == [Weights(8, True), Weights(8, False)]
    draw_grid(run, drawn)
    (saved,) = read_grids(folder, [])
    # the base has none, and so one picture
    assert len({cell.file for cell in saved.grid.cells[:2]}) == 1
    assert len({cell.file for cell in saved.grid.cells[2:]}) == 2
    with pytest.raises(UserError, match="step 7 has no moving average"):
        plan(run, "ema=on,off", "checkpoint=7,8")


def test_what_lies_beside_the_pictures(folder):
    words = ["--x", "cfg=1,3", "--y", 'negative-prompt="",blurry', "--z", "checkpoint=base,last", "--name", "all"]
    small = [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    called = call("grid", folder, *words, "--prompt", "<script>alert(1)</script>, \N{LION FACE}", *small)
    assert called.status == 0
    sizes = "2 (cfg) x 2 (negative-prompt) x 2 (checkpoint)"
    assert called.line("cells") == f"{sizes}: 8 cells, 6 pictures; 2 cells equal others"
    assert f"grid in {folder / 'grids' / 'all'} (sheet.png, and index.html to zoom)" in called.out
    place = folder / "grids" / "all"
    grid = Grid.model_validate_json((place / "index.json").read_bytes())
    assert {path.name for path in place.iterdir()} == {
        "index.json",
        "index.html",
        "sheet.png",
        "sheet-1.png",
        "sheet-2.png",
        *(cell.file for cell in grid.cells),
    }
    for cell in grid.cells:
        assert len(read_key(place / cell.file)) == 64
        with Image.open(place / cell.file) as image:
            assert f"CFG scale: {grid.x.labels[cell.x]}" in image.info["parameters"]
    page = (place / "index.html").read_text()
    assert page.count("<img") == 8
    assert "<script>alert" not in page
    assert set(re.findall(r'href="(?!data:)([^"]*)"', page)) <= {
        *(f"./{name}" for name in ("sheet.png", "sheet-1.png", "sheet-2.png")),
        *(f"./{cell.file.replace('+', '%2B')}" for cell in grid.cells),
    }
    assert "grids/all/sheet.png" in (folder / "report.html").read_text()
    # another grid of the name, which has one table, leaves no sheet of the earlier one
    assert call("grid", folder, "--x", "cfg=3", "--name", "all", "--prompt", "x", *small).status == 0
    assert sorted(path.name for path in place.glob("sheet*")) == ["sheet.png"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "missing: --x AXIS=VALUES"),
        (("--x", "hue=3"), "--x 'hue' is not an axis"),
        (("--x", "cfg=3", "--cfg", "5"), "--cfg and an axis give cfg; leave out one of them"),
        (("--x", "cfg=3", "--name", "../x", "--prompt", "a"), "--name '../x' names no folder in RUN/grids"),
        (("--x", "checkpoint=8", "--prompt", "a"), "checkpoint '8' is not in "),
        (("--x", "cfg=3", "--checkpoint", "8", "--prompt", "a"), "checkpoint '8' is not in "),
        (("--x", "seed=1-100", "--y", "steps=1-6", "--prompt", "a"), "100 x 6 = 600 cells are more than 500"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(folder, words, part):
    call("grid", folder, *words).assert_refused("grid", part)


def test_ctrl_c_keeps_what_is_drawn_and_says_so(folder, monkeypatch):
    def interrupt(self, settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(OpenRun, "fit_to_memory", interrupt)
    called = call("grid", folder, "--x", "cfg=3", "--prompt", "x", "--name", "stopped", "--steps", 2)
    assert called.status == 130
    assert called.err.endswith("are kept; the same command draws the rest\ninterrupted\n")


@pytest.mark.parametrize("place", ["grids", "grids/cfg", "grids/cfg/index.html", "grids/cfg/sheet.png"])
def test_what_is_in_the_way_of_a_grid_is_one_line(run, tmp_path, place):
    drawn, blocked = plan(run, "cfg=3"), tmp_path / place
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.mkdir() if "." in place else blocked.touch()
    with pytest.raises(UserError, match=f"{place} is "):
        draw_grid(replace(run, run_dir=tmp_path), drawn)


def test_texts_that_are_long_or_cannot_be_stored(run):
    drawn = plan(run, "cfg=3", prompts=("\udce9" + "x" * 30_000,), changes={"negative-prompt": "\udce9" * 300})
    assert drawn.cells[0].request.prompt.startswith("\\udce9xxx")
    assert len(drawn.prompt) <= 20_000
    assert all(len(value) <= 400 for _, value in drawn.fixed)
    Grid(x=drawn.axes[0], prompt=drawn.prompt, fixed=drawn.fixed, cells=()).model_dump_json()


def test_a_sheet_shows_every_picture_in_its_place(tmp_path):
    places = product(range(3), range(2), range(2))
    colours = {(x, y, z): (40 + 60 * x, 40 + 60 * y, 40 + 100 * z) for x, y, z in places}
    for place, colour in colours.items():
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"{'-'.join(map(str, place))}.png")
    grid = Grid(
        x=GridAxis(name="cfg", labels=("3", "5", "7.5")),
        y=GridAxis(name="prompt", labels=("word " * 40, "unbroken" * 30)),
        z=GridAxis(name="checkpoint", labels=("base", "\x1b[31m\N{LION FACE}")),
        prompt="a barn",
        cells=tuple(GridCell(x=x, y=y, z=z, file=f"{x}-{y}-{z}.png") for x, y, z in colours),
    )
    assert write_grid_sheets(tmp_path, grid, (64, 48)) == ["sheet.png", "sheet-1.png", "sheet-2.png"]
    for name, tables in {"sheet.png": (0, 1), "sheet-1.png": (0,), "sheet-2.png": (1,)}.items():
        sheet = pixels(tmp_path / name)
        tops = {}
        for place, colour in colours.items():
            found = np.argwhere((sheet == colour).all(axis=2))
            # enlarged by two
            assert len(found) == (128 * 96 if place[2] in tables else 0)
            tops[place] = found.min(axis=0) if len(found) else None
        for z in tables:
            assert len({tops[x, 0, z][0] for x in range(3)}) == len({tops[0, y, z][1] for y in range(2)}) == 1
            assert tops[0, 0, z][0] < tops[0, 1, z][0]
            assert tops[0, 0, z][1] < tops[1, 0, z][1] < tops[2, 0, z][1]
            top, left = tops[0, 0, z]
            # ink above the first column, and beside the first row, which stays clear of the pictures
            assert (sheet[top - 20 : top, left : left + 40].sum(axis=2) < 400).sum() > 20
            assert (sheet[top : top + 96, left - 200 : left - 8].sum(axis=2) < 400).sum() > 20
            assert (sheet[top : top + 96, left - 8 : left] == (0xFB, 0xFA, 0xF8)).all()


def test_a_large_grid_fits_one_sheet(tmp_path):
    labels = tuple(map(str, range(200)))
    cells = tuple(GridCell(x=x, y=y, file="none.png") for x in range(200) for y in range(5))
    grid = Grid(x=GridAxis(name="seed", labels=labels), y=GridAxis(name="steps", labels=labels[:25]), cells=cells)
    write_grid_sheets(tmp_path, grid, (512, 512))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width * sheet.height <= 16_000_000
        assert max(sheet.size) <= 16_000
        assert sheet.width >= 200 * EDGES_PX[-1]


@pytest.fixture(scope="module")
def embedded(folder, tmp_path_factory) -> OpenRun:
    """The run, opened with two embeddings."""
    files = []
    for seed, name in enumerate(("look", "fault")):
        files.append(tmp_path_factory.mktemp("files") / f"{name}.safetensors")
        vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(seed))
        save_file({name: vectors}, files[-1])
    return open_run(folder, [str(file) for file in files])


@pytest.mark.parametrize(
    ("axis", "prompt", "expected"),
    [
        ("embedding=none,look", "a hen", ["a hen", "a hen, look"]),
        ("embedding=none,LOOK,fault", "a look hen, barn", ["a  hen, barn", "a look hen, barn", "a fault hen, barn"]),
        ("embedding=none,look", "a hen, (look:1.2)", ["a hen, (:1.2)", "a hen, (look:1.2)"]),
        ("embedding=none,look", "look, a hen", ["a hen", "look, a hen"]),
        ("embedding=none,look", "a hen, look, red", ["a hen, red", "a hen, look, red"]),
        ("embedding=fault,look", "a hen", ["a hen, fault", "a hen, look"]),
    ],
)
def test_the_axis_embedding_changes_the_prompt(embedded, axis, prompt, expected):
    drawn = plan(embedded, axis, prompts=[prompt])
    assert [cell.request.prompt for cell in drawn.cells] == expected
    assert {cell.request.negative for cell in drawn.cells} == {""}
    assert drawn.prompt == ""


def test_the_axis_negative_embedding_changes_the_negative_prompt(embedded):
    drawn = plan(embedded, "negative-embedding=none,fault", changes={"negative-prompt": "blurry"})
    assert [(cell.request.prompt, cell.request.negative) for cell in drawn.cells] == [
        (PROMPT, "blurry"),
        (PROMPT, "blurry, fault"),
    ]
    assert drawn.axes[0].labels == ("none", "fault")


def test_an_unknown_embedding_is_refused(embedded, run):
    with pytest.raises(
        UserError, match=r"--x embedding: 'other' is no embedding of this run: it has look, fault; give"
    ):
        plan(embedded, "embedding=none,other")
    with pytest.raises(UserError, match=r"'look' is no embedding of this run: it has none; give its file with --emb"):
        plan(run, "embedding=none,look")


def test_grids_with_embeddings_are_drawn_and_kept_by_their_vectors(embedded, folder, tmp_path):
    planned = plan(embedded, "embedding=none,look", "negative-embedding=none,fault")
    made = draw_grid(embedded, planned, "embedded")
    files = sorted(path.name for path in made.glob("*.png") if not path.name.startswith("sheet"))
    assert len(files) == 4
    assert len({(made / name).read_bytes() for name in files}) == 4
    # the same names with other vectors: only the pictures that have them are drawn again
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(9))
    save_file({"x": vectors}, tmp_path / "look.safetensors")
    fault = embedded.embeddings[1]
    other = replace(open_run(folder, [str(tmp_path / "look.safetensors")]))
    other.embeddings = (*other.embeddings, fault)
    draw_grid(other, plan(other, "embedding=none,look", "negative-embedding=none,fault"), "embedded")
    after = sorted(path.name for path in made.glob("*.png") if not path.name.startswith("sheet"))
    assert len(set(after) - set(files)) == 2
