"""The tables of docs/metrics.md say what the result lines say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safelight.bench.core.results import RESULTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_the_table_of_changed_photographs_is_of_the_result_lines():
    lines = [json.loads(line) for line in (RESULTS / "crops.jsonl").read_text().splitlines()]
    measured = {line["config"]["change"]: line["figures"] for line in lines}
    rows = dict(re.findall(r"^\| ((?:none|contrast|blur)[^|]*?) \|(.*)\|$", PAGE.read_text(), flags=re.MULTILINE))
    assert set(rows) == set(measured)
    for change, row in rows.items():
        figures = measured[change]
        expected = [f"{figures['crops']}"]
        for name in ("kl", "z", "mmd", "mmd_z"):
            digits = {"kl": 2, "mmd": 3}.get(name, 1)
            expected.append(f"{figures[name]:.{digits}f} ({figures[f'{name}_sd']:.{digits}f})")
        expected.append(f"{40 * figures['share_p_below_005']:.0f} of 40")
        assert [cell.strip() for cell in row.split("|")] == expected
