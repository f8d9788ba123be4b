"""Which settings may change before a resume, and the message about those that may not."""

import hashlib
import json
from dataclasses import replace

import pytest

from safelight.data.buckets import Bucket
from safelight.data.photo import Photo, PhotoSettings
from safelight.data.samples import Sample
from safelight.trainer.checkpoint.identity import Identity, as_begun, identify
from safelight.trainer.config.toml import parse_config
from safelight.trainer.registry.schedules import SCHEDULES

RUN = {
    "optimizer": {"lr": 1e-3, "name": "adamw"},
    "train": {"batch_size": 4},
    "stage": [{"epochs": 2}, {"epochs": 1, "lr": 1e-4}],
}


def difference(stage: int, /, **changes: dict | list) -> str:
    """Return the difference of RUN with changed tables from a checkpoint of RUN in a stage."""
    changed = {**RUN}
    for table, values in changes.items():
        changed[table] = {**RUN.get(table, {}), **values} if isinstance(values, dict) else values
    reached = identify(parse_config(RUN, "here"), "fp32")
    here = identify(parse_config(changed, "here"), "fp32")
    found = here.difference(Identity(**json.loads(json.dumps(vars(reached)))), stage)
    return "" if found is None else found.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run": {"seed": 5}}, "run.seed is 5, but 20230801 in the checkpoint"),
        ({"model": {"base": "random:small"}}, "model.base is 'random:small', but 'tiny' in the checkpoint"),
        ({"optimizer": {"name": "adamw8bit"}}, "optimizer.name is 'adamw8bit', but 'adamw' in the checkpoint"),
        ({"optimizer": {"betas": [0.8, 0.999]}}, "optimizer.betas is [0.8, 0.999], but [0.9, 0.999] in the checkpoint"),
        ({"data": {"caption_dropout": 0.5}}, "data.caption_dropout is 0.5, but 0.04 in the checkpoint"),
        ({"loss": {"min_snr_gamma": 5}}, "loss.min_snr_gamma is 5.0, but 0.0 in the checkpoint"),
        ({"loss": {"kind": "huber"}}, "loss.kind is 'huber', but 'mse' in the checkpoint"),
        ({"loss": {"timesteps": "logit_normal"}}, "loss.timesteps is 'logit_normal', but 'uniform' in the checkpoint"),
        ({"loss": {"pyramid_noise": 0.3}}, "loss.pyramid_noise is 0.3, but 0.0 in the checkpoint"),
        ({"loss": {"input_perturbation": 0.1}}, "loss.input_perturbation is 0.1, but 0.0 in the checkpoint"),
        ({"loss": {"max_timestep": 500}}, "loss.max_timestep is 500, but 0 in the checkpoint"),
        ({"loss": {"weighting": "debiased"}}, "loss.weighting is 'debiased', but 'none' in the checkpoint"),
        ({"train": {"batch_size": 2}}, "stage 1's batch_size is 2, but 4 in the checkpoint"),
        (
            {"stage": [{"epochs": 1}]},
            "stage 1's epochs is 1, but 2 in the checkpoint; to train longer, add a stage after it: "
            "--stage.0.epochs 2 --stage.1.epochs N",
        ),
    ],
)
def test_a_change_that_decides_the_weights_is_named(changes, expected):
    assert difference(0, **changes) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"run": {"dir": "elsewhere", "device": "cuda"}},
        {"data": {"path": "elsewhere"}},
        {"train": {"max_steps": 9, "checkpointing": "full", "epochs": 7}},
        {"train": {"cuda_graphs": "off", "cudnn_benchmark": True}},
        {"sample": {"prompts": ["a cat"], "steps": 9}},
        {"loss": {"weighting": "none", "huber_delta": 0.5, "p2_gamma": 0.5}},
        {"loss": {"huber_schedule": "snr", "timestep_scale": 0.5, "pyramid_octaves": 3}},
        {"validate": {"every_epochs": 5}},
        {"save": {"keep": 9}},
        {"log": {"every_steps": 1, "tensorboard": False}},
        {"optimizer": {"lr": 2e-3}},
        {"stage": [{"epochs": 2, "lr": 1e-3}, {"epochs": 9, "lr": 1e-5, "batch_size": 1}]},
        {"stage": [{"epochs": 2}]},
        # its rate is constant
        {"stage": [{"epochs": 3}]},
        {"stage": [*RUN["stage"], {"epochs": 9}]},
    ],
)
def test_later_stages_and_settings_that_do_not_decide_the_weights_may_change(changes):
    assert difference(0, **changes) == ""


