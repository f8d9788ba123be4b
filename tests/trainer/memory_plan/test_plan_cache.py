"""What plans remember on disk: equal results without a trace, and none if anything that they depend on has changed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safelight.trainer.config.toml import parse_config
from safelight.trainer.memory_plan import estimator as estimator_module
from safelight.trainer.memory_plan import plan_cache, static_bytes
from safelight.trainer.memory_plan.allocation_trace import KINDS
from safelight.trainer.memory_plan.candidate import Candidate, EvalBatching
from safelight.trainer.memory_plan.communication import ONE_RANK, Exchange, Ranks, find_link
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import Card
from safelight.trainer.memory_plan.plan_cache import PlanCache, hash_of_packages, hash_of_sources, source_folders
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.memory_plan.ranks_plan import ranks_summary
from safelight.trainer.memory_plan.static_bytes import HostBytes, StaticBytes
from safelight.trainer.models.base import tiny_folder
from tests.small_base import small_base

ROOT = Path(__file__).resolve().parents[3]
CARD = Card("roomy", 100.0, bandwidth_gb_s=300.0, tflops=60.0, pcie_gb_s=15.0)
SETTINGS = ("exact", "none", 2, False)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder that plans remember in."""
    monkeypatch.setenv("SAFELIGHT_PLAN_CACHE", str(tmp_path / "plans"))
    return tmp_path / "plans"


@pytest.fixture
def traces(monkeypatch) -> list[tuple]:
    """The estimates that were not remembered; each is another candidate, and none is really traced."""
    found: list[tuple] = []

    def traced(self, *settings) -> Candidate:
        found.append(settings)
        kinds = dict.fromkeys(KINDS, 7)
        batching, host = EvalBatching(4, 2, "gpu", 5, 4), HostBytes(1, 2, 3, 4, 5, 6)
        return Candidate(
            *settings[:2],
            settings[3],
            settings[2],
            *range(len(found), len(found) + 4),
            "forward",
            kinds,
            1.5,
            batching,
            host,
        )

    monkeypatch.setattr(MemoryEstimator, "_traced", lambda self, *settings: traced(self, *settings))
    return found


def config_of(**sections: dict):
    return parse_config({"model": {"base": "tiny"}, "data": {"resolution": 64, "path": "none"}, **sections}, "here")


def estimate(config=None, card: Card = CARD, ranks: Ranks = ONE_RANK) -> Candidate:
    estimator = MemoryEstimator(config_of() if config is None else config, card, ranks)
    candidate = estimator.estimate(*SETTINGS)
    estimator.remember()
    return candidate


def test_a_remembered_candidate_is_the_estimated_one(folder, traces):
    first = estimate()
    assert estimate() == first
    assert len(traces) == 1
    assert len(list(folder.iterdir())) == 1
    # what neither takes memory nor time
    assert estimate(config_of(run={"dir": "elsewhere", "title": "t", "notes": "n"})) == first
    assert len(traces) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"config": config_of(data={"resolution": 128, "path": "none"})},
        {"config": config_of(model={"base": "tiny-xl"})},
        {"config": config_of(train={"accumulate": 2})},
        {"config": config_of(train={"ema_decay": 0.99})},
        {"config": config_of(train={"kernels": "off"})},
        {"config": config_of(optimizer={"weight_decay": 0.5})},
        {"config": config_of(adapter={"kind": "lora"})},
        {"config": config_of(stage=[{"batch_size": 3, "epochs": 1}])},
        {"card": dataclasses.replace(CARD, usable_gib=99.0)},
        {"card": dataclasses.replace(CARD, has_bf16=False)},
        {"ranks": Ranks(2)},
        {"ranks": Ranks(2, "states")},
    ],
)
def test_another_setting_or_card_is_estimated_anew(folder, traces, changed):
    estimate()
    estimate(**changed)
    assert len(traces) == 2
    # and is remembered beside the first
    estimate(**changed), estimate()
    assert len(traces) == 2


def test_another_config_of_the_same_base_is_estimated_anew(folder, traces, tmp_path):
    copy = shutil.copytree(tiny_folder(), tmp_path / "base")
    config = config_of(model={"base": str(copy)})
    estimate(config), estimate(config)
    assert len(traces) == 1
    for num, part in enumerate(("unet", "scheduler", "vae"), start=2):
        path = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        values = json.loads(path.read_text())
        value = {"unet": ("norm_num_groups", 4), "scheduler": ("beta_end", 0.011), "vae": ("norm_num_groups", 4)}[part]
        assert values.get(value[0]) != value[1]
        path.write_text(json.dumps({**values, value[0]: value[1]}))
        estimate(config), estimate(config)
        assert len(traces) == num, part


