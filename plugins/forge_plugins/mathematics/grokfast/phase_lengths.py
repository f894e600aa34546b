"""The phases of a Grokfast run as lengths in optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

PHASES: Final = ("warmup", "acceleration", "consolidation", "refinement", "completed")


def fitted(lengths: Mapping[str, int], total_steps: int | None) -> dict[str, int]:
    """Lengths that fit into a run.

    Args:
        lengths: of all phases but the last, in optimizer steps.
        total_steps: of the run; None: not known, nothing is changed.

    Returns:
        The lengths, or, when they are longer than the run together, each one's share of it; the
        rounding is such that they fill the run exactly.
    """
    whole = sum(lengths.values())
    if total_steps is None or whole <= total_steps:
        return dict(lengths)
    result: dict[str, int] = {}
    passed = given = 0
    for name, length in lengths.items():
        passed += length
        end = round(total_steps * passed / whole)
        result[name] = end - given
        given = end
    return result


def phase_at(step: int, lengths: Mapping[str, int]) -> str:
    """The phase of a step, counted from 1; after all of them, `completed`."""
    end = 0
    for name, length in lengths.items():
        end += length
        if step <= end:
            return name
    return PHASES[-1]
