"""The guards that `make sabotage` takes away are where its table says."""

from __future__ import annotations

from pathlib import Path

import pytest
from sabotage_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_guard_stands_once_and_its_battery_is_one(fault: Fault) -> None:
    """Red when the source has moved on and the fault would be planted nowhere."""
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.guard) == 1
    assert fault.guard != fault.instead
    battery = ROOT / "tests" / "batteries" / f"{fault.battery.replace('-', '_')}.py"
    assert "\nBATTERY = " in battery.read_text(encoding="utf-8")


def test_no_two_faults_have_a_name() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names))
