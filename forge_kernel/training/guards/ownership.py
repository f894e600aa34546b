"""The checked mode: each hook may write only what its docstring says it owns."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, Final

import torch

from forge_kernel.errors import OwnershipError

if TYPE_CHECKING:
    from torch import Tensor

    from forge_kernel.contract.run import Run

OWNED: Final[dict[str, frozenset[str]]] = {
    "transform_model": frozenset({"parameters", "gradients", "rates", "module modes"}),
    "make_optimizer": frozenset({"rates"}),
    "on_gradients": frozenset({"gradients"}),
    "on_weights": frozenset({"parameters"}),
    "on_weights_changed": frozenset(),
}
"""What a hook may write of the things watched; all other hooks: nothing."""

Image = dict[str, list[Any]]


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaN compares equal to itself."""
    return tensor.detach().contiguous().clone().view(-1).view(torch.uint8)


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


class OwnershipGuard:
    """Wraps hook calls with a comparison, before and after, of what the run goes by.

    Weights, gradients, rates, the modules' modes, progress, grad mode and the working folder.
    """

    def __init__(self) -> None:
        self.run: Run | None = None

    def image(self) -> Image:
        """What is watched, copied."""
        run = self.run
        if run is None or not run.parameters:
            return {}
        parameters = list(run.parameters.values())
        optimizer = getattr(run, "optimizer", None)
        groups = optimizer.param_groups if optimizer is not None else []
        return {
            "parameters": [_bits(parameter) for parameter in parameters],
            "gradients": [None if p.grad is None else _bits(p.grad) for p in parameters],
            "rates": [float(group["lr"]) for group in groups],
            "module modes": [module.training for module in run.model.modules()],
            "progress": list(astuple(run.progress)),
            "grad mode": [torch.is_grad_enabled()],
            "the working folder": [_working_folder()],
        }

    @staticmethod
    def _same(before: Any, after: Any) -> bool:
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            return torch.equal(before, after)
        return type(before) is type(after) and bool(before == after)

    def __call__(self, hook: str, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap one plugin's call."""
        owned = OWNED.get(hook, frozenset())

        def checked(*arguments: Any) -> Any:
            before = self.image()
            answer = call(*arguments)
            after = self.image()
            for what in before.keys() & after.keys() - owned:
                pairs = zip(before[what], after[what], strict=False)
                if len(before[what]) != len(after[what]) or not all(
                    self._same(old, new) for old, new in pairs
                ):
                    allowed = ", ".join(sorted(owned)) or "none of the weights or gradients"
                    raise OwnershipError(
                        f"{label} wrote {what} in {hook}, which may write {allowed}"
                    )
            return answer

        return checked


def training_modules(run: Run) -> frozenset[str]:
    """The names of the modules that are in training mode."""
    return frozenset(name for name, module in run.model.named_modules() if module.training)


def still_training(run: Run, trained: frozenset[str]) -> frozenset[str]:
    """Tell once, also outside of the checked mode, of modules that were left in evaluation mode.

    Args:
        run: between two steps.
        trained: modules that were in training mode when it began.

    Returns:
        Those of them that still are.
    """
    now = training_modules(run) & trained
    left = sorted(trained - now)
    if left:
        names = ", ".join(name or "the model itself" for name in left[:3])
        run.emit_event(
            "modes_changed",
            f"{len(left)} modules are in evaluation mode since training began ({names}): a plugin "
            "or a hook has left them so; run.checked names it",
        )
    return now
