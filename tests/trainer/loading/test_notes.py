"""Every setting that cannot take effect is said, and nothing else is."""

from __future__ import annotations

import pytest

from safelight.data import decode_memory
from safelight.errors import UserError
from safelight.trainer.config.presets import PRESETS, preset
from safelight.trainer.config.schema import Config
from safelight.trainer.config.timeline import StageSteps, Timeline
from safelight.trainer.config.toml import parse_config, to_toml
from safelight.trainer.loading import notes as module
from safelight.trainer.loading.notes import Contents, kept_by_stages, memory_note, notes, notes_of, prediction_note
from safelight.trainer.memory_plan.static_bytes import summary
from safelight.trainer.models.base import base_of
from tests.called import call


def contents(config: Config, *counts: int, num_validation: int = 4, has_captions: bool = True, **more) -> Contents:
    """Return a dataset whose buckets have these many photographs to train on."""
    stages = tuple(config.stages())
    batches = [sum(-(-count // s.batch_size) for count in counts) for s in stages]
    steps = tuple(StageSteps(s.epochs, (-(-num // s.accumulate),)) for s, num in zip(stages, batches, strict=True))
    timeline = Timeline(stages, steps, config.train.max_steps)
    return Contents(timeline, dict(enumerate(counts)), num_validation, has_captions, **{"has_tags": False, **more})


def notes_for(values: dict, *counts: int, device_type: str = "cuda", **more) -> list[str]:
    """Return the notes on some settings. Without counts: 40 photographs in one bucket, 10 steps per epoch."""
    config = parse_config(values, "test")
    return notes(config, contents(config, *(counts or (40,)), **more), device_type)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_for_a_hundred_photographs(name):
    config = preset(name)
    assert notes(config, contents(config, 100), "cuda") == []
    assert notes(config, None, "auto") == []


def test_a_warm_up_longer_than_its_stage():
    """The sd15 preset's second stage lasts 10 epochs; its warm-up is inherited."""
    config = preset("sd15")
    assert notes(config, contents(config, 16), "cuda") == [
        "stage 2 ends after 40 steps, before its warm-up of 50 does: the learning rate reaches 3.9e-07, not its peak "
        "of 5e-07; lower warmup_steps or raise epochs"
    ]
    (note,) = notes_for({"train": {"epochs": 1}, "optimizer": {"warmup_steps": 10}})
    assert note.startswith("the run ends after 10 steps, before its warm-up of 10 does")
    assert notes_for({"train": {"epochs": 1}, "optimizer": {"warmup_steps": 9}}) == []


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"train": {"max_steps": 301}}, "train.max_steps 301 is not reached: the run ends after 300 steps"),
        ({"train": {"max_steps": 5}, "stage": [{"epochs": 1}, {"epochs": 1}]}, "stage 2 is never reached: train.max"),
        ({"train": {"max_steps": 5}, "optimizer": {"schedule": "cosine"}}, "train.max_steps 5 ends the run before the"),
        (
            {"train": {"ema_decay": 0.999}},
            "train.ema_decay 0.999 is not reached in 300 steps: the average's decay rises",
        ),
        ({"save": {"every_steps": 301}}, "save.every_steps 301 is beyond the run's 300 steps: it saves nothing before"),
        ({"save": {"every_epochs": 31}}, "save.every_epochs 31 is beyond the run's 30 epochs: it saves nothing before"),
        (
            {"validate": {"every_epochs": 31}},
            "validate.every_epochs 31 is beyond the run's 30 epochs: the run validates",
        ),
        (
            {"sample": {"every_epochs": 31}},
            "sample.every_epochs 31 is beyond the run's 30 epochs: the run samples only",
        ),
        ({"log": {"every_steps": 400}}, "log.every_steps 400 is beyond the run's 300 steps: it logs a single line"),
        ({"train": {"max_steps": 19}, "save": {"every_epochs": 3}}, "save.every_epochs 3 is beyond the run's 2 epochs"),
        ({"train": {"accumulate": 11}}, "accumulate 11 is never filled: an epoch has 10 batches, and no step reaches"),
        (
            {"validate": {"every_epochs": 0}},
            "4 photographs held out by data.validation_fraction 0.1 and never validated",
        ),
        ({"data": {"crop_jitter": 0.1}}, "data.crop_jitter 0.1 has no effect with data.variants 1"),
        ({"data": {"max_tags": 3}}, "data.max_tags 3 has no effect: no photograph has tags"),
        ({"data": {"shuffle_tags": False}}, "data.shuffle_tags false has no effect: no photograph has tags"),
        ({"data": {"variants": 8}, "train": {"epochs": 2}}, "data.variants 8 is more than the run's 2 epochs"),
        (
            {"loss": {"huber_delta": 0.1}},
            "loss.huber_delta 0.1 has no effect with loss.kind mse",
        ),
        (
            {"loss": {"p2_gamma": 2, "min_snr_gamma": 5}},
            "loss.p2_gamma 2 has no effect with loss.weighting min_snr",
        ),
        ({"loss": {"timestep_scale": 0.5}}, "loss.timestep_scale 0.5 has no effect with loss.timesteps uniform"),
        ({"loss": {"pyramid_octaves": 3}}, "loss.pyramid_octaves 3 has no effect with loss.pyramid_noise 0"),
        ({"loss": {"huber_schedule": "snr"}}, "loss.huber_schedule snr has no effect with loss.kind mse"),
        (
            {"optimizer": {"clipping": "global"}, "train": {"max_grad_norm": 0}},
            "optimizer.clipping global has no effect",
        ),
        ({"validate": {"max_images": 1}}, "validate.max_images 1: the warning of over-fitting goes by the loss of one"),
        ({"train": {"accumulate_dtype": "fp32"}}, "train.accumulate_dtype fp32 has no effect with train.accumulate 1"),
        (
            {"sample": {"prompts": ["a cat"], "num_prompts": 3}},
            "sample.num_prompts 3 has no effect: sample.prompts lists",
        ),
        ({"sample": {"negative_prompt": "blur", "cfg": 1}}, "sample.negative_prompt has no effect with sample.cfg 1"),
        (
            {"train": {"epochs": 3}, "stage": [{"epochs": 9}]},
            "train.epochs 3 has no effect: each [[stage]] sets its own",
        ),
        ({"optimizer": {"lr": 1e-4}, "stage": [{"epochs": 9, "lr": 1e-5}]}, "optimizer.lr 0.0001 has no effect: every"),
    ],
)
def test_a_setting_without_effect_is_said(values, start):
    (note,) = notes_for(values)
    assert note.startswith(start)


def test_one_photograph_that_decides_is_said():
    (note,) = notes_for({}, num_validation=1)
    assert note.startswith("one photograph is held out: the warning of over-fitting goes by the loss of one photograph")
    (note,) = notes_for({"validate": {"patience": 3}}, num_validation=1)
    assert "the warning of over-fitting and validate.patience go by" in note
    assert note.endswith("raise data.validation_fraction")
    assert notes_for({}, num_validation=2) == []


@pytest.mark.parametrize(
    ("values", "counts", "more", "start"),
    [
        (
            {"train": {"batch_size": 8}},
            (5, 1),
            {},
            "batch_size 8 is never filled, the largest bucket has 5 photogra",
        ),
        (
            {"train": {"batch_size": 8}},
            (16, 1, 7),
            {},
            "2 of 3 buckets have fewer photographs than batch_size 8: their",
        ),
        (
            {"data": {"short_batches": "carry"}},
            (40,),
            {"num_waiting": 3},
            "3 uses of photographs of the last epochs wait for a batch when the run ends, and are not trained",
        ),
        (
            {"data": {"short_batches": "carry"}},
            (40, 1),
            {"num_waiting": 3, "num_never": 2},
            "some buckets never fill a batch: data.short_batches carry does not train their photographs, 2 uses in all",
        ),
        (
            {},
            (40,),
            {"num_flipped": 2},
            "the flip_p of 2 photographs has no effect with data.variants 1",
        ),
        (
            {},
            (40,),
            {"num_validation": 0},
            "data.validation_fraction 0.1 holds out no photograph: nothing is validated",
        ),
        ({}, (40,), {"has_captions": False}, "sample.every_epochs samples nothing: no photograph has a caption"),
        ({"memory": {"limit_gib": 6}}, (40,), {"device_type": "cpu"}, "memory.limit_gib 6 has no effect on a CPU"),
        ({"train": {"cudnn_benchmark": True}}, (40,), {"device_type": "cpu"}, "train.cudnn_benchmark has no effect on"),
        (
            {"data": {"validation_fraction": 0}, "validate": {"timesteps": 8}},
            (40,),
            {"num_validation": 0},
            "validate.timesteps 8 has no effect with data.validation_fraction 0",
        ),
    ],
)
def test_a_setting_without_effect_on_this_dataset_or_device_is_said(values, counts, more, start):
    (note,) = notes_for(values, *counts, **more)
    assert note.startswith(start)


def test_what_takes_effect_is_not_said():
    assert notes_for({"data": {"validation_fraction": 0}}, num_validation=0) == []
    assert notes_for({"optimizer": {"lr": 1e-4}, "stage": [{"epochs": 9, "lr": 1e-5}, {"epochs": 9}]}) == []
    # defaults that are longer than a short run
    assert notes_for({"train": {"epochs": 1}}, 4) == []


def test_plan_and_train_say_them(make_config, tmp_path, monkeypatch):
    config = make_config(optimizer={"warmup_steps": 500}, stage=[{"epochs": 1}], train={"max_steps": 1})
    (tmp_path / "run.toml").write_text(to_toml(config))
    expected = [f"note: {note}" for note in notes_of(config, "cpu")]
    assert any("warm-up of 500" in note for note in expected)
    planned = " ".join(call("plan", tmp_path / "run.toml").out.split())
    assert planned.endswith(" ".join(expected))
    monkeypatch.setattr("safelight.trainer.loading.job.open_dataset", lambda *args: (_ for _ in ()).throw(MemoryError))
    called = call("train", tmp_path / "run.toml")
    assert [line for line in called.err.splitlines() if "note: " in line] == expected
    called.assert_refused("train", "the computer's memory is full")


def test_too_little_host_memory_is_said(make_config, monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda: 2**20)
    assert memory_note(make_config(), "cpu", None).startswith(
        "the run takes at least 0.0 GiB of host memory, and 0.0 GiB"
    )
    monkeypatch.setattr(module, "available_bytes", decode_memory.available_bytes)
    assert memory_note(make_config(), "cpu", None) == ""


def test_more_settings_are_advised_where_most_buckets_hold_less_than_a_batch():
    values, advice = {"train": {"batch_size": 8}}, "; data.short_batches carry or merge fills them"
    assert notes_for(values, 16, 1, 7)[0].endswith(advice)
    assert not notes_for(values, 16, 16, 7)[0].endswith(advice)
    assert notes_for({**values, "data": {"short_batches": "carry"}}, 16, 1, 7) == []


def test_small_photographs_are_counted_and_named(make_config):
    """The largest of the photographs are 64 x 64 px."""

    def said(**data) -> list[str]:
        config = make_config(data={"resolution": 72, "max_aspect": 1.0, **data})
        return [note for note in notes_of(config, "cpu") if "enlarged" in note]

    left_out, enlarged = said()
    assert " would be enlarged more than 1.25 times and are left out (first: photos/0" in left_out
    assert "are smaller than trained at, and enlarged up to 1.1" in enlarged
    (enlarged,) = said(upscale="always")
    assert enlarged.startswith("21 photographs are smaller than trained at, and enlarged up to 1.5")
    assert said(resolution=64, max_aspect=4.0, upscale="always") == []
    with pytest.raises(ValueError, match=r"all photographs are too small to train at 72 px with data\.upscale skip"):
        said(upscale="skip")


def test_settings_of_the_text_encoder_without_effect():
    assert notes_for({"text_encoder": {"lr": 1e-6, "epochs": 3}}) == [
        "text_encoder.lr 1e-06 has no effect with text_encoder.train false",
        "text_encoder.epochs 3 has no effect with text_encoder.train false",
    ]
    assert notes_for({"text_encoder": {"train": True, "epochs": 29}}) == []
    assert notes_for({"text_encoder": {"train": True, "epochs": 30}}) == [
        "text_encoder.epochs 30 has no effect: the run has 30 epochs"
    ]
    (note,) = notes_for({"text_encoder": {"train": True, "epochs": 1, "warmup_steps": 10}})
    assert note.startswith("the text encoder is trained for 10 steps, and its warm-up of 10 does not end before")
    assert notes_for({"text_encoder": {"train": True, "epochs": 1, "warmup_steps": 9}}) == []
    (note,) = notes_for({"text_encoder": {"train": True}, "train": {"ema_decay": 0.9}})
    assert note.startswith("train.ema_decay 0.9 averages the UNet's weights only")
    (note,) = notes_for({"text_encoder": {"train": True}, "optimizer": {"fused_backward": True}})
    assert note.startswith("optimizer.fused_backward true is for the UNet only")


def test_settings_of_other_schedules_are_said():
    (note,) = notes_for({"optimizer": {"lr_end": 0.1}})
    assert note == "optimizer.lr_end 0.1 has no effect with schedule constant"
    assert notes_for({"optimizer": {"lr_end": 0.1, "schedule": "linear"}}) == []
    # a stage uses it, or has its own
    stages = [{"epochs": 1, "lr_power": 3}, {"epochs": 1, "schedule": "cosine"}]
    assert notes_for({"optimizer": {"lr_end": 0.1}, "stage": stages}) == [
        "stage 1's lr_power 3 has no effect with its schedule constant"
    ]
    text = {"train": True, "lr_cycles": 5, "schedule": "cosine"}
    (note,) = notes_for({"text_encoder": text})
    assert note == "text_encoder.lr_cycles 5 has no effect with text_encoder.schedule cosine"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"validate": {"min_gain": 2}}, "validate.min_gain 2.0 has no effect without validate.patience"),
        ({"validate": {"patience_ends": "run"}}, "validate.patience_ends run has no effect without validate.patience"),
        ({"prior": {"weight": 0.5}}, "prior.weight 0.5 has no effect: there are no class images"),
        ({"log": {"wandb_project": "x"}}, "log.wandb_project x has no effect with log.wandb false"),
        (
            {"sample": {"every_epochs": 0, "steps": 9}},
            "sample.every_epochs 0: the run draws nothing; sample.steps only matter to `safelight sample`, compare, "
            "grid and evaluate",
        ),
        (
            {"stage": [{"epochs": 30, "loss": {"huber_delta": 0.2}}]},
            "stage 1's loss.huber_delta 0.2 has no effect with its loss.kind mse",
        ),
    ],
)
def test_settings_of_what_a_run_does_not_do(values, told):
    assert notes_for(values) == [told]


