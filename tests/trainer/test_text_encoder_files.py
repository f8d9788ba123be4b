"""A checkpoint's text encoders: written and read back bit for bit; what does not fit is refused in one line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelight.errors import UserError
from safelight.trainer.adapters.full import FullFineTune
from safelight.trainer.adapters.text_encoders import WithTextEncoders, load_text_encoders
from tests.trainer.step.test_text_training import make_text


@pytest.fixture
def folder(small_unet, tmp_path) -> Path:
    """A checkpoint's folder with a UNet and a text encoder."""
    trained = WithTextEncoders(FullFineTune(small_unet), {"text_encoder": make_text(seed=3)})
    trained.write(tmp_path, {name: x.clone() for name, x in trained.tensors().items()})
    return tmp_path


def test_weights_are_read_back_bit_for_bit(folder, small_unet):
    text = make_text(seed=4)
    load_text_encoders(folder, {"text_encoder": text})
    assert all(torch.equal(x, make_text(seed=3).state_dict()[name]) for name, x in text.state_dict().items())
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == small_unet.state_dict().keys()
    assert (folder / "text_encoder" / "config.json").is_file()


@pytest.mark.parametrize("damage", ["missing", "cut", "shape", "dtype", "another", "not finite"])
def test_weights_that_do_not_fit_are_refused(folder, damage):
    path = folder / "text_encoder" / "model.safetensors"
    state, text = load_file(path), make_text(seed=4)
    name = next(iter(state))
    expected = "does not fit the text encoder of this run's base"
    if damage == "shape":
        state[name] = state[name][:-1].contiguous()
    elif damage == "dtype":
        state[name] = state[name].half()
    elif damage == "another":
        state["another"] = torch.zeros(1)
    elif damage == "not finite":
        state[name][0, 0] = float("nan")
        expected = "not finite"
    save_file(state, path)
    if damage in ("missing", "cut"):
        expected = "is missing or damaged"
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[:-4])
    with pytest.raises(UserError, match=expected) as error:
        load_text_encoders(folder, {"text_encoder": text})
    assert "\n" not in str(error.value)
