"""The registry of optimizers: imports no torch, is complete, and provides the config's help."""

import subprocess
import sys
from typing import get_args

import pytest

from safelight.trainer.config.schema import Optimizer
from safelight.trainer.optim.optimizer import load_class
from safelight.trainer.registry.optimizers import MEMORY_MODES, OPTIMIZERS, help_text, names_with


def test_it_imports_no_torch():
    code = "import sys; import safelight.trainer.registry.optimizers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("spec", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_row_refers_to_existing_classes_and_settings(spec):
    if spec.package:
        pytest.importorskip(spec.package)
    for path in filter(None, (spec.implementation, spec.library)):
        assert isinstance(load_class(path), type)
    assert set(spec.planned_modes) <= set(spec.memory_modes) <= set(MEMORY_MODES)
    assert set(spec.settings) <= set(Optimizer.model_fields)
    assert bool(spec.device_limit) == (len(spec.devices) < 2)


def test_the_config_offers_every_row_and_shows_its_help():
    fields = Optimizer.model_fields
    assert list(get_args(fields["name"].annotation)) == list(OPTIMIZERS)
    assert list(get_args(fields["memory"].annotation)) == ["auto", *MEMORY_MODES]
    assert fields["name"].description == help_text()
    assert max(map(len, help_text().splitlines())) <= 118
    for spec in OPTIMIZERS.values():
        assert f"{spec.name}: {spec.help.splitlines()[0]}" in help_text()


def test_messages_can_name_the_optimizers_with_an_ability():
    assert names_with(lambda spec: spec.steps_inside_backward) == "adamw8bit"
    assert names_with(lambda spec: spec.package == "bitsandbytes").count(" or ") == 2


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("adamw", (3, 5), 2 * 4 * 15),
        # two codes of a byte, and a scale for each of 17 blocks
        ("adamw8bit", (4097,), 2 * (4097 + 4 * 17)),
        ("bnb_adamw8bit", (4095,), 2 * 4 * 4095),
        ("bnb_lion8bit", (4097,), 4097 + 4 * 17),
        ("bnb_lion8bit", (10,), 40),
        ("schedulefree_adamw", (3, 5), 2 * 4 * 15),
        ("prodigy", (3, 5), 4 * 4 * 15),
        ("adafactor", (7,), 28),
        ("adafactor", (8, 6), 4 * (8 + 6)),
        # a 3 x 3 kernel has 3 row and 3 column factors
        ("adafactor", (8, 6, 3, 3), 4 * 8 * 6 * (3 + 3)),
    ],
)
def test_bytes_of_moments_by_hand(name, shape, expected):
    assert OPTIMIZERS[name].moment_bytes(shape) == expected


def test_moments_that_depend_on_a_setting():
    """Every eleventh of 100 values: 10 of them, twice, beside two moments."""
    spec = OPTIMIZERS["prodigy"]
    assert spec.moment_bytes((10, 10), Optimizer(name="prodigy", slice_p=11)) == 4 * (2 * 100 + 2 * 10)
    assert spec.moment_bytes((10, 10), Optimizer(name="prodigy")) == spec.moment_bytes((10, 10)) == 4 * 4 * 100