def test_an_older_checkpoint_that_recorded_settings_which_are_free_now_is_accepted():
    current = identify(parse_config(RUN, "here"), "fp32")
    recorded = {"train.cuda_graphs": "auto", "train.cudnn_benchmark": False, "save.keep": 3}
    assert not recorded.keys() & current.settings.keys()
    older = Identity({**current.settings, **recorded}, current.stages, current.data)
    assert current.difference(older, 0) is None
    unknown = Identity({**current.settings, "train.unknown": 1}, current.stages, current.data)
    assert current.difference(unknown, 0).text == "train.unknown is None, but 1 in the checkpoint"


def test_a_stage_that_was_reached_is_fixed():
    later = {"stage": [{"epochs": 2}, {"epochs": 1, "warmup_steps": 9}]}
    assert difference(0, **later) == ""
    assert difference(1, **later) == "stage 2's warmup_steps is 9, but 0 in the checkpoint"
    assert difference(1, stage=[{"epochs": 2}]) == "stage 2, which the checkpoint has reached, is missing"


def test_a_changed_learning_rate_is_named():
    """It decides the weights, but a run that diverged goes on with a smaller one."""
    reached = identify(parse_config(RUN, "here"), "fp32")
    slower = identify(parse_config({**RUN, "optimizer": {"lr": 1e-4, "name": "adamw"}}, "here"), "fp32")
    assert slower.changed_rates(reached, 0, False) == ["stage 1: peak learning rate 0.0001 instead of 0.001"]
    assert slower.changed_rates(reached, 1, False) == []


@pytest.mark.parametrize(
    ("old", "same", "other"),
    [
        ({}, {"weighting": "none"}, {"kind": "huber"}),
        ({}, {"huber_delta": 0.1}, {"weighting": "p2"}),
        ({"min_snr_gamma": 5}, {"weighting": "min_snr", "min_snr_gamma": 5}, {"min_snr_gamma": 5, "kind": "huber"}),
        ({"min_snr_gamma": 5}, {"min_snr_gamma": 5}, {"weighting": "p2"}),
        ({}, {"timestep_scale": 0.5}, {"timesteps": "logit_normal"}),
        ({}, {"pyramid_octaves": 3}, {"pyramid_noise": 0.3}),
        ({}, {}, {"min_timestep": 3}),
        ({}, {}, {"max_timestep": 3}),
        ({}, {}, {"input_perturbation": 0.3}),
    ],
)
def test_a_checkpoint_older_than_the_choice_of_losses(old, same, other):
    reached = identify(parse_config({**RUN, "loss": old}, "here"), "fp32")
    names = ("loss.prediction", "loss.min_snr_gamma", "loss.offset_noise", "loss.zero_terminal_snr")
    settings = {k: v for k, v in reached.settings.items() if not k.startswith("loss.") or k in names}
    before = Identity(settings, reached.stages, reached.data)
    assert identify(parse_config({**RUN, "loss": same}, "here"), "fp32").difference(before, 0) is None
    assert identify(parse_config({**RUN, "loss": other}, "here"), "fp32").difference(before, 0) is not None


def test_an_older_checkpoint_kept_8_bit_moments():
    run = {**RUN, "optimizer": {"lr": 1e-3}}
    reached = identify(parse_config(run, "here"), "fp32")
    settings = {name: value for name, value in reached.settings.items() if name != "optimizer.moments"}
    before = Identity(settings, reached.stages, reached.data)
    assert reached.difference(before, 0) is None
    other = identify(parse_config({**run, "optimizer": {"lr": 1e-3, "moments": "4bit"}}, "here"), "fp32")
    assert other.difference(before, 0).text == "optimizer.moments is '4bit', but '8bit' in the checkpoint"


def test_a_loss_parameter_is_compared_only_if_its_loss_is_chosen():
    def of(delta: float) -> Identity:
        loss = {"kind": "huber", "huber_delta": delta}
        return identify(parse_config({**RUN, "loss": loss}, "here"), "fp32")

    assert of(0.1).difference(of(0.2), 0).text == "loss.huber_delta is 0.1, but 0.2 in the checkpoint"


