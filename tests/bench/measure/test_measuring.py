"""`bench loader`, the ceilings, `bench quick` and `bench all`, with a rehearsal of all its parts on the CPU."""

import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safelight.__main__ import main
from safelight.bench.all import parts, run_all, short_training_run
from safelight.bench.core import ceilings as ceilings_module
from safelight.bench.core.arguments import All
from safelight.bench.core.ceilings import ceilings
from safelight.bench.core.results import read
from safelight.bench.measure import cache_growth, loader, quick, sampling
from safelight.bench.measure.optimizers import offered
from safelight.bench.recipes.suite import VARIANTS
from safelight.bench.recipes.workload import Workload
from safelight.units import GIB

ROOT = Path(__file__).resolve().parents[3]
# sizes of the ceilings' matrices and copies that take no time
SMALL = (512, 2**23, 3)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings_module, "SMALL", SMALL)


def test_every_source_delivers_each_row_once_per_epoch(tmp_path):
    """So that the same work is compared: rows of the same shapes and dtype."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        epochs = loader._cache_epochs(tmp_path / "cache", 10, "tiny", 16, 4, stack)
        batches = list(epochs["cache"]())
        ahead = list(epochs["cache-ahead"]())
        assert sorted(i for batch in batches for i in batch.sample_ids) == sorted(
            i for b in ahead for i in b.sample_ids
        )
        assert len({i for batch in batches for i in batch.sample_ids}) == 10
        rows = torch.cat([torch.cat([b.mean_BCHW, b.logvar_BCHW], dim=1) for b in batches])
        texts = torch.cat([b.conditioning.text_BTD for b in batches])
    for kind in ("npz", "pt"):
        epoch = list(loader._file_epoch(tmp_path / kind, kind, 10, "tiny", 16, 4)())
        latents, text = (torch.cat(part) for part in zip(*epoch, strict=True))
        assert latents.dtype == rows.dtype == torch.float32
        assert sorted(latents.sum((1, 2, 3)).tolist()) == pytest.approx(sorted(rows.sum((1, 2, 3)).tolist()))
        assert sorted(text.sum((1, 2)).tolist()) == pytest.approx(sorted(texts.sum((1, 2)).tolist()))
    pixels = torch.cat(list(loader._decode_epoch(tmp_path / "photos", 10, 64, 4)()))
    assert pixels.shape == (10, 3, 64, 64)
    assert pixels.std() > 0.1


@pytest.mark.long
def test_the_loader_command_measures_every_source(tmp_path, capsys):
    arguments = ["--base", "tiny", "--rows", "500", "--repeats", "1", "--append", str(tmp_path / "r")]
    assert main(["bench", "loader", *arguments]) == 0
    out = capsys.readouterr().out
    records = {r["config"]["source"]: r["figures"] for r in read(tmp_path / "r")}
    assert set(records) == {"cache", "cache-ahead", "npz", "pt", "decode"}
    assert all(name in out for name in records)
    for figures in records.values():
        assert figures["rows_per_s"] == pytest.approx(500 / (figures["wall_ms_per_batch"] * 63 / 1e3), rel=0.02)
        assert figures["cpu_ms_per_batch"] > 0
    assert main(["bench", "loader", "--rows", "1000000000"]) == 2
    assert "lower --rows" in capsys.readouterr().err


def test_a_ceiling_is_the_work_divided_by_the_fastest_time(monkeypatch):
    ran = []

    def timed(runs, device, repeats):
        ran.extend(runs[""](number) for number in range(repeats))
        return {"": [0.5, 0.25, 2.0]}

    monkeypatch.setattr(ceilings_module, "interleave", timed)
    limits = ceilings(torch.device("cpu"), torch.bfloat16, small=True)
    size, num_bytes, repeats = SMALL
    # a multiply and an add per term; a copy reads and writes
    assert limits["matmul_tflops"] == pytest.approx(2 * size**3 / 0.25 / 1e12, abs=1e-4)
    assert limits["copy_gb_per_s"] == pytest.approx(2 * num_bytes / 0.25 / 1e9, abs=1e-3)
    products, copies = ran[:repeats], ran[repeats:]
    assert [(x.shape, x.dtype) for x in products] == [((size, size), torch.bfloat16)] * repeats
    assert [x.nbytes for x in copies] == [num_bytes] * repeats


@pytest.mark.long
def test_quick_prints_our_step_the_recipe_and_the_limit(monkeypatch, capsys):
    monkeypatch.setattr(quick, "REPEATS", 1)
    monkeypatch.setattr(quick, "choose_work", lambda device: (Workload(device=device).resolved(), (1,)))
    assert main(["bench", "quick", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for word in ("safelight", "diffusers", "images/s", "of the limit", "TFLOP/s"):
        assert word in out


def test_quick_measures_no_step_once_the_time_is_up(monkeypatch):
    monkeypatch.setattr(quick, "BUDGET_S", 0)
    records = list(quick.quick("cpu"))
    assert [r["bench"] for r in records] == ["ceilings"]
    figures = records[0]["figures"]
    # a step with one image takes 0.937 GFLOP
    assert figures["limit_images_per_s"] == pytest.approx(figures["matmul_tflops"] * 1e12 / 0.937e9, rel=0.01)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[int, list[dict], str]:
    """Exit status and result lines of `bench all` on the CPU, with a small folder in place of our tests."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "tests").mkdir()
    (root / "tests" / "test_one.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_on_a_gpu():\n    pass\ndef test_other():\n    raise AssertionError\n"
    )
    out = tmp_path_factory.mktemp("all")

    def in_process(command, timeout_s, log):
        """Run the command in this process, which saves starting six interpreters."""
        assert command[:3] == [sys.executable, "-m", "safelight"]
        began = time.monotonic()
        return main(command[3:]), "", time.monotonic() - began

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ROOT", root)
        patch.setattr(short_training_run, "call", in_process)
        patch.setattr(ceilings_module, "SMALL", SMALL)
        status = main(["bench", "all", "--out", str(out), "--device", "cpu", "--minutes", "5"])
    return status, read(out / "results.jsonl")


