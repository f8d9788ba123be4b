"""User mistakes: sources without photographs, wrong configs, impossible paths.

Each is refused with one line and exit status 2, and nothing is written. A case gets a folder with `photos/` (two
photographs), `dataset/` (prepared from a third) and `run.toml`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mistake:
    """One case. words(place): makes the mistake and returns the command's arguments. says: part of the error line."""

    name: str
    words: Callable[[Path], list]
    says: str


def source(make: Callable[[Path], object]) -> Callable[[Path], list]:
    """Return a case's `words` that fill the folder `hostile` with `make` and prepare it."""

    def words(place: Path) -> list:
        (place / "hostile").mkdir()
        make(place / "hostile")
        return ["prepare", place / "hostile", "-o", place / "dataset"]

    return words


def toml(content: str | bytes, command: str = "plan") -> Callable[[Path], list]:
    """Return a case's `words` that run a command on a config with this content."""

    def words(place: Path) -> list:
        path = place / "hostile.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [command, path]

    return words


def given(command: str, *options: str) -> Callable[[Path], list]:
    """Return a case's `words` that run a command with options on the good config; {place} is the folder."""
    return lambda place: [command, place / "run.toml", *(option.format(place=place) for option in options)]


def nothing(folder: Path) -> None:
    pass


def only_text(folder: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_text("no picture")


def a_pickle(folder: Path) -> list[str]:
    """Make a base whose UNet is a pickle that would create a folder if loaded; return the option that selects it."""
    import pickle
    import shutil

    from safelight.trainer.models.base import tiny_folder

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "loaded"),)

    shutil.copytree(tiny_folder(), folder / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    for part in ("vae", "text_encoder"):
        for path in (tiny_folder() / part).glob("*.safetensors"):
            shutil.copy(path, folder / "base" / part)
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "model.pt"):
        (folder / "base" / "unet" / name).write_bytes(pickle.dumps(Bomb()))
    return ["--model.base", str(folder / "base")]


def garbage_weights(folder: Path) -> list[str]:
    options = a_pickle(folder)
    (folder / "base" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 5000)
    return options


def a_run(folder: Path, config: str) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text(config)
    return folder


def a_run_with_metrics(folder: Path) -> Path:
    (a_run(folder, "") / "metrics.jsonl").write_text("")
    return folder


def based(make: Callable[[Path], list[str]]) -> Callable[[Path], list]:
    return lambda place: ["train", place / "run.toml", *make(place)]


def a_file(name: str, command: str, *options: str) -> Callable[[Path], list]:
    def words(place: Path) -> list:
        (place / name).write_text("a file")
        return given(command, *options)(place)

    return words


