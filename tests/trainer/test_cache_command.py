"""`safelight cache --verify`, `--stats` and `--gc` on a dataset of the tiny base."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

from tests.called import call


@pytest.fixture(scope="module")
def place(tiny_dataset, tmp_path_factory):
    """A filled cache of six photographs, its settings in run.toml, and other.toml for another seed."""
    place = tmp_path_factory.mktemp("cache-command")
    (place / "photos").mkdir()
    for path in sorted((tiny_dataset.parent / "photos").glob("*.png"))[:6]:
        shutil.copy(path, place / "photos")
    assert call("prepare", place / "photos", "-o", place / "dataset").status == 0
    for name, seed in (("run", 1), ("other", 2)):
        (place / f"{name}.toml").write_text(
            f'[run]\ndir = "{place}/{name}"\ndevice = "cpu"\nseed = {seed}\n'
            f'[data]\npath = "{place}/dataset"\nresolution = 64\nvariants = 2\n'
        )
        assert call("cache", place / f"{name}.toml").status == 0
    return place


def results(*argv) -> tuple[int, dict]:
    called = call("cache", *argv, "--json")
    assert called.err.count("safelight cache:") == 0, called.err
    return called.status, json.loads(called.out)


def test_the_comparison_of_an_autoencoder_in_16_bits_is_printed(place, tmp_path):
    shutil.copytree(place / "dataset", tmp_path / "dataset")
    called = call("cache", place / "run.toml", "--data.path", tmp_path / "dataset", "--model.vae-precision", "fp16")
    assert called.status == 0
    assert "the autoencoder in fp16 differs from fp32 by " in " ".join(called.out.split())
    again = call("cache", place / "run.toml", "--data.path", tmp_path / "dataset")
    assert "autoencoder in" not in again.out


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_cache_filled_in_16_bits_is_sound(place, tmp_path, precision):
    """Rows are encoded several at a time and again one at a time, which rounds otherwise."""
    shutil.copytree(place / "dataset", tmp_path / "dataset")
    argv = place / "run.toml", "--data.path", tmp_path / "dataset", "--model.vae-precision", precision
    assert call("cache", *argv).status == 0
    status, found = results(*argv, "--verify", "--sample", "99")
    assert (status, found["problems"]) == (0, [])
    assert found["num_encoded"] > 12
    assert found["max_roundings"] < (4 if precision == "fp16" else 32)


@pytest.mark.long
def test_verify_says_that_it_is_sound_or_which_photograph_is_not(place, tmp_path):
    shutil.copytree(place / "dataset", tmp_path / "dataset")
    argv = (place / "run.toml", "--data.path", tmp_path / "dataset", "--verify", "--sample", "99")
    status, found = results(*argv)
    assert (status, found["sound"], found["problems"]) == (0, True, [])
    assert found["num_encoded"] == found["num_rows"] - found["num_unneeded"] > 12
    shard = max((tmp_path / "dataset" / "cache" / "shards").glob("posterior*"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    status, found = results(*argv)
    (problem,) = found["problems"]
    assert (status, found["sound"]) == (1, False)
    assert problem["name"].startswith("photos/")
    called = call("cache", *argv)
    assert called.status == 1
    assert problem["name"] in called.out
    assert "does not match its checksum" in called.out
    # what it advises, with the settings of the command line, helps
    advised = shlex.split(called.out.splitlines()[-1].split("`")[1])
    assert advised == ["safelight", "cache", *map(str, argv[:3])]
    assert call(*advised[1:]).status == 0
    assert results(*argv)[0] == 0
    shutil.rmtree(tmp_path / "dataset" / "cache")
    status, found = results(*argv)
    assert (status, found["num_rows"]) == (1, 0)
    assert len(found["missing"]) > 12


def test_stats_of_the_latents(place):
    status, stats = results(place / "run.toml", "--stats")
    assert status == 0
    # two crops of four photographs; the two that are held out have one
    assert stats["num_latents"] == 10
    assert all(0.1 < std < 5 for std in stats["channel_stds"])
    called = call("cache", place / "run.toml", "--stats")
    assert "latents of 10 crops, by channel" in called.out
    assert "captions" in called.out


def test_a_photograph_far_from_the_others_is_shown_with_its_crops(place, tmp_path):
    from PIL import Image

    shutil.copytree(place / "photos", tmp_path / "photos")
    for number, path in enumerate(sorted((place / "photos").iterdir())):
        # enough photographs for something to be usual
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photos" / f"turned {number}.png")
    Image.new("RGB", (64, 64), (1, 1, 1)).save(tmp_path / "photos" / "dark.png")
    assert call("prepare", tmp_path / "photos", "-o", tmp_path / "dataset").status == 0
    argv = (place / "run.toml", "--data.path", tmp_path / "dataset", "--data.validation-fraction", "0")
    assert call("cache", *argv).status == 0
    (line,) = [line for line in call("cache", *argv, "--stats").out.splitlines() if line.startswith("photos/dark.png")]
    assert line.split()[1] == "2"


def test_gc_deletes_what_these_settings_do_not_need_and_nothing_else(place, tmp_path):
    shutil.copytree(place / "dataset", tmp_path / "dataset")
    argv = (place / "run.toml", "--data.path", tmp_path / "dataset")
    for name in ("run", "other"):
        text = (place / f"{name}.toml").read_text().replace(f"{place}/dataset", f"{tmp_path}/dataset")
        (tmp_path / f"{name}.toml").write_text(text)
    _, before = results(*argv, "--stats")
    _, kept = results(*argv, "--gc", "--dry-run", "--keep", tmp_path / "other.toml")
    assert (kept["rows"], kept["num_bytes"]) == ({}, 0)
    status, planned = results(*argv, "--gc", "--dry-run")
    assert status == 0
    assert planned["rows"] == before["unneeded_rows"] != {}
    assert results(*argv, "--stats")[1] == before
    _, freed = results(*argv, "--gc")
    assert freed["rows"] == planned["rows"]
    assert freed["num_bytes"] == planned["num_bytes"] == sum(before["unneeded_bytes"].values())
    _, after = results(*argv, "--stats")
    assert after["unneeded_rows"] == {}
    assert after["channel_means"] == before["channel_means"]
    status, found = results(*argv, "--verify", "--sample", "99")
    assert (status, found["sound"], found["num_unneeded"]) == (0, True, 0)
    _, made = results(*argv)
    assert made["made"] == 0
    assert "0 rows deleted" in call("cache", *argv, "--gc").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--verify", "--gc"), "--verify and --gc are separate commands"),
        (("--sample", "3"), "--sample goes with --verify"),
        (("--dry-run",), "--dry-run goes with --gc"),
        (("--stats", "--keep", "run.toml"), "--keep goes with --gc"),
        (("--verify", "--sample", "-1"), "--sample -1 is below 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(place, options, message):
    call("cache", place / "run.toml", *options).assert_refused("cache", message)


def test_gc_refuses_to_keep_the_rows_of_another_dataset(place, tmp_path):
    (tmp_path / "far.toml").write_text('[data]\npath = "elsewhere"\n')
    called = call("cache", place / "run.toml", "--gc", "--keep", tmp_path / "far.toml")
    called.assert_refused("cache", f"--keep {tmp_path}/far.toml: its data.path is elsewhere, not ")