def test_what_a_dataset_and_a_prompt_file_change_is_estimated_anew(folder, traces, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\n")
    config = config_of(sample={"every_epochs": 1, "prompts_file": str(prompts)})
    estimate(config), estimate(config)
    assert len(traces) == 1
    prompts.write_text("a circle --w 128 --h 128\n")
    estimate(config), estimate(config)
    assert len(traces) == 2
    estimate(config_of(train={"batch_size": 4}))
    for num, (name, value) in enumerate((("has_masks", True), ("num_batch_ids", 3)), start=4):
        monkeypatch.setattr(estimator_module, name, lambda config, value=value: value)
        estimate(config_of(train={"batch_size": 4})), estimate(config_of(train={"batch_size": 4}))
        assert len(traces) == num, name


def test_deterministic_algorithms_are_an_input(folder, traces):
    estimate()
    torch.use_deterministic_algorithms(True)
    try:
        estimate()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(traces) == 2


def test_other_code_is_another_input(folder, traces, monkeypatch):
    estimate()
    code = plan_cache.code_inputs()
    for num, name in enumerate(code, start=2):
        monkeypatch.setattr(plan_cache, "code_inputs", lambda name=name: {**code, name: "another"})
        estimate(), estimate()
        assert len(traces) == num, name


def test_the_hash_of_sources_is_of_every_name_and_byte(tmp_path):
    folder = tmp_path / "trainer"
    (folder / "step").mkdir(parents=True)
    (folder / "step" / "step.py").write_text("a = 1\n")
    hashes = {hash_of_sources([folder])}
    (folder / "notes.txt").write_text("no code")
    assert hash_of_sources([folder]) in hashes
    for change in (
        lambda: (folder / "step" / "step.py").write_text("a = 2\n"),
        lambda: (folder / "step" / "step.py").rename(folder / "step" / "other.py"),
        lambda: (folder / "new.py").write_text(""),
    ):
        change()
        assert hash_of_sources([folder]) not in hashes
        hashes.add(hash_of_sources([folder]))
    # and those of this package are found
    found = {folder.resolve() for folder in source_folders()}
    assert found == {ROOT / name for name in ("kernels", "trainer", "data")}


def test_the_hash_of_packages_is_of_names_versions_and_order(tmp_path):
    for name in ("a/diffusers-0.42.0.dist-info", "b/torch-2.13.0.dist-info"):
        (tmp_path / name).mkdir(parents=True)
    places = [str(tmp_path / name) for name in ("a", "b", "missing")]
    first = hash_of_packages(places)
    assert hash_of_packages(places) == first != hash_of_packages(places[::-1])
    (tmp_path / "a" / "diffusers-0.42.0.dist-info").rename(tmp_path / "a" / "diffusers-0.43.0.dist-info")
    assert hash_of_packages(places) != first


def _damages():
    """Yield (what, a change of a file's values, or of its bytes)."""
    yield "truncated", lambda text: text[: len(text) // 2]
    yield "empty", lambda text: ""
    yield "a list", lambda text: "[]"
    yield "results of another plan", lambda text: text.replace('"resolution": 64', '"resolution": 65')
    for key, value in (
        ("held", -1),
        ("held", 1.5),
        ("held", True),
        ("held", None),
        ("memory", "vast"),
        ("checkpointing", ["none"]),
        ("during", "\u001b[2J"),
        ("no_graphs", "x" * 501),
        ("fused_backward", 1),
        ("images_per_s", "fast"),
        ("images_per_s", -2.0),
        ("kinds", {"weights": 1}),
        ("between", {"decode_on": "mars"}),
        ("host", {"states": 1}),
        ("unknown", 1),
    ):

        def change(text, key=key, value=value):
            stored = json.loads(text)
            (candidate,) = stored["results"].values()
            candidate[key] = value
            return json.dumps(stored)

        yield f"{key} {value!r:.20}", change


@pytest.mark.parametrize("change", [pytest.param(change, id=what) for what, change in _damages()])
def test_a_damaged_file_is_as_none(folder, traces, change):
    first = estimate()
    (path,) = folder.iterdir()
    whole = path.read_text()
    assert change(whole) != whole
    path.write_text(change(whole))
    again = estimate()
    assert len(traces) == 2
    assert again != first
    # and is replaced
    assert estimate() == again
    assert len(traces) == 2


def test_no_more_is_read_than_a_plan_can_have(folder, traces):
    estimate()
    (path,) = folder.iterdir()
    path.write_text(path.read_text() + " " * plan_cache.MAX_BYTES)
    estimate()
    assert len(traces) == 2


def test_nothing_is_kept_if_it_is_off_or_there_is_no_place(folder, traces, monkeypatch, tmp_path):
    folder.write_text("a file where the folder should be")
    estimate(), estimate()
    assert len(traces) == 2
    folder.unlink()
    for value in ("off", ""):
        monkeypatch.setenv("SAFELIGHT_PLAN_CACHE", value)
        estimate()
    assert len(traces) == 4
    assert not folder.exists()
    monkeypatch.delenv("SAFELIGHT_PLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert plan_cache.cache_folder() == tmp_path / "xdg" / "safelight" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan_cache.cache_folder() == tmp_path / ".cache" / "safelight" / "plans"


def test_old_files_make_room(folder, monkeypatch):
    monkeypatch.setattr(plan_cache, "MAX_FILES", 3)
    for num in range(5):
        cache = PlanCache({"num": num})
        cache.put("x", num)
        cache.save()
        for age, path in enumerate(sorted(folder.iterdir(), key=lambda p: -p.stat().st_mtime_ns)):
            os.utime(path, ns=(10**18 - age * 10**9 + num, 10**18 - age * 10**9 + num))
    assert [PlanCache({"num": num}).get("x", plan_cache.checked_int) for num in range(5)] == [None, None, 2, 3, 4]


def test_results_of_two_processes_are_both_kept(folder):
    one, two = PlanCache({"a": 1}), PlanCache({"a": 1})
    one.put("x", 1)
    two.put("y", 2)
    one.save()
    two.save()
    again = PlanCache({"a": 1})
    assert [again.get(key, plan_cache.checked_int) for key in ("x", "y")] == [1, 2]


def test_static_bytes_are_remembered_by_what_they_depend_on(folder, monkeypatch):
    built = []
    meta_unet = static_bytes.meta_unet
    monkeypatch.setattr(static_bytes, "meta_unet", lambda base: built.append(base) or meta_unet(base))
    config, cpu = config_of(), torch.device("cpu")
    first = static_bytes.static_bytes(config, cpu, torch.float32)
    assert static_bytes.static_bytes(config, cpu, torch.float32) == first
    assert len(built) == 1
    other = static_bytes.static_bytes(config, cpu, torch.bfloat16)
    assert other != first
    assert len(built) == 2
    static_bytes.static_bytes(config, torch.device("cuda"), torch.float32)
    assert len(built) == 3
    static_bytes.static_bytes(config_of(train={"ema_decay": 0.9}), cpu, torch.float32)
    assert len(built) == 4
    values = dataclasses.asdict(first)
    assert StaticBytes.from_json(values) == first
    for change in ({"weights": -1}, {"precision": "fp7"}, {"memory": 3}, {"more": 1}):
        with pytest.raises(ValueError, match=r"not a|none of"):
            StaticBytes.from_json({**values, **change})


def test_a_plan_is_the_same_plan_again(folder, monkeypatch):
    """Traced and remembered results of a small plan are equal, its refusal too, and nothing is traced twice."""
    config = config_of(model={"base": small_base()}, sample={"every_epochs": 1}, train={"checkpointing": "auto"})
    first = Planner(config, CARD).summary()
    tight = dataclasses.replace(CARD, usable_gib=0.51)
    refused = Planner(config, tight).summary()
    assert refused["refusal"]
    link = find_link(None, CARD)
    several = ranks_summary(config_of(model={"base": small_base()}), CARD, 2, link)
    assert all(row["exchanges"] and row["predicted"] for row in several["shards"].values())

    def fail(*args, **kwargs):
        raise AssertionError("traced again")

    monkeypatch.setattr(estimator_module, "meta_run", fail)
    monkeypatch.setattr(MemoryEstimator, "_traced", fail)
    assert ranks_summary(config_of(model={"base": small_base()}), CARD, 2, link) == several
    assert Planner(config, CARD).summary() == first
    assert Planner(config, tight).summary() == refused


@pytest.mark.parametrize("change", [{"payload": -1}, {"when": "never"}, {"collective": "telepathy"}, {"more": 1}])
def test_damaged_exchanges_are_refused(change):
    exchange = Exchange("gradients", "all_reduce", 8)
    assert Exchange.from_json(dataclasses.asdict(exchange)) == exchange
    with pytest.raises(ValueError, match=r"not a|none of"):
        Exchange.from_json({**dataclasses.asdict(exchange), **change})


@pytest.mark.long
def test_a_plan_that_was_made_before_imports_no_library_of_models(folder, tmp_path):
    """`safelight plan` twice, in processes of its own."""
    code = (
        "import sys; from safelight.__main__ import main; status = main(sys.argv[1:]);"
        "names = ('diffusers', 'transformers', 'bitsandbytes', 'peft', 'scipy', 'torch._dynamo', 'torch._inductor');"
        "print(status, *[name for name in names if name in sys.modules], file=sys.stderr)"
    )
    settings = tmp_path / "run.toml"
    settings.write_text('[model]\nbase = "tiny"\n[data]\nresolution = 64\npath = "none"\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SAFELIGHT_PLAN_CACHE": str(folder)}
    command = [sys.executable, "-c", code, "plan", str(settings), "--json", "--gpu", "t4"]
    first, again = (
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
        for _ in range(2)
    )
    assert again.stdout == first.stdout
    assert "diffusers" in first.stderr.splitlines()[-1].split()
    assert again.stderr.splitlines()[-1] == "0"
