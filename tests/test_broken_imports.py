"""A library that is installed but cannot be imported gives one line, and before anything is encoded."""

from __future__ import annotations

import importlib
import sys

import pytest

from safelight.broken_imports import broken_import
from safelight.errors import UserError
from safelight.kernels.triton.jit import check_launcher
from safelight.kernels.unet.attention_backends import _xformers_operators
from safelight.trainer.config.schema import Optimizer
from safelight.trainer.config.toml import to_toml
from safelight.trainer.optim.optimizer import check_library
from tests.called import call


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A function that makes a package whose import runs the given code, and hides any real one of that name."""

    def make(name: str, code: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        for loaded in list(sys.modules):
            if loaded.partition(".")[0] == name:
                monkeypatch.delitem(sys.modules, loaded)

    return make


def error_of(name: str) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011
        importlib.import_module(name)
    return raised.value


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libcudart.so.12: no such file')", "libcudart.so.12: no such file"),
        ("raise OSError('undefined symbol\\nmore')", "undefined symbol"),
        ("def load():\n    return {}['kernel']\nload()", "'kernel'"),
        (
            "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise RuntimeError('look up') from e",
            "division by zero",
        ),
    ],
)
def test_the_library_and_the_first_error_are_named(broken, code, reason):
    broken("madeup", code)
    expected = f"madeup cannot be imported ({reason}); install it again: pip install --force-reinstall madeup"
    assert broken_import(error_of("madeup")) == expected


def test_the_library_at_fault_is_named_not_the_one_that_imports_it(broken):
    broken("lower", "raise AttributeError('no such thing')")
    broken("upper", "try:\n    import lower\nexcept Exception as e:\n    raise RuntimeError('failed') from e")
    assert broken_import(error_of("upper")).startswith("lower cannot be imported (no such thing)")


def test_a_part_that_is_missing_is_named(broken):
    broken("whole", "import part_of_it.deeper")
    assert broken_import(error_of("whole")).startswith("part_of_it cannot be imported (No module named 'part_of_it')")


def test_an_error_of_ours_is_none(broken):
    assert broken_import(error_of("safelight.no_such_module")) is None
    with pytest.raises(KeyError) as raised:
        {}["a bug"]
    assert broken_import(raised.value) is None


def test_tensorboard_is_tried_before_anything_is_encoded(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("safelight.trainer.loading.job.open_dataset", lambda *args: pytest.fail("encoding has begun"))
    (tmp_path / "run.toml").write_text(to_toml(make_config(log={"tensorboard": True})))
    called = call("train", tmp_path / "run.toml")
    called.assert_refused("train", "tensorboard cannot be imported (import of torch.utils.tensorboard halted")
    assert called.err.endswith(", or set log.tensorboard = false\n")


def test_the_optimizers_library_is_tried(broken):
    broken("bitsandbytes", "raise KeyError('cuda')")
    check_library(Optimizer(name="adamw"))
    with pytest.raises(UserError, match=r"^bitsandbytes cannot be imported \('cuda'\); .* use another optimizer.name"):
        check_library(Optimizer(name="bnb_adamw8bit"))


def test_a_broken_triton_is_one_line(broken):
    broken("triton", "raise KeyError('driver')")
    with pytest.raises(UserError, match=r"^triton cannot be imported \('driver'\); .* PyTorch's own operations run"):
        check_launcher()


def test_a_broken_xformers_is_a_reason_not_to_use_it(broken):
    broken("xformers", "raise KeyError('ops')")
    _xformers_operators.cache_clear()
    with pytest.raises(ImportError, match="it cannot be imported: 'ops'"):
        _xformers_operators("cutlass")
