"""The moving average of the weights: its values, where it is used, and that it does not affect training."""

import json

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

from safelight.trainer import train as loop
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.inference.draw import open_run
from safelight.trainer.inference.export import export
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_unet
from safelight.trainer.optim.ema import NUM_UPDATES, PREFIX, WeightAverages, take_averages
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.registry.optimizers import OPTIMIZERS
from tests.small_base import small_base

DECAY = 0.6


def settings_of(folder, dataset, **train) -> dict:
    return {
        "run": {"dir": str(folder), "device": "cpu"},
        "model": {"base": small_base(), "precision": "bf16"},
        "data": {"path": str(dataset), "resolution": 64},
        "train": {"batch_size": 7, "epochs": 2, **train},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "sample": {"steps": 2, "num_prompts": 1, "every_epochs": 2},
        "validate": {"timesteps": 2, "every_epochs": 2},
        "save": {"every_steps": 1, "keep": 99},
        "log": {"every_steps": 1, "tensorboard": False},
    }


@pytest.fixture(scope="module")
def runs(tiny_dataset, tmp_path_factory):
    """The same run without and with a moving average, every step saved: (plain, averaged)."""
    root = tmp_path_factory.mktemp("ema")
    for name, train in (("plain", {}), ("averaged", {"ema_decay": DECAY})):
        loop.train(parse_config(settings_of(root / name, tiny_dataset, **train), "test"))
    return root / "plain", root / "averaged"


def states(run) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "state.safetensors") for folder in sorted((run / "checkpoints").iterdir())]


def losses(run, kind: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == kind]


def test_the_averages_are_those_of_the_fp32_weights_of_every_step(runs):
    found = states(runs[1])
    assert [int(state[NUM_UPDATES]) for state in found] == list(range(1, len(found) + 1))
    name = "mid_block.resnets.0.conv1.weight"
    average = load_unet(resolve_base(small_base()), 0).state_dict()[name].double()
    for n, state in enumerate(found, 1):
        decay = min(DECAY, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * state[f"master/{name}"].double()
        # fp32 rounds each of the few updates once or twice
        torch.testing.assert_close(state[f"{PREFIX}{name}"].double(), average, rtol=1e-6, atol=1e-7)
    last = found[-1]
    assert (last[f"{PREFIX}{name}"] - last[f"master/{name}"]).abs().max() > 1e-4


def test_averages_affect_validation_and_samples_but_not_training(runs):
    plain, averaged = runs
    for one, other in zip(states(plain), states(averaged), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses(plain, "train") == losses(averaged, "train")
    before, after = losses(plain, "validation"), losses(averaged, "validation")
    # held out and trained at step 0, where the average is the weights, and at the end
    assert before[:2] == after[:2]
    assert all(a != b for a, b in zip(before[2:], after[2:], strict=True))
    last = sorted((plain / "samples").iterdir())[-1].name
    one, other = (next((run / "samples" / last).glob("*-000-*.png")) for run in runs)
    assert one.name == other.name
    assert one.read_bytes() != other.read_bytes()


def test_a_finished_run_draws_with_the_averages(runs):
    run = open_run(runs[1])
    step = int(sorted((runs[1] / "checkpoints").iterdir())[-1].name.removeprefix("step-"))
    state = states(runs[1])[-1]
    drawn = run.unet(step).state_dict()
    assert all(torch.equal(tensor, state[f"{PREFIX}{name}"].bfloat16()) for name, tensor in drawn.items())
    plain = open_run(runs[0]).unet(step).state_dict()
    assert all(torch.equal(tensor, state[f"master/{name}"].bfloat16()) for name, tensor in plain.items())


@pytest.mark.parametrize(("weights", "prefix"), [("auto", PREFIX), ("ema", PREFIX), ("trained", "master/")])
def test_an_export_holds_the_weights_named_by_weights(runs, tmp_path, weights, prefix):
    done = export(runs[1], tmp_path / "out", dtype="fp32", weights=weights)
    state = states(runs[1])[-1]
    tensors = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, state[prefix + name]) for name, tensor in tensors.items())
    assert done.notes == [
        f"exported the {'weights of the last step' if weights == 'trained' else 'moving average of the weights'}"
    ]


def test_an_average_that_does_not_exist_is_not_exported(runs, tmp_path):
    with pytest.raises(ValueError, match=r"has no moving average, because train\.ema_decay is 0; leave out --weights"):
        export(runs[0], tmp_path / "out.safetensors", weights="ema")
    assert not (tmp_path / "out.safetensors").exists()
    export(runs[0], tmp_path / "out.safetensors")


