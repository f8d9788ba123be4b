"""`bench report`: predictions beside recorded lines, the goals, and the page."""

import json

import pytest

from safelight.__main__ import main
from safelight.bench.core.results import append
from safelight.bench.measure import predictions
from safelight.bench.measure.goals import context_gib, read_goals, timed_steps
from safelight.bench.measure.predictions import LAUNCHES, MEMORY, OPTIMIZERS, ROOFLINE, SAMPLING, SPEED, rows_of
from safelight.bench.recipes.suite import recipe_config
from safelight.bench.recipes.workload import Workload
from safelight.trainer.memory_plan.gpus import CONTEXT_BYTES, card_called, find_card
from safelight.trainer.memory_plan.planner import Planner
from safelight.units import GIB

H200 = "NVIDIA H200"
WORK = {
    "base": "tiny",
    "latent_size": 16,
    "batch_size": 1,
    "precision": "bf16",
    "optimizer": "adamw8bit, near",
    "checkpointing": "none",
    "device": "cuda",
}


def line(bench: str, config: dict, figures: dict, device: str = H200, note: str = "") -> dict:
    record = {"bench": bench, "config": config, "figures": figures, "machine": {"device": device, "torch": "2.13.0"}}
    return {**record, **({"note": note} if note else {})}


def step(recipe: str, images_per_s: float, peak_gib: float | None, **changes: object) -> dict:
    figures = {"images_per_s": [0.9 * images_per_s, images_per_s, 1.1 * images_per_s], "peak_gib": peak_gib}
    return line("step", {"recipe": recipe, **WORK, **changes, "loader": False, "repeats": 9}, figures)


def by_section(records: list[dict]) -> dict[str, list]:
    found: dict[str, list] = {}
    for row in rows_of(records):
        found.setdefault(row.section, []).append(row)
    return found


def test_a_steps_prediction_is_the_plans():
    work = Workload(**{**WORK, "checkpointing": "full"})
    config = recipe_config("safelight-fused-graphs", work)
    config.optimizer.memory = "near"
    planned = Planner(config, find_card("h200")).estimator.estimate("near", "full", 1)
    found = by_section([step("safelight-fused-graphs", 30.0, 0.5, checkpointing="full")])
    (speed,), (memory,) = found[SPEED], found[MEMORY]
    assert (speed.predicted, speed.measured, speed.unit) == (planned.images_per_s, 30.0, "images/s")
    assert memory.predicted == (planned.needed_bytes - CONTEXT_BYTES) / GIB
    assert memory.ratio == 0.5 / memory.predicted
    assert speed.what == "tiny 128 px, batch 1, fused graphs, near, full checkpointing"


def test_what_a_variant_changes_changes_its_prediction():
    recipes = ("safelight", "safelight-graphs", "safelight-unpatched", "safelight-lora", "safelight-lora-nf4")
    speeds, peaks = {}, {}
    for recipe in recipes:
        found = by_section([step(recipe, 1.0, 1.0)])
        speeds[recipe], peaks[recipe] = found[SPEED][0].predicted, found[MEMORY][0].predicted
    # an eager step waits for the host
    assert speeds["safelight-graphs"] > 2 * speeds["safelight"]
    assert speeds["safelight-unpatched"] < speeds["safelight"]
    assert peaks["safelight-lora-nf4"] < peaks["safelight-lora"] < peaks["safelight"]


def test_a_step_that_ran_out_of_memory_has_its_predicted_peak_alone():
    record = line("step", {"recipe": "safelight", **WORK}, {"fits": False})
    (row,) = rows_of([record])
    assert (row.section, row.measured, row.ratio) == (MEMORY, None, None)


def test_rooflines_optimizers_kernels_and_launches_are_compared_with_their_bounds():
    found = by_section(
        [
            line("ceilings", {"precision": "bf16"}, {"matmul_tflops": 700.0, "copy_gb_per_s": 4000.0}),
            line("ceilings", {"precision": "fp16"}, {"matmul_tflops": 24.0, "copy_gb_per_s": 250.0}, device="Tesla T4"),
            line(
                "roofline",
                {"recipe": "safelight", **WORK},
                {
                    "least_ms": 4.0,
                    "step_ms": [8.0, 10.0, 11.0],
                    "model_flop_use": {"share_of_limit": 0.4},
                    "classes": {"norm": {"least_ms": 1.0, "ms": 1.5}, "idle": {"ms": 2.0}},
                },
            ),
            line(
                "optimizer",
                {"optimizer": "adamw8bit, near", "parameters": 10**9, "device": "cuda"},
                {"moved_bytes_per_parameter": 12.0, "step_ms": [3.0, 6.0, 7.0]},
            ),
            line(
                "kernels",
                {"op": "geglu", "shape": [1, 4096, 2560]},
                {"forward": {"ours_ms": [0.1, 0.2, 0.3], "share_of_limit": 0.8}},
            ),
            line("profile", {"recipe": "safelight", **WORK}, {"launches": 1400}),
        ]
    )
    assert [(row.what.rpartition(": ")[2], row.predicted, row.measured) for row in found[ROOFLINE]] == [
        ("whole step, without the profiler", 4.0, 10.0),
        ("norm", 1.0, 1.5),
    ]
    # 12 bytes of 10^9 parameters at 4,000 GB/s
    assert [(row.predicted, row.measured) for row in found[OPTIMIZERS]] == [(3.0, 6.0)]
    (kernel,) = found[predictions.KERNELS]
    assert (kernel.what, kernel.predicted) == ("geglu 1x4096x2560 forward", pytest.approx(0.16))
    (launches,) = found[LAUNCHES]
    assert launches.measured == 1400
    assert 100 < launches.predicted < 3000