def test_a_called_command_is_killed_with_its_children_at_the_timeout(tmp_path):
    status, tail, seconds = short_training_run.call(["sh", "-c", "echo first; echo last; exit 3"], 10, tmp_path / "log")
    assert (status, tail) == (3, "last")
    assert 0 < seconds < 10
    # the sleeping child is killed too
    status, tail, seconds = short_training_run.call(
        ["sh", "-c", "echo begun; sleep 30 & sleep 30"], 1, tmp_path / "log"
    )
    assert (status, tail) == (124, "begun")
    assert seconds < 10


def test_the_error_of_a_failed_run_names_the_command_and_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(short_training_run, "call", lambda command, timeout_s, log: (2, "safelight init: no", 0.1))
    with pytest.raises(RuntimeError, match="safelight init exited with status 2: safelight init: no"):
        short_training_run.train(
            short_training_run.ShortRun("tiny", "tiny", 64, 1, 1, 1), tmp_path, "cpu", time.monotonic() + 9
        )


@pytest.mark.slow
def test_the_cpu_rehearsal_of_bench_all_runs_every_part(rehearsal):
    status, records = rehearsal
    failed = [(r["bench"], r.get("note")) for r in records if r["figures"].get("failed")]
    assert failed == []
    assert status == 0
    assert {r["bench"] for r in records} == {
        "ceilings",
        "step",
        "profile",
        "roofline",
        "attention",
        "memory",
        "kernels",
        "optimizer",
        "tests",
        "training_run",
        "loop",
        "sampling",
        "cache",
        # nothing of them on a CPU
        "graphs",
        "models",
        "mlperf",
        "diffusers_compiled",
    }
    steps = {
        (r["config"]["recipe"], r["config"]["base"], r["config"]["batch_size"], r["config"]["loader"])
        for r in records
        if r["bench"] == "step"
    }
    assert steps == {
        ("safelight", "tiny", 1, False),
        ("safelight", "tiny", 2, False),
        ("diffusers", "tiny", 1, False),
        ("diffusers", "tiny", 2, False),
        ("safelight", "tiny", 2, True),
        ("diffusers-16bit", "tiny", 1, False),
        ("safelight-fused", "tiny", 1, False),
        ("everydream", "tiny", 1, False),
        ("kohya", "tiny", 1, False),
        ("safelight-lora", "tiny-xl", 1, False),
        ("safelight-lora-nf4", "tiny-xl", 1, False),
        ("safelight-fused", "tiny-xl", 1, False),
    }
    modes = {r["config"]["optimizer"] for r in records if r["bench"] == "step" and r["config"]["precision"] == "bf16"}
    assert modes == {"adamw8bit, exact", "adamw8bit, streamed", "adamw8bit, paged"}
    assert [r["config"]["recipe"] for r in records if r["bench"] == "loop"] == ["safelight", "everydream"]
    (tests,) = (r for r in records if r["bench"] == "tests")
    assert tests["figures"]["exit_status"] == 0
    assert tests["note"].startswith("1 passed, 1 deselected")
    runs = {r["config"]["base"]: r["figures"]["steps"] for r in records if r["bench"] == "training_run"}
    # the second rehearses the run of SD1.5's size, with its preset and commands
    assert runs == {"tiny": 4, "random:small": 1}
    assert {r["config"]["what"] for r in records if r["bench"] == "kernels"} == {"bytes", "time"}
    assert {r["config"]["optimizer"] for r in records if r["bench"] == "optimizer"} == {*offered(torch.float32), "ema"}


