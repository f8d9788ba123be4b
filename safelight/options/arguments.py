"""The arguments of each command, as dataclasses for tyro; imported when a command is run."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro
from tyro.conf import DisallowNone, FlagConversionOff, Positional, arg

from safelight.errors import UserError
from safelight.options.option_help import described
from safelight.options.overrides import take_overrides
from safelight.output.columns import wrap_help
from safelight.trainer.config.presets import PRESETS
from safelight.trainer.config.toml import Config, load_config, parse_config, require_run

_T = TypeVar("_T")
RunFolder = Annotated[Positional[Path], arg(metavar="RUN", help="run folder, for example runs/tiny")]


@dataclass
class Init:
    preset: Annotated[
        Positional[str], arg(metavar="PRESET", help="; ".join(f"{name}: {text}" for name, (text, _) in PRESETS.items()))
    ]
    out: Annotated[Path, arg(aliases=["-o"], metavar="FILE", help="file to write")] = Path("run.toml")
    force: Annotated[bool, arg(help="replace the file if it is there")] = False


@dataclass
class Prepare:
    sources: Annotated[
        Positional[tuple[Path, ...]],
        arg(metavar="SRC...", help="folders of photos, or files", help_behavior_hint="(required)"),
    ]
    out: Annotated[Path, arg(aliases=["-o"], metavar="DATASET", help="folder to write")] = Path("datasets/photos")
    max_megapixels: Annotated[float, arg(help="larger photos are shrunk to so many million pixels")] = 1.5
    quality: Annotated[int, arg(help="how well photos are encoded that had to be shrunk or turned, 1 to 100")] = 95
    image_format: Annotated[Literal["jpeg", "webp"], arg(help="what those photos are encoded as")] = "jpeg"
    json: Annotated[bool, arg(help="print the result as JSON")] = False


def _own(metavar: str, text: str, default: str) -> object:
    """Return the help of an option that has no value of its own unless it is given."""
    return arg(metavar=metavar, help=text, help_behavior_hint=f"(default: {default})")


@dataclass
class Sample:
    run: RunFolder
    prompt: Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]", help="one image for each")]
    checkpoint: Annotated[str, arg(metavar="WHICH", help="last, best, base or a step's number")] = "last"
    steps: Annotated[int | None, _own("INT", "denoising steps", "the run's")] = None
    cfg: Annotated[float | None, _own("FLOAT", "guidance scale; 1: none", "the run's")] = None
    seed: Annotated[int | None, _own("INT", "of the noise", "the run's")] = None
    width: Annotated[int | None, _own("INT", "of the images, in px", "the run's")] = None
    height: Annotated[int | None, _own("INT", "of the images, in px", "the run's")] = None
    sampler: Annotated[
        Literal["ddim", "dpm++", "euler"] | None, _own("{ddim,dpm++,euler}", "how to denoise", "the run's")
    ] = None
    negative_prompt: Annotated[str | None, _own("TEXT", "what guidance points away from", "the run's")] = None
    out: Annotated[Path | None, arg(aliases=["-o"]), _own("FOLDER", "where the images go", "RUN/images")] = None


@dataclass
class Compare:
    run: RunFolder
    checkpoint: Annotated[str, arg(metavar="WHICH", help="last, best or a step's number")] = "last"
    num: Annotated[int, arg(help="how many pairs: the run's prompts, then captions of held-out photographs")] = 8


@dataclass
class Export:
    run: RunFolder
    out: Annotated[
        Path, arg(aliases=["-o"], metavar="FILE", help="NAME.safetensors for one file, any other name for a folder")
    ]
    checkpoint: Annotated[str, arg(metavar="WHICH", help="last, best or a step's number")] = "last"
    dtype: Annotated[Literal["fp16", "bf16", "fp32"], arg(help="of the weights that are written")] = "fp16"
    weights: Annotated[
        Literal["auto", "ema", "trained"],
        arg(help="auto: the moving average where the run keeps one, else the last step's weights"),
    ] = "auto"
    title: Annotated[str, _own("TEXT", "what a file calls the model", "the run's name and step")] = ""
    force: Annotated[bool, arg(help="replace what is there")] = False


@dataclass
class Report:
    run: RunFolder


@dataclass
class Demo:
    dir: Annotated[Path, arg(metavar="FOLDER", help="where to work; an earlier demo there is replaced")] = Path(
        "runs/demo"
    )
    json: Annotated[bool, arg(help="print the scores as JSON")] = False


ConfigFile = Annotated[
    Positional[Path], arg(metavar="RUN.TOML", help="the run's settings", help_behavior_hint="(required)")
]
# shown in the help; overrides.py takes the settings out of the arguments before tyro reads them
Settings = Annotated[FlagConversionOff[Config], arg(name="")]


@dataclass
class TrainArguments:
    config: ConfigFile
    settings: Settings
    resume: Annotated[bool, arg(help="go on from the newest checkpoint of run.dir")] = False


@dataclass
class PrintingArguments:
    config: ConfigFile
    settings: Settings
    json: Annotated[bool, arg(help="print the result as JSON")] = False


@dataclass
class ProfileArguments:
    config: ConfigFile
    settings: Settings
    steps: Annotated[int, arg(help="steps under the profiler, after some to warm up")] = 5
    out: Annotated[Path, arg(aliases=["-o"], metavar="FOLDER", help="where the trace, the page and the figures go")] = (
        Path("runs/profile")
    )
    append: Annotated[
        Path | None, arg(metavar="FILE", help="add the figures to this .jsonl", help_behavior_hint="(default: none)")
    ] = None
    json: Annotated[bool, arg(help="print the result as JSON")] = False


@dataclass
class PlanArguments:
    config: ConfigFile
    settings: Settings
    gpu: Annotated[
        str,
        _own("CARD", "card to plan for: t4, rtx3060, rtx4090, ..., or its memory: 8GiB", "auto: the one that is here"),
    ] = ""
    json: Annotated[bool, arg(help="print the result as JSON")] = False


# of a command that takes a run.toml: said once, above its options
SETTINGS_TEXT = (
    "Every setting of RUN.TOML can be given as an option, which counts more than the file: --train.batch-size 2; "
    "those of a stage by its number: --stage.0.lr 1e-6."
)
_WITH_CONFIG = {"train": TrainArguments, "plan": PlanArguments, "profile": ProfileArguments}


class _LikeStdout(io.StringIO):
    """Keeps what is printed, in the colours and frames that stdout itself would be given."""

    def __init__(self):
        super().__init__()
        self._stdout = sys.stdout

    def isatty(self) -> bool:
        return self._stdout.isatty()

    @property
    def encoding(self) -> str:
        return self._stdout.encoding


def parse(shape: type[_T], argv: list[str], command: str, description: str, default: _T | None = None) -> _T:
    """Return a command's arguments; --help prints and exits. Raises UserError, one line, for a mistake."""
    mistake, told = io.StringIO(), _LikeStdout()
    try:
        with contextlib.redirect_stderr(mistake), contextlib.redirect_stdout(told):
            arguments = tyro.cli(
                shape,
                args=argv,
                prog=f"safelight {command}",
                default=default,
                description=description,
                registry=described(),
                config=(tyro.conf.FlagCreatePairsOff, DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            print(wrap_help(told.getvalue()))
            raise
        line = _one_line(mistake.getvalue()).replace(f"Missing from safelight {command}:", "missing:")
        raise UserError(f"{line}; see safelight {command} --help") from None
    run = getattr(arguments, "run", None)
    if isinstance(run, Path):
        # before torch and diffusers are imported
        require_run(run)
    return arguments


def _one_line(box: str) -> str:
    """Return what tyro says below a title, in a box or between rules of ASCII, as a line: without title and help texts.

    Help texts, of the options it names, are indented by ten.
    """
    # an option that is left out is None to us, and no choice of the user's
    box = box.replace("'None', ", "")
    texts = [line.replace("│", " ").rstrip() for line in box.splitlines()[1:]]
    words = [";" if "───" in text or "---" in text else text for text in texts if not text.startswith(" " * 10)]
    told = re.split(r" ; (?:For full|Argument) helptext", " ".join(" ".join(words).split()))[0]
    return told.replace(" ;", ";").strip(".; ")


def is_of_run(path: Path) -> bool:
    """Return whether a config lies in a run folder, which is then the run's, whatever run.dir in it says."""
    return path.name == "config.toml" and (path.parent / "environment.json").is_file()


def parse_with_config(
    argv: list[str], command: str, description: str
) -> tuple[TrainArguments | PlanArguments | PrintingArguments | ProfileArguments, Config]:
    """Return (arguments, Config) of a command that takes a run.toml and any setting of it.

    Raises UserError for a mistake in the file or in a setting.
    """
    asks_help = any(a in ("-h", "--help") for a in argv)
    path = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    if path is None and not asks_help:
        raise UserError(f"the config comes first: safelight {command} run.toml (write one with `safelight init`)")
    if path is not None and (path / "config.toml").is_file():
        raise UserError(f"{path} is a run folder; give its settings: safelight {command} {path / 'config.toml'}")
    config = load_config(path) if path is not None else Config()
    if path is not None and is_of_run(path):
        # the folder may have been moved, or was named from elsewhere
        config.run.dir = str(path.parent)
    if config.stage and any(a.split("=")[0] == "--train.epochs" for a in argv):
        raise UserError("command line: train.epochs has no effect beside [[stage]] tables; give --stage.0.epochs")
    others, settings = take_overrides(argv, config.model_dump(by_alias=True))
    config = parse_config(settings, "command line")
    shape = _WITH_CONFIG.get(command, PrintingArguments)
    description = f"{description}.\n\n{SETTINGS_TEXT}"
    return parse(shape, others, command, description, shape(path or Path("run.toml"), config)), config
