"""Tensors of a checkpoint from somebody else: another shape, another dtype or none at all are one line."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from safelight.errors import UserError
from safelight.trainer.adapters.full import FullFineTune, load_averages
from safelight.trainer.config.schema import Optimizer as OptimizerConfig
from safelight.trainer.models.tensor_files import TensorFile
from safelight.trainer.optim.ema import WeightAverages, take_averages
from safelight.trainer.optim.optimizer import make_optimizer
from safelight.trainer.run_log.unlogged_steps import PREFIX, UnloggedSteps, take_state
from safelight.trainer.step.step import StepResult


class Layers(nn.Module):
    """A matrix whose moments are 8-bit, one whose moments are not, and a channels-last convolution."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.large, self.small, self.conv = nn.Linear(64, 80), nn.Linear(3, 2), nn.Conv2d(24, 24, 3)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)


def changed(tensor: Tensor, rng: random.Random) -> Tensor | None:
    """Return a tensor of another shape or dtype, with other values, or None to leave it out."""
    if rng.random() < 0.1:
        return None
    dtypes = (torch.float64, torch.float16, torch.bool, torch.int8, torch.uint8, torch.int64, torch.complex64)
    if rng.random() < 0.4:
        return tensor.to(rng.choice((*dtypes, torch.float8_e4m3fn)))
    if rng.random() < 0.3:
        if tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
            return torch.full_like(tensor, float("nan"))
        limits = torch.iinfo(tensor.dtype)
        return torch.full_like(tensor, rng.choice((limits.min, limits.max, 0)))
    shapes = ((), (0,), (1,), (5, 5), (2, 3, 4, 5), (80, 64), (64, 80), (24, 24, 3, 3), tuple(tensor.shape[1:]))
    shape = rng.choice(shapes)
    return torch.zeros(shape, dtype=tensor.dtype)


def optimizer_of(memory: str):
    dtype = torch.float32 if memory == "fp32" else torch.bfloat16
    return make_optimizer(Layers(), OptimizerConfig(memory=memory if memory != "fp32" else "auto"), dtype)


def state_of(memory: str) -> dict[str, Tensor]:
    optimizer = optimizer_of(memory)
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.set_hyper(1e-3, 0.0, 1.0)
    optimizer.step()
    unlogged = UnloggedSteps(4, torch.device("cpu"))
    for number in range(3):
        unlogged.add(StepResult(torch.ones(number + 1), torch.tensor(1.0), torch.tensor(True)))
    averages = WeightAverages(optimizer, 0.9).live_state()
    state = {**optimizer.live_state(), **averages, **unlogged.state()}
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def resume(memory: str, state: dict[str, Tensor]) -> None:
    """Take a checkpoint's state apart as a resumed run does."""
    optimizer = optimizer_of(memory)
    UnloggedSteps(4, torch.device("cpu"), take_state(state)).means()
    take_averages(state, WeightAverages(optimizer, 0.9))
    optimizer.load_state_tensors(state)


def try_states(memory: str, num: int, seed: int) -> int:
    """Change one tensor of a state at a time, or add one, num times; return how many states were refused."""
    sound, rng, num_refused = state_of(memory), random.Random(seed), 0
    resume(memory, dict(sound))
    for _ in range(num):
        state, name = dict(sound), rng.choice(list(sound))
        tensor = changed(state.pop(name), rng)
        if tensor is not None:
            state[name if rng.random() < 0.95 else rng.choice(("", "x", "a/b", "ema/", "log/x", "state1/none"))] = (
                tensor
            )
        try:
            resume(memory, state)
        except UserError:
            num_refused += 1
    return num_refused


@pytest.mark.parametrize("memory", ["fp32", "exact", "near"])
def test_state_of_another_form_is_refused_in_a_line(memory):
    assert try_states(memory, 150, 1) > 50


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["fp32", "exact", "near", "rounded"])
def test_ten_thousand_states_of_another_form(memory):
    assert try_states(memory, 2_500, 2) > 800


def test_unlogged_steps_of_another_form_are_refused():
    for sizes in ([9], [-1, 7], [2**62], []):
        state = state_of("fp32") | {f"{PREFIX}sizes": torch.tensor(sizes, dtype=torch.int64)}
        with pytest.raises(UserError, match="the checkpoint's unlogged steps are malformed"):
            UnloggedSteps(4, torch.device("cpu"), take_state(state))