MISTAKES = [
    Mistake("empty folder", source(nothing), "no photos found in"),
    Mistake("nothing left after filtering", source(only_text), "2 rejected); the first is "),
    Mistake(
        "folder of captions alone", source(lambda folder: (folder / "a.txt").write_text("a")), "no photos found in"
    ),
    Mistake(
        "source that is not there", lambda place: ["prepare", place / "gone", "-o", place / "dataset"], "does not exist"
    ),
    Mistake(
        "source of a name too long", lambda place: ["prepare", "a" * 5000, "-o", place / "dataset"], "does not exist"
    ),
    Mistake(
        "source that is a link to itself",
        lambda place: [(place / "loop").symlink_to("loop"), "prepare", place / "loop", "-o", place / "dataset"][1:],
        "does not exist",
    ),
    Mistake(
        "dataset in the source's place",
        lambda place: ["prepare", place / "photos", "-o", place / "photos"],
        "is inside the dataset folder",
    ),
    Mistake(
        "source inside the dataset",
        lambda place: ["prepare", place / "dataset" / "images", "-o", place / "dataset"],
        "is inside the dataset folder",
    ),
    Mistake(
        "dataset that is a file",
        lambda place: ["prepare", place / "photos", "-o", place / "run.toml"],
        "is a file; give a folder",
    ),
    Mistake(
        "dataset below a file",
        lambda place: ["prepare", place / "photos", "-o", place / "run.toml" / "x"],
        "is a file or its path leads through one; choose another",
    ),
    Mistake(
        "quality 0",
        lambda place: ["prepare", place / "photos", "-o", place / "dataset", "--quality", "0"],
        "quality 0 is outside 1 to 100",
    ),
    Mistake(
        "no megapixels",
        lambda place: ["prepare", place / "photos", "-o", place / "dataset", "--max-megapixels", "nan"],
        "max_megapixels nan is below 0.01",
    ),
    Mistake(
        "dataset in a run folder",
        lambda place: ["prepare", place / "photos", "-o", a_run_with_metrics(place / "run")],
        "run is a run folder; choose another dataset folder with -o",
    ),
    Mistake(
        "pruning by one photo",
        lambda place: ["prepare", next((place / "photos").glob("*.png")), "-o", place / "dataset", "--prune"],
        "--prune compares the dataset with whole folders, and ",
    ),
    Mistake("unknown table", toml("[trian]\nepochs = 3\n"), "trian is not a setting; did you mean train?"),
    Mistake(
        "unknown setting",
        toml("[train]\nbatchsize = 3\n"),
        "train.batchsize is not a setting; did you mean train.batch_size?",
    ),
    Mistake("word for a number", toml('[train]\nbatch_size = "four"\n'), "train.batch_size = 'four': "),
    Mistake("truth for a number", toml("[train]\nbatch_size = true\n"), "expected a number or text, got a boolean"),
    Mistake("fraction for a count", toml("[train]\nepochs = 1.5\n"), "train.epochs = 1.5: "),
    Mistake("value for a table", toml("train = 3\n"), "expected a table, [train]"),
    Mistake("table for a value", toml("[train.batch_size]\na = 1\n"), "train.batch_size = {'a': 1}: "),
    Mistake("batch of none", toml("[train]\nbatch_size = 0\n"), "train.batch_size = 0: expected 1 or more"),
    Mistake("learning rate -1", toml("[optimizer]\nlr = -1\n"), "optimizer.lr = -1: expected more than 0"),
    Mistake("learning rate that is no number", toml("[optimizer]\nlr = nan\n"), "optimizer.lr = nan: "),
    Mistake("learning rate without end", toml("[optimizer]\nlr = 1e400\n"), "optimizer.lr = inf: "),
    Mistake(
        "validation of one and a half",
        toml("[data]\nvalidation_fraction = 1.5\n"),
        "data.validation_fraction = 1.5: expected less than 1",
    ),
    Mistake(
        "validation of everything", toml("[data]\nvalidation_fraction = 1.0\n"), "data.validation_fraction = 1.0: "
    ),
    Mistake(
        "resolution that is no multiple",
        given("cache", "--data.resolution", "500"),
        "resolution 500 is not a multiple of 8; use 496 or 504",
    ),
    Mistake("resolution of 0", given("cache", "--data.resolution", "0"), "data.resolution = 0: "),
    Mistake("stage of no epochs", toml("[[stage]]\nepochs = 0\n"), "stage.0.epochs = 0: "),
    Mistake("seed below 0", given("plan", "--run.seed", "-1"), "run.seed = -1: "),
    Mistake("unknown preset", lambda place: ["init", "sd99", "-o", place / "new.toml"], "sd99"),
    Mistake("unknown GPU", given("plan", "--gpu", "voodoo2"), "gpu"),
    Mistake("unknown device", given("train", "--run.device", "tpu"), "run.device = 'tpu': "),
    Mistake("setting a second time", toml("[train]\nepochs = 1\nepochs = 2\n"), "is not valid TOML"),
    Mistake("config cut short", toml("[train]\nepochs = "), "is not valid TOML"),
    Mistake("config of bytes", toml(b"\xff\xfe\0\0\x80"), "is not valid TOML"),
    Mistake(
        "config in UTF-16", toml("[train]\nepochs = 1\n".encode("utf-16")), "(it looks like UTF-16); save it as UTF-8"
    ),
    Mistake(
        "config in UTF-16 without a mark",
        toml("[train]\nepochs = 1\n".encode("utf-16-le")),
        "(it looks like UTF-16); save it as UTF-8",
    ),
    Mistake(
        "path with a backslash that is an escape",
        toml('[run]\ndir = "runs\\new"\n'),
        r"run.dir = 'runs\new': it contains a control character; write / or use single quotes ('runs\new')",
    ),
    Mistake(
        "path with a backslash that is no escape",
        toml('[data]\npath = "my\\photos"\n'),
        "write / or use single quotes",
    ),
    Mistake(
        "path with a backslash before U",
        toml('[model]\nbase = "C:\\Users\\me"\n'),
        "write / or use single quotes",
    ),
    Mistake("config with NUL", toml(b"[train]\nepochs = 1\0\n"), "is not valid TOML"),
    Mistake("config nested without end", toml("a = " + "[" * 100_000), "nested too deeply"),
    Mistake("config that is a folder", lambda place: ["plan", place / "photos"], "photos is a folder without a config"),
    Mistake(
        "run folder whose config is cut short",
        lambda place: ["train", a_run(place / "r", "[tr")],
        "r/config.toml is not valid TOML",
    ),
    Mistake(
        "settings file of a long name",
        lambda place: ["init", "tiny", "-o", place / f"{'n' * 240}.toml"],
        "/" + "n" * 240 + ".toml: File name too long",
    ),
    Mistake(
        "settings file below a file",
        lambda place: ["init", "tiny", "-o", place / "run.toml" / "new.toml"],
        "run.toml is not a folder",
    ),
    Mistake("no preset", lambda place: ["init"], "give a preset: tiny, "),
    Mistake(
        "a demo where a file is",
        lambda place: ["demo", "--dir", place / "run.toml"],
        "is a file; give a folder with --dir",
    ),
    Mistake("no such benchmark", lambda place: ["bench", "stp"], "unknown benchmark 'stp'; did you mean step?"),
    Mistake(
        "no such optimizer to bench",
        lambda place: ["bench", "roofline", "--optimizer", "near"],
        "unknown optimizer 'near'; use a name of [optimizer]",
    ),
    Mistake(
        "memory mode of 16 bits to bench in 32",
        lambda place: ["bench", "memory", "--optimizer", "near", "--precision", "fp32"],
        "--optimizer near is a memory mode of 16-bit weights, and these are fp32; add --precision bf16",
    ),
    Mistake(
        "no repeats to bench",
        lambda place: ["bench", "step", "--repeats", "0"],
        "--repeats 0 is below 1; use 1 or more",
    ),
    Mistake(
        "batches of none to bench",
        lambda place: ["bench", "step", "--batch-size", "2", "0"],
        "--batch-size 0 is below 1; use 1 or more",
    ),
    Mistake(
        "more steps to profile than the run has",
        given("profile", "--steps", "100000", "-o", "{place}/profile"),
        "--steps 100000: the run has only 30 steps; lower --steps, or train for more epochs",
    ),
    Mistake(
        "no such optimizer to bench by memory",
        lambda place: ["bench", "memory", "--optimizer", "adam"],
        "unknown optimizer 'adam'; use adamw8bit, ",
    ),
    Mistake("config that is not there", lambda place: ["train", place / "gone.toml"], "does not exist"),
    Mistake(
        "config that is a picture",
        lambda place: ["train", next((place / "photos").glob("*.png"))],
        "is not valid TOML",
    ),
    Mistake(
        "run folder that is a file",
        a_file("busy", "train", "--run.dir", "{place}/busy"),
        "busy is a file or its path leads through one; name another --run.dir",
    ),
    Mistake(
        "run folder below a file",
        a_file("busy", "train", "--run.dir", "{place}/busy/run"),
        "busy/run is a file or its path leads through one; name another --run.dir",
    ),
    Mistake(
        "run folder with NUL in its name",
        toml('[run]\ndir = "a\\u0000b"\n', "train"),
        r"run.dir = 'a\x00b': it contains a control character",
    ),
    Mistake(
        "run folder of a name too long",
        given("train", "--run.dir", "{place}/" + "a" * 300),
        "cannot be written (File name too long)",
    ),
    Mistake(
        "dataset with NUL in its name",
        toml('[data]\npath = "a\\u0000b"\n', "cache"),
        r"data.path = 'a\x00b': it contains a control character",
    ),
    Mistake(
        "dataset that was not prepared",
        given("train", "--data.path", "{place}/photos"),
        "photos holds photographs and is no dataset yet; run `safelight prepare ",
    ),
    Mistake("a model of pickles", based(a_pickle), "other formats are never loaded"),
    Mistake("a model of garbage", based(garbage_weights), "its weights are damaged or do not fit"),
    Mistake("a model that is not there", given("train", "--model.base", "{place}/gone"), "model.base"),
    Mistake("a model that is a folder of photos", given("train", "--model.base", "{place}/photos"), "model.base"),
    Mistake("an autoencoder that is none", given("train", "--model.vae", "{place}/photos"), "model.vae"),
]
