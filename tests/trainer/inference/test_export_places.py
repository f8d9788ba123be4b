"""Where an export is written: what it replaces, what a failure leaves behind, and what is refused."""

import json
import os
import shutil
from collections import namedtuple

import pytest

import safelight.trainer.inference.export_place as places
import safelight.trainer.inference.model_export as model_export
from safelight.trainer.checkpoint.files import SEAL, folder_of
from safelight.trainer.inference.draw import open_run, sample
from safelight.trainer.inference.export import export
from tests.trainer.inference.exported_runs import STEP, make_run


def test_an_export_is_replaced_only_with_force(tiny_run, tmp_path):
    for place in (tmp_path / "out.safetensors", tmp_path / "out"):
        export(tiny_run, place, dtype="fp32")
        before = sorted((path.name, path.stat().st_mtime_ns) for path in [place, *place.rglob("*")])
        with pytest.raises(ValueError, match=rf"{place.name} already exists; name another with -o, or add --force"):
            export(tiny_run, place)
        assert sorted((path.name, path.stat().st_mtime_ns) for path in [place, *place.rglob("*")]) == before
        assert export(tiny_run, place, force=True).num_bytes < 10 * 10**6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.safetensors"]


def test_force_replaces_only_exports(tiny_run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="is not a diffusers folder, and --force replaces only those"):
        export(tiny_run, tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "mine.png").exists()
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"folder\.safetensors is a folder; name another"):
        export(tiny_run, tmp_path / "folder.safetensors", force=True)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(ValueError, match="file is a file; name another"):
        export(tiny_run, tmp_path / "file", force=True)


def test_force_deletes_nothing_that_an_export_does_not_write(tiny_run, tmp_path):
    export(tiny_run, tmp_path / "out")
    (tmp_path / "out" / "runs").mkdir()
    with pytest.raises(ValueError, match="out contains runs, which no export writes, and --force would delete it"):
        export(tiny_run, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "runs").is_dir()


def test_an_export_never_replaces_what_its_run_needs(tiny_run, tmp_path):
    export(tiny_run, tmp_path / "base")
    export(tiny_run, tmp_path / "vae" / "one.safetensors")
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = (run / "config.toml").read_text()
    changed = config.replace('base = "tiny"', f'base = "{tmp_path / "base"}"')
    assert changed != config
    (run / "config.toml").write_text(changed)
    with pytest.raises(ValueError, match=r"base is model\.base, which the run compares with, which the export would"):
        export(run, tmp_path / "base", force=True)
    weights = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors is in model\.base"):
        export(run, weights, force=True)
    assert weights.read_bytes() == before
    export(run, tmp_path / "new.safetensors", title="x\udcff")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(ValueError, match=r"link is model\.base"):
        export(run, tmp_path / "link", force=True)


