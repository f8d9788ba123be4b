"""The Colab notebook is valid, its commands exist in this version, and they run."""

import ast
import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.options.arguments import Compare, Export, Init, Prepare, Report, Sample
from safelight.options.parsing import parse, parse_with_config
from safelight.trainer.tiny.scenes import caption, draw, random_scene

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "colab_t4.ipynb"
SHAPES = {"init": Init, "prepare": Prepare, "sample": Sample, "compare": Compare, "export": Export, "report": Report}


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def lines_of(cells: list[dict]) -> list[str]:
    """Return the lines that are shell commands, without the leading `!`."""
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [line[1:] for source in sources for line in source.splitlines() if line.startswith("!")]


def commands_of(cells: list[dict]) -> list[list[str]]:
    """Return the arguments of each `safelight` command, without a condition before ` || `."""
    lines = [line.rpartition(" || ")[2] for line in lines_of(cells)]
    return [shlex.split(line)[1:] for line in lines if line.startswith("safelight ")]


def test_it_is_a_notebook_of_format_4_5():
    """Checks the parts of nbformat's schema that apply to this notebook's cells."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    wanted = {
        "markdown": {"cell_type", "id", "metadata", "source"},
        "code": {"cell_type", "id", "metadata", "source", "outputs", "execution_count"},
    }
    for cell in notebook["cells"]:
        assert set(cell) == wanted[cell["cell_type"]]
        assert re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", cell["id"])
        assert all(isinstance(line, str) for line in cell["source"])
        # committed without outputs
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


def test_the_cells_are_python_once_their_shell_lines_are_out(cells):
    for cell in cells:
        if cell["cell_type"] == "code":
            ast.parse("\n".join("pass" if s[:1] in ("!", "%") else s for s in "".join(cell["source"]).splitlines()))


def test_torch_is_kept_as_it_is(cells):
    installs = [line for line in lines_of(cells) if "pip install" in line]
    assert installs
    assert all("-c keep.txt" in line and "torch" not in line for line in installs)
    # "Run all" must stop without a GPU or if the installation fails; Jupyter does not stop after a failed command
    (cell,) = (cell for cell in cells if any("pip install" in line for line in cell["source"]))
    for begin in ("!nvidia-smi", "!test -d", "!pip install"):
        (number,) = (n for n, line in enumerate(cell["source"]) if line.startswith(begin))
        assert cell["source"][number + 1].startswith("assert _exit_code == 0, ")
    assert any("torch.__version__" in line and line.endswith("> keep.txt") for line in lines_of(cells))


def test_every_command_is_one_of_this_version(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from safelight.trainer.config.presets import preset
    from safelight.trainer.config.toml import to_toml

    (tmp_path / "run.toml").write_text(to_toml(preset("sd15")))
    commands = commands_of(cells)
    # the order of commands in a first session
    assert [words[0] for words in commands] == [
        "prepare",
        "init",
        "plan",
        "train",
        "compare",
        "report",
        "sample",
        "export",
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    for name, *rest in commands:
        rest = [word.replace("$HOME_OF_RUNS", str(tmp_path)) for word in rest]
        if name in SHAPES:
            parse(SHAPES[name], rest, name, "")
        else:
            parse_with_config(rest, name, "")
    with pytest.raises(ValueError, match="no-such"):
        parse(Export, ["run", "-o", "x", "--no-such", "1"], "export", "")
    train = next(words for words in commands if words[0] == "train")
    # what a disconnected session needs: settings are not overwritten, and the run is on the Drive
    assert "--resume" in train
    assert "$HOME_OF_RUNS/run" in train
    assert all("$HOME_OF_RUNS" in " ".join(words) for words in commands)
    (init,) = (line for line in lines_of(cells) if "safelight init" in line)
    assert init.startswith('test -f "$HOME_OF_RUNS/run.toml" || ')
    assert "--force" not in init


def photographs(folder: Path) -> None:
    """Write the photographs that a user would upload next to the notebook."""
    photos = folder / "safelight_home" / "photos"
    photos.mkdir(parents=True)
    for number in range(8):
        scene = random_scene(7, number)
        draw(scene).save(photos / f"{number:03d}.png")
        (photos / f"{number:03d}.txt").write_text(caption(scene, 7, number))


def small(line: str, max_steps: int) -> str:
    """Return a cell's line changed to train the tiny base for a few steps on a CPU, with this Python."""
    steps = f"--train.max-steps {max_steps} --data.variants 1 --train.checkpointing none --sample.every-epochs 0"
    # a CPU trains fp32 weights, for which optimizer.memory does not apply
    for name, here in (("init sd15", "init tiny"), (" --optimizer.memory near", "")):
        line = line.replace(name, here)
    condition, separator, command = line.rpartition(" || ")
    if command.startswith(("safelight ", "!safelight ")):
        command = command.replace("safelight ", f"{sys.executable} -m safelight ", 1)
    return condition + separator + command.replace("--train.checkpointing full", steps)


