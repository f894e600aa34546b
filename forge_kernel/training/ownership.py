"""The checked mode: each hook may write only what its docstring says it owns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch

from forge_kernel.errors import OwnershipError

if TYPE_CHECKING:
    from torch import Tensor

    from forge_kernel.contract.run import Run

OWNED: Final[dict[str, frozenset[str]]] = {
    "transform_model": frozenset({"parameters", "gradients", "rates"}),
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


class OwnershipGuard:
    """Wraps hook calls with a comparison of weights, gradients and rates before and after."""

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