def test_settings_that_a_run_uses_are_not_told():
    assert notes_for({"validate": {"min_gain": 2, "patience": 5}, "log": {"wandb": "offline", "wandb_name": "x"}}) == []
    assert notes_for({"prior": {"weight": 0.5}}, num_class_images=3) == []
    assert notes_for({"stage": [{"epochs": 30, "loss": {"huber_delta": 0.2, "kind": "huber"}}]}) == []


def test_a_prediction_other_than_the_bases_is_told():
    config = parse_config({"model": {"base": "tiny"}, "loss": {"prediction": "v_prediction"}}, "test")
    assert "is not what the base predicts (epsilon)" in prediction_note(config, base_of(config.model))
    config.loss.prediction = "epsilon"
    assert prediction_note(config, base_of(config.model)) == ""


def test_a_plan_refuses_timesteps_that_the_model_does_not_have():
    config = parse_config({"model": {"base": "tiny"}, "loss": {"max_timestep": 1001}}, "test")
    with pytest.raises(UserError, match=r"loss\.max_timestep 1001 is more than the 1000 timesteps"):
        summary(config)


def test_what_stages_keep_of_a_setting_of_the_command_line_is_said():
    config = parse_config(
        {
            "optimizer": {"lr": 2e-4},
            "loss": {"offset_noise": 0.1},
            "stage": [
                {"epochs": 2},
                {"epochs": 1, "lr": 3e-5, "loss": {"offset_noise": 0.0}},
                {"epochs": 1, "lr": 1e-5},
            ],
        },
        "test",
    )
    assert kept_by_stages(config, [["optimizer", "lr"], ["loss", "offset_noise"], ["stage", "1", "lr"]]) == [
        "--optimizer.lr 0.0002 is for stage 1: stages 2 and 3 keep their own (3e-05, 1e-05), which --stage.1.lr and "
        "--stage.2.lr set",
        "--loss.offset-noise 0.1 is for stages 1 and 3: stage 2 keeps its own (0), which --stage.1.loss.offset-noise "
        "sets",
    ]
    # nothing that no stage sets, nor what no stage can
    assert kept_by_stages(config, [["train", "batch_size"], ["run", "seed"], ["adapter", "rank"]]) == []
    # in every stage: another note says so, unless it is the default, which is never said to have no effect
    everywhere = {"stage": [{"epochs": 1, "lr": 1e-4}, {"epochs": 1, "lr": 3e-5}]}
    config = parse_config(everywhere, "test")
    (note,) = kept_by_stages(config, [["optimizer", "lr"]])
    assert note.startswith(f"--optimizer.lr {config.optimizer.lr:g} is for no stage: stages 1 and 2 keep their own")
    config = parse_config({"optimizer": {"lr": 1e-3}, **everywhere}, "test")
    assert kept_by_stages(config, [["optimizer", "lr"]]) == []


