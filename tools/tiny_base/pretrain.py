"""Train an embedded base: tiny from scratch; tiny-xl and tiny-v with what tiny has learned.

    python -m tools.tiny_base.pretrain --model tiny|tiny-xl|tiny-v --work DIR --out DIR

The data are drawn by scenes.py. A training that was stopped goes on where it was last saved in --work. Everything runs
on one thread, because the order of sums, and so the weights' bits, would otherwise depend on the number of cores; bf16
autocast on the CPU makes it faster.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tools.tiny_base import tiny, tiny_v, tiny_xl
from tools.tiny_base.training import SEED, Log

PRETRAININGS = {"tiny": tiny.pretrain, "tiny-xl": tiny_xl.pretrain, "tiny-v": tiny_v.pretrain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PRETRAININGS), default="tiny", help="the base to train")
    parser.add_argument("--work", type=Path, required=True, help="folder for resumable state and the log")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    PRETRAININGS[arguments.model](arguments.work, arguments.out, Log(arguments.work / "log.jsonl"))


if __name__ == "__main__":
    main()
