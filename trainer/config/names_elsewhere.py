"""What other trainers call settings and values, for messages about a name that is not one here. Does not import torch.

All names of three trainers are in docs/settings.md; here are those that people write from memory.
"""

from __future__ import annotations

import difflib

# name in kohya's sd-scripts, EveryDream2, OneTrainer or diffusers' scripts -> (table, setting)
_SETTINGS = {
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
_VALUES = {
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


def setting_named(name: str) -> tuple[str, str] | None:
    """Return (table, setting) of what another trainer calls by this name, None if it is not known."""
    return _SETTINGS.get(name.strip().lower().replace("-", "_"))


def nearest_value(value: str, known: list[str]) -> str:
    """Return the value of `known` that another one means or is nearest to, '' if none is."""
    lower = value[:100].strip().lower()
    meant = _VALUES.get(lower.replace("-", "_"), lower)
    if meant in known:
        return meant
    near = difflib.get_close_matches(meant, [one.lower() for one in known], n=1, cutoff=0.5)
    return next((one for one in known if near and one.lower() == near[0]), "")
