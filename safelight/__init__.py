"""Safelight fine-tunes Stable Diffusion, the whole UNet, on the one GPU you have.

Four folders are imported under this name. In a checkout `safelight.kernels` is the root folder `kernels/`, and so on;
in a wheel setup.py has put them inside the package. The folders have no `__init__.py`: a root package named `kernels`
would shadow Hugging Face's and break `import transformers` (docs/decisions.md, Layout and imports). Type checkers:
docs/editors.md.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root))
