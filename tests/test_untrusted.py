"""safelight/untrusted.py: what it refuses, what it accepts, and that no reader goes around it."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

from safelight import untrusted
from safelight.errors import UserError
from safelight.untrusted import UnsafeFile

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a\0b", "\ud800", "away", "away/x", "up/x"])
def test_a_path_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "away").symlink_to(tmp_path)
    (folder / "up").symlink_to("..")
    with pytest.raises(UnsafeFile):
        untrusted.path_in(folder, name)


def test_a_folder_that_is_no_path_is_refused():
    for check in (untrusted.check_links, lambda folder: untrusted.path_in(folder, "x")):
        with pytest.raises(UnsafeFile, match="is not a valid path"):
            check(Path("a\0b"))


def test_a_path_inside_is_returned_also_through_links_that_stay_inside(tmp_path):
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)
    (folder / "b").symlink_to("a")
    (tmp_path / "to_folder").symlink_to("folder")
    assert untrusted.path_in(folder, "b/new.txt") == folder / "b" / "new.txt"
    assert untrusted.path_in(tmp_path / "to_folder", "a") == tmp_path / "to_folder" / "a"


def test_links_out_of_a_folder_are_found_at_any_depth(tmp_path):
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "inside").symlink_to("a")
    untrusted.check_links(folder)
    untrusted.check_links(tmp_path / "nothing")
    (folder / "a" / "b" / "out").symlink_to(tmp_path / "not yet there")
    with pytest.raises(UnsafeFile, match=r"a/b/out is a link to .*not yet there, outside"):
        untrusted.check_links(folder)


def test_links_are_looked_for_in_folders_nested_deeper_than_python_recurses(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.symlink("/etc", "out", dir_fd=descriptor)
    os.close(descriptor)
    with pytest.raises(UnsafeFile):
        untrusted.check_links(tmp_path)
    # pytest's own clean-up of old folders recurses, and fails at its exit
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


@pytest.mark.parametrize("may_enter", [True, False])
def test_links_in_a_folder_that_cannot_be_listed_are_not_overlooked(tmp_path, monkeypatch, may_enter):
    """Its owner may still go through it."""
    (tmp_path / "hidden").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "hidden":
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: may_enter)
    if not may_enter:
        untrusted.check_links(tmp_path)
        return
    with pytest.raises(UnsafeFile, match="hidden cannot be searched for links"):
        untrusted.check_links(tmp_path)


def test_a_name_of_the_other_kind_is_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "link").symlink_to("folder")
    untrusted.check_kinds(tmp_path, ("folder", "link", "absent"), ("file", "absent"), "the run")
    untrusted.check_kinds(tmp_path / "absent", ("folder",), ("file",), "the run")
    with pytest.raises(UnsafeFile, match="file is a file where the run keeps a folder; move it away"):
        untrusted.check_kinds(tmp_path, ("folder", "file"), (), "the run")
    with pytest.raises(UnsafeFile, match="folder is a folder where the run keeps a file; move it away"):
        untrusted.check_kinds(tmp_path, (), ("folder",), "the run")
    for name in ("pipe", "dangling"):
        for folders, files in (([name], []), ([], [name])):
            with pytest.raises(UnsafeFile, match=f"{name} is neither file nor folder where"):
                untrusted.check_kinds(tmp_path, folders, files, "the run")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(tmp_path)
    listener.bind("socket")
    start = time.monotonic()
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "socket", Path("a\0b")):
        with pytest.raises(UnsafeFile):
            untrusted.read_bytes(path)
    assert time.monotonic() - start < 5
    with pytest.raises(FileNotFoundError):
        untrusted.read_bytes(tmp_path / "nothing")


def test_only_regular_files_are_opened_for_writing_and_no_links(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "new").symlink_to(tmp_path / "not there")
    for name in ("pipe", "link", "new", ""):
        with pytest.raises((UnsafeFile, IsADirectoryError)):
            untrusted.open_to_write(tmp_path / name)
    with pytest.raises(UnsafeFile, match="is a link"):
        untrusted.open_regular(tmp_path / "link", follow_links=False)
    assert sorted(os.listdir(tmp_path)) == ["link", "new", "pipe", "target"]
    with untrusted.open_to_write(tmp_path / "target") as file:
        assert file.read() == b"precious"
    with untrusted.open_to_write(tmp_path / "created") as file:
        file.write(b"x")
    assert (tmp_path / "created").read_bytes() == b"x"


def test_a_file_over_its_limit_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert untrusted.read_bytes(path, 5) == b"12345"
    with pytest.raises(UnsafeFile, match="5 bytes, over the limit of 4"):
        untrusted.read_bytes(path, 4)


def test_nothing_but_a_regular_file_is_appended_to(tmp_path):
    with untrusted.open_append(tmp_path / "log") as file:
        file.write(b"1")
    with untrusted.open_append(tmp_path / "log") as file:
        file.write(b"2")
    assert (tmp_path / "log").read_bytes() == b"12"
    (tmp_path / "link").symlink_to("log")
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "link", tmp_path / "dangling", tmp_path / "pipe", tmp_path):
        with pytest.raises(UnsafeFile):
            untrusted.open_append(path)
    assert (tmp_path / "log").read_bytes() == b"12"
    assert not (tmp_path / "new").exists()


def test_lines_over_their_limit_are_passed_over_without_being_held(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"1234\n\n" + b"x" * 5 + b"\n12\n" + b"y" * 2**21 + b"\n" + b"z" * 5 + b"\nend")
    assert list(untrusted.read_lines(path, 2**22, 5)) == [b"1234\n", b"\n", None, b"12\n", None, None, b"end"]
    path.write_bytes(b"z" * 6)
    assert list(untrusted.read_lines(path, 6, 5)) == [None]
    with pytest.raises(UnsafeFile, match="over the limit of 5"):
        next(untrusted.read_lines(path, 5))


def test_json_of_very_many_values_is_refused_before_it_is_parsed():
    """Three bytes of text take 90 of memory."""
    for content in (b"[" + b"[]," * 2**22 + b"0]", "[" + "0," * 2**22 + "0]", b"[" + b"{}," * 2**22 + b"0]"):
        start = time.process_time()
        with pytest.raises(UnsafeFile, match="more than 4,194,304 values"):
            untrusted.parse_json(content)
        assert time.process_time() - start < 1
    assert untrusted.parse_json("[[], {}, 1]", max_values=6) == [[], {}, 1]
    with pytest.raises(UnsafeFile, match="more than 5 values"):
        untrusted.parse_json("[[], {}, 1]", max_values=5)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 65 + "]" * 65, "1e999", "9" * 400, str(2**64), "NaN", "[Infinity]", "{", "", "\xff"],
)
def test_json_out_of_bounds_is_refused(text):
    with pytest.raises(UnsafeFile):
        untrusted.parse_json(text.encode("latin-1"))


def test_json_within_bounds_is_read():
    value = {"a": [1, 2**64 - 1, 0.5, None, True, "\u00e4"], "b": {}}
    assert untrusted.parse_json(json.dumps(value)) == value
    assert untrusted.parse_json("[NaN, Infinity]", allow_nan=True)[1] == float("inf")
    with pytest.raises(UnsafeFile):
        untrusted.parse_json("1e999", allow_nan=True)


def test_integers_that_mean_no_limit_are_clamped_on_request():
    text = "[1000000000000000019884624838656, -1000000000000000019884624838656, 18446744073709551616, 5, -7]"
    most = untrusted.MAX_INT
    assert untrusted.parse_json(text, clamp_ints=True) == [most, -most, most, 5, -7]
    assert untrusted.parse_json("9" * 100_000, clamp_ints=True) == most


def test_a_json_file_of_another_type_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UnsafeFile, match=r"x\.json is not valid: it holds a list"):
        untrusted.read_json_object(tmp_path / "x.json")


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 50_000 + " = 1",
        '"b c"' + '."b c"' * 500 + " = 1",
        "a = " + "[" * 5000,
        "a = [0x" + "f" * 9000 + "]",
    ],
)
def test_toml_out_of_bounds_is_refused_at_once(text):
    start = time.process_time()
    with pytest.raises(UnsafeFile):
        untrusted.parse_toml(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "text",
    [
        # dots between parts that hold what ends a key, in every kind of string
        '"=".' * 500 + "a = 1",
        "'['." * 500 + "a = 1",
        '"\\n, }".' * 500 + "a = 1",
        '"\\"".' * 500 + "a = 1",
        '"#" \t. ' * 500 + "a = 1",
        "[" + "a . " * 500 + "b]",
        "[[" + "'a]'." * 500 + "b]]",
        "b = {" + '"{".' * 500 + "a = 1}",
        # after strings and comments that hold quotes
        "b = '''\"'''\n" + '"=".' * 500 + "a = 1",
        'b = """\\""" \' """""\n' + '"=".' * 500 + "a = 1",
        "# it's\n" + '"=".' * 500 + "a = 1",
    ],
)
def test_a_dotted_key_is_refused_however_it_is_written(text):
    with pytest.raises(UnsafeFile, match="dotted key of more than"):
        untrusted.parse_toml(text)


