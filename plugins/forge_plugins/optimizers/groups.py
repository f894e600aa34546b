"""Parameter groups by rule: what is decayed and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def decay_groups(
    parameters: Sequence[tuple[str, nn.Parameter]], weight_decay: float, decay: str
) -> list[dict[str, Any]]:
    """Split parameters into a decayed and a bare group.

    Args:
        parameters: by name.
        weight_decay: of the decayed group.
        decay: `all` parameters, or `matrices` only (biases, norms and other vectors are exempt).

    Returns:
        One or two groups for a torch optimizer, none of them empty.
    """
    if decay == "all":
        return [{"params": [p for _, p in parameters], "weight_decay": weight_decay}]
    decayed = [p for _, p in parameters if p.ndim >= 2]
    bare = [p for _, p in parameters if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": bare, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
