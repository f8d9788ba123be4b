"""`optimizer.fused_backward = auto`: how it is written, when it is taken, that a run keeps it, and that nothing takes it for a bool."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.kernels.unet.checkpointing import MODES
from safelight.options.overrides import take_overrides
from safelight.trainer.checkpoint.files import folder_of, list_checkpoints
from safelight.trainer.checkpoint.identity import identify
from safelight.trainer.config.toml import Optimizer, load_config, parse_config, to_toml
from safelight.trainer.memory_plan.candidate import Need
from safelight.trainer.memory_plan.gpus import Card, find_card
from safelight.trainer.memory_plan.planner import Planner
from safelight.trainer.memory_plan.resolve_auto import describe, filled_in, record, settle, settle_on
from safelight.trainer.optim.optimizer import UNetOptimizer, memory_mode
from safelight.trainer.train import train
from safelight.units import GIB

ROOT = Path(__file__).parents[3]
GOLDEN = json.loads((ROOT / "tests/trainer/memory_plan/golden_plans.json").read_text())
CPU = torch.device("cpu")


def test_it_is_written_as_true_false_or_auto(tmp_path):
    for text, value in (("true", True), ("false", False), ('"auto"', "auto")):
        path = tmp_path / "run.toml"
        path.write_text(f"[optimizer]\nfused_backward = {text}\n")
        config = load_config(path)
        assert config.optimizer.fused_backward is value or (value == "auto" == config.optimizer.fused_backward)
        assert f"fused_backward = {text}\n" in to_toml(config)
    assert parse_config({}, "here").optimizer.fused_backward == "auto"
    # as any other switch
    assert parse_config({"optimizer": {"fused_backward": 1}}, "here").optimizer.fused_backward is True
    for value in ("yes", "true", 2, None):
        with pytest.raises(ValueError, match=r"fused_backward = .*: input should be 'auto', true or false$"):
            parse_config({"optimizer": {"fused_backward": value}}, "here")


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (["--optimizer.fused-backward", "true"], True),
        (["--optimizer.fused-backward=false"], False),
        (["--optimizer.fused-backward", "auto"], "auto"),
        (["--optimizer.fused-backward"], True),
        (["--optimizer.no-fused-backward"], False),
        (["--optimizer.fused-backward", "often"], "often"),
    ],
)
def test_on_the_command_line(given, value):
    others, settings = take_overrides([*given, "--resume"], {"stage": []})
    assert (others, settings["optimizer"]) == (["--resume"], {"fused_backward": value})


def test_what_name_and_clipping_leave():
    for options, choices, clipping in (
        ({}, (False, True), "global"),
        ({"fused_backward": True}, (True,), "lagged"),
        ({"fused_backward": False}, (False,), "global"),
        ({"clipping": "global"}, (False,), "global"),
        ({"clipping": "lagged"}, (True,), "lagged"),
        ({"clipping": "per-tensor"}, (True,), "per-tensor"),
        ({"name": "adamw"}, (False,), "global"),
        ({"name": "bnb_adamw8bit"}, (False,), "global"),
    ):
        optimizer = Optimizer(**options)
        assert (optimizer.fused_choices(), optimizer.clipping_mode()) == (choices, clipping)
        assert optimizer.is_fused is choices[0]
    # an optimizer that cannot step inside backward is not refused for it
    assert memory_mode(Optimizer(name="adamw"), torch.float32) == "fp32"
    module = torch.nn.Linear(4, 4)
    assert not UNetOptimizer(module, Optimizer()).is_fused
    assert UNetOptimizer(module, Optimizer(clipping="lagged")).is_fused


def test_nothing_reads_the_setting_but_where_it_is_resolved():
    """bool("auto") is true: everybody else asks is_fused, fused_choices or a plan."""
    found = set()
    for part in ("kernels", "data", "trainer", "bench", "safelight"):
        for path in (ROOT / part).rglob("*.py"):
            text = path.read_text()
            if "fused_backward" in text:
                nodes = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute))
                read = (n for n in nodes if n.attr == "fused_backward" and isinstance(n.ctx, ast.Load))
                found |= {(path.relative_to(ROOT).as_posix(), ast.unparse(n.value)) for n in read}
    needs = {
        ("trainer/memory_plan/candidate.py", "self"),
        ("trainer/memory_plan/estimator.py", "need"),
        ("trainer/memory_plan/resolve_auto.py", "need"),
    }
    assert found - needs == {("trainer/config/schema.py", "self")}


def planner_of(base: str, card: Card, monkeypatch, batch_size: int = 1, clip: float = 1.0, **optimizer) -> Planner:
    """Return a planner whose needs are the golden tables', of a card that is one of them by its dtype."""
    train = {"checkpointing": "auto", "batch_size": batch_size, "max_grad_norm": clip}
    data = {"resolution": 1024 if base == "sdxl" else 512}
    config = parse_config(
        {"model": {"base": f"random:{base}"}, "train": train, "data": data, "optimizer": optimizer}, "here"
    )
    gib = GOLDEN["t4" if not card.has_bf16 else "rtx4090"][base]["gib"]

    def need(self, memory: str, how: str, batch_size: int, fused: bool) -> Need:
        needed = round(GIB * gib[f"{memory} {how} {'fused' if fused else 'unfused'} {batch_size}"])
        return Need(memory, how, fused, batch_size, needed, 0, 0, 0, "step", {}, None)

    monkeypatch.setattr(Planner, "need", need)
    return Planner(config, card)


def taken(planner: Planner) -> str:
    need = planner.choose()
    return f"{need.memory} {need.checkpointing} {'fused' if need.fused_backward else 'unfused'}"


