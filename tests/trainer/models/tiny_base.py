"""The files of the tiny base's parts, for tests that load or damage them."""

from pathlib import Path

from safelight.trainer.models.base import resolve_base
from safelight.trainer.models.weights import load_texts, load_unet, load_vae

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def load(part: str, folder: Path):
    base = resolve_base(str(folder))
    loaders = {
        "unet": lambda: load_unet(base, 0),
        "vae": lambda: load_vae(base, "", 0),
        "text_encoder": lambda: load_texts(base, "", 0)[0][1],
    }
    return loaders[part]()


class Opened:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))
