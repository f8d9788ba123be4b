"""The variants of our step, each with one technique added or removed."""

import pytest
import torch

from safelight.bench.core import plot
from safelight.bench.recipes import suite, workload
from safelight.bench.recipes.suite import OURS, VARIANTS, build
from safelight.bench.recipes.workload import LR, Ours, Workload, random_batches
from safelight.kernels.ops.quantized_weight import QuantizedWeight
from tests.trainer.run_log.recorded import RunsAgain

WORK = Workload("tiny", latent_size=8, device="cpu").resolved()


def losses(trainer: Ours, sizes: tuple[int, ...]) -> list[float]:
    batches = [random_batches(1, Workload("tiny", 8, size, device="cpu").resolved())[0] for size in sizes]
    return [trainer.step(batch).item() for batch in batches]


def test_replayed_steps_are_the_same_steps():
    sizes = (2, 1, 2)
    replayed = Ours(WORK)
    replayed._recorder = RunsAgain(replayed.optimizer)
    assert losses(replayed, sizes) == losses(build(OURS, WORK), sizes)
    assert (replayed._recorder.num_captured, replayed._recorder.num_replayed) == (2, 3)


def test_every_variant_differs_from_ours_in_one_technique(monkeypatch):
    monkeypatch.setattr(suite, "CudaRecorder", lambda device: f"recorder on {device.type}")
    monkeypatch.setattr(suite, "Ours", lambda work, **options: {name: x for name, x in options.items() if x})
    on_gpu = Workload(device="cuda")
    assert {name: build(name, on_gpu) for name in VARIANTS} == {
        OURS: {},
        "safelight-unpatched": {"kernels": "off"},
        "safelight-fused": {"fused": True},
        "safelight-graphs": {"recorder": "recorder on cuda"},
        "safelight-fused-graphs": {"fused": True, "recorder": "recorder on cuda"},
        "safelight-cudnn-benchmark": {"cudnn_benchmark": True},
        "safelight-lora": {"adapter": {"kind": "lora"}},
        "safelight-lora-nf4": {"adapter": {"kind": "lora", "base": "nf4"}},
    }


def test_kernels_and_fused_backward_are_switched_by_the_variant():
    patched, unpatched = Ours(WORK, kernels="on"), Ours(WORK, kernels="off")
    assert "kernels off" in unpatched.notes
    assert "kernels off" not in patched.notes
    assert {type(m) for m in patched.unet.modules()} != {type(m) for m in unpatched.unet.modules()}
    assert Ours(WORK, fused=True).optimizer.is_fused
    assert not unpatched.optimizer.is_fused


def test_a_step_changes_the_weights_by_its_learning_rate():
    trainer = build(OURS, WORK)
    before = [p.detach().clone() for p in trainer.unet.parameters()]
    losses(trainer, (1,))
    moved = torch.cat(
        [(p.detach() - old).abs().flatten() for p, old in zip(trainer.unet.parameters(), before, strict=True)]
    )
    # Adam's first step equals the learning rate for any gradient; weight decay adds a hundredth of it at most
    assert moved.median().item() == pytest.approx(LR, rel=0.1)


def test_fused_backward_has_the_losses_of_the_plain_step():
    fused = losses(build("safelight-fused", WORK), (2, 2))
    assert fused == pytest.approx(losses(build(OURS, WORK), (2, 2)), rel=1e-3)


@pytest.mark.parametrize("recipe", ["safelight-lora", "safelight-lora-nf4"])
def test_a_lora_alone_is_trained_beside_a_frozen_base(recipe):
    trainer = build(recipe, WORK)
    is_quantized = [isinstance(p, QuantizedWeight) for p in trainer.unet.parameters()]
    assert any(is_quantized) == (recipe == "safelight-lora-nf4")
    before = {name: p.detach().clone() for name, p in trainer.unet.named_parameters() if p.requires_grad}
    assert before.keys() == {name for name, _ in trainer.unet.named_parameters() if ".adapter." in name}
    losses(trainer, (1,))
    moved = {name: p.ne(before[name]).any().item() for name, p in trainer.unet.named_parameters() if name in before}
    # A's gradient is B times something, and B is zero before the first step; weight decay is too small for fp32 to see
    assert all(has_moved for name, has_moved in moved.items() if name.endswith("lora_B"))
    assert "training a LoRA of rank 16" in trainer.notes


def test_weights_wait_in_host_memory_until_they_are_converted_for_a_gpu(monkeypatch):
    """All of them in fp32 on the GPU would be the peak of memory modes paged and streamed."""

    class Stop(Exception):
        pass

    def prepare(unet, config, choice, device, dtype):
        seen.append(({p.device.type for p in unet.parameters()}, device.type, dtype))
        raise Stop

    seen = []
    monkeypatch.setattr(workload, "prepare_unet", prepare)
    monkeypatch.setattr(workload, "attention_of", lambda unet, work: None)
    monkeypatch.setattr(Workload, "dtype", torch.bfloat16)
    with pytest.raises(Stop):
        Ours(Workload("tiny", 8, precision="bf16", device="cuda"))
    assert seen == [({"cpu"}, "cuda", torch.bfloat16)]


def test_cudnn_benchmark_is_on_in_its_variant_only():
    seen = []

    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32

    before = flags()
    for recipe in (OURS, "safelight-cudnn-benchmark"):
        trainer = build(recipe, WORK)
        trainer.unet.conv_in.register_forward_hook(lambda *_: seen.append(flags()))
        losses(trainer, (1,))
    # with the other value of allow_tf32, torch does not reuse the algorithms cached without cudnn.benchmark
    assert seen == [(False, before[1]), (True, not before[1])]
    assert flags() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match="safelight-graphs replays CUDA graphs and needs a CUDA device; leave it out"):
        build("safelight-graphs", WORK)


def test_every_variant_has_a_colour_in_the_plots():
    assert VARIANTS.keys() <= plot.COLOURS.keys()
