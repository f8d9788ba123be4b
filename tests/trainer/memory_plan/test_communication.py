"""What processes send each other, by the plan: equal to what real steps of two processes were counted to exchange.

`python tests/trainer/memory_plan/test_communication.py` rewrites the golden plans.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from safelight.errors import UserError
from safelight.trainer.config.schema import Config
from safelight.trainer.config.toml import parse_config
from safelight.trainer.distributed.spread import num_micro_steps, spread
from safelight.trainer.memory_plan.communication import (
    Exchange,
    Link,
    Ranks,
    find_link,
    idle_note,
    largest_share,
    num_buckets,
    predict_speed,
    sent_bytes,
)
from safelight.trainer.memory_plan.estimator import MemoryEstimator
from safelight.trainer.memory_plan.gpus import BACKWARD_SHARE, Card, find_card
from safelight.trainer.memory_plan.meta_run import meta_run
from safelight.trainer.memory_plan.ranks_plan import all_exchanges, exchanges_of, ranks_summary
from safelight.trainer.models.device import DTYPES
from safelight.trainer.optim.reduction import BUCKET_BYTES, MAX_IN_FLIGHT
from safelight.units import GIB
from tests.small_base import small_base
from tests.trainer.memory_plan.counted_steps import train_counted

GOLDEN = Path(__file__).parent / "golden_ranks.json"
NUM_STEPS = 2
RUNS = {
    "fp32": {},
    "bf16 exact": {"model": {"precision": "bf16"}, "optimizer": {"memory": "exact"}},
    "bf16 fused, streamed": {
        "model": {"precision": "bf16"},
        "optimizer": {"memory": "streamed", "fused_backward": True},
    },
    "two micro-batches each": {"train": {"accumulate": 4}},
    "summed in fp32": {"model": {"precision": "bf16"}, "train": {"accumulate": 4, "accumulate_dtype": "fp32"}},
    "an adapter": {"adapter": {"kind": "lora"}},
    "the text encoder": {"text_encoder": {"train": True}},
    "states": {"distributed": {"shard": "states"}},
    "states, bf16, fused": {
        "model": {"precision": "bf16"},
        "optimizer": {"memory": "exact", "fused_backward": True},
        "distributed": {"shard": "states"},
    },
    "full, the text encoder": {"text_encoder": {"train": True}, "distributed": {"shard": "full"}},
    "full, two micro-batches each": {"train": {"accumulate": 4}, "distributed": {"shard": "full"}},
}


def payloads(exchanges: list[Exchange]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for exchange in exchanges:
        total[exchange.collective] += exchange.payload
    return dict(total)


# each takes ten seconds
FAST = ("states",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
@pytest.mark.long
def test_a_real_step_of_two_processes_exchanges_the_planned_bytes(name, small_config, processes):
    # batches of one are full
    train = {"max_steps": NUM_STEPS, "batch_size": 1, "accumulate": 2, **RUNS[name].get("train", {})}
    only_steps = {"validate": {"every_epochs": 0}, "sample": {"every_epochs": 0}}
    config = small_config(**{**RUNS[name], **only_steps, "train": train})
    counted = processes(train_counted, settings=config.model_dump(mode="json", by_alias=True))
    config, _ = spread(config, 2)
    num_micro = num_micro_steps(config.train.accumulate, 2)
    dtype = DTYPES[{"auto": "fp32"}.get(config.model.precision, config.model.precision)]
    run = meta_run(config, dtype, config.trained_optimizer.is_fused, num_micro, is_reduced=True)
    ranks = Ranks(2, config.distributed.shard)
    planned = payloads(all_exchanges(run, config, ranks, config.optimizer.memory == "streamed"))
    for steps in counted:
        assert steps == [planned] * NUM_STEPS


@pytest.mark.parametrize(
    ("collective", "num", "expected"),
    [
        ("all_reduce", 2, 1000),
        ("all_reduce", 4, 1500),
        ("all_gather", 4, 750),
        ("reduce_scatter", 8, 875),
        ("reduce", 2, 500),
        ("broadcast", 3, 667),
    ],
)
def test_bytes_that_a_ring_sends_of_a_thousand(collective, num, expected):
    assert sent_bytes(collective, 1000, num) == expected


def test_states_send_as_much_as_none_and_full_half_as_much_again():
    def sent(shard: str) -> int:
        config = parse_config({"model": {"base": small_base()}, "train": {"accumulate": 4}}, "here")
        run = meta_run(config, torch.bfloat16, False, 1, is_reduced=True)
        return sum(one.sent(4) for one in exchanges_of(run.optimizer, config, Ranks(4, shard)))

    assert sent("states") == pytest.approx(sent("none"), rel=0.01)
    # rows that N does not divide are filled up
    assert sent("full") == pytest.approx(1.5 * sent("none"), rel=0.05)


LINK = Link("test", 1 / 0.8, 0.0)


def seconds(exchanges: list[Exchange], compute: float, num_micro: int = 1) -> float:
    ranks = Ranks(2, "none", LINK)
    speed = predict_speed(exchanges, ranks, compute, num_micro, images=8, single_images_per_s=8 / compute / num_micro)
    assert speed.seconds == pytest.approx(compute + speed.exposed)
    assert speed.images_per_s == pytest.approx(8 / speed.seconds)
    return speed.exposed


def test_only_the_last_bucket_is_waited_for_where_the_rest_hides_under_backward():
    # half a second sent in ten messages under two seconds of backward
    ten = Exchange("gradients", "all_reduce", 5 * 10**8, 10, "backward")
    assert seconds([ten], 3.0) == pytest.approx(0.05)
    # 10 s do not hide: 9 s of them have 2 s to hide in
    ten = Exchange("gradients", "all_reduce", 10**10, 10, "backward")
    assert seconds([ten], 3.0) == pytest.approx(1 + 9 - 3 * BACKWARD_SHARE)
    # earlier micro-steps exchange nothing that could hide under them
    assert seconds([ten], 6.0, num_micro=2) == pytest.approx(1 + 9 - 3 * BACKWARD_SHARE)
    assert seconds([Exchange("weights", "broadcast", 10**9)], 3.0) == pytest.approx(0.5)


def test_efficiency_counts_places_that_idle():
    # 3 micro-batches over 2 processes: each takes the time of 2
    speed = predict_speed([], Ranks(2, "none", LINK), 2.0, 2, images=3, single_images_per_s=1.0)
    assert speed.efficiency == pytest.approx(0.75)


def test_latency_counts_every_hop_of_every_message():
    slow = Link("slow", 1e9, 1e-3)
    exchange = Exchange("gradients", "all_reduce", 8, 5, "backward")
    assert exchange.seconds(4, slow) == pytest.approx(5 * 6 * 1e-3)


def test_links():
    a100, t4 = find_card("a100"), find_card("t4")
    assert find_link("nvlink", a100).gb_s == 300
    # the card's own generation limits a faster slot
    assert find_link("pcie5", t4).gb_s == find_link(None, t4).gb_s == t4.pcie_gb_s
    assert find_link("10GbE", t4).gb_s == 1.25
    assert find_link("nvlink", Card("8 GiB", 8.0)).gb_s is None
    with pytest.raises(UserError, match="t4 has none; use pcie4, or rtx3090, a100"):
        find_link("nvlink", t4)


@pytest.mark.parametrize(
    ("accumulate", "num", "expected"),
    [
        (4, 2, None),
        (6, 4, "each runs 2 micro-batches a step, and 2 of 8, 25 % of the GPUs' time, weigh nothing; use 4 or 8"),
        (3, 4, "each runs 1 micro-batches a step, and 1 of 4, 25 % of the GPUs' time, weigh nothing; use 4"),
    ],
)
def test_what_idles_is_said(accumulate, num, expected):
    note = idle_note(accumulate, num)
    assert note == "" if expected is None else note.endswith(expected)


def test_parts_are_owned_evenly_and_buckets_close_when_they_are_full():
    assert largest_share({"a": 4, "b": 3, "c": 2, "d": 2, "e": 1}, 2) == 0.5
    assert largest_share({"a": 10, "b": 1}, 4) == 10 / 11
    assert num_buckets([1, 2, 3, 4], 3) == 3
    assert num_buckets([1, 2, 3, 1], 3) == 3
    assert num_buckets([1, 2], 0) == 2


def test_a_process_has_no_gradient_buffers_where_its_share_is_one_micro_batch():
    config = parse_config({"model": {"base": small_base()}, "train": {"accumulate": 4}}, "here")
    card = Card("100 GiB", 100)
    alone, four, two = (MemoryEstimator(config, card, ranks) for ranks in (Ranks(), Ranks(4), Ranks(2)))
    gradients = [each.held("exact", each.meta_run(False))["gradients"] for each in (alone, four, two)]
    weights = sum(p.numel() for p in four.meta_run(False).unet.parameters())
    assert gradients[1] == 0
    assert gradients[0] == gradients[2] >= 2 * weights


def sd15(**settings) -> Config:
    data, train = {"path": "none", "resolution": 512}, {"batch_size": 4, **settings}
    return parse_config({"model": {"base": "random:sd15"}, "data": data, "train": train}, "here")


@pytest.mark.long
def test_buckets_are_part_of_the_traced_step():
    card = find_card("t4")
    alone, two = (MemoryEstimator(sd15(accumulate=2), card, ranks) for ranks in (Ranks(), Ranks(2)))
    parts = two.meta_run(True).optimizer.parts.values()
    sizes = {name: 2 * p.numel() for name, p in two.meta_run(True).optimizer.parameters.items()}
    largest = max(sum(sizes[name] for name in part) for part in parts)
    # one process sums the micro-batches in buffers, which two have no need of
    assert alone.held("exact", alone.meta_run(True))["gradients"] >= sum(sizes.values())
    added = two.step_trace("full", True, 2).transient
    most = (MAX_IN_FLIGHT + 2) * (BUCKET_BYTES + largest)
    assert BUCKET_BYTES < added - _without_buckets(card) < most


def _without_buckets(card: Card) -> int:
    """Return what a step of one micro-batch adds in a single process."""
    return MemoryEstimator(sd15(accumulate=1), card).step_trace("full", True, 2).transient


def test_shards_divide_what_they_say():
    held = {}
    for shard in ("none", "states", "full"):
        estimator = MemoryEstimator(sd15(accumulate=4), find_card("t4"), Ranks(4, shard))
        held[shard] = estimator.held("exact", estimator.meta_run(True))
    for kind in ("master", "optimizer state"):
        for shard in ("states", "full"):
            assert held[shard][kind] == pytest.approx(held["none"][kind] / 4, rel=0.02)
    assert held["states"]["weights"] == held["none"]["weights"]
    # a quarter, and the blocks that are gathered
    assert held["none"]["weights"] / 4 < held["full"]["weights"] < held["none"]["weights"] / 2


def golden_plan(config: Config, gpu: str, num: int, link: str) -> dict:
    """Return what a golden plan holds of a run on several GPUs."""
    card = find_card(gpu)
    summary = ranks_summary(config, card, num, find_link(link, card))
    rows = {}
    for shard, row in summary["shards"].items():
        chosen, speed = row["candidate"], row["predicted"]
        rows[shard] = {
            "fits": row["fits"],
            "settings": f"{chosen['memory']} {chosen['checkpointing']} fused {chosen['fused_backward']}",
            "gib": round(chosen["needed"] / GIB, 3),
            "sent_bytes": row["sent_bytes"],
            "images_per_s": round(speed["images_per_s"], 3),
            "efficiency": round(speed["efficiency"], 4),
        }
    return rows


def golden_plans(name: str) -> dict:
    if name == "sd15 on 4 t4":
        return golden_plan(sd15(accumulate=4), "t4", 4, "pcie3")
    train = {"batch_size": 1, "accumulate": 2, "checkpointing": "full"}
    optimizer = {"memory": "exact", "fused_backward": True}
    data = {"path": "none", "resolution": 1024}
    settings = {"model": {"base": "random:sdxl"}, "data": data, "train": train, "optimizer": optimizer}
    return golden_plan(parse_config(settings, "here"), "rtx3060", 2, "pcie4")


@pytest.mark.parametrize("name", ["sd15 on 4 t4", pytest.param("sdxl on 2 rtx3060", marks=pytest.mark.slow)])
@pytest.mark.long
def test_golden_plans(name):
    assert golden_plans(name) == json.loads(GOLDEN.read_text())[name]


def test_sdxl_in_exact_precision_fits_two_cards_of_12_gb():
    rows = json.loads(GOLDEN.read_text())["sdxl on 2 rtx3060"]
    assert [rows[shard]["fits"] for shard in ("none", "states", "full")] == [False, True, True]
    assert max(rows["states"]["gib"], rows["full"]["gib"]) < find_card("rtx3060").usable_gib


def plan_error(argv: list[str], capsys) -> str:
    from safelight.__main__ import main

    assert main(["plan", *argv]) == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--link", "nvlink"], "--link nvlink is what several GPUs are connected by; add --gpus 2 or more"),
        (["--gpus", "1"], "--gpus 1: a single GPU exchanges nothing; leave it out, or use 2 or more"),
        (["--gpus", "0"], "--gpus 0 must be 2 to 10,000"),
        (["--gpus", "2"], "--gpus 2: there is no GPU here; name one: --gpu t4, or its memory: 8GiB"),
        (["--gpu", "t4", "--gpus", "2", "--link", "nvlink"], "--link nvlink: t4 has none"),
        (["--gpu", "t4", "--gpus", "2", "--link", "infiniband"], "--link"),
    ],
)
def test_mistakes_are_said_in_a_line(options, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "run.toml"
    file.write_text(f'[model]\nbase = "{small_base()}"\n[data]\npath = "{tmp_path}/none"\n')
    assert expected in plan_error([str(file), *options], capsys)


def test_steps_and_time_are_those_of_all_gpus(tiny_dataset, tmp_path, capsys):
    """A step has a micro-batch for each GPU, so there are fewer steps; and all GPUs share the images."""
    from safelight.__main__ import main

    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\nbase = "{small_base()}"\n[data]\npath = "{tiny_dataset}"\nresolution = 64\n'
        "[train]\nbatch_size = 1\nepochs = 100\n[validate]\nbatch_size = 1\n"
    )
    plans = []
    for options in ([], ["--gpus", "4"]):
        assert main(["plan", str(file), "--gpu", "a100", *options]) == 0
        plans.append(capsys.readouterr())
    texts = [re.sub(r"\s+", " ", plan.out + plan.err) for plan in plans]
    one, four = (int(re.search(r"([\d,]+) steps", text)[1].replace(",", "")) for text in texts)
    per_epoch = one // 100
    assert four == 100 * -(-per_epoch // 4)
    assert "on 4 GPUs, plus validation" in texts[1]
    assert re.search(r"next: safelight train \S+ --gpus 4, with the same settings", texts[1])


if __name__ == "__main__":
    found = {name: golden_plans(name) for name in ("sd15 on 4 t4", "sdxl on 2 rtx3060")}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