def test_sampling_is_compared_with_the_passes_of_the_unet():
    def predicted(**changes: object) -> float:
        config = {**WORK, "steps": 30, "cfg": 7.5, **changes}
        (row,) = rows_of([line("sampling", config, {"denoise_s": [1.0, 2.0, 3.0]})])
        assert (row.section, row.measured, row.unit) == (SAMPLING, 2.0, "s")
        return row.predicted

    assert predicted(steps=60) == pytest.approx(2 * predicted())
    # guidance runs the UNet on two rows for each picture; of this size, computing takes longer than launching
    large = {"latent_size": 64, "batch_size": 512}
    assert predicted(**large) == pytest.approx(predicted(**large | {"cfg": 1, "batch_size": 1024}))
    assert predicted(**large, cfg=1) < 0.6 * predicted(**large)


def test_what_processes_send_is_compared_with_the_plan_of_several_gpus():
    config = {"base": "tiny", "latent_size": 16, "batch_size": 4, "precision": "fp32", "device": "cpu"}
    ours = {"sent_mib": 12.289, "calls": 1}
    records = [
        line("scale", {**config, "processes": 1}, {"ours": {"sent_mib": 0.0, "calls": 0}}, "CPU"),
        line("scale", {**config, "processes": 2}, {"ours": ours, "ddp": ours}, "CPU"),
        line("scale", {**config, "processes": 2, "bucket_mib": 1.0}, {"ours": ours}, "CPU"),
    ]
    sent, calls = rows_of(records)
    assert (sent.section, sent.unit, calls.unit) == (predictions.COMMUNICATION, "MiB", "messages")
    # every gradient once in each direction of a ring of two
    assert sent.predicted == pytest.approx(12.289, abs=1e-3)
    assert (calls.predicted, calls.measured) == (1, 1)


@pytest.mark.parametrize(
    "config",
    [
        {"base": "/home/somebody/model"},
        {"base": ["tiny"]},
        {"latent_size": 10**9},
        {"batch_size": "8"},
        {"batch_size": True},
        {"precision": "int3"},
        {"optimizer": "sgd, near"},
        {"optimizer": 7},
        {"checkpointing": "some"},
        {"recipe": "somebody's"},
        {"device": "cpu"},
    ],
)
def test_lines_that_no_plan_accepts_have_no_row(config):
    assert rows_of([line("step", {"recipe": "safelight", **WORK, **config}, {"peak_gib": 1.0, "fits": False})]) == []


def test_cards_are_known_by_the_names_that_torch_gives_them():
    assert card_called("NVIDIA H100 80GB HBM3").name == "h100"
    assert card_called("Tesla T4").name == "t4"
    assert card_called("a card of tomorrow") is None


def goal_of(what: str):
    (goal,) = [goal for goal in read_goals() if goal.what == what]
    return goal


def test_goals_take_the_best_line_of_their_card_and_settings():
    sd15 = {"base": "random:sd15", "latent_size": 64}
    records = [
        step("safelight", 50.0, 6.0, **sd15),
        step("safelight-graphs", 90.0, 6.5, **sd15),
        step("safelight-lora", 200.0, 3.0, **sd15),
        step("diffusers", 30.0, 9.0, **sd15),
        step("safelight", 300.0, 8.0, **sd15, batch_size=32),
        line("memory", {}, {"context_gib": 0.25}),
    ]
    steps = timed_steps(records)
    assert context_gib(records) == 0.25
    assert context_gib(records[:-1]) == 0.5
    speed = goal_of("SD1.5 512 px, batch 1")
    assert speed.measured(steps, 0.25) == 90.0
    assert (speed.verdict(90.0), speed.verdict(110), speed.verdict(79.9)) == ("must", "stretch", "missed")
    assert goal_of("SD1.5 512 px, batch 1, over diffusers").measured(steps, 0.25) == 3.0
    near = goal_of("SD1.5 512 px, batch 1, near")
    assert near.measured(steps, 0.25) == 6.25
    assert (near.verdict(5.1), near.verdict(4.8), near.verdict(6.25)) == ("must", "stretch", "missed")
    assert goal_of("SD1.5 512 px, batch 1, paged").measured(steps, 0.25) is None
    assert goal_of("SD1.5 512 px, batch 4").measured(steps, 0.25) is None
    assert goal_of("SD1.5 512 px, batch 4").verdict(None) == "not measured"


def test_the_command_writes_a_page_and_prints_its_tables(tmp_path, capsys):
    file, page = tmp_path / "results.jsonl", tmp_path / "deep" / "page.html"
    for record in (
        step("safelight", 30.0, 0.5),
        line("sdxl_lora", {}, {}, note="skipped: SDXL's weights need more <memory>"),
        line("tests", {}, {"failed": True}, note="the process was killed by SIGSEGV"),
    ):
        append(file, record)
    assert main(["bench", "report", str(file), "-o", str(page)]) == 0
    out, html = capsys.readouterr().out, page.read_text()
    for word in (SPEED, MEMORY, "tiny 128 px, batch 1, near", "H200, SD1.5 512 px, batch 1", "not measured"):
        assert word in out
        assert word in html
    assert "Predicted and measured: NVIDIA H200" in html
    assert "SDXL&#x27;s weights need more &lt;memory&gt;" in html
    assert "killed by SIGSEGV" in html
    # of the goals, none is measured by these lines
    assert "of 0" not in html
    assert main(["bench", "report", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["measured"] for row in found["rows"]] == [30.0, 0.5]
    assert len(found["goals"]) == len(read_goals())
    assert main(["bench", "report"]) == 2
