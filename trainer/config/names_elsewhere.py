"""What other trainers call settings and values, for messages about a name that is not one here. Does not import torch.

All names of three trainers are in docs/settings.md, whose tables of values and of names without a counterpart are made
from this file; here are those that people write from memory.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

# name in kohya's sd-scripts, EveryDream2, OneTrainer or diffusers' scripts -> (table, setting)
SETTINGS = {
    "learning_rate": ("optimizer", "lr"),
    "unet_lr": ("optimizer", "lr"),
    "text_encoder_lr": ("text_encoder", "lr"),
    "lr_scheduler": ("optimizer", "schedule"),
    "scheduler": ("optimizer", "schedule"),
    "lr_warmup_steps": ("optimizer", "warmup_steps"),
    "lr_scheduler_num_cycles": ("optimizer", "lr_cycles"),
    "lr_scheduler_power": ("optimizer", "lr_power"),
    "optimizer_type": ("optimizer", "name"),
    "network_dim": ("adapter", "rank"),
    "network_rank": ("adapter", "rank"),
    "lora_rank": ("adapter", "rank"),
    "network_alpha": ("adapter", "alpha"),
    "lora_alpha": ("adapter", "alpha"),
    "network_dropout": ("adapter", "dropout"),
    "network_module": ("adapter", "kind"),
    "train_batch_size": ("train", "batch_size"),
    "gradient_accumulation_steps": ("train", "accumulate"),
    "grad_accum": ("train", "accumulate"),
    "gradient_checkpointing": ("train", "checkpointing"),
    "max_train_epochs": ("train", "epochs"),
    "num_train_epochs": ("train", "epochs"),
    "max_epochs": ("train", "epochs"),
    "max_train_steps": ("train", "max_steps"),
    "clip_grad_norm": ("train", "max_grad_norm"),
    "resolution": ("data", "resolution"),
    "train_data_dir": ("data", "path"),
    "data_root": ("data", "path"),
    "cond_dropout": ("data", "caption_dropout"),
    "caption_dropout_rate": ("data", "caption_dropout"),
    "shuffle_caption": ("data", "shuffle_tags"),
    "keep_tokens": ("data", "keep_tags"),
    "weighted_captions": ("data", "prompt_weights"),
    "noise_offset": ("loss", "offset_noise"),
    "prior_loss_weight": ("prior", "weight"),
    "loss_type": ("loss", "kind"),
    "pretrained_model_name_or_path": ("model", "base"),
    "resume_ckpt": ("model", "base"),
    "mixed_precision": ("model", "precision"),
    "xformers": ("model", "attention"),
    "output_dir": ("run", "dir"),
    "sample_every_n_epochs": ("sample", "every_epochs"),
    "sample_prompts": ("sample", "prompts_file"),
    "sample_sampler": ("sample", "sampler"),
    "save_every_n_epochs": ("save", "every_epochs"),
    "num_vectors_per_token": ("embedding", "vectors"),
    "token_string": ("embedding", "word"),
    "init_word": ("embedding", "initial_text"),
    "ema_decay_rate": ("train", "ema_decay"),
    # the same names as here, without their table or in another
    "lr": ("optimizer", "lr"),
    "batch_size": ("train", "batch_size"),
    "epochs": ("train", "epochs"),
    "min_snr_gamma": ("loss", "min_snr_gamma"),
    "zero_terminal_snr": ("loss", "zero_terminal_snr"),
    "clip_skip": ("model", "clip_skip"),
    "flip_p": ("data", "flip_p"),
    "seed": ("run", "seed"),
}
# value elsewhere, in lower case -> value here
VALUES = {
    "lion": "bnb_lion8bit",
    "lion8bit": "bnb_lion8bit",
    "pagedadamw8bit": "bnb_paged_adamw8bit",
    "adamwschedulefree": "schedulefree_adamw",
    "radamschedulefree": "schedulefree_radam",
    "cosine_with_restarts": "cosine_restarts",
    "constant_with_warmup": "constant",
    "locon": "lora",
    "textual_inversion": "embedding",
    "fp8": "8bit",
}


@dataclass(frozen=True)
class Without:
    """Settings of another trainer that have no counterpart here. instead: what to do; settings stand in backticks."""

    trainer: str
    names: tuple[str, ...]
    instead: str


_NOTHING = "nothing to set: "
_CACHED = f"{_NOTHING}latents and captions are always cached, in the dataset's folder"
_BUCKETS = f"{_NOTHING}photographs are always in buckets by their shape; `data.max_aspect` limits it"
_RESUMABLE = f"{_NOTHING}every checkpoint can be resumed bit for bit, by `--resume`"
_EXPORTED = "`safelight export` writes the file afterwards, with `--dtype` and, of a LoRA, `--layout kohya`"
_LOADED = f"{_NOTHING}photographs are read from the cache, ahead of the steps"
_SEVERAL_GPUS = "nothing to set: `torchrun` starts a process for each GPU"
_FITTED = (
    f"{_NOTHING}memory is planned for the GPU; `memory.limit_gib`, `train.checkpointing` and `optimizer.memory` say how"
)
_COMPILED = "`train.kernels` and `train.cuda_graphs`, which are on where they can be"
_AVERAGE = (
    f"{_NOTHING}`train.ema_decay` averages after every step, and pictures, exports and validation use the average"
)
WITHOUT = (
    Without("kohya", ("save_state", "save_state_on_train_end"), _RESUMABLE),
    Without(
        "kohya",
        (
            "cache_latents",
            "cache_latents_to_disk",
            "cache_text_encoder_outputs",
            "cache_text_encoder_outputs_to_disk",
            "skip_cache_check",
        ),
        _CACHED,
    ),
    Without("kohya", ("vae_batch_size", "lowram", "highvram"), _FITTED),
    Without(
        "kohya",
        ("max_data_loader_n_workers", "persistent_data_loader_workers"),
        _LOADED,
    ),
    Without("kohya", ("enable_bucket", "bucket_reso_steps"), _BUCKETS),
    Without("kohya", ("conv_dim", "conv_alpha"), "`adapter.target linear convolution`, with the one `adapter.rank`"),
    Without(
        "kohya",
        ("network_args",),
        "`adapter.target`, `adapter.dora` and `adapter.rslora`; one rank for all layers, `adapter.rank`",
    ),
    Without("kohya", ("optimizer_args",), "settings of their own: `optimizer.betas`, `optimizer.weight_decay`, ..."),
    Without("kohya", ("lr_scheduler_args", "lr_scheduler_type"), "`optimizer.schedule`, and what its help names"),
    Without("kohya", ("network_train_unet_only",), f"{_NOTHING}`text_encoder.train` is false unless it is set"),
    Without("kohya", ("network_train_text_encoder_only",), "no counterpart: a LoRA is of the UNet"),
    Without(
        "kohya",
        ("network_weights", "dim_from_weights"),
        "no counterpart: a LoRA goes on by `--resume`, or merged by `safelight export --merge` as `model.base`",
    ),
    Without("kohya", ("scale_weight_norms",), "no counterpart: `train.max_grad_norm` or `optimizer.weight_decay`"),
    Without("kohya", ("save_precision", "save_model_as", "output_name"), _EXPORTED),
    Without(
        "kohya",
        ("dataset_config", "in_json", "dataset_repeats", "caption_extension"),
        "`safelight prepare` reads folders and captions, with `--kohya` also the repeats in their names; docs/data.md",
    ),
    Without("kohya", ("color_aug", "face_crop_aug_range"), "no counterpart: photographs keep their colours"),
    Without("kohya", ("adaptive_noise_scale", "noise_offset_random_strength"), "no counterpart: `loss.offset_noise`"),
    Without(
        "kohya",
        ("scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"),
        "no counterpart: `loss.weighting min_snr` with `loss.min_snr_gamma`",
    ),
    Without("kohya", ("torch_compile", "dynamo_backend"), _COMPILED),
    Without("kohya", ("deepspeed", "multi_gpu"), _SEVERAL_GPUS),
    Without("EveryDream2", ("amp",), "`model.precision`"),
    Without("EveryDream2", ("useadam8bit",), f"{_NOTHING}`optimizer.name adamw8bit` is the default"),
    Without("EveryDream2", ("lr_decay_steps",), "`train.epochs`, or a `[[stage]]`: a schedule spans its stage"),
    Without("EveryDream2", ("scale_lr",), "no counterpart: `optimizer.lr`; a larger batch does not change it"),
    Without("EveryDream2", ("save_optimizer",), _RESUMABLE),
    Without("EveryDream2", ("save_full_precision", "save_ckpt_dir", "no_save_ckpt", "no_prepend_last"), _EXPORTED),
    Without("EveryDream2", ("save_ckpts_from_n_epochs",), "a `[[stage]]` with its own `save.every_epochs`"),
    Without("EveryDream2", ("load_settings_every_epoch",), "a `[[stage]]` for settings that change"),
    Without(
        "EveryDream2",
        ("rated_dataset", "rated_dataset_target_dropout_percent"),
        "no counterpart: a photograph's `repeats` (docs/data.md), or a `[[stage]]`",
    ),
    Without("EveryDream2", ("disable_unet_training",), "no counterpart: `train.layers` trains a part of the UNet"),
    Without("EveryDream2", ("disable_xformers",), "`model.attention`"),
    Without(
        "EveryDream2",
        ("embedding_perturbation",),
        "no counterpart: `loss.input_perturbation` disturbs the latents",
    ),
    Without("EveryDream2", ("ema_update_interval", "ema_strength_target", "ema_device"), _AVERAGE),
    Without("OneTrainer", ("latent_caching", "clear_cache_before_training", "cache_dir"), _CACHED),
    Without("OneTrainer", ("dataloader_threads",), _LOADED),
    Without(
        "OneTrainer", ("learning_rate_scaler",), "no counterpart: `optimizer.lr`; a larger batch does not change it"
    ),
    Without("OneTrainer", ("layer_offload_fraction", "enable_async_offloading", "temp_device"), _FITTED),
    Without("OneTrainer", ("ema_update_step_interval",), _AVERAGE),
    Without("OneTrainer", ("compile",), _COMPILED),
    Without("OneTrainer", ("output_dtype", "output_model_format", "output_model_destination"), _EXPORTED),
    Without("OneTrainer", ("backup_before_save", "continue_last_backup"), _RESUMABLE),
    Without(
        "OneTrainer", ("masked_training",), f"{_NOTHING}masks are used where photographs have them; `loss.mask_weight`"
    ),
    Without("OneTrainer", ("unmasked_probability", "normalize_masked_area_loss"), "no counterpart: `loss.mask_weight`"),
    Without("OneTrainer", ("preserve_embedding_norm",), "no counterpart: `optimizer.lr` of `adapter.kind embedding`"),
    Without("OneTrainer", ("multi_gpu", "device_indexes"), _SEVERAL_GPUS),
)
_INSTEAD = {name: row.instead for row in reversed(WITHOUT) for name in row.names}


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def setting_named(name: str) -> tuple[str, str] | None:
    """Return (table, setting) of what another trainer calls by this name, None if it is not known."""
    return SETTINGS.get(_plain(name))


def instead_of(name: str) -> str:
    """Return what to do instead of a setting of another trainer that has no counterpart, '' for any other name."""
    return _INSTEAD.get(_plain(name), "").replace("`", "")


def nearest_value(value: str, known: list[str]) -> str:
    """Return the value of `known` that another one means or is nearest to, '' if none is."""
    lower = value[:100].strip().lower()
    meant = VALUES.get(lower.replace("-", "_"), lower)
    if meant in known:
        return meant
    near = difflib.get_close_matches(meant, [one.lower() for one in known], n=1, cutoff=0.5)
    return next((one for one in known if near and one.lower() == near[0]), "")