def sized(gib: float) -> Card:
    return Card(f"{gib:g} GiB", gib)


@pytest.mark.parametrize(
    ("base", "card", "batch_size", "expected"),
    [
        ("sd15", find_card("t4"), 4, "exact none unfused"),
        ("sd15", find_card("rtx4060"), 1, "exact none unfused"),
        ("sd15", find_card("rtx4060"), 4, "exact selective unfused"),
        ("sd15", find_card("rtx4060"), 8, "exact full fused"),
        # as much of the weights is kept, and only what clips comes a step later: before another memory mode
        ("sd15", sized(6), 1, "exact none fused"),
        ("sd15", sized(5.7), 1, "exact full fused"),
        ("sd15", sized(5.2), 1, "near none fused"),
        # pages stream beside the backward pass
        ("sd15", sized(4.5), 1, "paged none fused"),
        ("sdxl", find_card("t4"), 1, "near full fused"),
        ("sdxl", find_card("rtx4090"), 1, "exact none unfused"),
        ("sdxl", sized(20), 1, "exact none fused"),
    ],
)
def test_it_is_taken_where_a_run_fits_only_with_it(base, card, batch_size, expected, monkeypatch):
    assert taken(planner_of(base, card, monkeypatch, batch_size)) == expected


def test_before_the_order_of_clipping_is_given_up_activations_are_recomputed_but_not_sent_away(monkeypatch):
    gib = GOLDEN["rtx4090"]["sd15"]["gib"]
    # room for the step inside backward without checkpointing, and for one after it with
    room = sized(max(gib["exact none fused 4"], gib["exact selective unfused 4"]) + 0.01)
    assert room.usable_gib < gib["exact none unfused 4"]
    assert taken(planner_of("sd15", room, monkeypatch, 4)) == "exact selective unfused"
    assert taken(planner_of("sd15", room, monkeypatch, 4, clip=0.0)) == "exact none fused"
    # a stage that clips is a run that clips
    planner = planner_of("sd15", room, monkeypatch, 4, clip=0.0)
    planner.config.stage = parse_config({"stage": [{"epochs": 1}, {"epochs": 1, "max_grad_norm": 1.0}]}, "here").stage
    assert taken(planner) == "exact selective unfused"
    # full, but not offload
    tight = sized((gib["exact offload unfused 8"] + gib["exact full unfused 8"]) / 2)
    assert taken(planner_of("sd15", tight, monkeypatch, 8)) == "exact full fused"


def test_what_is_set_is_set(monkeypatch):
    roomy, small = sized(40), sized(6)
    assert taken(planner_of("sd15", roomy, monkeypatch, fused_backward=True)) == "exact none fused"
    assert taken(planner_of("sd15", roomy, monkeypatch, clipping="per-tensor")) == "exact none fused"
    for options in ({"fused_backward": False}, {"clipping": "global"}):
        planner = planner_of("sd15", small, monkeypatch, memory="exact", **options)
        assert planner.choose() is None
        fixed = "--optimizer.fused-backward true" in planner.refusal()
        # what would fit is said, but nothing that clipping rules out
        assert fixed == ("clipping" not in options)


def test_a_run_keeps_what_it_began_with(monkeypatch):
    base = {"model": {"base": "random:sd15"}, "train": {"checkpointing": "auto", "batch_size": 1}}
    config = parse_config({**base, "data": {"resolution": 512}}, "here")
    planner_of("sd15", sized(6), monkeypatch)
    monkeypatch.setattr("safelight.trainer.memory_plan.resolve_auto._as_before", lambda need, *_: need)
    settled, need = settle_on(config, sized(6))
    assert (settled.optimizer.fused_backward, settled.train.checkpointing) == (True, "none")
    assert describe(need).endswith("checkpointing none, stepped inside backward")
    assert record(need)["fused_backward"] is True
    # on a larger card, and on a CPU, whatever environment.json says
    for before in (record(need), None):
        assert settle_on(config, sized(40), before, True)[0].optimizer.fused_backward is True
    assert settle(config, CPU, None, True)[0].optimizer.is_fused
    assert not settle(config, CPU, None, False)[0].optimizer.is_fused
    # and one that was not, on a smaller card, is not made one: what it may change is said
    would = "--optimizer.memory paged --train.checkpointing none --optimizer.fused-backward false --train.batch-size 1"
    with pytest.raises(ValueError, match=rf"and 6 GiB has 6\.00 GiB for it; 4\.\d+ GiB would do with {would}$"):
        settle_on(config.model_copy(update={"optimizer": Optimizer(memory="exact")}), sized(6), None, False)
    # what is set now is not overruled: the checkpoint's identity refuses it by name
    pinned = parse_config({**base, "optimizer": {"fused_backward": False}}, "here")
    other = settle(pinned, CPU, None, True)[0]
    assert other.optimizer.fused_backward is False
    one, two = (identify(filled_in(config, record(replace(need, fused_backward=f))), "bf16") for f in (True, False))
    assert (one.is_fused, two.is_fused) == (True, False)
    assert two.difference(one, 0) == "optimizer.fused_backward is False here and True there"
    # of a checkpoint from before there was `auto`
    assert identify(config, "bf16").settings["optimizer.fused_backward"] is False


def test_a_resumed_run_steps_as_it_did(make_config):
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
    with pytest.raises(ValueError, match=r"optimizer\.fused_backward is False here and True there"):
        train(config, resume=True)


def test_all_ways_are_there_once():
    planner = Planner(parse_config({"train": {"checkpointing": "auto"}}, "here"), sized(8))
    assert len(set(planner.ways())) == len(planner.ways()) == 4 * len(MODES) * 2
