"""Pictures drawn by graphs of the UNet's forward pass, and on our kernels, are those drawn without.

On a CPU: with a recorder that behaves like a CUDA graph, and with the kernels' references.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from safelight.kernels.unet.patch import is_patched
from safelight.trainer.families.conditioning import TextConditioning
from safelight.trainer.inference import pictures
from safelight.trainer.inference.draw import OpenRun, open_run
from safelight.trainer.inference.pictures import Request, Weights, draw_pictures
from safelight.trainer.inference.sampling import Settings, generate
from safelight.trainer.inference.unet_graphs import UNetGraphs
from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.latent_codec import LatentCodec
from safelight.trainer.models.noise_schedule import make_schedule
from safelight.trainer.models.weights import load_unet, load_vae
from tests.small_base import small_base
from tests.trainer.inference.exported_runs import STEP, make_run
from tests.trainer.run_log.recorded import CpuRecorder

CPU = torch.device("cpu")
SETTINGS = Settings(width=32, height=48, steps=4, cfg=3.0, seed=12, sampler="ddim")


class Forgetful(CpuRecorder):
    """Without state, since a forward pass changes nothing."""

    def __init__(self):
        super().__init__(list)


@pytest.fixture(scope="module")
def unet():
    return load_unet(resolve_base(small_base()), 0).eval()


@pytest.fixture(scope="module")
def drawing(unet):
    base = resolve_base("tiny")
    codec, schedule = LatentCodec(load_vae(base, "", 0), CPU), make_schedule(base.config_of("scheduler"))
    text = torch.randn(4, 48, 128, generator=torch.Generator().manual_seed(1))

    def draw(number: int, settings: Settings = SETTINGS, **options) -> np.ndarray:
        rows = TextConditioning(text[:number]), TextConditioning(text[3:])
        images = generate(unet, codec, *rows, schedule, settings, **options)
        return np.stack([np.asarray(image) for image in images])

    return draw


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "euler-a"])
def test_a_replayed_picture_has_the_bits_of_one_without_graphs(unet, drawing, sampler):
    settings = replace(SETTINGS, sampler=sampler)
    recorder = Forgetful()
    graphs = UNetGraphs(unet, recorder, lambda: True)
    plain = drawing(3, settings, batch_size=2)
    assert np.array_equal(drawing(3, settings, batch_size=2, graphs=graphs), plain)
    # two shapes: of two pictures, and of the one that is left; captured once each, whatever the number of steps
    assert (recorder.num_warm_ups, len(recorder.tapes), recorder.num_forgotten) == (2, 2, 1)
    # another text and other noise of the shape that was last: replayed
    other = replace(settings, seed=99)
    assert np.array_equal(drawing(1, other, graphs=graphs), drawing(1, other))
    assert len(recorder.tapes) == 2
    assert not np.array_equal(drawing(1, other), drawing(1, settings))


def test_after_a_capture_that_does_not_fit_a_smaller_one_has_a_pool_of_its_own(unet, drawing):
    class Small(Forgetful):
        def capture(self, run):
            replay, result = super().capture(run)
            if len(result) > 2:
                raise torch.OutOfMemoryError
            return replay, result

    recorder = Small()
    graphs = UNetGraphs(unet, recorder, lambda: True)
    with pytest.raises(torch.OutOfMemoryError):
        drawing(2, batch_size=2, graphs=graphs)
    assert recorder.num_forgotten == 1
    assert np.array_equal(drawing(2, batch_size=1, graphs=graphs), drawing(2, batch_size=1))


def test_weights_may_change_between_replays(unet, drawing):
    graphs = UNetGraphs(unet, Forgetful(), lambda: True)
    before = drawing(1, graphs=graphs)
    with torch.no_grad():
        unet.conv_out.bias += 0.5
    try:
        after = drawing(1, graphs=graphs)
        assert np.array_equal(after, drawing(1))
        assert not np.array_equal(after, before)
    finally:
        with torch.no_grad():
            unet.conv_out.bias -= 0.5


def test_without_room_the_unet_is_called_and_a_released_graph_is_captured_again(unet, drawing):
    recorder = Forgetful()
    cramped = UNetGraphs(unet, recorder, lambda: False)
    assert np.array_equal(drawing(1, graphs=cramped), drawing(1))
    assert (recorder.num_warm_ups, recorder.tapes) == (1, [])
    graphs = UNetGraphs(unet, recorder, lambda: True)
    for num_captured in (1, 2):
        assert np.array_equal(drawing(1, graphs=graphs), drawing(1))
        assert len(recorder.tapes) == num_captured
        graphs.release()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


def requests_of(*sizes: int) -> list[Request]:
    settings = Settings(width=16, height=16, steps=2, cfg=3.0, seed=5, sampler="ddim")
    return [
        Request(Weights(STEP), f"a red circle {place}", place, replace(settings, width=width), "")
        for place, width in enumerate(sizes)
    ]


def test_what_a_run_draws_is_drawn_by_graphs_which_are_freed_before_memory_is_asked_for(run_dir, monkeypatch):
    run, recorder, events = open_run(run_dir), Forgetful(), []
    requests = requests_of(16, 16, 16, 24)
    plain = {number: np.asarray(image) for number, image in draw_pictures(run, requests)}

    def fit(self, settings):
        events.append(("asked", len(recorder.tapes) - recorder.num_forgotten))
        return self.device, 2

    monkeypatch.setattr(OpenRun, "fit_to_memory", fit)
    monkeypatch.setattr(OpenRun, "graphs", lambda self, unet: UNetGraphs(unet, recorder, lambda: True))
    drawn = {number: np.asarray(image) for number, image in draw_pictures(run, requests)}
    assert drawn.keys() == plain.keys()
    for number, image in drawn.items():
        # batches of other sizes round otherwise
        assert np.abs(image.astype(int) - plain[number].astype(int)).max() <= 1
    # two of 16 px, the third of them, one of 24 px
    assert len(recorder.tapes) == 3
    # while batches were made, and then once for each size: no graph held memory meanwhile
    assert {held for _, held in events} == {0}


def test_a_batch_too_large_for_memory_frees_the_graph_and_is_drawn_in_halves(run_dir, monkeypatch):
    run, recorder = open_run(run_dir), Forgetful()
    real, sizes = pictures.generate, []

    def generate_small(*arguments, batch_size, graphs, **options):
        sizes.append(batch_size)
        if batch_size > 1:
            raise torch.OutOfMemoryError
        assert graphs._graph is None or len(sizes) > 2
        return real(*arguments, batch_size=batch_size, graphs=graphs, **options)

    monkeypatch.setattr(pictures, "generate", generate_small)
    monkeypatch.setattr(OpenRun, "graphs", lambda self, unet: UNetGraphs(unet, recorder, lambda: True))
    drawn = dict(draw_pictures(run, requests_of(16, 16)))
    assert sorted(drawn) == [0, 1]
    assert sizes == [2, 1, 1]
    assert len(recorder.tapes) == 1


def test_a_run_on_our_kernels_draws_on_them(run_dir):
    plain = open_run(run_dir)
    patched = replace(plain, config=plain.config.model_copy(deep=True))
    patched.config.train.kernels = "on"
    assert not is_patched(plain.unet(STEP))
    assert is_patched(patched.unet(STEP))
    requests = requests_of(16, 24)
    pictures_of = [dict(draw_pictures(run, requests)) for run in (plain, patched)]
    for number in range(2):
        ours, theirs = (np.asarray(one[number], np.int16) for one in pictures_of)
        assert np.abs(ours - theirs).max() <= 1


def test_graphs_are_for_gpus_and_can_be_turned_off(run_dir, monkeypatch):
    run = open_run(run_dir)
    module = run.unet(STEP)
    assert run.graphs(module) is None
    made = []
    monkeypatch.setattr(
        "safelight.trainer.inference.draw.unet_graphs", lambda unet, device: made.append(device) or "graphs"
    )
    on_gpu = replace(run, device=torch.device("cuda", 0))
    assert on_gpu.graphs(module) == "graphs"
    assert made == [on_gpu.device]
    off = replace(on_gpu, config=run.config.model_copy(deep=True))
    off.config.train.cuda_graphs = "off"
    assert off.graphs(module) is None
