"""The tables of docs/metrics.md say what the result lines say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safelight.bench.core.results import RESULTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def section(title: str) -> str:
    return PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_table_of_changed_photographs_is_of_the_result_lines():
    lines = [json.loads(line) for line in (RESULTS / "crops.jsonl").read_text().splitlines()]
    measured = {line["config"]["change"]: line["figures"] for line in lines}
    rows = dict(
        re.findall(r"^\| ((?:none|contrast|blur)[^|]*?) \|(.*)\|$", section("Crop divergence"), flags=re.MULTILINE)
    )
    assert set(rows) == set(measured)
    for change, row in rows.items():
        figures = measured[change]
        expected = [f"{figures['crops']}"]
        for name in ("kl", "z", "mmd", "mmd_z"):
            digits = {"kl": 2, "mmd": 3}.get(name, 1)
            expected.append(f"{figures[name]:.{digits}f} ({figures[f'{name}_sd']:.{digits}f})")
        expected.append(f"{40 * figures['share_p_below_005']:.0f} of 40")
        assert [cell.strip() for cell in row.split("|")] == expected


def test_the_table_of_other_definitions_is_of_the_result_lines():
    lines = [json.loads(line) for line in (RESULTS / "crop_definitions.jsonl").read_text().splitlines()]
    measured: dict[str, list[str]] = {}
    for line in sorted(lines, key=lambda line: (line["config"]["kinds"] != "each", "(changed" in str(line["config"]))):
        change, figures = line["config"]["change"], line["figures"]
        change = change.replace("none", "unchanged").replace("contrast and colour", "strengthened")
        # adding 0 makes -0.0 0.0
        cell = f"{round(figures['kl'], 2) + 0:.2f} (z {figures['z']:.1f})"
        measured.setdefault(change.replace("blur,", "softened,"), []).append(cell)
    rows = {name: cells for name, *cells in _rows(section("Crop divergence"))}
    for change, expected in measured.items():
        assert len(expected) == 3
        assert rows[change][:3] == expected


def test_the_tables_of_whole_sets_are_of_the_result_line():
    figures = json.loads((RESULTS / "metrics.jsonl").read_text().splitlines()[-1])["figures"]
    rows = {name: cells for name, *cells in _rows(PAGE.read_text())}
    for num in (25, 50, 100):
        found, expected = figures[f"halves_{num}"], []
        for name, digits in (("kid", 1), ("frechet", 0), ("density", 2), ("coverage", 2)):
            expected.append(f"{found[name]['mean']:.{digits}f} ({found[name]['sd']:.{digits}f})")
            expected += [f"{found[name]['half_width']:.{digits}f}"] if name in ("kid", "frechet") else []
        assert rows[str(num)] == expected
    titles = {"same": "nothing"}
    titles |= {f"burnt_{factor}": f"burnt {factor}" for factor in ("1.25", "1.5", "2", "3")}
    titles |= {f"blurred_{radius}": f"soft: blur of radius {radius} px" for radius in (1, 2, 4, 8)}
    titles |= {f"different_{num}": f"fewer: {num}" for num in (50, 20, 10)}
    for key, title in titles.items():
        expected = []
        for name, digits in (("kid", 1), ("frechet", 0), ("density", 2), ("coverage", 2)):
            value, low, high = figures[key][name]
            expected.append(f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        assert rows[title] == expected


def test_the_table_of_burnt_and_smoothed_photographs_is_of_the_result_lines():
    lines = [json.loads(line) for line in (RESULTS / "burn.jsonl").read_text().splitlines()]
    figures = [line["figures"] for line in sorted(lines, key=lambda line: line["config"]["size_px"])]
    names = {"unsharp mask": "unsharp halos", "median filter": "median"}
    rows = re.findall(r"^\| ([^|,]+), ([^|]+?) \|(.*)\|$", section("Burnt and smoothed out"), flags=re.MULTILINE)
    assert len(rows) == 18
    for damage, grade, row in rows:
        if grade.startswith("strength"):
            grade = f"{100 * float(grade.split()[1]):.0f} percent"
        grade = grade.removesuffix(" px") if damage == "blur" else grade
        found = [of_size[names.get(damage, damage)][grade] for of_size in figures]
        expected = [f"{of_size['auc']:.3f}" for of_size in found]
        expected += [f"{100 * of_size['over_share']:.1f} %" for of_size in found]
        assert [cell.strip() for cell in row.split("|")] == expected, (damage, grade)


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
