"""`optimizer.fused_backward = auto`: when the planner steps inside backward, and that a run keeps doing so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.kernels.unet.checkpointing import MODES
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.checkpoint.identity import identify
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.memory_plan.candidate import Candidate
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import Card, find_card
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.memory_plan.resolve_auto import describe, filled_in, resolve, resolve_for
from safelight.trainer.train import train
from safelight.units import GIB

GOLDEN = json.loads((Path(__file__).parent / "golden_plans.json").read_text())
CPU = torch.device("cpu")


def planner_of(base: str, card: Card, monkeypatch, batch_size: int = 1, clip: float = 1.0, **optimizer) -> Planner:
    """Return a planner that looks up estimates in the golden plans of a card with the same dtype."""
    train = {"checkpointing": "auto", "batch_size": batch_size, "max_grad_norm": clip}
    data = {"resolution": 1024 if base == "sdxl" else 512}
    config = parse_config(
        {"model": {"base": f"random:{base}"}, "train": train, "data": data, "optimizer": optimizer}, "here"
    )
    gib = GOLDEN["t4" if not card.has_bf16 else "rtx4090"][base]["gib"]

    def estimate(self, memory: str, checkpointing: str, batch_size: int, fused: bool) -> Candidate:
        needed = round(GIB * gib[f"{memory} {checkpointing} {'fused' if fused else 'unfused'} {batch_size}"])
        return Candidate(memory, checkpointing, fused, batch_size, needed, 0, 0, 0, "step", {}, None)

    monkeypatch.setattr(MemoryEstimator, "estimate", estimate)
    return Planner(config, card)


def chosen(planner: Planner) -> str:
    candidate = planner.choose()
    return f"{candidate.memory} {candidate.checkpointing} {'fused' if candidate.fused_backward else 'unfused'}"


def sized(gib: float) -> Card:
    return Card(f"{gib:g} GiB", gib)


@pytest.mark.parametrize(
    ("base", "card", "batch_size", "expected"),
    [
        ("sd15", find_card("t4"), 4, "exact none unfused"),
        ("sd15", find_card("rtx4060"), 1, "exact none unfused"),
        ("sd15", find_card("rtx4060"), 4, "exact selective unfused"),
        ("sd15", find_card("rtx4060"), 8, "exact full fused"),
        # lagged clipping is preferred to a memory mode that keeps less of the weights
        ("sd15", sized(6), 1, "exact none fused"),
        ("sd15", sized(5.7), 1, "exact full fused"),
        ("sd15", sized(5.2), 1, "near none fused"),
        # pages stream during the backward pass
        ("sd15", sized(4.5), 1, "paged none fused"),
        ("sdxl", find_card("t4"), 1, "near full fused"),
        ("sdxl", find_card("rtx4090"), 1, "exact none unfused"),
        ("sdxl", sized(20), 1, "exact none fused"),
        # the weights alone would fill most of these cards
        ("sdxl", sized(6), 1, "streamed none fused"),
        ("sdxl", sized(5.5), 1, "streamed selective fused"),
        ("sdxl", sized(4), 1, "streamed full fused"),
    ],
)
def test_a_fused_step_is_chosen_only_if_a_run_does_not_fit_otherwise(base, card, batch_size, expected, monkeypatch):
    assert chosen(planner_of(base, card, monkeypatch, batch_size)) == expected


def test_checkpointing_is_preferred_to_a_fused_step_unless_it_offloads(monkeypatch):
    gib = GOLDEN["rtx4090"]["sd15"]["gib"]
    # enough for a fused step without checkpointing, and for an unfused one with
    room = sized(max(gib["exact none fused 4"], gib["exact selective unfused 4"]) + 0.01)
    assert room.usable_gib < gib["exact none unfused 4"]
    assert chosen(planner_of("sd15", room, monkeypatch, 4)) == "exact selective unfused"
    assert chosen(planner_of("sd15", room, monkeypatch, 4, clip=0.0)) == "exact none fused"
    # a stage that clips is a run that clips
    planner = planner_of("sd15", room, monkeypatch, 4, clip=0.0)
    planner.config.stage = parse_config({"stage": [{"epochs": 1}, {"epochs": 1, "max_grad_norm": 1.0}]}, "here").stage
    assert chosen(planner) == "exact selective unfused"
    # full, but not offload
    tight = sized((gib["exact offload unfused 8"] + gib["exact full unfused 8"]) / 2)
    assert chosen(planner_of("sd15", tight, monkeypatch, 8)) == "exact full fused"


def test_an_explicit_setting_is_kept(monkeypatch):
    roomy, small = sized(40), sized(6)
    assert chosen(planner_of("sd15", roomy, monkeypatch, fused_backward=True)) == "exact none fused"
    assert chosen(planner_of("sd15", roomy, monkeypatch, clipping="per-tensor")) == "exact none fused"
    for options in ({"fused_backward": False}, {"clipping": "global"}):
        planner = planner_of("sd15", small, monkeypatch, memory="exact", **options)
        assert planner.choose() is None
        fixed = "--optimizer.fused-backward true" in planner.refusal()
        # the refusal says what would fit, but nothing that clipping rules out
        assert fixed == ("clipping" not in options)


def test_a_resumed_run_keeps_its_choice(monkeypatch):
    base = {"model": {"base": "random:sd15"}, "train": {"checkpointing": "auto", "batch_size": 1}}
    config = parse_config({**base, "data": {"resolution": 512}}, "here")
    planner_of("sd15", sized(6), monkeypatch)
    monkeypatch.setattr(
        "safelight.trainer.memory_plan.resolve_auto._with_recorded_batching", lambda candidate, *_: candidate
    )
    resolved, candidate = resolve_for(config, sized(6))
    assert (resolved.optimizer.fused_backward, resolved.train.checkpointing) == (True, "none")
    assert describe(candidate).endswith("checkpointing none, optimizer step inside backward")
    assert candidate.to_json()["fused_backward"] is True
    # the checkpoint decides, also on a larger card, on a CPU and without environment.json
    for recorded in (candidate.to_json(), None):
        assert resolve_for(config, sized(40), recorded, True)[0].optimizer.fused_backward is True
    assert resolve(config, CPU, None, True)[0].optimizer.is_fused
    assert not resolve(config, CPU, None, False)[0].optimizer.is_fused
    # an unfused run stays unfused on a smaller card; the refusal says what it may change
    options = (
        "--optimizer.memory paged --train.checkpointing none --optimizer.fused-backward false --train.batch-size 1"
    )
    with pytest.raises(
        ValueError, match=rf"but 6 GiB has 6\.00 GiB available; it would need 4\.\d+ GiB with {options}$"
    ):
        resolve_for(config.model_copy(update={"optimizer": Optimizer(memory="exact")}), sized(6), None, False)
    # an explicit value is not changed; comparing it with the checkpoint's then fails
    pinned = parse_config({**base, "optimizer": {"fused_backward": False}}, "here")
    other = resolve(pinned, CPU, None, True)[0]
    assert other.optimizer.fused_backward is False
    one, two = (
        identify(filled_in(config, replace(candidate, fused_backward=fused).to_json()), "bf16")
        for fused in (True, False)
    )
    assert (one.is_fused, two.is_fused) == (True, False)
    assert two.difference(one, 0).text == "optimizer.fused_backward is False, but True in the checkpoint"
    # as in a checkpoint older than `auto`
    assert identify(config, "bf16").settings["optimizer.fused_backward"] is False


def test_a_resumed_training_steps_as_before(make_config):
    config = make_config(
        optimizer={"lr": 1e-4, "fused_backward": True, "weight_decay": 0.0},
        save={"every_steps": 1, "every_epochs": 0},
        validate={"every_epochs": 0},
        sample={"every_epochs": 0},
        train={"max_steps": 1, "batch_size": 8},
    )
    train(config)
    config.optimizer.fused_backward, config.train.max_steps = "auto", 2
    run_dir = Path(train(config, resume=True).run_dir)
    state = load_file(folder_of(run_dir, list_checkpoints(run_dir)[-1]) / "state.safetensors")
    assert state["clipping/last_norm"] > 0
    assert any("stepped inside backward" in note for note in json.loads((run_dir / "model.json").read_text())["notes"])
    config.optimizer.fused_backward = False
    with pytest.raises(ValueError, match=r"optimizer\.fused_backward is False, but True in the checkpoint"):
        train(config, resume=True)


def test_every_combination_is_planned_once():
    planner = Planner(parse_config({"train": {"checkpointing": "auto"}}, "here"), sized(8))
    # streamed only with a step inside backward
    assert len(set(planner.combinations())) == len(planner.combinations()) == (4 * 2 + 1) * len(MODES)
