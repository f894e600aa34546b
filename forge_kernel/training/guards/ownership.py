"""The checked mode: each hook may write only what its docstring says it owns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, Final

import torch

from forge_kernel.errors import OwnershipError
from forge_kernel.storage.random_state import StreamState

if TYPE_CHECKING:
    from forge_kernel.contract.run import Run

STREAMS: Final = frozenset(
    {"python's random stream", "numpy's random stream", "torch's random stream"}
)
OWNED: Final[dict[str, frozenset[str]]] = {
    "make_data": STREAMS,
    "transform_data": STREAMS,
    "make_model": STREAMS,
    "make_modules": STREAMS,
    "transform_model": frozenset({"parameters", "gradients", "module modes", *STREAMS}),
    "make_optimizer": frozenset({"rates", "the optimizer's state", "the optimizer's groups"}),
    "on_batch": STREAMS,
    "compute_outputs": STREAMS,
    "compute_loss": STREAMS,
    "regularize": STREAMS,
    "on_gradients": frozenset({"gradients", *STREAMS}),
    "on_weights": frozenset({"parameters", *STREAMS}),
}
"""What a hook may write of the things watched; all other hooks, and all observers: nothing.

What makes the weights or the step may draw from the streams: they are kept with the run. Who only
looks on may not, since a run would then be another one without it.
"""

Image = dict[str, list[Any]]


def _bits(value: Any) -> Any:
    """A tensor's bytes, so that NaN compares equal to itself; other values as text."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    value = value.detach()
    value = value.coalesce().values() if value.is_sparse else value
    return value.contiguous().clone().view(-1).view(torch.uint8)


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _streams() -> Image:
    """How far the process's random streams have been drawn."""
    state = StreamState.read()
    keys = state.numpy[1].tobytes()
    return {
        "python's random stream": [state.python],
        "numpy's random stream": [keys, *state.numpy[2:]],
        "torch's random stream": [state.torch, *state.cuda],
    }


def _of_the_optimizer(optimizer: torch.optim.Optimizer) -> Image:
    groups = optimizer.param_groups
    return {
        "rates": [float(group["lr"]) for group in groups],
        "the optimizer's state": [
            (id(parameter), name, _bits(value))
            for parameter, memory in optimizer.state.items()
            for name, value in (memory.items() if isinstance(memory, Mapping) else ())
        ],
        "the optimizer's groups": [
            (name, [id(p) for p in value] if name == "params" else _bits(value))
            for group in groups
            for name, value in group.items()
            if name != "lr"
        ],
    }


class OwnershipGuard:
    """Wraps hook calls with a comparison, before and after, of what the run goes by.

    Weights, gradients, the optimizer, the modules' modes, progress, random streams, grad mode and
    the working folder.
    """

    def __init__(self) -> None:
        self.run: Run | None = None

    def image(self) -> Image:
        """What is watched, copied."""
        run = self.run
        if run is None:
            return {}
        optimizer = getattr(run, "optimizer", None)
        model = getattr(run, "model", None)
        parameters = list(run.parameters.values())
        if not parameters and model is not None:  # not named yet
            parameters = list(model.parameters())
        tops = [*([] if model is None else [model]), *run.modules.values()]
        return {
            "parameters": [_bits(parameter) for parameter in parameters],
            "gradients": [None if p.grad is None else _bits(p.grad) for p in parameters],
            "module modes": [module.training for top in tops for module in top.modules()],
            "progress": list(astuple(run.progress)),
            "grad mode": [torch.is_grad_enabled()],
            "the working folder": [_working_folder()],
            **_streams(),
            **({} if optimizer is None else _of_the_optimizer(optimizer)),
        }

    @staticmethod
    def _same(before: Any, after: Any) -> bool:
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            return torch.equal(before, after)
        if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
            pairs = zip(before, after, strict=True)
            return all(
                torch.equal(old, new)
                if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)
                else type(old) is type(new) and bool(old == new)
                for old, new in pairs
            )
        return type(before) is type(after) and bool(before == after)

    def __call__(
        self, hook: str, label: str, call: Callable[..., Any], *, watches: bool = False
    ) -> Callable[..., Any]:
        """Wrap one plugin's call; `watches`: an observer's, which owns nothing."""
        owned = frozenset[str]() if watches else OWNED.get(hook, frozenset())

        def checked(*arguments: Any) -> Any:
            before = self.image()
            answer = call(*arguments)
            after = self.image()
            for what in sorted(before.keys() & after.keys() - owned):
                pairs = zip(before[what], after[what], strict=False)
                if len(before[what]) != len(after[what]) or not all(
                    self._same(old, new) for old, new in pairs
                ):
                    allowed = ", ".join(sorted(owned)) or "nothing of the run"
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
