"""Replayed steps equal eager steps bit for bit; on a CPU, with a recorder that behaves like a CUDA graph."""

import copy
import dataclasses
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from safelight.data.batches import Batch
from safelight.data.buckets import Bucket
from safelight.trainer.config.schema import Loss, Optimizer
from safelight.trainer.config.toml import parse_config
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.memory_plan.meta_run import MetaRun
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.step.cuda_graphs import CudaRecorder, Shape, StepGraphs, shapes_of
from safelight.trainer.step.step import MicroResult, StepContext, StepSettings, micro_step, train_step, upload
from tests.small_base import small_base
from tests.trainer.run_log.recorded import CpuRecorder, OperatorTape

# the optimizer's reference reads the skip flags back; its kernel does not
pytestmark = pytest.mark.usefixtures("interpreted")

CPU = torch.device("cpu")
LARGE, SMALL = (2, 4, 8), (1, 4, 4)
# of each kind one, the larger with 8-bit moments: a program of the interpreter takes milliseconds
TRAINED = ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "mid_block.attentions.0.norm.bias", "conv_out.bias")


@pytest.fixture(scope="module")
def narrow_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(24,),
        norm_num_groups=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
    ).train()
    for name, p in unet.named_parameters():
        p.requires_grad_(name in TRAINED)
    return unet


def batch_of(number: int, shape: tuple[int, int, int], num_tokens: int = 5, dim: int = 8) -> Batch:
    size, height, width = shape
    generator = torch.Generator().manual_seed(number)
    mean, logvar = (torch.randn(size, 4, height, width, generator=generator) for _ in range(2))
    text = torch.randn(size, num_tokens, dim, generator=generator)
    ids = tuple(range(10 * number, 10 * number + size))
    return Batch(mean, logvar - 4, TextConditioning(text), ids, (0,) * size, Bucket(8 * width, 8 * height))


