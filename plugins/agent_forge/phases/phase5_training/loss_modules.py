"""What a loss function brings into a training: modules with weights or averages of their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, Final

from torch import nn

from agent_forge.phases.phase5_training.pipeline.loss_functions import BaseLoss, LossManager
from forge_kernel.api import RunError
from forge_kernel.embedding import INPUTS, TARGETS, WEIGHTS

MOST_PARTIALS: Final = 100  # one around the other, of a loss function


def face_loss(loss_fn: Callable[..., Any]) -> BaseLoss | LossManager | None:
    """The loss of this package that is called: itself, or by one of its methods."""
    owner = getattr(loss_fn, "__self__", loss_fn)
    return owner if isinstance(owner, BaseLoss | LossManager) else None


def further_of(given: Any) -> dict[str, Any]:
    """What a batch that names its inputs holds beside inputs, targets and weights."""
    if not isinstance(given, Mapping) or not any(name in given for name in INPUTS):
        return {}
    own = (*INPUTS, *TARGETS, *WEIGHTS)
    return {str(key): part for key, part in given.items() if key not in own}


def modules_of(loss_fn: Callable[..., Any], model: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters or buffers that are trained, saved and restored beside the model.

    They are the loss function itself or the owner of the method; of an ordinary function, a
    `functools.partial` or a callable object, the losses of this package that it names. What
    belongs to the model is the model's.

    Args:
        loss_fn: the function.
        model: that is trained.

    Returns:
        By name: `loss`, `loss_1`, ...

    Raises:
        RunError: a module holds the model and parameters of its own side by side.
    """
    own = {id(item) for item in chain(model.parameters(), model.buffers())}
    result: dict[int, nn.Module] = {}
    for module in _named(loss_fn):
        for part in _apart(module, own):
            result[id(part)] = part
    within = {
        id(inner) for item in result.values() for inner in item.modules() if inner is not item
    }
    kept = [item for item in result.values() if id(item) not in within]
    return {f"loss_{place}" if place else "loss": item for place, item in enumerate(kept)}


def _named(loss_fn: Any) -> Iterator[nn.Module]:
    """The modules that a loss function consists of."""
    held: list[Any] = []
    for _ in range(MOST_PARTIALS):
        if not isinstance(loss_fn, functools.partial):
            break
        held += [*loss_fn.args, *loss_fn.keywords.values()]
        loss_fn = loss_fn.func
    owner = getattr(loss_fn, "__self__", loss_fn)
    if isinstance(owner, nn.Module):
        yield owner
    elif inspect.isfunction(owner):
        names = inspect.getclosurevars(owner)
        held += [*names.nonlocals.values(), *names.globals.values(), *(owner.__defaults__ or ())]
    else:
        held += getattr(owner, "__dict__", {}).values()
    for value in held:
        part = face_loss(value) if callable(value) else None
        if part is not None:
            yield part


def _apart(module: nn.Module, own: set[int]) -> Iterator[nn.Module]:
    """The largest parts of a module that have tensors, none of them the model's."""
    todo = [module]
    while todo:
        part = todo.pop()
        tensors = list(chain(part.parameters(), part.buffers()))
        if not tensors:
            continue
        if all(id(item) not in own for item in tensors):
            yield part
            continue
        direct = chain(part.parameters(recurse=False), part.buffers(recurse=False))
        if any(id(item) not in own for item in direct):
            raise RunError(
                f"the loss {type(part).__name__} holds the model, and beside it parameters or "
                "buffers of its own: keep these in a module of their own within it"
            )
        todo += reversed(list(part.children()))
