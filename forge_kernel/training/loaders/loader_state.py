"""What decides the order and the draws of a user's loader: found in its parts and kept."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from forge_kernel.errors import RunError

_DEPTH: Final = 6  # loader -> batch sampler -> sampler -> data -> transform -> its generator
_MEMBERS: Final = 64  # of a list that is looked through
_OBJECTS: Final = 2000  # looked at in all
_PLAIN: Final = (
    str, bytes, int, float, complex, bool, type(None), torch.Tensor, np.ndarray, np.generic,
    torch.dtype, torch.device, nn.Module, ModuleType, type, FunctionType, BuiltinFunctionType,
)  # fmt: skip
_GENERATORS: Final = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def parts(loader: Any) -> Iterator[tuple[str, Any]]:
    """A loader and the objects that it is made of, each once, by the path of attributes to it.

    Samplers, datasets, wrappers, transforms and the generators that they hold.
    """
    seen: set[int] = set()
    todo: list[tuple[str, Any, int]] = [("", loader, 0)]
    while todo and len(seen) < _OBJECTS:
        path, value, depth = todo.pop(0)
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        yield path, value
        if depth >= _DEPTH or isinstance(value, _GENERATORS):
            continue
        for name, inner in _inside(value):
            todo.append((f"{path}.{name}" if path else name, inner, depth + 1))


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """The members of an object or a small collection."""
    if isinstance(value, MethodType):
        yield "self", value.__self__
    elif isinstance(value, Mapping):
        if len(value) <= _MEMBERS:
            yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple | set):
        if len(value) <= _MEMBERS:
            yield from ((str(index), item) for index, item in enumerate(value))
    else:
        yield from list(getattr(value, "__dict__", {}).items())
        for cls in type(value).__mro__:
            slots = vars(cls).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    yield name, getattr(value, name)


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the epoch to everything in a loader that asks for it, wherever it sits."""
    for _, part in parts(loader):
        hear = getattr(part, "set_epoch", None)
        if callable(hear):
            hear(epoch)


class LoaderGenerators:
    """The generators that a loader, its samplers, its data or their transforms hold.

    Args:
        loader: looked through once.
    """

    def __init__(self, loader: Any) -> None:
        self._found: dict[str, Any] = {}
        self._lost: list[str] = []  # draws that nobody can repeat
        for path, part in parts(loader):
            if isinstance(part, random.SystemRandom):
                self._lost.append(path)
            elif isinstance(part, _GENERATORS):
                self._found[path] = part

    def read(self) -> dict[str, Any]:
        """Their states as a checkpoint keeps them, by path."""
        return {path: _state(generator) for path, generator in self._found.items()}

    def write(self, states: Mapping[str, Any]) -> None:
        """Set them to states that `read` gave.

        Raises:
            RunError: there are others than those that the states are of.
        """
        if self._lost:
            raise RunError(
                f"the training data draws from {', '.join(self._lost)} (random.SystemRandom), "
                "which nobody can repeat: the epoch cannot be continued where it was. Use a "
                "seeded generator"
            )
        other = sorted(states.keys() ^ self._found.keys())
        if other:
            raise RunError(
                f"the training data holds other generators than when the run began: {other[:5]}"
            )
        for path, state in states.items():
            _set_state(self._found[path], state)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return json.dumps(generator.bit_generator.state, default=_plain)
    if isinstance(generator, np.random.RandomState):
        return json.dumps(generator.get_state(legacy=False), default=_plain)
    return json.dumps(generator.getstate())


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = json.loads(state, object_hook=_array)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(json.loads(state, object_hook=_array))
    else:
        version, numbers, gauss = json.loads(state)
        generator.setstate((version, tuple(numbers), gauss))


def _plain(value: Any) -> Any:
    """An array or number of numpy's states as JSON can hold it."""
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item()


def _array(value: dict[str, Any]) -> Any:
    """The array that `_plain` was given."""
    if value.keys() == {"array", "dtype"}:
        return np.asarray(value["array"], dtype=value["dtype"])
    return value