class Trained:
    """A copy of a UNet that is trained step by step, by graphs or without."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype, with_graphs: bool, **settings):
        self.unet = copy.deepcopy(unet)
        self.optimizer = make_optimizer(self.unet, Optimizer(name="adamw8bit", **settings), dtype)
        schedule = make_schedule(resolve_base("tiny").config_of("scheduler"))
        self.context = StepContext(self.unet, self.optimizer, schedule, 1.0, Loss(min_snr_gamma=5.0))
        self.recorder = CpuRecorder(self.state)
        self.graphs = StepGraphs(self.run_of(2), self.optimizer, self.recorder) if with_graphs else None

    def run_of(self, num_samples: int):
        return lambda inputs, *place: micro_step(self.context, inputs, num_samples, *place)

    def state(self) -> list[torch.Tensor]:
        """Return all that a step may change."""
        optimizer = self.optimizer
        return [*self.unet.parameters(), *optimizer.live_state().values(), *optimizer.buffers.tensors.values()]

    def step(self, batches: list[Batch], lr: float, num_samples: int = 2):
        settings = StepSettings(num_samples, lr, 0.01, 0.5)
        result = train_step(self.context, batches, settings, seed=1, epoch=0, graphs=self.graphs)
        return result.losses.clone(), result.grad_norm.clone(), result.is_applied.clone()


def same_bits(some: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    # a skipped step's norm is not finite
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(some, others, strict=True))


def pair(unet: UNet2DConditionModel, dtype: torch.dtype, **settings) -> tuple[Trained, Trained]:
    return Trained(unet, dtype, False, **settings), Trained(unet, dtype, True, **settings)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float16])
def test_replayed_steps_equal_taken_ones(narrow_unet, dtype):
    eager, replayed = pair(narrow_unet, dtype, fused_backward=True)
    shapes = [LARGE, SMALL, LARGE, SMALL]
    before = [x.clone() for x in replayed.state()]
    like = upload(batch_of(0, LARGE), CPU, 1, 0)
    assert replayed.graphs.prepare({Shape(*shape) for shape in shapes}, like) == 2
    assert replayed.recorder.num_warm_ups == 2
    assert same_bits(before, replayed.state()), "recording changed something"
    skipped = 0
    for number, shape in enumerate(shapes):
        batch, lr = batch_of(number, shape), 1e-3 / (number + 1)
        if dtype == torch.float16:
            # 2^31: the first steps overflow and are skipped
            for trained in (eager, replayed) if number == 0 else ():
                trained.optimizer.loss_scale.scale.fill_(2.0**31)
        found, expected = replayed.step([batch], lr), eager.step([batch], lr)
        assert same_bits(found, expected), number
        assert same_bits(eager.state(), replayed.state())
        skipped += int(replayed.optimizer.num_skipped_tensors)
    assert (skipped > 0) == (dtype == torch.float16)


@pytest.mark.long
def test_masks_and_loss_scales_are_replayed(narrow_unet):
    eager, replayed = pair(narrow_unet, torch.float16, fused_backward=True)

    def weighted(number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        mask, scales = torch.rand(2, 1, 4, 8, generator=generator), 1 + torch.rand(2, generator=generator)
        return dataclasses.replace(batch_of(number, LARGE), mask_B1HW=mask, scales_B=scales)

    assert replayed.graphs.prepare({Shape(*LARGE)}, upload(weighted(0), CPU, 1, 0)) == 1
    for number in (1, 2):
        found, expected = replayed.step([weighted(number)], 1e-3), eager.step([weighted(number)], 1e-3)
        assert same_bits(found, expected)
        assert same_bits(eager.state(), replayed.state())
    # they reach the gradient
    plain = pair(narrow_unet, torch.float16, fused_backward=True)[0]
    for number in (1, 2):
        plain.step([batch_of(number, LARGE)], 1e-3)
    assert not same_bits(plain.state(), replayed.state())


@pytest.mark.parametrize(
    ("fused", "accumulate_dtype"),
    [(True, "fp32"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(True, "auto"), (False, "auto")])],
)
def test_replayed_accumulation_equals_taken_steps(narrow_unet, fused, accumulate_dtype):
    eager, replayed = pair(narrow_unet, torch.bfloat16, fused_backward=fused)
    for trained in (eager, replayed):
        trained.optimizer.buffers.dtype = accumulate_dtype
        trained.optimizer.buffers.allocate()
    # two micro-batches a step, the epoch's last step has one
    sizes = [LARGE, SMALL, LARGE]
    like = upload(batch_of(0, LARGE), CPU, 1, 0)
    wanted = shapes_of(sizes, 2)
    assert replayed.graphs.prepare(wanted, like) == len(wanted) == 3
    batches = [batch_of(number, size) for number, size in enumerate(sizes)]
    for start in range(0, len(batches), 2):
        group = batches[start : start + 2]
        found, expected = replayed.step(group, 1e-3), eager.step(group, 1e-3)
        assert same_bits(found, expected), start
    assert same_bits(eager.state(), replayed.state())


def test_another_stage_has_graphs_of_its_own(narrow_unet):
    eager, replayed = pair(narrow_unet, torch.bfloat16, fused_backward=False)
    like, batch = upload(batch_of(0, SMALL), CPU, 1, 0), batch_of(3, SMALL)
    for num_samples in (2, 1):
        replayed.graphs.clear()
        replayed.graphs = StepGraphs(replayed.run_of(num_samples), replayed.optimizer, replayed.recorder)
        replayed.graphs.prepare({Shape(*SMALL)}, like)
        found, expected = (t.step([batch], 1e-3, num_samples) for t in (replayed, eager))
        assert same_bits(found, expected), num_samples
    assert same_bits(eager.state(), replayed.state())


def test_a_shape_is_recorded_once_and_an_unknown_one_refused(narrow_unet, monkeypatch):
    trained = Trained(narrow_unet, torch.bfloat16, True)
    monkeypatch.setattr(trained.graphs, "_run", lambda inputs, *place: inputs.mean_BCHW.sum())
    like = upload(batch_of(0, SMALL), CPU, 1, 0)
    assert trained.graphs.prepare({Shape(*LARGE), Shape(*SMALL)}, like) == 2
    assert trained.graphs.prepare({Shape(*SMALL)}, like) == 0
    assert len(trained.graphs) == 2
    batch = upload(batch_of(4, LARGE), CPU, 1, 0)
    assert torch.equal(trained.graphs(batch), batch.mean_BCHW.sum())
    with pytest.raises(KeyError):
        trained.graphs(batch, is_last=False)


def test_the_largest_shape_is_rehearsed_and_recorded_first(narrow_unet, monkeypatch):
    """So that the pool grows only once; shapes with equally many latents come in a fixed order."""
    trained, ran, asked = Trained(narrow_unet, torch.bfloat16, True), [], []
    for name in ("warm_up", "free_cached_memory", "capture"):
        does = getattr(trained.recorder, name)
        monkeypatch.setattr(trained.recorder, name, lambda *run, name=name, does=does: asked.append(name) or does(*run))

    def run(inputs, is_first: bool, is_last: bool) -> torch.Tensor:
        ran.append((tuple(inputs.mean_BCHW.shape[i] for i in (0, 2, 3)), is_first, is_last))
        return inputs.mean_BCHW.sum()

    monkeypatch.setattr(trained.graphs, "_run", run)
    sizes = [(1, 4, 4), (2, 8, 8), (2, 4, 8), (2, 8, 4), (1, 8, 8)]
    trained.graphs.prepare(shapes_of(sizes, 1), upload(batch_of(0, SMALL), CPU, 1, 0))
    largest_first = [(2, 8, 8), (2, 8, 4), (1, 8, 8), (2, 4, 8), (1, 4, 4)]
    assert [size for size, *_ in ran] == 2 * largest_first
    assert all(is_first and is_last for _, is_first, is_last in ran)
    # what rehearsals took is given back before the pool is begun
    assert asked == ["free_cached_memory", *["warm_up"] * 5, "free_cached_memory", *["capture"] * 5]


def test_a_size_that_comes_later_has_all_recorded_anew_and_another_place_has_not(narrow_unet, monkeypatch):
    trained = Trained(narrow_unet, torch.bfloat16, True)
    monkeypatch.setattr(trained.graphs, "_run", lambda inputs, *place: inputs.mean_BCHW.sum())
    released = []
    monkeypatch.setattr(trained.optimizer, "release_captures", lambda: released.append(True))
    recorder, like = trained.recorder, upload(batch_of(0, SMALL), CPU, 1, 0)
    first, last = Shape(*SMALL, True, False), Shape(*SMALL, False, True)
    assert trained.graphs.prepare({first, last}, like) == recorder.num_warm_ups == 2
    # the end of a step is known: nothing new runs beside the pool
    assert trained.graphs.prepare({Shape(*SMALL, False, False)}, like) == 1
    assert (recorder.num_warm_ups, len(recorder.tapes), recorder.num_forgotten) == (2, 3, 0)
    # a rehearsal's memory never stands beside the pool's, and a pool given up is never recorded into again
    assert trained.graphs.prepare({Shape(*LARGE, True, False)}, like) == 4
    assert (recorder.num_warm_ups, len(recorder.tapes), recorder.num_forgotten) == (3, 7, 1)
    # the optimizer's tables of the graphs' gradients go with them
    assert released == [True]
    for shape in (SMALL, LARGE):
        inputs = upload(batch_of(4, shape), CPU, 1, 0)
        assert torch.equal(trained.graphs(inputs, is_last=False), inputs.mean_BCHW.sum())


def test_graphs_of_short_batches_do_not_pile_up(narrow_unet, monkeypatch):
    """With fractional repeats a bucket's last batch has another size in each epoch."""
    trained = Trained(narrow_unet, torch.bfloat16, True)
    monkeypatch.setattr(trained.graphs, "_run", lambda inputs, *place: inputs.mean_BCHW.sum())
    like = upload(batch_of(0, SMALL), CPU, 1, 0)
    full, other = Shape(4, 8, 8), Shape(4, 4, 8)
    held = [trained.graphs.prepare({full, other, Shape(size, 8, 8)}, like) and len(trained.graphs) for size in (3, 2)]
    assert held == [3, 3]
    # sizes that were warmed up before, too
    assert trained.graphs.prepare({full, Shape(3, 8, 8)}, like) == len(trained.graphs) == 3
    assert trained.graphs.prepare({full}, like) == 0


