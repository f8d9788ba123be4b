"""A traced step on meta tensors needs the memory that the CPU allocator reports for the real step."""

import pytest
import torch

from safelight.bench.counting.profiled import allocated_peak
from safelight.data.batches import Batch
from safelight.data.buckets import Bucket
from safelight.kernels.unet.attention import attention_cases, choose_attention
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config
from safelight.trainer.families.conditioning import TextConditioning, TokenConditioning
from safelight.trainer.memory_plan.allocation_trace import (
    ACTIVATIONS,
    AVERAGE,
    GRADIENTS,
    MASTER,
    OPTIMIZER,
    TEMPORARY,
    WEIGHTS,
)
from safelight.trainer.memory_plan.memory_tracer import LiveBytes
from safelight.trainer.memory_plan.meta_run import META, MetaRun
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import load_texts, load_unet
from safelight.trainer.step.prepare_unet import prepare_unet
from safelight.trainer.step.step import StepContext, StepSettings, train_step
from safelight.trainer.step.text_training import train_texts

pytestmark = pytest.mark.usefixtures("noise_by_torch")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS, FUSED = {"kernels": "on"}, {"fused_backward": True}


def config_of(precision: str = "fp32", **sections: dict) -> Config:
    return parse_config({"model": {"precision": precision}, **sections}, "here")


def measured(config: Config, spec: str, batch_size: int, side: int, num_micro: int = 1) -> int:
    """Return how far the allocator's live bytes rise during the second of two real steps."""
    base, dtype = resolve_base(spec), DTYPES[config.model.precision]
    unet = load_unet(base, 1).train()
    optimizer = prepare_unet(unet, config, choose_attention(CPU, dtype, attention_cases(unet)), CPU, dtype).optimizer
    schedule, texts = make_schedule(base.config_of("scheduler")), None
    if config.text_encoder.train:
        parts = dict(zip(base.family.text_encoders, (one for _, one in load_texts(base, "", 1)), strict=True))
        num_tokens = parts["text_encoder"].config.max_position_embeddings
        texts = train_texts(config, base.family, parts, unet.config, None, CPU, optimizer.loss_scale)
    context = StepContext(unet, optimizer, schedule, 1.0, config.loss, texts)
    shapes = [(4, side, side), (4, side, side), (77, unet.config.cross_attention_dim)]
    ids, zeros = tuple(range(batch_size)), (0,) * batch_size

    def read(text):
        if texts is None:
            return TextConditioning(text)
        return TokenConditioning(torch.ones(batch_size, 1, num_tokens, dtype=torch.int64), torch.zeros(batch_size, 6))

    batches = [
        Batch(mean, logvar, read(text), ids, zeros, Bucket(8 * side, 8 * side))
        for mean, logvar, text in ([torch.randn(batch_size, *s) for s in shapes] for _ in range(num_micro))
    ]

    def step():
        train_step(context, batches, StepSettings(batch_size * num_micro, 1e-6, 0.01, 1.0, 1e-6), seed=1, epoch=0)

    step()
    return allocated_peak(step)


def predicted(config: Config, spec: str, batch_size: int, side: int, num_micro: int = 1) -> int:
    run = MetaRun(config, resolve_base(spec), CPU, DTYPES[config.model.precision])
    run.step(batch_size, side, side, num_micro)
    return run.step(batch_size, side, side, num_micro).transient


def assert_predicted(config: Config, *step, within: float) -> None:
    real = measured(config, *step)
    assert predicted(config, *step) == pytest.approx(real, rel=within)


@pytest.mark.long
def test_predicted_peaks_equal_the_allocators():
    assert_predicted(config_of(optimizer=FUSED), "tiny", 8, 16, within=0.0001)
    # the optimizer's reference implementation uses lookup tables that the trace lacks: a byte per element of its
    # largest tensor
    config = config_of("bf16", train={**KERNELS, "checkpointing": "selective"}, optimizer={"memory": "exact"})
    assert_predicted(config, "tiny", 1, 16, within=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("precision", "memory"),
    [("fp32", "fp32"), *((p, m) for p in ("bf16", "fp16") for m in ("exact", "near", "rounded", "paged", "fp32"))],
)
def test_predicted_peaks_of_every_mode(precision, memory, fused, checkpointing, kernels):
    train = {"kernels": kernels, "checkpointing": checkpointing}
    config = config_of(precision, train=train, optimizer={"memory": memory, "fused_backward": fused})
    assert_predicted(config, "tiny", 2, 16, within=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adafactor"])
def test_predicted_peaks_under_accumulation_and_of_other_optimizers(name):
    assert_predicted(config_of(optimizer={"name": name}), "tiny", 2, 16, 2, within=0.03)


TEXT = {"train": True, "last_layers": 1}


def test_predicted_peak_with_the_text_encoder():
    assert_predicted(config_of(optimizer={"name": "adamw"}, text_encoder={"train": True}), "tiny", 2, 16, within=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("text", [{"train": True}, TEXT])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("num_micro", [1, 2])
def test_predicted_peaks_with_the_text_encoder(precision, text, checkpointing, num_micro):
    config = config_of(precision, text_encoder=text, train={"checkpointing": checkpointing})
    assert_predicted(config, "tiny", 2, 16, num_micro, within=0.03)


@pytest.mark.slow
def test_predicted_peak_of_full_size_sd15():
    """A full step in bf16 on latents of 32 x 32: about 10 GiB and a minute."""
    config = config_of("bf16", optimizer=FUSED)
    assert_predicted(config, "random:sd15", 1, 32, within=0.03)


def test_a_storage_is_counted_once_and_until_its_last_reference_is_dropped():
    live = LiveBytes(rounding=512)
    with live:
        x = torch.empty(100, device=META)
        view = x.view(10, 10)
        assert live.total == live.live[ACTIVATIONS] == 512
        del x
        assert live.total == 512
        y = view + 1
        assert (live.total, live.peak.total, live.peak.during) == (1024, 1024, "forward")
        del view
        assert (live.total, live.peak.total) == (512, 1024)
        live.hold([y], WEIGHTS)
        assert live.live[WEIGHTS] == 512
        assert live.live[ACTIVATIONS] == 0


def test_a_convolutions_gradients_have_its_weights_memory_format():
    conv = torch.nn.Conv2d(8, 16, 3, device=META).to(memory_format=torch.channels_last)
    x = torch.empty(2, 8, 9, 9, device=META, requires_grad=True)
    with LiveBytes():
        y = conv(x)
        y.backward(torch.empty_like(y))
    for tensor in (y, conv.weight.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.long
def test_held_bytes_are_counted_by_kind():
    config = config_of("bf16", train={"ema_decay": 0.9}, optimizer=FUSED)
    run = MetaRun(config, resolve_base("tiny"), CPU, torch.bfloat16)
    first, second = (run.step(2, 16, 16) for _ in range(2))
    num = sum(p.numel() for p in run.unet.parameters())
    held = second.held
    assert (held[WEIGHTS], held[MASTER], held[AVERAGE]) == (2 * num, 2 * num, 4 * num)
    assert held[GRADIENTS] == held[ACTIVATIONS] == held[TEMPORARY] == 0
    assert held[OPTIMIZER] > 2 * num
    # a step leaves nothing behind
    assert first.held == held
    assert second.peak.total == sum(second.peak.kinds.values())
    assert second.work.flops == first.work.flops > 0