def assert_complete(home: Path) -> None:
    assert (home / "mine.safetensors").is_file()
    rows = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("event") == "resumed" for row in rows)
    assert max(row["step"] for row in rows) == 3


@pytest.mark.slow
def test_it_runs_in_a_notebook_runner(tmp_path):
    """Every cell but the installation, in Jupyter's own kernel; a second time, as after a disconnected session."""
    nbclient = pytest.importorskip("nbclient", reason="no notebook runner is installed: pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    photographs(tmp_path)
    for max_steps in (2, 3):
        notebook = nbformat.read(NOTEBOOK, 4)
        notebook.cells = [cell for cell in notebook.cells if "pip install" not in cell.source]
        for cell in notebook.cells:
            if cell.cell_type == "code":
                lines = [small(line, max_steps) for line in cell.source.splitlines()]
                # Jupyter continues after a failed command
                cell.source = "\n".join(
                    f"{line}\nassert _exit_code == 0, {line!r}" if line.startswith("!") else line for line in lines
                )
        runner = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
        runner.execute()
    home, cells = tmp_path / "safelight_home", {cell.id: cell for cell in notebook.cells}
    assert_complete(home)

    def shown(cell: str, kind: str) -> list[str]:
        return [output.data[kind] for output in cells[cell].outputs if kind in output.get("data", {})]

    # the whole report, in a frame that confines its styles; the pictures of both sessions
    (frame,) = shown("c14", "text/html")
    (page,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(page) == (home / "run" / "report.html").read_text()
    assert len(shown("c17", "image/png")) == len(list((tmp_path / "images").glob("*.png"))) == 2
    printed = "".join(output.get("text", "") for output in cells["c11"].outputs)
    assert "training 3/3" in printed


@pytest.mark.slow
def test_it_runs_on_the_tiny_base(cells, tmp_path):
    """Every code cell but the installation, on a CPU with the tiny preset; again, as after a disconnected session."""
    photographs(tmp_path)
    script = ["import os", f"os.chdir({str(tmp_path)!r})", "def display(*x): pass", "_exit_code = 0"]

    def build(max_steps: int) -> str:
        lines = list(script)
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or "pip install" in source:
                continue
            # there is no display here
            source = re.sub(r"^from IPython\.display import .*$", "HTML = Image = str", source, flags=re.M)
            source = source.replace("display(HTML(", "open('shown.html', 'w').write((")
            for line in source.splitlines():
                if not line.startswith("!"):
                    lines.append(line)
                    continue
                words = small(line[1:], max_steps)
                lines.append(f"assert os.system({words!r}) == 0, {words!r}")
        return "\n".join(lines)

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for max_steps in (2, 3):
        file = tmp_path / f"cells{max_steps}.py"
        file.write_text(build(max_steps))
        done = subprocess.run(
            [sys.executable, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    home = tmp_path / "safelight_home"
    assert_complete(home)
    assert list((tmp_path / "images").glob("*.png"))
    # the whole report, in a frame that confines its styles
    shown = (tmp_path / "shown.html").read_text()
    assert shown.startswith("<iframe srcdoc=")
    (page,) = re.findall(r'srcdoc="([^"]*)"', shown)
    assert html.unescape(page) == (home / "run" / "report.html").read_text()
