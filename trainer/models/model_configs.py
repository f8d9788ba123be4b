"""What the configs in a model's folder may say: types, choices and bounds of every value that a model is built from.

A config may come from anybody. What passes here is an architecture that training, sampling and export support, and
small enough to build; values that no part of a model is built from are dropped. Names and defaults are those of
diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safelight.errors import UserError

Channels = Annotated[int, Field(ge=1, le=8192)]
Width = Annotated[int, Field(ge=1, le=65536)]
Layers = Annotated[int, Field(ge=1, le=64)]
Heads = Annotated[int, Field(ge=1, le=1024)]
SizePx = Annotated[int, Field(ge=1, le=16384)]
Vocabulary = Annotated[int, Field(ge=1, le=1_000_000)]
TokenId = Annotated[int, Field(ge=0, le=1_000_000)]
Name = Annotated[str, Field(max_length=100)]
Small = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(ge=1e-4, le=1e4)]
Beta = Annotated[float, Field(gt=0, lt=1)]
Blocks = Annotated[list[Channels], Field(min_length=1, max_length=8)]
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]
# the longest known has 2,000
MAX_CONFIG_BYTES = 2**20
# one of diffusers' transformer blocks has twenty Parameters; by this count SDXL has 180
MAX_TRANSFORMERS = 512


class _Values(BaseModel):
    """Values of a config, of exactly these types: no text for a number, no true for 1."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class UNet(_Values):
    """diffusers' UNet2DConditionModel: of its many options those that Stable Diffusion's UNets use."""

    class_name: Literal["UNet2DConditionModel"] = Field("UNet2DConditionModel", alias="_class_name")
    sample_size: Annotated[int, Field(ge=1, le=2048)]
    in_channels: Annotated[int, Field(ge=1, le=64)]
    out_channels: Annotated[int, Field(ge=1, le=64)] = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: Literal[0, 1] = 0
    down_block_types: list[Literal["CrossAttnDownBlock2D", "DownBlock2D"]]
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] | None = "UNetMidBlock2DCrossAttn"
    up_block_types: list[Literal["CrossAttnUpBlock2D", "UpBlock2D"]]
    only_cross_attention: Literal[False] = False
    block_out_channels: Blocks
    layers_per_block: Annotated[int, Field(ge=1, le=16)] = 2
    downsample_padding: Literal[0, 1] = 1
    mid_block_scale_factor: Factor = 1
    dropout: Probability = 0
    act_fn: Activation = "silu"
    norm_num_groups: Channels = 32
    norm_eps: Small = 1e-5
    cross_attention_dim: Channels
    transformer_layers_per_block: Layers | Annotated[list[Layers], Field(min_length=1, max_length=8)] = 1
    reverse_transformer_layers_per_block: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: Heads | Annotated[list[Heads], Field(min_length=1, max_length=8)] = 8
    num_attention_heads: None = None
    dual_cross_attention: Literal[False] = False
    use_linear_projection: bool = False
    class_embed_type: None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: Channels | None = None
    num_class_embeds: None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: Literal["default"] = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: Factor = 1
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: Channels | None = None
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    # of latent consistency models, which are refused by their name
    time_cond_proj_dim: Channels | None = None
    conv_in_kernel: Literal[1, 3, 5, 7] = 3
    conv_out_kernel: Literal[1, 3, 5, 7] = 3
    projection_class_embeddings_input_dim: Width | None = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    mid_block_only_cross_attention: Literal[False] | None = None
    cross_attention_norm: None = None
    addition_embed_type_num_heads: Heads = 64

    @model_validator(mode="after")
    def _fits_together(self):
        num_blocks = len(self.block_out_channels)
        for key in ("down_block_types", "up_block_types", "transformer_layers_per_block", "attention_head_dim"):
            value = getattr(self, key)
            if isinstance(value, list) and len(value) != num_blocks:
                raise ValueError(f"{key} has {len(value)} values, but block_out_channels has {num_blocks}")
        _check_groups(self.block_out_channels, self.norm_num_groups)
        self._check_heads()
        if self.block_out_channels[0] < 4:
            raise ValueError("block_out_channels begins with less than 4, too few for the timestep's embedding")
        depths = self.transformer_layers_per_block
        depth = max(depths) if isinstance(depths, list) else depths
        if 2 * num_blocks * (self.layers_per_block + 1) * depth > MAX_TRANSFORMERS:
            raise ValueError(f"it describes more than {MAX_TRANSFORMERS} transformer blocks")
        if self.addition_embed_type == "text_time" and not (
            self.addition_time_embed_dim and self.projection_class_embeddings_input_dim
        ):
            raise ValueError(
                "addition_embed_type text_time needs addition_time_embed_dim and projection_class_embeddings_input_dim"
            )
        return self

    def _check_heads(self) -> None:
        """Raise ValueError unless the channels of every block with attention are a multiple of its heads."""
        # diffusers' attention_head_dim is the number of heads. The middle block, if any, is as wide as the last one
        num_blocks, value = len(self.block_out_channels), self.attention_head_dim
        heads = value if isinstance(value, list) else [value] * num_blocks
        pairs = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        attends = [any(kind.startswith("CrossAttn") for kind in pair) for pair in pairs]
        attends[-1] |= self.mid_block_type is not None
        for width, num, is_used in zip(self.block_out_channels, heads, attends, strict=True):
            if is_used and width % num:
                raise ValueError(f"attention_head_dim {num} does not divide {width} of block_out_channels")