def test_toml_with_many_sentences_is_read():
    text = "A red barn. A cow, e.g. a brown one. " * 50
    for quote in ('"', "'", '"""', "'''"):
        toml = f"[sample]  # {text}\nprompt = {quote}{text}{quote}\nsizes = [{'0.5, ' * 50}]\n"
        assert untrusted.parse_toml(toml) == {"sample": {"prompt": text, "sizes": [0.5] * 50}}


@pytest.mark.parametrize("piece", ['"', '\\"""\n', "'''\n", 'a="', '\\"', 'a = """" ', "a='x'\n[", "a.", "#'\n"])
def test_checking_dotted_keys_takes_time_in_proportion_to_the_text(piece):
    for start in ("", '"""\n'):
        began = time.process_time()
        with contextlib.suppress(UnsafeFile):
            untrusted.parse_toml(start + piece * (untrusted.MAX_TOML_BYTES // len(piece) - 1))
        assert time.process_time() - began < 1


def test_no_key_longer_than_the_limit_reaches_tomllib(monkeypatch):
    """Texts of random tokens: whatever strings and comments they form, the parser never sees a longer key."""
    longest = 0
    parse_key = tomllib._parser.parse_key

    def measured(src, pos):
        nonlocal longest
        pos, key = parse_key(src, pos)
        longest = max(longest, len(key))
        return pos, key

    monkeypatch.setattr(tomllib._parser, "parse_key", measured)
    monkeypatch.setattr(untrusted, "MAX_KEY_PARTS", 3)
    tokens = ["a", ".", ".", "a.a", " ", "=", "1", '"', "'", '"""', "'''", "\\", "\n", "#", "[", "]", "{", "}", ","]
    tokens += ["\r\n", '"="', "'['", '.""', ".''", 'a=""', "a='''\n", "a=1\n", ".a.a", "]\n"]
    draws = random.Random(0)
    for _ in range(10_000):
        with contextlib.suppress(UnsafeFile):
            untrusted.parse_toml("".join(draws.choices(tokens, k=draws.randint(1, 30))))
    assert longest == 3


def test_no_message_carries_control_characters():
    assert str(UserError("a \x1b]0;title\x07 b\n", "c\r")) == r"a \x1b]0;title\x07 b\n" + "\n" + r"c\r"


# calls that open or parse a file, by the last part of their name
READERS = {
    *("open", "read_text", "read_bytes", "load", "loads", "load_file", "safe_open", "connect", "mmap", "memmap"),
    *("fromfile", "loadtxt", "genfromtxt", "from_pretrained", "from_single_file", "CDLL", "imread", "parse_html"),
}
# readers that are not of files
NOT_FILES = {"tl.load"}
OURS = {"open_regular", "open_to_write", "open_append", "read_bytes", "read_json", "read_json_object", "read_toml"}
# file -> the calls in it that go around untrusted.py -> why they may
EXCEPTIONS: dict[str, dict[str, str]] = {
    "bench/core/results.py": {"path.open": "appends to a file that the user named"},
    "bench/core/turns.py": {
        "pickle.loads": "what the process that started it has pickled",
        "open": "a temporary file of the process that started it",
    },
    "safelight/__main__.py": {"os.open": "/dev/null", "open": "/dev/null"},
    "safelight/bug_report.py": {"open": "creates a file of its own: mode x follows no link"},
    "data/atomic.py": {
        "os.open": "a folder, to sync it",
        "open": "a temporary file of its own, mode x, or one just written",
    },
    "data/decode_memory.py": {
        ".read_text": "/proc and /sys",
        "MEMINFO.read_text": "/proc",
        "OWN_CGROUPS.read_text": "/proc",
    },
    "data/images.py": {
        "Image.open": "bytes or a file that open_regular opened, in the formats that prepare accepts",
        "opened.load": "the pixels of such an image",
        ".read_text": "/proc",
        "ctypes.CDLL": "the libtiff that Pillow has loaded",
    },
    "data/index.py": {"sqlite3.connect": "after the index's own checks, at its top"},
    "data/sources/arrow_child.py": {"json.loads": "requests of the process that started it"},
    "data/sources/tar.py": {"tarfile.open": "a file that open_regular opened, of which it reads the headers"},
    "trainer/adapters/text_encoders.py": {".load": "trainer/adapters"},
    "trainer/captioning/models.py": {"model_class.from_pretrained": "no name: config and tensors are given"},
    "trainer/captioning/prompt_child.py": {"json.load": "a request of the process that started it"},
    "trainer/captioning/processors.py": {"processor_class.from_pretrained": "the checked copies of model_files.py"},
    "trainer/step/host_allocator.py": {"ctypes.CDLL": "the C library that the process has loaded"},
    "trainer/tagging/detectors.py": {"AutoImageProcessor.from_pretrained": "the checked copies of model_files.py"},
    "trainer/checkpoint/files.py": {"trained.load": "trainer/adapters"},
    "trainer/distributed/launch.py": {"file.read_text": "in a temporary folder of its own"},
    "trainer/distributed/meeting.py": {".read_text": "/proc"},
    "trainer/distributed/watch.py": {"probe.connect": "a socket"},
    "trainer/features/cache.py": {"load": "a function that it is given"},
    "trainer/features/lpips.py": {"load": "a function that it is given"},
    "trainer/features/transformers_features.py": {
        "AutoImageProcessor.from_pretrained": "the checked copies of model_files.py"
    },
    "trainer/inference/draw.py": {"trained.load": "trainer/adapters"},
    "trainer/inference/export_place.py": {"path.open": "what diffusers has just written"},
    "trainer/inference/model_export.py": {
        "json.loads": "what diffusers has just written",
        "config_path.read_text": "what diffusers has just written",
    },
    "trainer/inference/modelspec.py": {"path.open": "what export has just written"},
    "trainer/inference/word_export.py": {"trained.load": "trainer/adapters"},
    "trainer/models/base.py": {"json.loads": "a text that it made itself"},
    "trainer/models/base_record.py": {"json.loads": "a text that it made itself"},
    "trainer/models/build.py": {"kind.from_pretrained": "no name: config and tensors are given"},
    "trainer/models/tensor_files.py": {"mmap.mmap": "a file that open_regular opened, after its header's check"},
    "trainer/models/tokenizer.py": {
        "CLIPTokenizer.from_pretrained": "a temporary folder with files made from checked values"
    },
    "trainer/report/theme.py": {".read_text": "style sheets and scripts of this folder"},
    "trainer/run_log/environment.py": {".read_text": "/proc"},
}
# rooms that read only what they wrote themselves
OWN_FILES = ("bench/all/", "bench/measure/", "bench/profile/", "bench/recipes/", "kernels/aot/")


def reading_calls(path: Path) -> set[str]:
    """Return the calls in a file that may read another: by name, or `.name` if called on an expression."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name):
            name = function.id
        elif isinstance(function, ast.Attribute):
            name = f"{function.value.id if isinstance(function.value, ast.Name) else ''}.{function.attr}"
        else:
            continue
        if name.rpartition(".")[2] in READERS:
            found.add(name)
    return found - NOT_FILES - OURS


def test_folders_are_deleted_by_the_one_function_that_deletes_links_in_their_place():
    """shutil.rmtree refuses a link, and leaves it when errors are ignored: what is written next goes through it."""
    found = {
        path.relative_to(ROOT).as_posix()
        for top in ("safelight", "kernels", "data", "trainer", "bench")
        for path in (ROOT / top).rglob("*.py")
        if "rmtree" in path.read_text()
    }
    # the second deletes a temporary folder that it made
    assert found == {"data/atomic.py", "trainer/captioning/model_files.py"}


def test_no_reader_goes_around_this_module():
    """A call that opens or parses a file goes through untrusted.py, or says above why it need not."""
    found = {}
    for top in ("safelight", "kernels", "data", "trainer", "bench"):
        for path in (ROOT / top).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if name != "safelight/untrusted.py" and not name.startswith(OWN_FILES) and (calls := reading_calls(path)):
                found[name] = calls
    assert found == {name: set(calls) for name, calls in EXCEPTIONS.items()}


LONG_HEX, LONG = "0x" + "f" * 5000, "it has an integer of more than 64 bits"
MISTAGGED = "a value is not what its tag, such as !!bool or !!int, says"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"a: {LONG_HEX}", LONG),
        (f"a: [{{b: [-{LONG_HEX}]}}]", LONG),
        (f"? {LONG_HEX}\n: 1", LONG),
        (f"? !!set {{? {LONG_HEX}}}\n: 1", "line 1: found unhashable key"),
        (f"!!set {{? {LONG_HEX}}}", LONG),
        (f"!!pairs\n- a: {LONG_HEX}", LONG),
        (f"a: {'1' * 5000}", LONG),
        (f"a: {'1:' * 5000}1", LONG),
        (f"a: 0{'7' * 5000}", LONG),
        ("a: 18446744073709551616", LONG),
        (f"a: {'1:' * 5000}1.5", "int too large to convert to float"),
        ("a: 2001-01-01 00:00:00 +99:99", "offset must be a timedelta"),
        ("a: !!bool maybe", MISTAGGED),
        ("a: !!timestamp today", MISTAGGED),
        ("a: !!int ''", MISTAGGED),
        ("a: !!float '_'", MISTAGGED),
        ("a: !!binary é", "line 1: failed to convert base64 data into ascii"),
    ],
)
def test_yaml_values_that_no_setting_can_take(text, reason):
    with pytest.raises(UnsafeFile, match=f"^{re.escape(reason)}"):
        untrusted.parse_yaml(text)


def test_the_largest_yaml_integer():
    assert untrusted.parse_yaml("18446744073709551615: -18446744073709551615") == {
        untrusted.MAX_INT: -untrusted.MAX_INT
    }