def test_a_failing_part_leaves_a_line_and_the_next_one_runs(tmp_path, monkeypatch):
    def fail(context):
        yield context.make_record("first", {}, {"x": 1})
        raise RuntimeError("the card fell out\nat once")

    chosen = (run_all.Part("first", 0, 9, fail), run_all.Part("ceilings", 0, 9, parts._ceilings))
    monkeypatch.setattr(run_all, "PARTS", chosen)
    records = list(run_all.run_parts(1, tmp_path, Workload(device="cpu")))
    assert records == read(tmp_path / "results.jsonl")
    assert [r["bench"] for r in records] == ["first", "first", "ceilings"]
    assert records[1]["note"] == "the card fell out"
    assert records[1]["figures"]["failed"]


def test_the_memory_of_a_gpu_decides_which_steps_are_measured(tmp_path, monkeypatch):
    """The recipes, bases and batch sizes of the parts on a T4 and on an H200; nothing runs."""
    requested, optimizers = [], []

    def record_request(workloads, repeats, loader, together):
        optimizers.extend((w.optimizer, w.checkpointing) for _, w in workloads.values())
        steps = [(recipe, w.base, w.latent_size, w.batch_size) for recipe, w in workloads.values()]
        requested.extend(steps)
        yield from ({"bench": "step", "figures": {}} for _ in steps)

    monkeypatch.setattr(parts, "measure", record_request)
    monkeypatch.setattr(
        parts,
        "variants",
        lambda recipes, sizes, work: {
            f"{name} {size}": (name, replace(work, batch_size=size)) for name in recipes for size in sizes
        },
    )
    # the device is not here
    monkeypatch.setattr(Workload, "resolved", lambda work: replace(work, latent_size=work.latent_size or 128))
    monkeypatch.setattr(parts, "available_bytes", lambda: free_bytes[0])
    monkeypatch.setattr(run_all.BenchContext, "make_record", lambda self, bench, config, figures, note: {"note": note})
    measures = {part.name: part.measure for part in parts.PARTS}
    free_bytes = [64 * GIB]

    def steps_of(name: str, gib: float) -> list[tuple]:
        requested.clear(), optimizers.clear()
        monkeypatch.setattr(run_all.BenchContext, "gpu_gib", gib)
        work = Workload("random:sd15", 64, device="cuda", precision="fp16")
        notes.extend(measures[name](run_all.BenchContext(tmp_path, work, time.monotonic() + 99)))
        return list(requested)

    notes: list[dict] = []
    sd15, sd21, sdxl = ("random:sd15", 64), ("random:sd21", 64), ("random:sdxl", 128)
    assert steps_of("steps", 14.6) == [(name, *sd15, n) for name in ("safelight", "diffusers") for n in (1, 4, 8)]
    assert steps_of("steps", 139) == [(name, *sd15, n) for name in ("safelight", "diffusers") for n in (1, 8, 32)]
    replayed = ("safelight-graphs", "safelight-fused-graphs")
    assert steps_of("graphs", 139) == [(name, *sd15, n) for name in replayed for n in (1, 32)]
    loras = ("safelight-lora", "safelight-lora-nf4")
    assert {name for name, *_ in steps_of("ablation", 139)} == VARIANTS.keys() - {*replayed, *loras}
    modes = ("exact", "near", "rounded", "paged", "streamed")
    assert steps_of("memory_modes", 14.6) == [("safelight-fused", *sd15, 1)] * len(modes)
    assert optimizers == [(f"adamw8bit, {mode}", "full") for mode in modes]
    assert steps_of("sdxl_memory", 139) == [("safelight-fused", *sdxl, 1)] * 4
    assert optimizers == [(f"adamw8bit, {mode}", "full") for mode in modes[1:]]
    assert steps_of("sdxl_lora", 139) == [(name, *sdxl, n) for name in loras for n in (1, 4)]
    assert steps_of("sdxl_lora", 14.6) == [(name, *sdxl, 1) for name in loras]
    assert steps_of("models", 139) == [
        *((name, *sd21, n) for name in ("safelight-graphs", "safelight") for n in (32, 64)),
        *((name, *sdxl, 8) for name in ("safelight-graphs", "safelight")),
    ]
    assert steps_of("mlperf", 139) == [("mlperf", *sd21, 32)]
    assert steps_of("mlperf", 14.6) == [("mlperf", *sd15, 4)]
    assert steps_of("everydream", 14.6) == [("everydream", *sd15, n) for n in (1, 4)]
    notes.clear()
    assert steps_of("models", 14.6) == []
    assert notes == [{"note": "skipped: SDXL at batch 8 needs 70 GiB, this GPU has 15"}]
    notes.clear()
    free_bytes[0] = 12 * GIB
    assert steps_of("sdxl_lora", 14.6) == steps_of("sdxl_memory", 14.6) == []
    assert notes == [{"note": "skipped: SDXL's weights need 22 GiB of host memory, 12 are free"}] * 2