def test_the_plan_says_what_the_second_stage_of_a_preset_keeps(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(to_toml(preset("sd15-lora")))
    changes = ["--model.base", "tiny", "--run.dir", tmp_path / "run", "--data.resolution", 64, "--run.device", "cpu"]
    done = call("plan", file, *changes, "--optimizer.lr", "2e-4")
    assert done.status == 0, done.err
    assert "--optimizer.lr 0.0002 is for stage 1: stage 2 keeps its own (3e-05), which --stage.1.lr sets" in " ".join(
        done.out.split()
    )


@pytest.mark.parametrize("lr", [1e-6, 1e-4])
def test_an_embedding_at_the_rate_of_something_else(lr):
    word = {"adapter": {"kind": "embedding"}, "embedding": {"word": "<me>"}, "data": {"caption_dropout": 0.0}}
    found = notes_for({**word, "optimizer": {"lr": lr}})
    (note,) = [note for note in found if "hardly moves an embedding" in note]
    assert note.startswith(f"optimizer.lr {lr:g} hardly moves")
    assert note.endswith("5e-4 to 1e-2 is usual")
    assert not any("hardly moves" in note for note in notes_for({**word, "optimizer": {"lr": 5e-3}}))
    assert not any("hardly" in note for note in notes_for({**word, "optimizer": {"name": "prodigy", "lr": 1.0}}))
