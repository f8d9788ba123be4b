"""Prodigy: equal to prodigyopt step by step, its estimate in checkpoints and logs, and its own settings."""

import pytest
import torch
from safetensors.torch import load_file

from safelight.errors import Diverged
from safelight.trainer.checkpoint.files import folder_of
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import load_config, parse_config, to_toml
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.train import train
from tests.trainer.checkpoints import state_tensors
from tests.trainer.equal_runs import metrics

prodigyopt = pytest.importorskip("prodigyopt")


def net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    # a tensor of zeros, of which the library keeps less
    torch.nn.init.zeros_(module[1].bias)
    return module


def set_gradients(module: torch.nn.Module, step: int) -> None:
    """Set the gradients of the squared distance from 1, with noise."""
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = (p.detach().float() - 1.0 + 0.1 * torch.randn(p.shape, generator=generator)).to(p)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"d0": 1e-4, "d_coef": 2.0},
        {"safeguard_warmup": True},
        {"use_bias_correction": True},
        {"slice_p": 3},
        {"betas": (0.8, 0.9), "eps": 1e-4},
    ],
)
def test_it_equals_the_library_and_every_setting_has_an_effect(options, capsys):
    ends = []
    for given in (options, {}):
        module, twin = net(), net()
        ours = make_optimizer(module, Optimizer(name="prodigy", **given))
        library = prodigyopt.Prodigy(twin.parameters(), **given)
        for step in range(30):
            # a warm-up, which safeguard_warmup reads
            lr = min(1.0, (step + 1) / 10)
            set_gradients(module, step)
            set_gradients(twin, step)
            ours.set_hyper(lr, 0.01, 0.0)
            assert ours.step()[1]
            library.param_groups[0] |= {"lr": lr, "weight_decay": 0.01}
            library.step()
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
        group = library.param_groups[0]
        assert ours.effective_lr == group["d"] * group["lr"] > group["d0"]
        ends.append(module[0].weight.detach().clone())
    assert capsys.readouterr().out == "", "the library prints a line about weight decay"
    assert torch.equal(*ends) == (options == {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resume_in_the_middle_equals_no_resume(dtype):
    def steps(module, optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            set_gradients(module, step)
            optimizer.set_hyper(1.0, 0.01, 1.0)
            optimizer.step()

    module, other = net(), net(1)
    optimizer = make_optimizer(module, Optimizer(name="prodigy", d0=1e-4), dtype)
    steps(module, optimizer, 0, 7)
    resumed = make_optimizer(other, Optimizer(name="prodigy", d0=1e-4), dtype)
    with torch.no_grad():
        for a, b in zip(other.parameters(), module.parameters(), strict=True):
            a.copy_(b)
    resumed.load_state_tensors(state_tensors(optimizer))
    assert resumed.effective_lr == optimizer.effective_lr / 1.0 > 1e-4
    for one, its_optimizer in ((module, optimizer), (other, resumed)):
        steps(one, its_optimizer, 7, 14)
    found, expected = state_tensors(resumed), state_tensors(optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.parameters(), strict=True))


def test_an_estimate_that_is_missing_or_no_number_is_refused():
    optimizer = make_optimizer(net(), Optimizer(name="prodigy"))
    state = state_tensors(optimizer)
    for value, message in (
        (None, r"numbers/d is missing"),
        (torch.tensor(1.0), r"numbers/d is \(\) torch.float32, not \(\) torch.float64"),
        (torch.tensor(float("nan"), dtype=torch.float64), r"numbers/d is nan"),
    ):
        others = {key: x for key, x in state.items() if key != "numbers/d"}
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_tensors(others if value is None else {**others, "numbers/d": value})


def test_its_lr_is_1_unless_it_is_given(tmp_path):
    config = parse_config({"optimizer": {"name": "prodigy"}}, "here")
    assert config.optimizer.lr == 1.0
    assert parse_config({"optimizer": {"name": "adamw"}}, "here").optimizer.lr == 1e-6
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "run.toml").optimizer.lr == 1.0
    assert parse_config({"optimizer": {"name": "prodigy", "lr": 0.5}}, "here").optimizer.lr == 0.5


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"optimizer": {"lr": 1e-4}}, "optimizer.lr 0.0001 is a factor on the learning rate that prodigy estimates"),
        ({"stage": [{"epochs": 1}, {"epochs": 1, "lr": 5e-7}]}, "stage 2's lr 5e-07 is a factor on .*; set it to 1"),
        ({"text_encoder": {"train": True}}, "text_encoder.lr 5e-07 is a factor on the learning rate"),
    ],
)
def test_a_rate_for_another_optimizer_is_refused(tables, message):
    tables = {**tables, "optimizer": {"name": "prodigy", **tables.get("optimizer", {})}}
    with pytest.raises(ValueError, match=rf"^here: {message}"):
        parse_config(tables, "here")


def test_an_estimate_that_leaves_fp32_ends_a_run_as_any_divergence(small_config, tmp_path, monkeypatch):
    """prodigyopt's own step fails in the middle with a RuntimeError, with half of the tensors updated."""
    config = small_config(
        run={"dir": str(tmp_path / "run")},
        optimizer={"name": "prodigy", "lr": 1.0},
        stage=[{"epochs": 2}],
        train={"max_steps": 4},
        log={"every_steps": 1},
        validate={"every_epochs": 0},
        sample={"every_epochs": 0},
    )
    step = prodigyopt.Prodigy.step

    def grow(self, closure=None):
        result = step(self, closure)
        group = self.param_groups[0]
        if group["k"] == 2:
            group["d"] = group["d_max"] = 1e30
        return result

    monkeypatch.setattr(prodigyopt.Prodigy, "step", grow)
    said = r"^step 2: prodigy's estimate .* has grown to 1e\+30, .*: the factor on the learning rate 1 is"
    with pytest.raises(Diverged, match=f"{said} .* --optimizer.lr 0.1"):
        train(config)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1]
    assert rows[-1]["event"] == "diverged"


def test_a_run_logs_the_estimate_of_unet_and_text_encoder(small_config, tmp_path):
    config = small_config(
        run={"dir": str(tmp_path / "run")},
        optimizer={"name": "prodigy", "d0": 1e-5, "lr": 1.0},
        text_encoder={"train": True, "lr": 0.5},
        stage=[{"epochs": 2}],
        train={"max_steps": 4},
        log={"every_steps": 2},
        validate={"every_epochs": 0},
        sample={"every_epochs": 0},
    )
    train(config)
    rows = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert [row["lr"] for row in rows] == [1.0, 1.0]
    assert all(row["effective_lr"] >= 1e-5 and row["text_effective_lr"] >= 0.5e-5 for row in rows)
    state = load_file(folder_of(tmp_path / "run", 4) / "state.safetensors")
    assert float(state["numbers/d"]) == rows[-1]["effective_lr"]
    assert 0.5 * float(state["text/numbers/d"]) == rows[-1]["text_effective_lr"]
