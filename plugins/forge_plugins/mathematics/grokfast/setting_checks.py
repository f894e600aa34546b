"""What can be said of a slow gradient's two numbers before anything is computed. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def swapped(values: Mapping[str, Any]) -> str | None:
    """A hint when `alpha` and `lambda_reg` look as if each stood in the other's place.

    Args:
        values: settings as they were given; `lambda_reg` is 2.0 where it is missing.
    """
    alpha, amount = values.get("alpha"), values.get("lambda_reg", 2.0)
    if not isinstance(alpha, int | float) or not isinstance(amount, int | float):
        return None
    if alpha >= 1 and 0 <= amount < 1:
        return (
            f"alpha and lambda_reg look swapped: alpha is the decay (below 1), lambda_reg the "
            f"amplification; write alpha: {amount}, lambda_reg: {alpha}"
        )
    return None