def test_a_part_ends_when_its_own_time_is_up_and_the_next_one_keeps_its(tmp_path, monkeypatch):
    def endless(context):
        while context.remaining() > 0:
            time.sleep(0.01)
            yield context.make_record("endless", {}, {})

    chosen = (run_all.Part("endless", 0, 0.2, endless), run_all.Part("ceilings", 0, 9, parts._ceilings))
    monkeypatch.setattr(run_all.BenchContext, "is_gpu", True)
    monkeypatch.setattr(parts, "ceilings", lambda device, dtype, small: {})
    began = time.monotonic()
    work, end = Workload(device="cpu"), time.monotonic() + 300
    records = [record for name, record in run_all.part_events(chosen, tmp_path, work, end) if name and record]
    assert time.monotonic() - began < 60
    assert [r["bench"] for r in records] == ["endless"] * (len(records) - 1) + ["ceilings"]


def test_a_part_that_measures_nothing_says_so(tmp_path):
    (record,) = run_all.run_parts(1, tmp_path, Workload(device="cpu"), only=("graphs",))
    assert (record["bench"], record["figures"], record["note"]) == ("graphs", {}, "skipped: it needs a GPU")


def test_what_the_goals_need_fits_the_default_time_and_all_but_runs_and_compilers_ten_minutes():
    def most_s(last: str) -> float:
        names = [part.name for part in parts.PARTS]
        return sum(part.max_s for part in parts.PARTS[: names.index(last) + 1])

    assert most_s("roofline") <= 60 * All(Path()).minutes
    assert most_s("cache") <= 600
    assert all(part.min_s <= part.max_s for part in parts.PARTS)


def test_the_docs_have_every_part_in_its_order():
    text = (ROOT / "docs" / "measurements.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| .+ \|$", text, re.MULTILINE)
    assert [(name, int(most)) for name, most, _ in rows] == [(part.name, part.max_s) for part in parts.PARTS]
    expected = {name: int(seconds) for name, _, seconds in rows}
    names = list(expected)
    # what the text says: six minutes and eight
    assert sum(expected[name] for name in names[: names.index("roofline") + 1]) <= 360
    assert sum(expected[name] for name in names[: names.index("cache") + 1]) <= 480
    assert all(seconds <= int(most) for (_, most, _), seconds in zip(rows, expected.values(), strict=True))


def test_only_files_that_may_have_gpu_tests_are_collected(tmp_path, monkeypatch):
    marked = "import pytest\n@pytest.mark.gpu\ndef test_a():\n    pass\n"
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text("import pytest\nON = pytest.param('cuda', marks=[pytest.mark.gpu])\n")
    for file in (folder / "test_in_folder.py", folder.parent / "test_marked.py"):
        file.write_text(marked)
    (folder.parent / "test_other.py").write_text("def test_b():\n    pass\n")
    commands = []
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setattr(parts, "call", lambda command, timeout_s, log: commands.append(command) or (0, "", 1.0))
    context = run_all.BenchContext(tmp_path, Workload(device="cpu").resolved(), time.monotonic() + 99)
    list(parts.gpu_tests(context))
    assert commands[0][-2:] == [str(folder.parent / "test_marked.py"), str(folder)]
    monkeypatch.setattr(parts, "ROOT", tmp_path / "nowhere")
    (record,) = parts.gpu_tests(context)
    assert (record["note"], len(commands)) == ("no tests: this is not a checkout", 1)
    # those of this checkout
    places = parts._places_of_gpu_tests(ROOT / "tests")
    assert ROOT / "tests" / "kernels" in places
    assert ROOT / "tests" / "trainer" / "step" / "test_step.py" in places


