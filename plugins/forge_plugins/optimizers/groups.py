"""Optimizers from settings; parameter groups by rule: what is decayed and what is not."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import LazyModule, PluginError
from forge_plugins.optimizers.settings import ParameterGroup

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_plugins.mathematics.optimizers import plain_parameters
else:
    plain_parameters = LazyModule("forge_plugins.mathematics.optimizers.plain_parameters")

OF_GROUPS: Final = ("weight_decay", "decay", "groups")
"""Settings of the groups, not of the optimizer."""


def optimizer_of(
    make: Callable[..., torch.optim.Optimizer],
    parameters: Sequence[tuple[str, nn.Parameter]],
    config: Any,
) -> torch.optim.Optimizer:
    """An optimizer whose arguments have the names of a plugin's settings.

    Args:
        make: takes parameter groups and the settings but for those of `OF_GROUPS`.
        parameters: by name.
        config: the settings.

    Raises:
        PluginError: a pattern of the groups names nothing that is trained.
    """
    settings = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in OF_GROUPS
    }
    check_names(parameters, config.groups)
    made = make(
        decay_groups(parameters, config.weight_decay, config.decay, config.groups), **settings
    )
    return plain_parameters.with_plain_parameters(made)


def check_names(
    parameters: Sequence[tuple[str, nn.Parameter]], named: Sequence[ParameterGroup]
) -> None:
    """Refuse patterns that name nothing.

    Args:
        parameters: by name.
        named: groups of the settings.

    Raises:
        PluginError: each pattern that names no parameter that is trained, or of which other
            entries before have taken all.
    """
    trained = [name for name, parameter in parameters if parameter.requires_grad]
    faults = []
    for place, group in enumerate(named):
        where = f"optimizer.with.groups[{place}].parameters"
        for pattern in group.parameters:
            hits = [name for name in trained if fnmatch.fnmatchcase(name, pattern)]
            if not hits:
                frozen = any(fnmatch.fnmatchcase(name, pattern) for name, _ in parameters)
                why = "only parameters that are frozen" if frozen else "no parameter"
                faults.append(f"{where}: '{pattern}' names {why}")
            elif all(_entry_of(name, named) is not group for name in hits):
                faults.append(f"{where}: what '{pattern}' names is in an entry before it")
    if faults:
        some = ", ".join(trained[:4])
        raise PluginError(f"{'; '.join(faults)}. Parameters are named as {some}")


def _entry_of(name: str, named: Sequence[ParameterGroup]) -> ParameterGroup | None:
    """The first entry that names a parameter."""
    for group in named:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in group.parameters):
            return group
    return None


def decay_groups(
    parameters: Sequence[tuple[str, nn.Parameter]],
    weight_decay: float,
    decay: str,
    named: Sequence[ParameterGroup] = (),
) -> list[dict[str, Any]]:
    """Split parameters into a decayed and a bare group, and those of each entry apart.

    Args:
        parameters: by name.
        weight_decay: of the decayed group.
        decay: `all` parameters, or `matrices` only (biases, norms and other vectors are exempt).
        named: rates and decays by name; their groups come last.

    Returns:
        Groups for a torch optimizer, none of them empty.
    """
    if not named:
        return _by_rule(parameters, weight_decay, decay)
    entries = [(_entry_of(name, named), name, parameter) for name, parameter in parameters]
    rest = [(name, p) for entry, name, p in entries if entry is None]
    groups = _by_rule(rest, weight_decay, decay) if rest else []
    for group in named:
        own = [(name, p) for entry, name, p in entries if entry is group]
        if not own:
            continue
        whole = group.weight_decay is not None
        split = _by_rule(
            own, group.weight_decay if whole else weight_decay, "all" if whole else decay
        )
        if group.lr is not None:
            for each in split:
                each["lr"] = group.lr
        groups += split
    return groups


def _by_rule(
    parameters: Sequence[tuple[str, nn.Parameter]], weight_decay: float | None, decay: str
) -> list[dict[str, Any]]:
    if decay == "all":
        return [{"params": [p for _, p in parameters], "weight_decay": weight_decay}]
    decayed = [p for _, p in parameters if p.ndim >= 2]
    bare = [p for _, p in parameters if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": bare, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
