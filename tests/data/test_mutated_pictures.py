"""Whatever is in a picture file, decoding gives a picture or a reason: no crash, no hang, no line on the terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("mutated_pictures.py")
# a header may claim a canvas of Pillow's limit, 178 megapixels, which the WebP decoder allocates three times
MAX_GROWN_BYTES = 3 * 2**30
MAX_S = 5


def decode_mutated(kind: str, first_seed: int, num_pictures: int) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), kind, str(first_seed), str(num_pictures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)
    assert done.stderr == ""
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["decoded"] + result["rejected"] == num_pictures
    assert result["decoded"] > num_pictures // 10
    assert result["slowest_s"] < MAX_S, result["slowest"]
    assert result["grown_bytes"] < MAX_GROWN_BYTES
    return result


def test_mutated_pictures_give_a_picture_or_a_reason():
    assert decode_mutated("files", 0, 700)["rejected"] > 70


@pytest.mark.slow
def test_20000_mutated_pictures_give_a_picture_or_a_reason():
    assert decode_mutated("files", 100_000, 20_000)["rejected"] > 2_000


@pytest.mark.slow
def test_10000_mutated_colour_profiles_change_no_more_than_colours():
    assert decode_mutated("profiles", 0, 10_000)["rejected"] == 0
