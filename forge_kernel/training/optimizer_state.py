"""The optimizer's memory by parameter name, to and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_kernel.contract.run import Run
from forge_kernel.errors import RunError


def _parameter_order(run: Run) -> list[str]:
    """The names of the optimizer's parameters, in the order of its state dict."""
    names = {id(parameter): name for name, parameter in run.named_parameters()}
    return [
        names.get(id(parameter), f"optimizer.{index}.{place}")
        for index, group in enumerate(run.optimizer.param_groups)
        for place, parameter in enumerate(group["params"])
    ]


def optimizer_state(run: Run) -> dict[str, dict[str, Any]]:
    """The optimizer's memory by parameter name; group settings come from the configuration.

    It is what the optimizer's own `state_dict` gives, so that its hooks may bring it into plain
    tensors.
    """
    order = _parameter_order(run)
    return {order[place]: state for place, state in run.optimizer.state_dict()["state"].items()}


def load_optimizer_state(run: Run, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the optimizer its memory back.

    Raises:
        RunError: the state is of other parameters.
    """
    order = _parameter_order(run)
    foreign = sorted(state.keys() - set(order))
    if foreign:
        raise RunError(f"the checkpoint has optimizer state of unknown parameters {foreign[:5]}")
    packed = run.optimizer.state_dict()
    packed["state"] = {
        index: dict(state[name]) for index, name in enumerate(order) if name in state
    }
    run.optimizer.load_state_dict(packed)
