"""Learning rate and momentum of an optimizer's groups, as multiples of their first values."""

from __future__ import annotations

from typing import Any

import torch

from forge_kernel.errors import PluginError
from forge_kernel.state import Rates


class GroupRates:
    """Writes a schedule's factors into the groups; ratios between groups are kept.

    Args:
        optimizer: as it was built: its groups hold the values that factors multiply.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        groups = optimizer.param_groups
        self._rates = [group["lr"] for group in groups]
        self._momenta = [
            group["betas"][0] if "betas" in group else group.get("momentum") for group in groups
        ]
        self._written: tuple[Any, Any] = (None, None)

    def write(self, rates: Rates) -> None:
        """Set what has changed since the last call.

        Raises:
            PluginError: another number of factors than groups, or momentum without momentum.
        """
        wanted = (rates.learning_rate, rates.momentum)
        if wanted == self._written:
            return
        groups = self._optimizer.param_groups
        factors = _for_each(rates.learning_rate, len(groups))
        for group, base, factor in zip(groups, self._rates, factors, strict=True):
            group["lr"] = base * factor
        if rates.momentum is not None:
            momenta = _for_each(rates.momentum, len(groups))
            for group, base, factor in zip(groups, self._momenta, momenta, strict=True):
                if base is None:
                    raise PluginError("the schedule sets momentum, the optimizer has none")
                if "betas" in group:
                    group["betas"] = (base * factor, *group["betas"][1:])
                else:
                    group["momentum"] = base * factor
        self._written = wanted


def _for_each(value: float | tuple[float, ...], groups: int) -> tuple[float, ...]:
    if isinstance(value, tuple):
        if len(value) != groups:
            raise PluginError(f"compute_rates gave {len(value)} factors for {groups} groups")
        return value
    return (value,) * groups
