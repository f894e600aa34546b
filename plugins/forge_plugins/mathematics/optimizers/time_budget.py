"""Whether something that takes time can be afforded now."""

from __future__ import annotations


def affordable(spent: float, cost: float, elapsed: float, share: float) -> bool:
    """Whether one more, at the cost of the last, keeps within a share of the time.

    Args:
        spent: seconds that were spent so far; they are part of `elapsed`.
        cost: seconds that one more takes.
        elapsed: seconds since the beginning.
        share: of the time that may be spent, in (0, 1]; 1 affords everything.
    """
    assert 0 < share <= 1, share
    return share == 1 or spent + cost <= share * (elapsed + cost)
