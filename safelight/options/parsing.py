"""Reads the arguments of a command, and the settings file or run folder that they name.

Whatever is wrong is said in one line, before torch and diffusers are imported.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import DisallowNone

from safelight.errors import UserError
from safelight.options.arguments import CacheArguments, PlanArguments, ProfileArguments, TrainArguments
from safelight.options.option_help import EMPTY_PATH, described
from safelight.options.overrides import names_config, take_overrides, with_overrides
from safelight.output.columns import wrap_help
from safelight.trainer.config.names_elsewhere import instead_of, setting_named
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import COMMAND_LINE, load_config, parse_config, require_run
from safelight.trainer.registry.samplers import sampler_named

_T = TypeVar("_T")
# a path that no file can have stands for an argument that was not given, of which tyro would speak in its own words
_NOT_GIVEN = Path("\0")
# how the help names a path that is given by its position or a short option
SHOWN = {"run": "RUN", "runs": "RUN", "dataset": "DATASET", "config": "RUN.TOML", "sources": "SRC", "out": "-o"}
# in the help of commands that take a run.toml, once, above the options
SETTINGS_TEXT = (
    "Every setting in RUN.TOML can be overridden by an option: --train.batch-size 2; settings of a stage by its "
    "number, from 0 on: --stage.0.lr 1e-6."
)
_WITH_CONFIG = {"train": TrainArguments, "cache": CacheArguments, "plan": PlanArguments, "profile": ProfileArguments}


class _LikeStdout(io.StringIO):
    """Buffers output, and looks like stdout to code that chooses colors and box characters."""

    def __init__(self):
        super().__init__()
        self._stdout = sys.stdout

    def isatty(self) -> bool:
        return self._stdout.isatty()

    @property
    def encoding(self) -> str:
        return self._stdout.encoding


# before a value that begins like an option, so that tyro takes it for one of several; no argument can hold it
_VALUE = "\0"
# an option, and no negative number
_FLAG = re.compile("--?[A-Za-z]|--$")


def parse(shape: type[_T], argv: list[str], command: str, description: str, default: _T | None = None) -> _T:
    """Return a command's arguments; --help prints and exits. Raises UserError, a single line, for invalid ones."""
    errors, output = io.StringIO(), _LikeStdout()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
            arguments = tyro.cli(
                shape,
                args=_gathered(shape, argv),
                prog=f"safelight {command}",
                default=default,
                description=description,
                registry=described(),
                config=(tyro.conf.FlagCreatePairsOff, DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            print(wrap_help(output.getvalue()))
            raise
        line = _one_line(errors.getvalue().replace(_VALUE, "")).replace(
            f"Missing from safelight {command}:", "missing:"
        )
        if line.lower().startswith("missing") and (unknown := _unknown_flags(shape, argv)):
            # tyro would speak only of the argument that the unknown option took for its value
            line = f"Unrecognized options: {', '.join(unknown)}"
        if command in _WITH_CONFIG and (here := _named_elsewhere(shape, argv)):
            line = here
        if "--lora" in _unknown_flags(shape, argv):
            line = (
                "--lora is not an option: a run draws with the LoRA that it trained, of which --lora-scale says how "
                "much, and reads no others; a word goes with --embedding"
            )
        if dashed := _dashed_text(shape, argv):
            line = f"{line}; a text that begins with a dash is given as {dashed}"
        raise UserError(f"{line}; see safelight {command} --help") from None
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        if isinstance(value, tuple) and any(isinstance(item, str) and item.startswith(_VALUE) for item in value):
            setattr(arguments, field.name, tuple(item.removeprefix(_VALUE) for item in value))
        # as "$UNSET" gives
        if value == EMPTY_PATH or (isinstance(value, tuple) and EMPTY_PATH in value):
            shown = SHOWN.get(field.name, f"--{field.name.replace('_', '-')}")
            raise UserError(f"{shown} is empty; name a path (. is the current folder)")
        if isinstance(value, Path):
            setattr(arguments, field.name, _expanded(value))
        elif isinstance(value, tuple) and any(isinstance(item, Path) for item in value):
            setattr(arguments, field.name, tuple(map(_expanded, value)))
    if isinstance(getattr(arguments, "sampler", None), str):
        try:
            arguments.sampler = sampler_named(arguments.sampler)
        except UserError as error:
            raise UserError(f"--{error}") from None
    run = getattr(arguments, "run", None)
    if isinstance(run, Path):
        # before torch and diffusers are imported
        arguments.run = run_folder(run)
    return arguments


def _gathered(shape: type, argv: list[str]) -> list[str]:
    """Return the arguments with all values of an option that takes several behind its first: -p A -p B is -p A B."""
    for name, is_text in _lists_of(shape).items():
        flag, words, values, place = f"--{name.replace('_', '-')}", [], [], None
        is_value = False
        for word in argv:
            option, equals, value = word.partition("=")
            if option.replace("_", "-") == flag:
                place, is_value = len(words) if place is None else place, not equals
                values += [f"{_VALUE}{value}" if is_text and value.startswith("-") else value] if equals else []
            elif is_value and not _FLAG.match(word):
                values.append(word)
            else:
                is_value = False
                words.append(word)
        if place is not None:
            argv = [*words[:place], flag, *values, *words[place:]]
    return argv


def _lists_of(shape: type) -> dict[str, bool]:
    """Return the options that take several values -> whether they are texts."""
    kinds = get_type_hints(shape)
    return {
        name: get_args(kinds[name])[0] is str
        for name, hint in get_type_hints(shape, include_extras=True).items()
        if get_origin(kinds[name]) is tuple
        and not any(marker in str(hint) for marker in ("AppendAction", "Positional"))
    }


def _dashed_text(shape: type, argv: list[str]) -> str:
    """Return how the first word with a single dash behind an option that takes texts is given: --prompt=-5. '' if none.

    Such a word is taken for an option.
    """
    flags = {f"--{name.replace('_', '-')}" for name, is_text in _lists_of(shape).items() if is_text}
    for before, word in itertools.pairwise(argv):
        if before.replace("_", "-") in flags and re.match("-[A-Za-z]", word) and word != "-h":
            return shlex.quote(f"{before}={word}")
    return ""


def _unknown_flags(shape: type, argv: list[str]) -> list[str]:
    """Return the arguments that begin with -- and are no option of the command."""
    known = {f"--{field.name.replace('_', '-')}" for field in fields(shape)} | {"--help", "--"}
    return [word for word in argv if word.startswith("--") and word.split("=")[0].replace("_", "-") not in known]


def _named_elsewhere(shape: type, argv: list[str]) -> str:
    """Return what options that other trainers have are called here, or what to do instead, '' if there are none."""
    found = []
    for option in (word.split("=")[0] for word in _unknown_flags(shape, argv)):
        named, advice = setting_named(option[2:]), instead_of(option[2:])
        if named or advice:
            here = f"here: --{'.'.join(named).replace('_', '-')}" if named else advice
            found.append(f"{option} is not an option; {here}")
    return "; ".join(found)


def without_options(argv: list[str], flags: tuple[str, ...], valued: tuple[str, ...]) -> list[str]:
    """Return a command's arguments without some options. flags: options without a value. valued: those with one."""
    kept, is_value = [], False
    for word in argv:
        name = word.partition("=")[0].replace("_", "-")
        if not is_value and name not in (*flags, *valued):
            kept.append(word)
        is_value = not is_value and name in valued and "=" not in word
    return kept


def _expanded(path: Path) -> Path:
    """Return a path with ~ replaced by the home folder: shells leave it alone in --out=~/x."""
    return Path(os.path.expanduser(path))


def _one_line(box: str) -> str:
    """Return tyro's error message as one line, without its title, frame and help texts.

    tyro draws a box, or ASCII rules, below a title. It repeats the help of the options it names, indented by ten.
    """
    texts = [line.replace("│", " ").rstrip() for line in box.splitlines()[1:]]
    words = [";" if "───" in text or "---" in text else text for text in texts if not text.startswith(" " * 10)]
    message = re.split(r" ; (?:For full|Argument) helptext", " ".join(" ".join(words).split()))[0]
    message = re.sub(r"(?<=Expected one of )\(([^()]*)\)", _choices, message)
    # in our words: tyro's message names the Python type and its parser
    message = re.sub(
        r"Error parsing (\S+): no type matching (INT|FLOAT) could be instantiated from \['(.*?)'\].*",
        lambda found: f"{found[1]} {found[3]} is not a {'whole ' if found[2] == 'INT' else ''}number",
        message,
    )
    return message.replace(" ;", ";").strip(".; ")


def _choices(found: re.Match) -> str:
    """Return tyro's list of choices in one order: it prints a set, in another at every start.

    None stands for an option that was not given; a user cannot choose it.
    """
    names = {name.strip() for name in found[1].split(",")} - {"'None'", ""}
    return f"({', '.join(sorted(names))})"


def is_of_run(path: Path) -> bool:
    """Return whether a config file is the one inside a run folder; that folder then overrides its run.dir.

    Any of a run's own files beside it makes it one, so that damage does not turn it into settings for another folder.
    """
    beside = ("environment.json", "metrics.jsonl", "model.json", "checkpoints")
    return path.name == "config.toml" and any(os.path.lexists(path.parent / name) for name in beside)


def run_folder(path: Path) -> Path:
    """Return the run folder that an argument names: the folder itself, or that of a settings file.

    Raises UserError if it is not a run's.
    """
    run = path
    if path.suffix == ".toml" and path.is_file():
        run = path.parent if is_of_run(path) else Path(load_config(path).run.dir)
    require_run(run)
    return run


def load_run_config(path: Path) -> Config:
    """Return the config of a settings file or of a run folder. Raises UserError if there is none."""
    is_run_folder = path.is_dir()
    if is_run_folder:
        if not (path / "config.toml").is_file():
            raise UserError(
                f"{path} is a folder without a config.toml, so it is not a run folder; give a run folder, or a "
                "settings file such as run.toml"
            )
        path = path / "config.toml"
    elif path.suffix.lower() != ".toml" and not path.exists():
        raise UserError(
            f"{path} does not exist; give a run folder, or a settings file (`safelight init tiny -o run.toml` writes "
            "one)"
        )
    config = load_config(path)
    if is_run_folder or is_of_run(path):
        # the folder may have been moved, or come from somebody else: what its config names is not written to
        config.run.dir = str(path.parent)
    return config


def settings_given(argv: list[str]) -> list[list[str]]:
    """Return the paths of the settings that a command's options give, as [train, batch_size]."""
    return [path for path, _ in take_overrides(argv)[1]]


def parse_with_config(
    argv: list[str], command: str, description: str
) -> tuple[TrainArguments | CacheArguments | PlanArguments | ProfileArguments, Config]:
    """Return (arguments, Config) of a command that takes a run.toml, or a run folder, and overrides of its settings.

    They may come in any order. Raises UserError for an invalid file, option or setting.
    """
    others, overrides = take_overrides(argv)
    shape = _WITH_CONFIG[command]
    description = f"{description}.\n\n{SETTINGS_TEXT}"

    def configured(path: Path | None) -> Config:
        config = load_run_config(path) if path is not None else Config()
        if config.stage and any(name == ["train", "epochs"] for name, _ in overrides):
            raise UserError(
                "command line: train.epochs has no effect because the file has [[stage]] tables; use --stage.0.epochs"
            )
        return parse_config(with_overrides(config.model_dump(by_alias=True), overrides), COMMAND_LINE)

    if {"-h", "--help"} & set(others):
        # the help shows the file's values as the defaults
        path = next((Path(os.path.expanduser(word)) for word in others if names_config(word)), None)
        parse(shape, ["--help"], command, description, shape(tyro.MISSING, configured(path)))
    arguments = parse(shape, others, command, description, shape(_NOT_GIVEN, Config()))
    if arguments.config == _NOT_GIVEN:
        # a setting that does not exist is the likelier mistake: it may have taken the file's name for its value
        configured(None)
        raise UserError(f"give the settings file: safelight {command} run.toml (write one with `safelight init`)")
    return arguments, configured(arguments.config)
