"""Optimizers from settings; parameter groups by rule: what is decayed and what is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_plugins.mathematics.optimizers import plain_parameters
else:
    plain_parameters = LazyModule("forge_plugins.mathematics.optimizers.plain_parameters")

OF_GROUPS: Final = ("weight_decay", "decay")  # settings of the groups, not of the optimizer


def optimizer_of(
    make: Callable[..., torch.optim.Optimizer],
    parameters: Sequence[tuple[str, nn.Parameter]],
    config: Any,
) -> torch.optim.Optimizer:
    """An optimizer whose arguments have the names of a plugin's settings.

    Args:
        make: takes parameter groups and the settings but for `weight_decay` and `decay`.
        parameters: by name.
        config: the settings.
    """
    settings = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in OF_GROUPS
    }
    made = make(decay_groups(parameters, config.weight_decay, config.decay), **settings)
    return plain_parameters.with_plain_parameters(made)


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
