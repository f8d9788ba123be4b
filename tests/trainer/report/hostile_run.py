"""Change a run folder: drop lines, rewrite JSON files, or fill it with hostile text."""

import json
from collections.abc import Callable
from pathlib import Path

HOSTILE = (
    "</title></script></style></textarea>--><script>window.pwned=1</script><img src=x onerror=window.pwned=2>"
    "<svg onload=window.pwned=3> [x](javascript:window.pwned=4) javascript:window.pwned=5 {{7*7}} ${window.pwned=6} "
    "<%= 7*7 %> \" onclick=window.pwned=7 ' \u202eturned around " + "W" * 10_000
)
# fields of the records that are no free text, and the lengths of those that have a limit
KEPT = ("file", "id", "model", "better", "set", "first", "second", "sureness")
MAX_LENGTHS = {
    "name": 60,
    "title": 200,
    "features": 200,
    "detector": 200,
    "labels": 400,
    "fixed": 60,
    "sampler": 40,
    "weights": 64,
    "why": 200,
    "optimizer": 40,
    "spacing": 40,
    "measured_on": 200,
    "options": 200,
    "reason": 400,
}
HEBREW = "שועל אדום עומד בעשב גבוה"


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def keep_lines(run: Path, kept: Callable[[dict], bool]) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if kept(json.loads(line))))


def make_hostile(run: Path) -> None:
    """Replace every text in a run folder by the hostile one."""

    def poisoned(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {name: item if name in KEPT else poisoned(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [poisoned(item, key) for item in value]
        is_text = isinstance(value, str) and value and not value.endswith(".png")
        return HOSTILE[: MAX_LENGTHS.get(key)] if is_text else value

    for path in (
        *run.glob("*.json"),
        *run.glob("compare/*.json"),
        *run.glob("[sg]*/*/*.json"),
        *run.glob("find_lr/*.json"),
    ):
        path.write_text(json.dumps(poisoned(json.loads(path.read_text()))))
    data = json.loads((run / "data.json").read_text())
    data["examples"][0]["caption"] = HEBREW
    (run / "data.json").write_text(json.dumps(data))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 1, "event": HOSTILE, "detail": HOSTILE, "time": 1}) + "\n")
    texts = {"dir": HOSTILE, "title": HOSTILE, "notes": HOSTILE[:1000]}
    lines = [f"{name} = {json.dumps(text)}\n" for name, text in texts.items()]
    (run / "config.toml").write_text(f"[run]\n{''.join(lines)}")
