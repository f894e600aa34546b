"""Metrics of a profile, against what numpy says of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_plugins.formats.columns.table import Table
from forge_plugins.formats.inspection import profile as module
from forge_plugins.formats.inspection.profile import profile_of
from forge_plugins.formats.inspection.quality import assess
from forge_plugins.reports.bars import svg_bars, text_bars


@given(
    count=st.integers(1, 400),
    kind=st.sampled_from(["normal", "integers", "wide", "constant", "gaps", "skewed"]),
    block=st.integers(3, 500),
)
@settings(max_examples=60, deadline=None)
def test_no_number_is_lost_between_the_bars(count: int, kind: str, block: int) -> None:
    draw = np.random.default_rng(count)
    column: Any = {
        "normal": lambda: draw.normal(size=(count, 3)).astype(np.float32),
        "integers": lambda: draw.integers(-3, 9, (count, 3)),
        "wide": lambda: draw.integers(0, 2**40, (count, 3)),
        "constant": lambda: np.full((count, 3), 7.0),
        "gaps": lambda: np.where(draw.random((count, 3)) < 0.3, np.nan, draw.random((count, 3))),
        "skewed": lambda: draw.exponential(1, (count, 3)) ** 8,
    }[kind]()
    table = Table(Path("memory"), "npy", {"input": column})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = profile_of(table, assess(table), "none", 0.5)
    finite = column[np.isfinite(column)].astype(np.float64)
    about = found.fields["input"]
    if len(finite):
        assert about["smallest"] == finite.min()
        assert about["largest"] == finite.max()
        assert about["mean"] == pytest.approx(finite.mean(), rel=1e-5, abs=1e-6)
    else:
        assert about["mean"] is None
    if not len(finite) or finite.min() == finite.max():
        assert found.spread is None
        return
    assert found.spread is not None
    assert sum(found.spread.counts) == len(finite)
    if kind == "integers":
        assert found.spread.names == [str(n) for n in range(column.min(), column.max() + 1)]
        assert found.spread.counts == [int((column == int(n)).sum()) for n in found.spread.names]
    assert sum(found.scores.counts if found.scores else []) == count


def test_the_outer_bars_say_on_which_side_their_numbers_lie() -> None:
    """Planted: the labels of the two outer bars swapped."""
    numbers = np.concatenate([np.linspace(0, 1, 9000), np.full(20, -50.0), np.full(10, 90.0)])
    table = Table(Path("memory"), "npy", {"input": numbers.reshape(-1, 1)})
    found = profile_of(table, assess(table), "none", 0.5).spread
    assert found is not None
    counts = dict(zip(found.names, found.counts, strict=True))
    first, last = found.names[0], found.names[-1]
    assert first.startswith("below ")
    assert last.startswith("above ")
    low, high = float(first.split()[1]), float(last.split()[1])
    assert (counts[first], counts[last]) == (
        int((numbers < low).sum()),
        int((numbers > high).sum()),
    )


def test_bars_are_as_long_as_their_counts_say() -> None:
    lines = text_bars(["a", "bb", "c", "d"], [800, 400, 0, 1], 8)
    assert lines == [" a  800  ████████", "bb  400  ████", " c    0", " d    1  ▏"]
    assert text_bars([], []) == []
    drawn = svg_bars("x & y", [str(n) for n in range(50)], [1] * 50)
    assert "10 more are not drawn" in drawn
    assert "x &amp; y" in drawn