def test_a_pool_whose_graphs_are_given_up_is_not_taken_again(monkeypatch):
    handles = iter(range(9))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    recorder = CudaRecorder(torch.device("cuda"))
    before = recorder._pool
    recorder.forget()
    assert recorder._pool != before


def test_a_gpus_graphs_share_one_pool_and_run_first_on_the_stream_that_records_them(monkeypatch):
    calls = []

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            calls.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(stream: Stream):
        calls.append(f"on {stream.name}")
        yield
        calls.append(f"off {stream.name}")

    @contextmanager
    def capture(graph, **options):
        calls.append(options)
        yield

    own, current = Stream("own"), Stream("current")
    for name, value in (
        ("graph_pool_handle", lambda: 7),
        ("Stream", lambda device: own),
        ("current_stream", lambda device: current),
        ("stream", entered),
        ("graph", capture),
        ("CUDAGraph", lambda: SimpleNamespace(replay=None)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = CudaRecorder(torch.device("cuda"))
    recorder.warm_up(lambda: calls.append("run"))
    assert calls == ["own waits for current", "on own", "run", "off own", "current waits for own"]
    calls.clear()
    results = [recorder.capture(lambda number=number: number)[1] for number in range(2)]
    assert results == [0, 1]
    # the loader's thread may pin memory meanwhile
    assert calls == [{"pool": 7, "stream": own, "capture_error_mode": "thread_local"}] * 2


@pytest.mark.parametrize(
    ("met", "expected"),
    [
        (RuntimeError("not permitted\nwhen capturing"), ValueError),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError),
    ],
)
def test_a_capture_that_fails_tells_what_it_met_first(monkeypatch, met, expected):
    @contextmanager
    def capture(*_, **__):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    class Graph:
        replay = None

    for name, value in (("graph_pool_handle", lambda: 0), ("Stream", lambda _: None), ("graph", capture)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    def run():
        raise met

    with pytest.raises(expected, match=r"\(not permitted\); set train.cuda_graphs|^full$"):
        CudaRecorder(torch.device("cuda")).capture(run)


def test_a_steps_losses_outlive_the_next_replay():
    """Micro-batches in the middle of a step are replayed by one graph, which writes each time to the same place."""
    place, batches = torch.zeros(2), [batch_of(number, LARGE) for number in range(4)]

    def graphs(inputs, is_first: bool, is_last: bool) -> MicroResult:
        place.copy_(inputs.mean_BCHW.mean((1, 2, 3)))
        return MicroResult(place, *((torch.ones(()), torch.ones((), dtype=torch.bool)) if is_last else (None, None)))

    optimizer = SimpleNamespace(set_hyper=lambda *_: None)
    schedule = make_schedule(resolve_base("tiny").config_of("scheduler"))
    context = StepContext(None, optimizer, schedule, 1.0, Loss())
    result = train_step(context, batches, StepSettings(8, 1e-3, 0.0, 1.0), seed=1, epoch=0, graphs=graphs)
    assert torch.equal(result.losses, torch.cat([batch.mean_BCHW.mean((1, 2, 3)) for batch in batches]))


def test_what_reads_back_or_is_rebound_does_not_replay():
    """The recorder has teeth: of what a graph cannot do it does nothing either."""
    recorder, total, held = CpuRecorder(lambda: []), torch.zeros(()), {}
    with pytest.raises(RuntimeError, match="reads a number back"):
        recorder.capture(lambda: (total + 1).item())

    def rebinds(x: torch.Tensor) -> torch.Tensor:
        held["sum"] = held.get("sum", total) + x
        return held["sum"]

    x = torch.ones(())
    replay, result = recorder.capture(partial(rebinds, x))
    replay(), replay()
    assert result == 1, "added to what was there while it was recorded"


def test_the_shapes_of_an_epoch():
    sizes = [LARGE, LARGE, SMALL, LARGE, SMALL]
    assert shapes_of(sizes, 1) == {Shape(*LARGE), Shape(*SMALL)}
    assert shapes_of(sizes, 2) == {
        Shape(*LARGE, True, False),
        Shape(*LARGE, False, True),
        Shape(*SMALL, True, False),
        Shape(*SMALL, True, True),
    }
    assert shapes_of([LARGE] * 3, 3) == {
        Shape(*LARGE, True, False),
        Shape(*LARGE, False, False),
        Shape(*LARGE, False, True),
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_whole_step_is_the_same_whatever_its_numbers(accumulate):
    """On meta tensors, on our kernels as on a GPU: nothing is read back, and step 3 asks for what step 2 asked for.

    Of other batches, seeds, learning rate, decay and clipping; all that is kept, where it was.
    """
    train = {"kernels": "on", "ema_decay": 0.9, "accumulate": accumulate, "checkpointing": "full"}
    config = parse_config({"train": train, "optimizer": {"fused_backward": True}}, "here")
    run = MetaRun(config, resolve_base(small_base()), torch.device("cuda"), torch.float16)
    dim = run.unet.config.cross_attention_dim
    kept = [*run.unet.parameters(), *run.optimizer.live_state().values(), *run.optimizer.buffers.tensors.values()]
    kept += [*run.ema.averages.values(), run.ema.num_updates]
    asked = []
    for number in range(3):
        run.optimizer.set_hyper(1e-3 / (number + 1), 0.1 * number, float(number))
        calls = []
        for place in range(accumulate):
            batch = batch_of(number, (2, 16, 16), num_tokens=77, dim=dim)
            inputs = upload(batch, torch.device("meta"), number, number)
            with OperatorTape(kept) as tape:
                result = micro_step(run.context, inputs, 2 * accumulate, place == 0, place == accumulate - 1)
                if place == accumulate - 1:
                    run.ema.update(result.is_applied)
            calls += tape.calls
        asked.append(calls)
    assert asked[1] == asked[2]
    names = {name for name, _, _ in asked[1]}
    assert {"_noising_kernel", "_adamw8bit_kernel", "_ema_kernel", "aten.convolution_backward.default"} <= names
    # weights that lie side by side are of one storage
    assert len({number for _, _, numbers in asked[1] for number in numbers}) > 100