class AutoencoderKL(_Values):
    class_name: Literal["AutoencoderKL"] = Field("AutoencoderKL", alias="_class_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: list[Literal["DownEncoderBlock2D"]]
    up_block_types: list[Literal["UpDecoderBlock2D"]]
    block_out_channels: Blocks
    layers_per_block: Annotated[int, Field(ge=1, le=16)] = 1
    act_fn: Activation = "silu"
    latent_channels: Annotated[int, Field(ge=1, le=64)] = 4
    norm_num_groups: Channels = 32
    sample_size: SizePx | None = None
    scaling_factor: Factor = 0.18215
    shift_factor: None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @model_validator(mode="after")
    def _fits_together(self):
        for key in ("down_block_types", "up_block_types"):
            if len(getattr(self, key)) != len(self.block_out_channels):
                raise ValueError(f"{key} and block_out_channels have different lengths")
        _check_groups(self.block_out_channels, self.norm_num_groups)
        return self


class AutoencoderTiny(_Values):
    class_name: Literal["AutoencoderTiny"] = Field("AutoencoderTiny", alias="_class_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    encoder_block_out_channels: Blocks
    decoder_block_out_channels: Blocks
    act_fn: Activation = "relu"
    upsample_fn: Literal["nearest"] = "nearest"
    latent_channels: Annotated[int, Field(ge=1, le=64)] = 4
    upsampling_scaling_factor: Literal[2] = 2
    num_encoder_blocks: Annotated[list[Layers], Field(min_length=1, max_length=8)]
    num_decoder_blocks: Annotated[list[Layers], Field(min_length=1, max_length=8)]
    latent_magnitude: Factor = 3
    latent_shift: Annotated[float, Field(ge=-1e4, le=1e4)] = 0.5
    force_upcast: bool = False
    scaling_factor: Factor = 1
    shift_factor: Literal[0] = 0

    @model_validator(mode="after")
    def _fits_together(self):
        lengths = {
            len(self.encoder_block_out_channels),
            len(self.decoder_block_out_channels),
            len(self.num_encoder_blocks),
            len(self.num_decoder_blocks),
        }
        if len(lengths) > 1:
            raise ValueError("its lists of blocks have different lengths")
        return self


class TextEncoder(_Values):
    """transformers' CLIPTextModel."""

    vocab_size: Vocabulary = 49408
    hidden_size: Channels = 512
    intermediate_size: Width = 2048
    projection_dim: Annotated[int, Field(ge=0, le=8192)] | None = 512
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 8
    max_position_embeddings: Annotated[int, Field(ge=3, le=4096)] = 77
    hidden_act: Literal["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"] = "quick_gelu"
    layer_norm_eps: Small = 1e-5
    attention_dropout: Probability = 0
    initializer_range: Annotated[float, Field(ge=0, le=10)] = 0.02
    initializer_factor: Annotated[float, Field(ge=0, le=10)] = 1
    # only checked: the name of a repository would make transformers download code for it
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(None, exclude=True)
    )
    pad_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None

    @model_validator(mode="after")
    def _fits_together(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


Scalar = bool | int | float | str | None
# no scheduler of diffusers has a larger number; some make a list of as many
MAX_EXTRA = 100_000


class Scheduler(_Values):
    """A scheduler of diffusers. Other values, which only matter for the scheduler of an export, are kept."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Scalar] = Field(init=False)

    class_name: Annotated[str, Field(pattern="^[A-Za-z0-9]{1,60}Scheduler$")] = Field(
        "DDIMScheduler", alias="_class_name"
    )
    num_train_timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: Name = "linear"
    # refused later, with what to do
    trained_betas: list | None = None
    prediction_type: Name = "epsilon"
    rescale_betas_zero_snr: bool = False
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: Annotated[int, Field(ge=0, le=1000)] = 0
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    skip_prk_steps: bool = False
    thresholding: bool = False
    clip_sample_range: Factor = 1
    dynamic_thresholding_ratio: Small = 0.995
    sample_max_value: Factor = 1

    @model_validator(mode="after")
    def _extras_are_small(self):
        for key, value in self.__pydantic_extra__.items():
            if isinstance(value, int | float) and abs(value) > MAX_EXTRA:
                raise ValueError(f"{key[:60]} is {value:g}, over the limit of {MAX_EXTRA:,}")
        return self


class ModelIndex(_Values):
    """model_index.json, of which only the names of the parts matter."""

    model_config = ConfigDict(extra="allow")

    class_name: Name = Field("", alias="_class_name")
    force_zeros_for_empty_prompt: bool | None = None


PARTS: dict[str, type[_Values]] = {
    "unet": UNet,
    "vae": AutoencoderKL,
    "text_encoder": TextEncoder,
    "text_encoder_2": TextEncoder,
    "scheduler": Scheduler,
    "model_index": ModelIndex,
}


def _check_groups(channels: Iterable[int], groups: int) -> None:
    for width in channels:
        if width % groups:
            raise ValueError(f"block_out_channels {width} is not a multiple of norm_num_groups {groups}")


def checked(part: str, values: dict, path: Path) -> dict:
    """Return the values of a part's config that matter, under their own names, without missing ones.

    None is left out too, except where it is a choice and not the default: a UNet's mid_block_type may be None.

    part: a key of PARTS. path: the config's file, for messages. Raises UserError for a value of a wrong type or out of
    bounds.
    """
    # diffusers keeps what only it needs under such names
    values = {key: value for key, value in values.items() if key == "_class_name" or not key.startswith("_")}
    schema, kind = PARTS[part], values.get("_class_name", "AutoencoderKL")
    if part == "vae" and kind == "AutoencoderTiny":
        schema = AutoencoderTiny
    elif part == "vae" and kind != "AutoencoderKL":
        raise UserError(f"{path} is a {str(kind)[:60]}; use an AutoencoderKL or AutoencoderTiny")
    try:
        checked_values = schema.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{path} is wrong: {_describe(first)}; get this file again, or use another model") from None
    choices = {key for key, field in schema.model_fields.items() if field.default is not None}
    given = checked_values.model_dump(by_alias=True, exclude_unset=True)
    return {key: value for key, value in given.items() if value is not None or key in choices}


def _describe(error: dict) -> str:
    """Return what is wrong in words: key, value and reason."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    # the second part of a union's location is the name of the alternative
    key = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{key} is missing"
    value = repr(error["input"])
    return f"{key} is {value if len(value) <= 60 else value[:57] + '...'}: {message[0].lower()}{message[1:]}"