def test_auto_precision_is_compared_by_the_dtype_it_resolves_to():
    auto, explicit = (parse_config({"model": {"precision": name}}, "here") for name in ("auto", "bf16"))
    assert identify(explicit, "bf16").difference(identify(auto, "bf16"), 0) is None
    assert (
        identify(auto, "fp32").difference(identify(auto, "bf16"), 0).text
        == "model.precision is 'fp32', but 'bf16' in the checkpoint"
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_stage_whose_schedule_depends_on_its_length_keeps_it(schedule):
    values = {"optimizer": {"schedule": schedule}, "train": {"epochs": 2}}
    before, longer = (identify(parse_config({**values, "train": {"epochs": num}}, "here"), "fp32") for num in (2, 4))
    assert longer.difference(before, 0).text.startswith(
        "stage 1's epochs is 4, but 2 in the checkpoint; to train longer"
    )
    constant = identify(parse_config({"train": {"epochs": 4}}, "here"), "fp32")
    assert "epochs" in constant.difference(before, 0).text


def test_masks_and_loss_scales_belong_to_the_data_and_their_absence_is_as_before():
    photo = Photo("images/a.png", "0" * 64, 64, 64, ("a",), "photos/a.png", "file name")
    plain = Sample(photo, Bucket(64, 64), ("latent",), ("text",), (), ("a",))
    masked = replace(plain, mask_keys=("mask",))
    scaled = replace(plain, photo=replace(photo, settings=PhotoSettings(loss_scale=2.0)))
    data = [identify(parse_config(RUN, "here"), "fp32", [sample]).data for sample in (plain, masked, scaled)]
    assert len(set(data)) == 3
    # of a checkpoint from before there were masks
    assert data[0] == hashlib.sha256(b'[[["latent"], ["text"]]]').hexdigest()
    assert difference(0, loss={"mask_weight": 0.5}) == "loss.mask_weight is 0.5, but 0.0 in the checkpoint"


def test_a_run_keeps_the_enlargement_it_began_with_and_an_older_one_leaves_nothing_out():
    config = parse_config(RUN, "here")
    begun = identify(config, "fp32")
    assert as_begun(parse_config({**RUN, "data": {"upscale": "skip"}}, "here"), begun, "fp32").data.upscale == "allow"
    older = replace(begun, settings={name: v for name, v in begun.settings.items() if name != "data.upscale"})
    assert as_begun(config, older, "fp32").data.upscale == "always"
    assert config.data.upscale == "allow"
    damaged = {**vars(begun), "settings": {**begun.settings, "data.upscale": "sometimes"}}
    with pytest.raises(ValueError, match=r"data\.upscale is none of allow, skip, always"):
        Identity.from_record(damaged)


def test_latents_stay_in_the_precision_that_a_run_began_with():
    config = parse_config(RUN, "here")

    def encoded_in(precision: str) -> Identity:
        return identify(parse_config({**RUN, "model": {"vae_precision": precision}}, "here"), "fp32")

    begun = encoded_in("fp32")
    older = replace(begun, settings={name: v for name, v in begun.settings.items() if name != "model.vae_precision"})
    for checkpoint in (begun, older):
        # begun on a CPU, resumed on a GPU
        assert as_begun(config, checkpoint, "fp16").model.vae_precision == "fp32"
        # where auto stands for the same, nothing has changed
        assert as_begun(config, checkpoint, "fp32").model.vae_precision == "auto"
        assert encoded_in("fp16").difference(checkpoint, 0).text == (
            "model.vae_precision is 'fp16', but 'fp32' in the checkpoint"
        )
    assert as_begun(config, encoded_in("fp16"), "fp16").model.vae_precision == "auto"
    # begun on a GPU, resumed on a CPU
    assert as_begun(config, encoded_in("fp16"), "fp32").model.vae_precision == "fp16"
    damaged = {**vars(begun), "settings": {**begun.settings, "model.vae_precision": "fp8"}}
    with pytest.raises(ValueError, match=r"model\.vae_precision is none of auto, fp32, bf16, fp16"):
        Identity.from_record(damaged)


def test_an_older_checkpoint_carried_nothing_over():
    begun = identify(parse_config(RUN, "here"), "fp32")
    older = replace(begun, settings={name: v for name, v in begun.settings.items() if name != "data.short_batches"})
    carried = identify(parse_config({**RUN, "data": {"short_batches": "carry"}}, "here"), "fp32")
    assert identify(parse_config(RUN, "here"), "fp32").difference(older, 0) is None
    assert carried.difference(older, 0).text == "data.short_batches is 'carry', but 'keep' in the checkpoint"


def test_the_text_encoders_training_belongs_to_the_run_and_older_checkpoints_had_none():
    def of(run_epochs: int = 2, **text) -> Identity:
        config = parse_config({"train": {"epochs": run_epochs}, "text_encoder": text}, "here")
        return identify(config, "fp32")

    old = of()
    without = Identity({k: v for k, v in old.settings.items() if not k.startswith("text_encoder")}, old.stages, "")
    assert old.difference(without, 0) is None
    begins = of(train=True).difference(without, 0).text
    assert begins.startswith("text_encoder.train is True, but False in the checkpoint")
    # settings that have no effect are not compared
    assert of(lr=1e-3).difference(old, 0) is None
    assert "text_encoder.last_layers" in of(train=True, last_layers=1).difference(of(train=True), 0).text
    # its learning rate may change as the UNet's may, and is told while it counts
    faster = of(train=True, lr=1e-3)
    assert faster.difference(of(train=True), 0) is None
    assert faster.changed_rates(of(train=True), 0, True) == ["text encoder: peak learning rate 0.001 instead of 5e-07"]
    assert faster.changed_rates(of(train=True), 0, False) == []
    # its training may have ended: a later end would not be what the record says
    later = of(3, train=True, epochs=2).difference(of(2, train=True, epochs=1), 0)
    assert later.text == "text_encoder.epochs is 2, but 1 in the checkpoint"
    # at a constant rate a longer run trains it longer; a schedule spans the run
    assert of(3, train=True).difference(of(2, train=True), 0) is None
    changed = of(3, train=True, schedule="cosine").difference(of(2, train=True, schedule="cosine"), 0).text
    assert changed == "text_encoder.epochs is 3, but 2 in the checkpoint"
    assert of(3, train=True, schedule="cosine", epochs=2).difference(of(2, train=True, schedule="cosine"), 0) is None


def test_settings_of_the_schedule_are_compared_and_older_checkpoints_lack_them():
    def identity(**optimizer):
        text = {"train": True, "schedule": "cosine", "lr_end": optimizer.get("lr_end", 0.0)}
        tables = {"optimizer": {"schedule": "cosine", **optimizer}, "text_encoder": text}
        return identify(parse_config(tables, "here"), "fp32")

    before, now = identity(), identity(lr_end=0.1)
    # the text encoder's differs first
    assert now.difference(before, 0).text == "text_encoder.lr_end is 0.1, but 0.0 in the checkpoint"
    ignored = ["text_encoder.lr_end"]
    assert now.difference(before, 0, ignored).text == "stage 1's lr_end is 0.1, but 0.0 in the checkpoint"
    # written before there was lr_end
    old = Identity(
        {name: value for name, value in before.settings.items() if name != "text_encoder.lr_end"},
        [{name: value for name, value in before.stages[0].items() if name != "lr_end"}],
        before.data,
    )
    assert now.difference(old, 0).text == "text_encoder.lr_end is 0.1, but 0.0 in the checkpoint"
    assert now.difference(old, 0, ignored).name == "lr_end"
    assert before.difference(old, 0) is None
    # of another schedule
    assert identity(lr_power=3.0).difference(before, 0) is None


def test_a_stage_becomes_longer_only_if_its_rates_stay():
    def identity(epochs: int, schedule: str):
        return identify(parse_config({"stage": [{"epochs": epochs, "schedule": schedule}]}, "here"), "fp32")

    for schedule in SCHEDULES:
        difference = identity(3, schedule).difference(identity(2, schedule), 0)
        assert (difference is None) == (schedule == "constant")


@pytest.mark.parametrize("num", [0, 1, 3])
def test_the_digest_of_the_rows_is_that_of_their_list_as_json(num):
    """Checkpoints hold the digest of `json.dumps` of all rows; no text of that length is made."""
    own = PhotoSettings(repeats=2.0)
    settings = [PhotoSettings(), own, PhotoSettings()][:num]
    photos = [Photo(f"{n}.png", f"{n:064x}", 8, 8, ("a",), "", "", settings=one) for n, one in enumerate(settings)]
    samples = [Sample(one, Bucket(8, 8), ("l", "é"), ("t",), (), ("a",)) for one in photos]
    rows = [[["l", "é"], ["t"], *([{"repeats": 2.0}] if one.settings == own else [])] for one in photos]
    expected = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert identify(parse_config(RUN, "here"), "fp32", samples).data == expected
