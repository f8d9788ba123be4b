"""Validation: fixed noise, stratified timesteps, independent of batch size and of the rest of the set."""

import pytest
import torch

from safelight.data.batches import load_batch
from safelight.kernels.philox import Key, Purpose, normals_torch
from safelight.trainer.between_steps.evaluate import describe_validation
from safelight.trainer.checkpoint.files import Position
from safelight.trainer.loading.dataset import open_dataset
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import load_unet
from safelight.trainer.step.validate import Validation, _batches, choose_subset, validate

SEED = 31


@pytest.fixture(scope="module")
def dataset(tiny_dataset):
    from safelight.trainer.config.toml import parse_config

    config = parse_config({"data": {"path": str(tiny_dataset), "resolution": 64}}, "test")
    opened = open_dataset(config, resolve_base("tiny"), torch.device("cpu"))
    with opened.cache:
        yield opened


@pytest.fixture(scope="module")
def measure(dataset):
    schedule = make_schedule(resolve_base("tiny").config_of("scheduler"))
    base = load_unet(resolve_base("tiny"), 0)

    def run(samples, batch_size=8, num_bands=2, seed=SEED, unet=base):
        return validate(
            unet,
            dataset.rows(samples),
            schedule,
            dataset.scaling_factor,
            seed=seed,
            num_bands=num_bands,
            batch_size=batch_size,
        )

    return run


def test_batch_size_and_order_do_not_matter(dataset, measure):
    samples = dataset.train[:6]
    whole = measure(samples)
    for other in (measure(samples, batch_size=1), measure(samples[::-1], batch_size=4)):
        assert other.loss == pytest.approx(whole.loss, rel=1e-5)
        assert other.loss_by_timestep == pytest.approx(whole.loss_by_timestep, rel=1e-5)


def test_an_images_loss_does_not_depend_on_the_others(dataset, measure):
    """The set's loss is the mean of its images' losses measured alone."""
    samples = dataset.train[:4]
    alone = [measure([sample]).loss for sample in samples]
    assert measure(samples).loss == pytest.approx(sum(alone) / 4, rel=1e-5)


def test_twice_the_same_to_the_bit(dataset, measure):
    assert measure(dataset.train[:3]) == measure(dataset.train[:3])
    assert measure(dataset.train[:3], seed=SEED + 1).loss != measure(dataset.train[:3]).loss


def test_bands_are_equal_and_each_is_met(dataset, monkeypatch):
    """Every image meets exactly one timestep in each of five bands."""
    import safelight.trainer.step.validate as module

    seen = []

    def spy(unet, noisy, conditioning, mask):
        seen.append(noisy.timesteps_B)
        return torch.zeros(len(noisy.timesteps_B))

    monkeypatch.setattr(module, "sample_losses", spy)
    samples = dataset.train
    schedule = make_schedule(resolve_base("tiny").config_of("scheduler"))
    validate(
        torch.nn.Linear(1, 1),
        dataset.rows(samples),
        schedule,
        1.0,
        seed=SEED,
        num_bands=5,
        batch_size=4,
    )
    timesteps = torch.cat(seen)
    assert len(timesteps) == 5 * len(samples)
    # a batch is cut short at most once a bucket
    assert sum(len(batch) < 4 for batch in seen) <= len({sample.bucket for sample in samples})
    counts = torch.bincount(timesteps // 200, minlength=5)
    assert counts.tolist() == [len(samples)] * 5
    assert len(timesteps.unique()) > 3 * len(samples)


def test_the_noise_is_the_keys_noise_and_the_latent_the_posteriors_mean(dataset, monkeypatch):
    import safelight.trainer.step.validate as module

    caught, conditionings = [], []

    def spy(unet, noisy, conditioning, mask):
        caught.append(noisy)
        conditionings.append(conditioning)
        return torch.zeros(1)

    monkeypatch.setattr(module, "sample_losses", spy)
    sample = dataset.train[0]
    schedule = make_schedule(resolve_base("tiny").config_of("scheduler"))
    validate(
        torch.nn.Linear(1, 1),
        dataset.rows([sample]),
        schedule,
        2.0,
        seed=SEED,
        num_bands=1,
        batch_size=1,
    )
    ((micro_batch, _),) = _batches([sample], 1, 1)
    batch = load_batch(dataset.rows([sample]), micro_batch)
    noise = normals_torch(
        [Key(SEED, Purpose.VALIDATION_NOISE, sample.sample_id, 0, 0)], tuple(batch.mean_BCHW.shape[1:])
    )
    a = schedule.alphas_cumprod_T[caught[0].timesteps_B].view(-1, 1, 1, 1)
    torch.testing.assert_close(caught[0].noisy_BCHW, a.sqrt() * batch.mean_BCHW * 2.0 + (1 - a).sqrt() * noise)
    assert torch.equal(caught[0].target_BCHW, noise)
    assert torch.equal(conditionings[0].text_BTD, batch.conditioning.text_BTD)


def test_the_model_is_left_as_it_was(dataset, measure):
    base = load_unet(resolve_base("tiny"), 0).train()
    measure(dataset.train[:2], unet=base)
    assert base.training
    assert all(p.grad is None for p in base.parameters())


def test_subset_is_a_function_of_seed_and_ids(dataset):
    samples = dataset.train
    chosen = choose_subset(samples, 5, SEED)
    assert len(chosen) == 5
    assert {s.sample_id for s in choose_subset(samples[::-1], 5, SEED)} == {s.sample_id for s in chosen}
    assert {s.sample_id for s in choose_subset(samples, 5, SEED + 1)} != {s.sample_id for s in chosen}
    assert choose_subset(samples, 1000, SEED) == samples


def test_nothing_to_validate_on_is_said(measure):
    with pytest.raises(ValueError, match="validation_fraction"):
        measure([])


@pytest.mark.parametrize(
    ("before", "loss", "num_images", "line"),
    [
        (Position(), 0.31551, 2, "step 0: held-out loss 0.3155 on 2 photographs; training photographs 0.2359"),
        (Position(), 0.31551, 1, "step 0: held-out loss 0.3155 on 1 photograph; training photographs 0.2359"),
        (
            Position(step=12, best_step=8, best_loss=0.2),
            0.19754,
            2,
            "step 12: held-out loss 0.1975, best so far by 0.0025; training photographs 0.2359",
        ),
        (
            Position(step=14, best_step=8, best_loss=0.2),
            0.20287,
            2,
            "step 14: held-out loss 0.2029, 0.0029 above the best (step 8); training photographs 0.2359",
        ),
    ],
)
def test_a_validation_is_one_line(before, loss, num_images, line):
    assert describe_validation(before, Validation(loss, (), num_images), Validation(0.23589, (), 2)) == line
