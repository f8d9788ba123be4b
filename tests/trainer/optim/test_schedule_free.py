"""Schedule-free optimizers: equal to the library, trained at y, and validated, sampled and exported at the average."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.errors import UserError
from safelight.trainer.adapters.full import FOLDER, WEIGHTS_NAME, has_averages, load_averages
from safelight.trainer.between_steps import evaluate
from safelight.trainer.checkpoint.files import folder_of
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.export import export
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.ema import OwnAverages
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.train import train
from tests.small_base import small_base
from tests.trainer.checkpoints import state_tensors

schedulefree = pytest.importorskip("schedulefree")
LIBRARY = {"schedulefree_adamw": "AdamWScheduleFree", "schedulefree_radam": "RAdamScheduleFree"}
NAMES = tuple(LIBRARY)


def net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))


def set_gradients(module: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"average_power": 1.0}, {"average_lr_power": 0.5}, {"betas": (0.8, 0.9)}])
def test_it_equals_the_library_and_every_setting_has_an_effect(name, options):
    ends = []
    names = {"average_power": "r", "average_lr_power": "weight_lr_power"}
    for given in (options, {}):
        module, twin = net(), net()
        ours = make_optimizer(module, Optimizer(name=name, **given))
        theirs = getattr(schedulefree, LIBRARY[name])(
            twin.parameters(), weight_decay=0.01, foreach=False, **{names.get(k, k): v for k, v in given.items()}
        )
        theirs.train()
        for step in range(20):
            lr = 1e-2 * min(1.0, (step + 1) / 5)
            set_gradients(module, step)
            set_gradients(twin, step)
            ours.set_hyper(lr, 0.01, 0.0)
            assert ours.step()[1]
            theirs.param_groups[0]["lr"] = lr
            theirs.step()
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
        y = module[0].weight.detach().clone()
        theirs.eval()
        averages = [ours.value(parameter) for parameter in ours.parameters]
        for average, p in zip(averages, twin.parameters(), strict=True):
            torch.testing.assert_close(average, p.detach(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(averages[0], y)
        ends.append(averages[0])
    assert torch.equal(*ends) == (options == {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_resume_in_the_middle_equals_no_resume(name, dtype):
    def steps(module, optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            set_gradients(module, step)
            optimizer.set_hyper(1e-2, 0.01, 1.0)
            optimizer.step()

    module, other = net(), net(1)
    optimizer = make_optimizer(module, Optimizer(name=name), dtype)
    steps(module, optimizer, 0, 9)
    resumed = make_optimizer(other, Optimizer(name=name), dtype)
    with torch.no_grad():
        for a, b in zip(other.parameters(), module.parameters(), strict=True):
            a.copy_(b)
    resumed.load_state_tensors(state_tensors(optimizer))
    for one, its_optimizer in ((module, optimizer), (other, resumed)):
        steps(one, its_optimizer, 9, 18)
    found, expected = state_tensors(resumed), state_tensors(optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(resumed.value(key), optimizer.value(key)) for key in optimizer.parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_takes_the_weights_place_for_a_while(dtype):
    module = net()
    optimizer = make_optimizer(module, Optimizer(name="schedulefree_adamw"), dtype)
    averages = OwnAverages(optimizer)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with averages.applied():
        # before the first step there is nothing to average
        assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    for step in range(5):
        set_gradients(module, step)
        optimizer.set_hyper(1e-1, 0.0, 0.0)
        optimizer.step()
    y = {name: p.detach().clone() for name, p in module.named_parameters()}
    x = {name: optimizer.value(name).clone() for name in y}
    with averages.applied():
        assert all(torch.equal(p, x[name].to(dtype)) for name, p in module.named_parameters())
    assert all(torch.equal(p, y[name]) for name, p in module.named_parameters())
    assert not torch.equal(x["0.weight"].to(dtype), y["0.weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_validation_pictures_and_exports_use_the_average(small_config, tmp_path, monkeypatch, precision):
    run_dir, seen = tmp_path / "run", []
    original = evaluate.validate

    def watched(unet, *args, **kwargs):
        seen.append({name: p.detach().clone() for name, p in unet.named_parameters()})
        return original(unet, *args, **kwargs)

    monkeypatch.setattr(evaluate, "validate", watched)
    config = small_config(
        run={"dir": str(run_dir)},
        model={"precision": precision},
        optimizer={"name": "schedulefree_adamw", "lr": 1e-2},
        train={"max_steps": 4},
        sample={"every_epochs": 0},
    )
    train(config)
    folder = folder_of(run_dir, 4)
    state, saved = load_file(folder / "state.safetensors"), load_file(folder / FOLDER / WEIGHTS_NAME)
    assert has_averages(folder)
    assert not any(key.startswith("ema/") for key in state)
    dtype = next(iter(saved.values())).dtype
    y = {name: state.get(f"master/{name}", saved[name]) for name in saved}
    x = {name: torch.lerp(y[name], state[f"z/{name}"], 1 - 1 / 0.9) for name in saved}
    # the last validation; the check of the weights that are saved follows it
    assert all(torch.equal(p, x[name].to(dtype)) for name, p in seen[-2].items())
    assert all(torch.equal(p, saved[name]) for name, p in seen[-1].items())
    assert not torch.equal(seen[-1]["conv_in.weight"], seen[-2]["conv_in.weight"])
    unet = open_run(run_dir).unet(4)
    assert all(torch.equal(p.float(), x[name].to(p.dtype).float()) for name, p in unet.named_parameters())
    raw = open_run(run_dir).unet(4, averaged=False)
    assert all(torch.equal(p.float(), saved[name].to(p.dtype).float()) for name, p in raw.named_parameters())
    for weights, expected in (("auto", x), ("ema", x), ("trained", y)):
        done = export(run_dir, tmp_path / weights, dtype="fp32", weights=weights)
        exported = load_file(tmp_path / weights / FOLDER / WEIGHTS_NAME)
        assert all(torch.equal(exported[name], expected[name]) for name in expected)
        what = "the weights of the last step" if weights == "trained" else "schedulefree_adamw's average of the weights"
        assert f"exported {what}" in done.notes


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"optimizer": {"schedule": "cosine"}}, "schedule cosine does not go with schedulefree_adamw, whose average"),
        (
            {"stage": [{"epochs": 1}, {"epochs": 1, "schedule": "linear"}]},
            "schedule linear does not go with schedulefree_adamw",
        ),
        ({"train": {"ema_decay": 0.9}}, "train.ema_decay 0.9 does not go with schedulefree_adamw, which averages"),
        ({"text_encoder": {"train": True}}, "text_encoder.train does not go with schedulefree_adamw: "),
        ({"optimizer": {"betas": [0.0, 0.9]}}, "optimizer.betas: the first is 0, and schedulefree_adamw averages with"),
    ],
)
def test_what_does_not_go_with_an_average_is_refused(tables, message):
    tables = {**tables, "optimizer": {"name": "schedulefree_adamw", **tables.get("optimizer", {})}}
    with pytest.raises(ValueError, match=rf"^here: {message}"):
        parse_config(tables, "here")


def test_a_checkpoint_with_a_damaged_average_is_refused(tmp_path):
    unet = load_unet(resolve_base(small_base()), 0)
    name, p = next(iter(unet.named_parameters()))
    beta1 = torch.tensor(0.9, dtype=torch.float64)
    for state, message in (
        ({f"z/{name}": p, "numbers/beta1": torch.tensor(0.0)}, "numbers/beta1 is .*, no number between 0 and 1"),
        ({f"z/{name}": torch.zeros(3), "numbers/beta1": beta1, f"master/{name}": p}, "moving average of .* is"),
        ({"z/other": torch.zeros(3), "numbers/beta1": beta1}, "which this UNet does not have"),
    ):
        (tmp_path / FOLDER).mkdir(exist_ok=True)
        save_file({key: value.detach().clone() for key, value in state.items()}, tmp_path / "state.safetensors")
        with pytest.raises(UserError, match=message):
            load_averages(tmp_path, unet)