def test_sampling_draws_the_pictures_of_the_sampler(monkeypatch):
    drawn = []
    generate = sampling.generate

    def counted(unet, codec, conditioning, negative, *others, **options):
        images = generate(unet, codec, conditioning, negative, *others, **options)
        drawn.append((len(images), images[0].size, len(negative.tensors()[0])))
        return images

    monkeypatch.setattr(sampling, "generate", counted)
    records = list(sampling.bench_sampling(Workload("tiny", 8, device="cpu"), (1, 2), repeats=2, steps=2))
    # a warm-up, and two that are timed
    assert drawn == [(1, (64, 64), 1)] * 3 + [(2, (64, 64), 1)] * 3
    for record, size in zip(records, (1, 2), strict=True):
        figures = record["figures"]
        assert (record["config"]["batch_size"], record["config"]["steps"]) == (size, 2)
        total_s = figures["denoise_s"][1] + figures["decode_s"][1]
        assert size / figures["images_per_s"][2] <= total_s * 1.01
        assert figures["denoise_s"][0] > 0 < figures["decode_s"][0]


def test_encoding_fills_a_cache_with_the_bases_autoencoder():
    record = cache_growth.bench_encoding(Workload("tiny", 8, device="cpu"), num=3, batch_size=2, repeats=1)
    config, figures = record["config"], record["figures"]
    assert (config["encoder"], config["precision"], config["photo_px"], config["crop_px"]) == ("tiny", "fp32", 80, 64)
    assert figures["encoded_images_per_s"] == pytest.approx(3 / figures["alone_s"], rel=0.05)
    assert figures["filled_images_per_s"] == pytest.approx(3 / figures["fill_s"], rel=0.05)


def test_parts_that_no_longer_fit_the_time_are_recorded_as_skipped(tmp_path):
    records = list(run_all.run_parts(0.001, tmp_path, Workload(device="cpu"), only=("ceilings", "steps")))
    assert [r.get("note") for r in records] == ["skipped: not enough time left"] * 2
    with pytest.raises(ValueError, match="there is no part nothing of bench all; use ceilings"):
        list(run_all.run_parts(1, tmp_path, Workload(device="cpu"), only=("nothing",)))
    with pytest.raises(ValueError, match="--minutes 0 must be above 0"):
        list(run_all.run_parts(0, tmp_path, Workload(device="cpu")))


@pytest.mark.long
def test_the_cache_command_counts_reads_that_do_not_grow_and_compares_filling_with_the_encoder(tmp_path, capsys):
    arguments = ["--rows", "300", "3000", "--photos", "8", "--repeats", "1", "--append", str(tmp_path / "r")]
    assert main(["bench", "cache", *arguments]) == 0
    out = capsys.readouterr().out
    *growth, tiny, slow, fast, computing = read(tmp_path / "r")
    assert [r["config"]["rows"] for r in growth] == [300, 3000]
    small, large = (r["figures"] for r in growth)
    assert large["index_mib"] > 5 * small["index_mib"]
    # a page of the index more for each row at most, of ten times as many rows
    assert 8 < small["read_calls_per_batch"] <= large["read_calls_per_batch"] < small["read_calls_per_batch"] + 10
    for record, least_s in ((tiny, 0), (slow, 8 * 0.1), (fast, 8 * 0.025), (computing, 8 * 0.025)):
        figures = record["figures"]
        idle_s = sum(figures[f"{when}_s"] for when in ("before", "between", "after"))
        assert 0 < idle_s <= figures["fill_s"] - least_s + 0.01
        assert figures["alone_s"] >= least_s
        assert figures["of_encoder_alone"] == pytest.approx(figures["alone_s"] / figures["fill_s"], abs=0.01)
    assert "of the encoder alone" in out
    assert main(["bench", "cache", "--rows", "100000000000"]) == 2
    assert "lower --rows" in capsys.readouterr().err