def test_the_weights_come_back_bit_for_bit_even_after_an_error():
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    optimizer = make_optimizer(module, parse_config({"optimizer": {"name": "adamw"}}, "test").optimizer, torch.float16)
    ema = WeightAverages(optimizer, 0.9)
    before = {name: p.clone() for name, p in module.named_parameters()}
    for average in ema.averages.values():
        average.add_(1)
    with ema.applied():
        assert all(torch.equal(p, ema.averages[name].half()) for name, p in module.named_parameters())
        assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    with pytest.raises(KeyError), ema.applied():
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_skipped_step_leaves_the_averages_alone(as_tensor):
    torch.manual_seed(2)
    module = torch.nn.Linear(5, 3)
    optimizer = make_optimizer(module, parse_config({"optimizer": {"name": "adamw"}}, "test").optimizer)
    ema = WeightAverages(optimizer, 0.9)
    flag = torch.tensor if as_tensor else bool
    with torch.no_grad():
        module.weight.add_(1)
    ema.update(flag(True))
    moved = ema.averages["weight"].clone()
    assert not torch.equal(moved, module.weight - 1)
    ema.update(flag(False))
    assert torch.equal(ema.averages["weight"], moved)
    assert int(ema.num_updates) == 1
    ema.update(flag(True))
    assert int(ema.num_updates) == 2
    assert not torch.equal(ema.averages["weight"], moved)


def test_a_checkpoint_without_averages_is_refused_by_a_run_that_keeps_them(runs, tiny_dataset):
    plain = settings_of(runs[0], tiny_dataset, ema_decay=0.9)
    with pytest.raises(ValueError, match=r"train\.ema_decay is 0\.9, but 0\.0 in the checkpoint"):
        loop.train(parse_config(plain, "test"), resume=True)
    module = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(module, parse_config({"optimizer": {"name": "adamw"}}, "test").optimizer)
    with pytest.raises(ValueError, match=r"has no moving average of these weights; resume with train\.ema_decay = 0"):
        take_averages({"loss_scale/scale": torch.ones(())}, WeightAverages(optimizer, 0.9))


@pytest.mark.parametrize(
    ("name", "dtype", "memory"),
    [
        *(
            (name, torch.float32, "auto")
            for name, spec in OPTIMIZERS.items()
            if "cpu" in spec.devices and not spec.averages_weights
        ),
        *(("adamw8bit", torch.bfloat16, memory) for memory in ("exact", "near", "rounded", "fp32")),
    ],
)
def test_it_follows_weights_in_every_memory_order(name, dtype, memory):
    """bitsandbytes' step gives weights that are not contiguous new memory: a view of the old one would stand still."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(32, 32, 3)
    conv.weight.data = conv.weight.detach().contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(conv, Optimizer(name=name, memory=memory), dtype)
    averages = WeightAverages(optimizer, 0.5)
    optimizer.set_hyper(1e-2, 0.0, 0.0)
    expected = optimizer.value("weight").clone()
    for n in range(1, 4):
        conv.weight.grad, conv.bias.grad = torch.randn_like(conv.weight), torch.randn_like(conv.bias)
        averages.update(optimizer.step()[1])
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * optimizer.value("weight")
        torch.testing.assert_close(averages.averages["weight"], expected)


@pytest.mark.parametrize("decay", [0.9999, 0.55, 0.1], ids=["rising throughout", "rising, then constant", "constant"])
def test_it_is_one_update_ahead_of_diffusers(decay):
    """EMAModel's first update copies the weights; stepped with the initial ones before training, it equals ours."""
    torch.manual_seed(3)
    module = torch.nn.Linear(9, 7)
    optimizer = make_optimizer(module, Optimizer(name="adamw"))
    ours = WeightAverages(optimizer, decay)
    ahead, plain, warmed = (EMAModel(module.parameters(), decay, use_ema_warmup=w) for w in (False, False, True))
    ahead.step(module.parameters())
    for n in range(1, 21):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))
        ours.update(True)
        for model in (ahead, plain, warmed):
            model.step(module.parameters())
        assert ahead.cur_decay_value == min(decay, (1 + n) / (10 + n))
        assert plain.get_decay(n + 1) == ahead.cur_decay_value
        averages = [ours.averages[name] for name, _ in module.named_parameters()]
        for average, shadow in zip(averages, ahead.shadow_params, strict=True):
            torch.testing.assert_close(average, shadow, rtol=1e-5, atol=1e-6)
        # as created, and with the warm-up that EMAModel has besides, it is another average
        for other in (plain, warmed) if n < 4 else ():
            assert (averages[0] - other.shadow_params[0]).abs().max() > 1e-4