def test_memory_orders_that_would_allocate_more_than_the_tensor_are_refused():
    state = state_of("fp32")
    name = "strides/conv.weight"
    for strides in ([2**40, 1, 1, 1], [-216, 1, 72, 24], [216, 1, 72], [0, 0, 0, 0], [216, 2, 72, 24]):
        with pytest.raises(UserError, match="strides"):
            resume("fp32", {**state, name: torch.tensor(strides)})


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_dtype_are_refused_by_resume_sample_and_export(tmp_path: Path, dtype):
    unet = Layers()
    (tmp_path / "unet").mkdir()
    weights = {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({}, tmp_path / "state.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    save_file(weights, path)
    FullFineTune(unet).load(tmp_path)
    FullFineTune(unet).merged(tmp_path, shapes, "auto", lambda name, tensor: tensor)
    save_file({**weights, "small.bias": torch.zeros(2).to(dtype)}, path)
    with pytest.raises(UserError, match=r"small\.bias is \(2,\) torch"):
        FullFineTune(unet).load(tmp_path)
    with pytest.raises(UserError, match=r"small\.bias is \(2,\) torch"):
        FullFineTune(unet).merged(tmp_path, shapes, "auto", lambda name, tensor: tensor)
    save_file(weights, path)
    for average in (
        {"ema/small.bias": torch.zeros(2).to(dtype)},
        {"ema/small.bias": torch.zeros(5)},
        {"ema/x": torch.zeros(1)},
    ):
        save_file(average, tmp_path / "state.safetensors")
        with pytest.raises(UserError, match="moving average of"):
            load_averages(tmp_path, unet)


def add_entry(path: Path, name: str, entry: dict) -> None:
    """Add a tensor without bytes to a file's header; END in its offsets is where the others end."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    offsets = [len(data) if offset == "END" else offset for offset in entry["data_offsets"]]
    text = json.dumps({**header, name: {**entry, "data_offsets": offsets}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def saved(folder: Path) -> tuple[Layers, dict[str, tuple[int, ...]]]:
    """Write a checkpoint's two files of tensors; return the UNet and its shapes."""
    unet = Layers()
    (folder / "unet").mkdir()
    weights = {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({"ema/small.bias": torch.zeros(2)}, folder / "state.safetensors")
    return unet, {name: tuple(tensor.shape) for name, tensor in weights.items()}


def read_all(folder: Path, unet: nn.Module, shapes: dict) -> str:
    """Read a checkpoint's tensors as sample and export do; return the messages of those that fail."""
    reads = (
        lambda: load_averages(folder, unet),
        lambda: FullFineTune(unet).load(folder),
        lambda: FullFineTune(unet).merged(folder, shapes, "auto", lambda name, tensor: tensor),
    )
    messages = []
    for read in reads:
        try:
            read()
        except UserError as error:
            messages.append(str(error))
    return "\n".join(messages)


@pytest.mark.parametrize("file", ["state.safetensors", "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [0, 2**63, 2**63], "data_offsets": ["END", "END"]},
        {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": ["END", "END"]},
        {"dtype": "I8", "shape": [0] + [2**8] * 15, "data_offsets": ["END", "END"]},
        {"dtype": "F32", "shape": [0] * 99, "data_offsets": ["END", "END"]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["END", 2**40]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "NOPE", "shape": [0], "data_offsets": ["END", "END"]},
    ],
)
def test_headers_of_a_checkpoint_are_checked_before_its_tensors_are_read(tmp_path, file, entry):
    unet, shapes = saved(tmp_path)
    assert read_all(tmp_path, unet, shapes) == ""
    add_entry(tmp_path / file, "extra", entry)
    messages = read_all(tmp_path, unet, shapes).splitlines()
    assert len(messages) == 2
    for message in messages:
        assert message.startswith(f"{tmp_path}/{file} is damaged or not a safetensors file (")
        assert message.endswith("; use another checkpoint")


@pytest.mark.parametrize(
    "content", [b"", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{]"]
)
@pytest.mark.parametrize("file", ["state.safetensors", "unet/diffusion_pytorch_model.safetensors"])
def test_a_checkpoints_file_without_a_header_is_named(tmp_path, file, content):
    unet, shapes = saved(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert f"{tmp_path}/{file} is damaged or not a safetensors file" in read_all(tmp_path, unet, shapes)
    (tmp_path / file).unlink()
    assert len(read_all(tmp_path, unet, shapes).splitlines()) == 2


def test_a_dtype_that_torch_lacks_and_a_weight_in_two_files_are_refused(tmp_path):
    unet, shapes = saved(tmp_path)
    state, weights = tmp_path / "state.safetensors", tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    (weights.parent / "another.safetensors").write_bytes(weights.read_bytes())
    assert "has conv.bias, which is also in another.safetensors" in read_all(tmp_path, unet, shapes)
    add_entry(state, "x", {"dtype": "F6_E2M3", "shape": [0], "data_offsets": ["END", "END"]})
    for read in (TensorFile(state).map, lambda: TensorFile(state).read("x")):
        with pytest.raises(UserError, match=f"{state}: x is F6_E2M3, which cannot be read"):
            read()


def test_a_mapped_file_holds_what_the_library_reads_wherever_its_bytes_begin(tmp_path):
    tensors = state_of("near")
    for padding in range(4):
        path = tmp_path / f"{padding}.safetensors"
        save_file({**tensors, "empty": torch.zeros(0, 3)}, path)
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        path.write_bytes(
            struct.pack("<Q", size + padding) + content[8 : 8 + size] + b" " * padding + content[8 + size :]
        )
        mapped = TensorFile(path).map()
        assert mapped.keys() == tensors.keys() | {"empty"}
        assert mapped["empty"].shape == (0, 3)
        for name, tensor in tensors.items():
            assert mapped[name].dtype == tensor.dtype
            assert torch.equal(mapped[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        next(iter(mapped.values())).zero_()
        assert path.read_bytes()[8 + size + padding :] == content[8 + size :]


def test_a_tensor_of_another_shape_and_a_remainder_of_a_full_weight_are_named(tmp_path):
    unet, shapes = saved(tmp_path)
    state, weight = tmp_path / "state.safetensors", unet.state_dict()["small.bias"]
    save_file({"master/small.bias": torch.zeros(5)}, state)
    assert f"{tmp_path}: small.bias is (5,), not (2,), so it does not fit" in read_all(tmp_path, unet, shapes)
    save_file({"remainder/small.bias": torch.zeros(weight.shape, dtype=torch.int16)}, state)
    assert "remainder/small.bias is (2,) torch.int16, which completes no weight" in read_all(tmp_path, unet, shapes)
    save_file({"ema/small.bias": torch.zeros(5)}, state)
    assert f"{tmp_path}: the checkpoint's moving average of small.bias is (5,)" in read_all(tmp_path, unet, shapes)
