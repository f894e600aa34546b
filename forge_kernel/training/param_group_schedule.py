"""Rate, momentum and decay of an optimizer's groups, as multiples of their first values.

A group remembers its first values under `initial_lr` (as torch's schedulers have it),
`initial_momentum` and `initial_weight_decay`, so that every run, trainer and scheduler over one
optimizer multiplies the same base and never what another one wrote last. Who wants another base
sets `initial_lr`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from forge_kernel.contract.values import ScheduleFactors
from forge_kernel.errors import PluginError

Group = dict[str, Any]


def initial_rate(group: Group) -> Any:
    """The rate that factors multiply: the group's first one."""
    return group.setdefault("initial_lr", group["lr"])


def initial_momentum(group: Group) -> float | None:
    """The momentum that factors multiply: the group's first one; None: it has none."""
    return group.get("initial_momentum", _momentum(group))


def write_rate(group: Group, rate: Any) -> None:
    """Set a group's rate, as a schedule does."""
    initial_rate(group)
    group["lr"] = group["scheduled_lr"] = rate


def write_momentum(group: Group, momentum: float | None) -> None:
    """Set a group's momentum, as a schedule does; None: the first one, if one was ever set."""
    if momentum is None:
        if "initial_momentum" not in group:
            return
        momentum = group["initial_momentum"]
    group.setdefault("initial_momentum", _momentum(group))
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    else:
        group["momentum"] = momentum


def write_decay(group: Group, decay: float | None) -> None:
    """Set a group's weight decay, as a schedule does; None: the first one, if one was ever set."""
    if decay is None:
        if "initial_weight_decay" not in group:
            return
        decay = group["initial_weight_decay"]
    group.setdefault("initial_weight_decay", group["weight_decay"])
    group["weight_decay"] = decay


def _momentum(group: Group) -> float | None:
    return group["betas"][0] if "betas" in group else group.get("momentum")


class ParamGroupSchedule:
    """Writes a schedule's factors into the groups; ratios between groups are kept.

    What an earlier schedule wrote last is taken back.

    Args:
        optimizer: its groups hold, or remember, the values that factors multiply.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        groups = optimizer.param_groups
        self._rates = [initial_rate(group) for group in groups]
        self._momenta = [initial_momentum(group) for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            if "scheduled_lr" in group and group["lr"] == group["scheduled_lr"]:
                group["lr"] = rate
            write_momentum(group, None)
            write_decay(group, None)
        self._written: tuple[Any, Any, Any] = (None, None, None)
        self._rate: Any = None  # the very object, to see that nobody wrote another one

    def write(self, rates: ScheduleFactors) -> None:
        """Set what has changed since the last call, by the schedule or by someone else.

        Raises:
            PluginError: another number of factors than groups, or a factor of momentum or weight
                decay for an optimizer that has none.
        """
        wanted = (rates.learning_rate, rates.momentum, rates.weight_decay)
        groups = self._optimizer.param_groups
        if wanted == self._written and groups[0]["lr"] is self._rate:
            return
        factors = _for_each(rates.learning_rate, len(groups))
        for group, base, factor in zip(groups, self._rates, factors, strict=True):
            write_rate(group, base * factor)
        if rates.momentum is not None:
            momenta = _for_each(rates.momentum, len(groups))
            for group, first, factor in zip(groups, self._momenta, momenta, strict=True):
                if first is None:
                    raise PluginError("the schedule sets momentum, the optimizer has none")
                write_momentum(group, first * factor)
        if rates.weight_decay is not None:
            self._write_decays(rates.weight_decay)
        elif self._written[2] is not None:  # another schedule has taken over
            self._write_decays(1.0)
        self._written, self._rate = wanted, groups[0]["lr"]

    def _write_decays(self, given: float | tuple[float, ...]) -> None:
        groups = self._optimizer.param_groups
        for group, factor in zip(groups, _for_each(given, len(groups)), strict=True):
            if "weight_decay" not in group:
                raise PluginError("the schedule sets weight decay, the optimizer has none")
            first = group.get("initial_weight_decay", group["weight_decay"])
            write_decay(group, first * factor)


def _for_each(value: float | tuple[float, ...], groups: int) -> tuple[float, ...]:
    factors = value if isinstance(value, tuple) else (value,) * groups
    if len(factors) != groups:
        raise PluginError(
            f"compute_schedule_factors gave {len(factors)} factors for {groups} groups"
        )
    for factor in factors:
        if not 0 <= factor < math.inf:
            raise PluginError(
                f"compute_schedule_factors gave the factor {factor}: it is finite and at least 0"
            )
    return factors
