"""Several torch optimizers that look like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class JoinedOptimizer(torch.optim.Optimizer):
    """Steps its parts one after the other; their groups are one list, their memories one map.

    Args:
        parts: optimizers over disjoint parameters.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._tie()

    def _tie(self) -> None:
        """Let the parts use this optimizer's groups (the same objects) and state."""
        first = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + count]
            part.state = self.state
            first += count

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; torch puts new groups and a new map in the place of the old ones."""
        super().load_state_dict(state_dict)
        self._tie()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
