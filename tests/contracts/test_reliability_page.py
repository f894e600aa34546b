"""docs/reliability.md is what the last long runs gave, and nothing typed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from mutation import PARTS

ROOT = Path(__file__).resolve().parents[2]
BATTERIES = ROOT / "tests" / "batteries"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BATTERIES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    return result


def data(name: str = "reliability") -> dict[str, Any]:
    text = (ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def test_the_page_is_what_the_batteries_gave() -> None:
    """Red when a figure is typed by hand."""
    known = data()
    page = module("reliability_page").page(known["outcomes"], known["about"], data("mutation"))
    assert (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8") == page


def test_each_battery_has_its_row_and_none_was_wrong() -> None:
    known = {
        file.stem.replace("_", "-")
        for file in BATTERIES.glob("*.py")
        if "\nBATTERY = " in file.read_text(encoding="utf-8")
    }
    outcomes = {outcome["battery"]: outcome for outcome in data()["outcomes"]}
    assert outcomes.keys() == known
    assert [name for name, outcome in outcomes.items() if outcome["wrong"]] == []


def test_each_part_has_its_score_and_none_is_below_what_the_long_run_asks() -> None:
    """The share is counted anew from what was planted and noticed."""
    parts = data("mutation")["parts"]
    assert [part["part"] for part in parts] == list(PARTS)
    for part in parts:
        assert part["killed"] + part["survived"] == part["total"] > 0
        assert 100 * part["killed"] / part["total"] >= 85.0, part["part"]
        assert abs(part["percent"] - 100 * part["killed"] / part["total"]) <= 0.05