def test_two_exports_to_one_name_do_not_mix(tiny_run, tmp_path):
    out = tmp_path / "out.safetensors"
    with places.locked(out), pytest.raises(ValueError, match=r"another export to .*out\.safetensors is running"):
        export(tiny_run, out)
    export(tiny_run, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


def test_an_export_never_writes_into_checkpoints_or_a_dataset(tiny_run, tmp_path):
    state = folder_of(tiny_run, STEP) / "state.safetensors"
    before = state.read_bytes()
    for name in ("images", "cache"):
        (tmp_path / "dataset" / name).mkdir(parents=True)
    (tmp_path / "dataset" / "manifest.jsonl").write_text("")
    (tmp_path / "link").symlink_to(state.parent)
    places = (
        (state, "checkpoints of a run"),
        (tmp_path / "link" / "state.safetensors", "checkpoints of a run"),
        (tiny_run / "checkpoints" / "new", "checkpoints of a run"),
        (tmp_path / "dataset" / "images" / "out.safetensors", "images of a dataset"),
        (tmp_path / "dataset" / "cache" / "out", "cache of a dataset"),
    )
    for place, said in places:
        with pytest.raises(ValueError, match=f"the {said}; name another place with -o"):
            export(tiny_run, place, force=True)
        with pytest.raises(ValueError, match=f"the {said}; name another place with -o"):
            sample(open_run(tiny_run), ["a dog"], "last", place.parent, {})
    assert state.read_bytes() == before
    export(tiny_run, tiny_run / "exports" / "out.safetensors")


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_a_failed_export_leaves_the_earlier_one_unchanged(tiny_run, tmp_path, monkeypatch, name):
    export(tiny_run, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(places, "sign", broken)
    monkeypatch.setattr(model_export, "_load_in_fp32", broken)
    with pytest.raises(OSError, match="No space left"):
        export(tiny_run, tmp_path / name, dtype="fp32", force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_too_little_free_space_is_reported_before_anything_is_written(tiny_run, tmp_path, monkeypatch, name):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    # a smaller dtype is proposed where there is one
    for dtype, fix in (("fp16", ""), ("bf16", ""), ("fp32", ", or use --dtype fp16")):
        with pytest.raises(
            ValueError, match=r"takes [0-9.]+ MiB, and 64\.0 MiB must stay free, but .* has .* free; free some "
        ) as refused:
            export(tiny_run, tmp_path / name, dtype=dtype)
        assert str(refused.value).endswith(f"or name another place with -o{fix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
@pytest.mark.parametrize("word", ["partial", "old"])
def test_a_planted_link_is_deleted_and_never_written_through(tiny_run, tmp_path, name, word):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "model_index.json").write_text("precious")
    (tmp_path / "shared").mkdir()
    out = tmp_path / "shared" / name
    export(tiny_run, out)
    (tmp_path / "shared" / f".{name}.{word}").symlink_to("../victim")
    export(tiny_run, out, force=True)
    assert [path.read_text() for path in (tmp_path / "victim").iterdir()] == ["precious"]
    assert not out.is_symlink()
    if word == "partial" or name == "out":
        assert [path.name for path in (tmp_path / "shared").iterdir()] == [name]


@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_a_link_to_nothing_is_named(tiny_run, tmp_path, name):
    (tmp_path / name).symlink_to("gone")
    for force in (False, True):
        with pytest.raises(ValueError, match=f"{name} is a link to .*gone, which does not exist; delete it"):
            export(tiny_run, tmp_path / name, force=force)


def test_files_get_the_permissions_of_the_umask(tiny_run, tmp_path):
    """safetensors creates files that only their owner may read."""
    old = os.umask(0o022)
    try:
        for place in (tmp_path / "out.safetensors", tmp_path / "out"):
            export(tiny_run, place)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o644}


def test_a_refused_export_is_one_line(tiny_run, tmp_path):
    out = tmp_path / "out.safetensors"
    for run, place, options, line in (
        (tmp_path / "none", out, {}, r"none is not a run folder: it has no config\.toml"),
        (tiny_run, out, {"checkpoint": "base"}, "checkpoint 'base' is not in .*; use last, best or one of 7"),
        (tiny_run, out, {"checkpoint": "8"}, "checkpoint '8' is not in"),
        (
            tiny_run,
            tmp_path / "out.ckpt",
            {},
            r"\.ckpt files cannot be written; name a \.safetensors file, or a folder",
        ),
    ):
        with pytest.raises(ValueError, match=line):
            export(run, place, **options)
    run = make_run(tmp_path / "large", largest=1e5)
    with pytest.raises(ValueError, match=r"conv_in\.bias has values up to 1e\+05, above fp16's limit of 65504; use"):
        export(run, out)
    assert export(run, out, dtype="bf16").path == out
    config = run / "config.toml"
    config.write_text(config.read_text().replace('base = "tiny"', 'base = "random:small"'))
    with pytest.raises(ValueError, match=r"does not fit the UNet that model\.base names; restore the base"):
        export(run, tmp_path / "other.safetensors", dtype="bf16")
    (folder_of(run, STEP) / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is damaged: state\.safetensors"):
        export(run, tmp_path / "other.safetensors", dtype="bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out.safetensors"]


def test_instead_of_a_damaged_checkpoint_a_later_one_is_offered(tmp_path):
    run = make_run(tmp_path / "run")
    record = json.loads((folder_of(run, STEP) / "state.json").read_text())
    later = folder_of(run, STEP + 1)
    shutil.copytree(folder_of(run, STEP), later)
    record["position"]["step"] = STEP + 1
    del record[SEAL]
    (later / "state.json").write_text(json.dumps(record))
    (folder_of(run, STEP) / "state.safetensors").write_bytes(b"")
    for read in (
        lambda: export(run, tmp_path / "out.safetensors", checkpoint=str(STEP)),
        lambda: open_run(run).unet(STEP),
    ):
        with pytest.raises(ValueError, match=f"is damaged: .*; use --checkpoint {STEP + 1}, the newest intact one$"):
            read()
