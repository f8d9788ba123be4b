"""The counter against counts by hand, FlopCounterMode, real attention, the profiler and published figures; the gate."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from safelight.__main__ import main
from safelight.bench.core.arguments import Count
from safelight.bench.core.operators import class_of, num_foreach_kernels
from safelight.bench.core.results import COUNTS, read
from safelight.bench.counting.counters import CardOperators, Counter, SavedBytes
from safelight.bench.counting.profiled import COMPOUND
from safelight.bench.measure import count, gate
from safelight.kernels.unet import narrow_attention
from safelight.trainer.config.schema import Loss
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import meta_unet
from safelight.trainer.step.step import accumulate


@pytest.fixture(scope="module")
def tiny():
    return resolve_base("tiny")


@pytest.fixture(scope="module")
def tiny_counts(tiny):
    return count.trace(tiny, precision="fp32", optimizer="adamw8bit")


def test_a_linear_layer_with_silu_counted_by_hand():
    layer = nn.Linear(8, 16, device="meta")
    x = torch.empty(4, 8, device="meta")
    saved = SavedBytes(layer.parameters())
    with CardOperators(), Counter() as counter, saved:
        F.silu(layer(x)).sum().backward()
    rows = counter.counts.rows
    # forward addmm; backward the weight gradient (x needs none)
    assert rows["matmul"].launches == 2
    # silu, sum, ones, silu backward, sum of the bias gradient
    assert rows["elementwise"].launches == 5
    assert counter.counts.flops_forward == 2 * 4 * 8 * 16
    assert counter.counts.flops_total == 2 * counter.counts.flops_forward
    # x and the input of SiLU; the weight is not an activation
    assert saved.total == 4 * (4 * 8 + 4 * 16)
    # silu 64 in, 64 out; sum 64 in, 1 out; ones 1 in, 1 out; silu backward 3 x 64, the expanded gradient counting in
    # full; bias 64 in, 16 out
    assert rows["elementwise"].bytes_moved == 4 * (128 + 65 + 2 + 192 + 80)


def test_flops_agree_with_torchs_flop_counter(tiny, tiny_counts):
    unet = meta_unet(tiny).train()
    noised, conditioning = count.meta_inputs(unet, 1, unet.config.sample_size, "nchw")
    schedule = make_schedule(tiny.config_of("scheduler")).to(torch.device("meta"))
    with FlopCounterMode(display=False) as whole:
        accumulate(unet, noised, conditioning, schedule, Loss(), 1, torch.ones((), device="meta"))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        unet(noised.noisy_BCHW, noised.timesteps_B, conditioning.text_BTD)
    assert tiny_counts.flops_forward == forward.get_total_flops() > 1e8
    # fused attention recomputes the scores in backward: five matrix products instead of the math path's four
    scores = sum(flops for name, flops in forward.get_flop_counts()["Global"].items() if "bmm" in str(name))
    assert tiny_counts.flops_total == whole.get_total_flops() + scores // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_on_meta_tensors_is_a_gpus_fused_operator_and_saves_its_tensors(dtype):
    q, k, v = (torch.empty(1, 2, n, 40, dtype=dtype, device="meta", requires_grad=True) for n in (64, 77, 77))
    saved = SavedBytes([])
    with CardOperators(), Counter() as counter, saved:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    name = "flash" if dtype == torch.bfloat16 else "efficient"
    forward, backward = (
        counter.counts.by_operator[f"_scaled_dot_product_{name}_attention{which}"] for which in ("", "_backward")
    )
    assert (forward.launches, backward.launches) == (1, 3)
    # q, k, v, the output and the log-sum-exp, but not the 64 x 77 matrix of each head
    tensors = dtype.itemsize * 2 * 40 * (2 * 64 + 2 * 77) + 4 * 2 * 64
    # and a few bytes of random generator state
    assert tensors < saved.total <= tensors + 24
    # two matrix products forward, four backward, and the recomputed scores
    assert counter.counts.flops_total == 7 * 2 * 2 * 64 * 77 * 40
    with CardOperators(), pytest.raises(ValueError, match="mask or dropout"):
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def test_attention_on_real_tensors_is_torchs_own():
    q = torch.randn(1, 2, 4, 8)
    with CardOperators():
        counted = F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(counted, F.scaled_dot_product_attention(q, q, q))


def test_launches_of_multi_tensor_operators():
    # 110 tensors of one list per launch, 64 of two
    assert num_foreach_kernels([10] * 110, 1) == 1
    assert num_foreach_kernels([10] * 111, 1) == 2
    assert num_foreach_kernels([10] * 128, 2) == 2
    # 320 blocks of 65,536 elements per launch
    assert num_foreach_kernels([320 * 65536], 1) == 1
    assert num_foreach_kernels([320 * 65536 + 1], 1) == 2
    assert num_foreach_kernels([], 1) == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("convolution_backward", "conv"),
        ("addmm", "matmul"),
        ("native_group_norm", "norm"),
        ("add", "elementwise"),
        ("_scaled_dot_product_efficient_attention_backward", "attention"),
        ("_to_copy", "copy/cast"),
        ("linalg_vector_norm", "elementwise"),
        ("_foreach_norm", "elementwise"),
        ("mul", "elementwise"),
        ("clone", "copy/cast"),
        ("_fused_adamw_", "optimizer"),
        ("addcmul", "elementwise"),
    ],
)
def test_classes_of_operators(name, kind):
    assert class_of(name) == kind


def test_launches_and_syncs_of_the_optimizer_are_counted(tiny, tiny_counts):
    tensors = list(meta_unet(tiny).parameters())
    # one to read the norm, and bitsandbytes synchronizes after every tensor
    assert tiny_counts.host_syncs == len(tensors) + 1
    assert tiny_counts.by_operator["optimizer_update"].launches == len(tensors)
    adamw = count.trace(tiny, precision="fp32", optimizer="adamw")
    assert adamw.host_syncs == 1
    assert adamw.rows["conv"] == tiny_counts.rows["conv"]
    # a dozen multi-tensor operators launch fewer kernels than there are tensors
    assert adamw.rows["optimizer"].launches < len(tensors)


def test_autocast_casts_each_weight_once_and_keeps_norms_in_fp32(tiny):
    unet = meta_unet(tiny)
    noised, conditioning = count.meta_inputs(unet, 1, 16, "nchw")
    seen = {}
    for kind in (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm):
        module = next(m for m in unet.modules() if isinstance(m, kind))
        module.register_forward_hook(lambda m, i, out, kind=kind: seen.update({kind: out.dtype}))
    with CardOperators(torch.bfloat16) as operators:
        unet(noised.noisy_BCHW, noised.timesteps_B, conditioning.text_BTD)
    assert seen == {
        nn.Conv2d: torch.bfloat16,
        nn.Linear: torch.bfloat16,
        nn.GroupNorm: torch.float32,
        nn.LayerNorm: torch.float32,
    }
    cast = {
        p for m in unet.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in (m.weight, m.bias) if p is not None
    }
    assert set(operators.casts) == cast


def test_checkpointing_recomputes_with_the_same_operators(tiny):
    plain, full = (count.trace(tiny, checkpointing=how) for how in ("none", "full"))
    assert full.saved_bytes < plain.saved_bytes / 3
    assert full.flops_forward == plain.flops_forward
    assert 0 < full.flops_total - plain.flops_total <= plain.flops_forward
    assert count.trace(tiny, checkpointing="full", precision="autocast-bf16").saved_bytes > full.saved_bytes


def test_the_profiler_sees_the_operators_that_are_counted(tiny_counts, monkeypatch):
    # counted is the fused operator of a GPU, so the CPU is to use its own for the narrow heads too
    monkeypatch.setattr(narrow_attention, "MAX_HEAD_DIM", 0)
    seen = count.profile_count(Count(precision="fp32", optimizer="adamw"))["classes"]
    assert {kind: seen[kind]["launches"] for kind in COMPOUND} == {
        kind: tiny_counts.rows[kind].operators for kind in COMPOUND
    }
    # the count covers loss and gradients; the profiler also saw noising, clipping and the optimizer
    assert seen["elementwise"]["launches"] >= tiny_counts.rows["elementwise"].operators


# launches, GB and MiB saved of an eager SD1.5 step, counted independently of this code
INDEPENDENT_COUNTS = {
    ("bf16", "nchw"): (3292, 13.6, 893),
    ("autocast-bf16", "nchw"): (4761, 27.8, 2789),
    # derived from the NCHW count: 98 convolutions launch 2 and 3 kernels instead of 4 and 8, and 61 GroupNorms 5 and 7
    # instead of 3 and 5 (docs/log.md)
    ("bf16", "channels_last"): (3292 - 98 * (2 + 5) + 61 * (2 + 2), 5.8, None),
}


@pytest.mark.long
def test_counts_of_sd15_agree_with_independent_counts_and_the_golden_lines():
    goldens = {
        (g["config"]["precision"], g["config"]["layout"]): g
        for g in gate.goldens(base="random:sd15")
        if g["config"]["checkpointing"] == "none" and not g["config"].get("patched")
    }
    base = resolve_base("random:sd15")
    for (precision, layout), (launches, gigabytes, saved) in INDEPENDENT_COUNTS.items():
        figures = count.figures(count.trace(base, precision=precision, layout=layout))
        assert figures["launches"] == pytest.approx(launches, rel=0.03)
        assert figures["memory_bound_gb"] == pytest.approx(gigabytes, rel=0.03)
        assert round(figures["forward_gflop"]) == 803
        assert round(figures["step_gflop"], -1) == 2470
        if saved:
            assert round(figures["saved_mib"]) == saved
        golden = goldens[precision, layout]["figures"]
        for name in ("launches", "memory_bound_gb", "saved_mib", "forward_gflop"):
            assert figures[name] <= golden[name]


# maximum MiB that a patched SD1.5 UNet saves per image at 64x64 latents, by checkpointing
LIMITS = {"none": 496, "selective": 320, "full": 148}


@pytest.fixture(scope="module")
def patched_sd15():
    base = resolve_base("random:sd15")
    return {mode: count.trace(base, layout="channels_last", checkpointing=mode, patched=True) for mode in LIMITS}


def test_a_patched_sd15_saves_no_more_than_its_limits_and_the_golden_lines(patched_sd15):
    goldens = {g["config"]["checkpointing"]: g for g in gate.goldens(base="random:sd15") if g["config"].get("patched")}
    for mode, counts in patched_sd15.items():
        figures = count.figures(counts)
        assert figures["saved_mib"] <= LIMITS[mode]
        rose, _ = gate.differences(goldens[mode]["figures"], figures)
        assert not rose
    # the same matrix products as without our kernels
    assert patched_sd15["none"].flops_total == pytest.approx(2469.8e9, rel=1e-4)
    assert patched_sd15["none"].flops_forward == patched_sd15["full"].flops_forward


def test_the_kernels_of_a_patched_step_are_counted(patched_sd15):
    """By hand: SD1.5 has 22 residual blocks, 16 transformer blocks and a final norm."""
    by_kernel = patched_sd15["none"].by_operator
    # three norms per transformer block, in the forward pass and recomputed in backward
    assert by_kernel["_layer_norm_fwd_kernel"].launches == 2 * 3 * 16
    assert by_kernel["_layer_norm_bwd_kernel"].launches == 3 * 16
    assert by_kernel["_geglu_bwd_kernel"].launches == 16
    assert by_kernel["_bias_residual_fwd_kernel"].launches == 22
    # SD1.5's GEGLU projects 5 blocks of 320 at 64x64, 5 of 640 at 32x32, 5 of 1280 at 16x16 and one at 8x8, to 8 times
    # as many features; the forward kernel reads those and writes half
    projected = sum(n * side**2 * 8 * dim for n, side, dim in ((5, 64, 320), (5, 32, 640), (5, 16, 1280), (1, 8, 1280)))
    once = by_kernel["_geglu_fwd_kernel"].bytes_moved / by_kernel["_geglu_fwd_kernel"].launches * 16
    assert once == 2 * (projected + projected // 2)
    # the residuals of 16 transformers, the sum of two time-embedding biases, and the gradients that autograd adds at
    # 12 skip connections
    assert by_kernel["add"].launches == 16 + 1 + 12
    # 19 norms split a group over programs, in three launches; 42 have a program per group, in one launch
    assert by_kernel["_bwd_dx_kernel"].launches == by_kernel["_group_stats_kernel"].launches == 19
    assert by_kernel["_bwd_whole_kernel"].launches == 42
    # less than a third of the bytes and half of the launches of the eager NCHW step
    total = patched_sd15["none"]
    assert total.total("bytes_moved", with_optimizer=False) < 3.5e9
    assert total.total("launches", with_optimizer=False) < 1400


def test_a_channels_last_convolution_without_bias_launches_one_kernel_less():
    x, weight, bias = (
        torch.empty(shape, device="meta").requires_grad_() for shape in ((1, 8, 4, 4), (8, 8, 3, 3), (8,))
    )
    for layout, fewer in (("channels_last", 1), ("nchw", 0)):
        launches = []
        for b in (bias, None):
            with CardOperators(), Counter(layout) as counter:
                F.conv2d(x, weight, b, padding=1).sum().backward()
            launches.append(
                (counter.counts.by_operator["convolution"], counter.counts.by_operator["convolution_backward"])
            )
        assert [a.launches - b.launches for a, b in zip(*launches, strict=True)] == [fewer, fewer]


def test_combinations_that_cannot_be_counted_are_refused(tiny):
    with pytest.raises(ValueError, match="requires --layout channels_last without autocast, not nchw, bf16"):
        count.trace(tiny, patched=True)
    with pytest.raises(ValueError, match="selective checkpointing can only be counted with --patched"):
        count.trace(tiny, checkpointing="selective")


def test_the_gate_passes_as_committed_and_fails_on_one_more_operator(monkeypatch, capsys):
    assert main(["bench", "gate", "--base", "tiny"]) == 0
    assert capsys.readouterr().out == "same  tiny, batch 1, bf16, nchw, adamw8bit\n"
    from diffusers.models.resnet import ResnetBlock2D

    forward = ResnetBlock2D.forward
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 1.0)
    assert main(["bench", "gate", "--base", "tiny"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("rose  tiny, batch 1, bf16, nchw, adamw8bit\n")
    assert "classes.elementwise.launches:" in out


def test_a_new_class_has_risen_and_lower_figures_have_fallen():
    golden = {"launches": 5, "classes": {"conv": {"launches": 5}}}
    assert gate.differences(golden, {"launches": 5, "classes": {"conv": {"launches": 4}, "norm": {"launches": 1}}}) == (
        ["classes.norm.launches: 0 -> 1"],
        ["classes.conv.launches: 5 -> 4"],
    )


def test_the_command_prints_a_table_or_json_and_appends_a_line(tmp_path, capsys):
    assert main(["bench", "count", "--append", str(tmp_path / "r.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "without optimizer" in out
    assert "Launches and bytes are estimates" in out
    assert main(["bench", "count", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (appended,) = read(tmp_path / "r.jsonl")
    assert appended["figures"] == printed["figures"]
    golden = next(line for line in read(COUNTS) if line["config"]["base"] == "tiny")
    assert appended["config"] == golden["config"]
