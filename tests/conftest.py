"""Fixtures for all tests: a small prepared dataset and the config of a small run.

Each test process uses one torch thread.
"""

import copy
import gc
import os
from pathlib import Path

import pytest
import torch

from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config

torch.set_num_threads(1)
# until pytest_collection_finish: a quarter of the time of importing and collecting went into looking for garbage
gc.disable()
# huggingface_hub reads this when it is imported, so setting it in a command called by a test would be too late
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# a plan under test is computed, not remembered; test_plan_cache.py names a folder of its own
os.environ["SAFELIGHT_PLAN_CACHE"] = "off"

NUM_SCENES = 24
SMALL_RUN = {
    "model": {"base": "tiny"},
    "data": {"resolution": 64},
    "train": {"batch_size": 4},
    "optimizer": {"lr": 1e-4},
    "stage": [{"epochs": 2}, {"epochs": 1, "lr": 5e-5}],
    "validate": {"timesteps": 2},
    "sample": {"steps": 2, "num_prompts": 2},
    "log": {"tensorboard": False},
}


@pytest.fixture
def interpreted(monkeypatch):
    """Run Triton kernels on the CPU, in Triton's interpreter."""
    import triton
    from triton.runtime import interpreter

    # 3.6, which torch 2.10 and 2.11 bring, calls int() on a one-element array, which numpy 2.4 refuses; compiled code
    # does not. TODO: drop once pyproject.toml requires triton >= 3.7
    if triton.__version__.startswith("3.6."):
        patch = interpreter._patch_lang_tensor

        def with_index(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def noise_by_torch(monkeypatch):
    """Draw training noise by torch's operators, as on a GPU, for tests that compare what a step allocates or computes
    with a trace: on a CPU numpy draws it, which no allocator and no profiler of torch sees."""
    from safelight.kernels import philox
    from safelight.kernels.ops import noising

    def normals(keys, shape, device="cpu", first_block=0):
        return philox._normals_on(torch.device(device), keys, shape, first_block)

    monkeypatch.setattr(noising, "normals_torch", normals)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """A prepared dataset of 24 framed scenes with captions. Tests share it: they may fill its cache, nothing else."""
    from safelight.data.prepare.ingest import ingest
    from safelight.trainer.tiny.scenes import caption, draw, random_scene

    folder = tmp_path_factory.mktemp("scenes")
    source = folder / "photos"
    source.mkdir()
    for number in range(NUM_SCENES):
        scene = random_scene(7, number, in_look=True)
        draw(scene).save(source / f"{number:03d}.png")
        (source / f"{number:03d}.txt").write_text(caption(scene, 7, number))
    ingest([source], folder / "dataset")
    return folder / "dataset"


@pytest.fixture(scope="session")
def small_taesd(tmp_path_factory) -> Path:
    """The folder of a small AutoencoderTiny with random weights and 4 px per latent, like the tiny base's VAE."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    folder = tmp_path_factory.mktemp("taesd")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processes():
    """A function that runs a function of a test module in several processes at once: see tests/processes.py."""
    from tests.processes import Processes

    with Processes() as several:
        yield several


def _merge(values: dict, changes: dict) -> dict:
    merged = copy.deepcopy(values)
    for name, change in changes.items():
        is_table = isinstance(change, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], change) if is_table else change
    return merged


@pytest.fixture
def make_config(tmp_path, tiny_dataset):
    """A function that returns the Config of the small run with some settings changed: make_config(train={...})."""

    def make(**changes) -> Config:
        paths = {"run": {"dir": str(tmp_path / "run")}, "data": {"path": str(tiny_dataset)}}
        return parse_config(_merge(_merge(SMALL_RUN, paths), changes), "make_config")

    return make


@pytest.fixture
def small_config(make_config):
    """make_config on the small base, whose steps cost a third: where it does not matter what the model has learned."""
    from tests.small_base import small_base

    return lambda **changes: make_config(**_merge({"model": {"base": small_base()}}, changes))


# the files that take longest, which would otherwise keep one process busy after the others have ended
_FIRST = ("tests/trainer/tiny/test_demo.py", "tests/trainer/test_resume.py", "tests/trainer/test_cli.py")


def pytest_collection_modifyitems(items):
    root = Path(__file__).resolve().parent.parent
    place = {root / name: number for number, name in enumerate(_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish():
    # modules and thousands of collected tests live to the end: garbage collection need not go through them again and
    # again
    gc.freeze()
    gc.enable()
