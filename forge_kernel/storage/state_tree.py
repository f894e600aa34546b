"""Plugin state as a tree with string keys: tensors apart from the rest, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from forge_kernel.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_TENSOR = "$tensor"


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool | int)


def split_tree(state: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of a tree.

    Args:
        state: mappings with string keys and lists, with leaves of tensors, finite numbers,
            strings, bools and None.
        prefix: start of the tensors' names.

    Returns:
        The tree as JSON data with references in the tensors' places, and the tensors by name.

    Raises:
        CheckpointError: a key or leaf of another type.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    holder: dict[str, Any] = {}
    stack: list[tuple[Any, str, Any, str | int]] = [(state, prefix, holder, "root")]
    while stack:
        value, name, parent, key = stack.pop()
        plain: Any
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach()
            plain = {_TENSOR: name}
        elif isinstance(value, Mapping):
            plain = {}
            for inner_key in value:
                if not isinstance(inner_key, str) or inner_key == _TENSOR:
                    raise CheckpointError(f"{name}: the key {inner_key!r} is not plain text")
                plain[inner_key] = None
                stack.append((value[inner_key], f"{name}/{inner_key}", plain, inner_key))
        elif isinstance(value, list | tuple):
            plain = [None] * len(value)
            for index, item in enumerate(value):
                stack.append((item, f"{name}/{index}", plain, index))
        elif _is_plain(value):
            plain = value
        else:
            what = f"{type(value).__name__} {value!r}"[:80]
            raise CheckpointError(
                f"{name}: {what} cannot be kept; use tensors, finite numbers, strings, bools, None"
            )
        parent[key] = plain
    return holder["root"], tensors


def join_tree(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put the tensors back where `split_tree` took them out.

    Raises:
        CheckpointError: a reference without its tensor.
    """
    holder: dict[str, Any] = {}
    stack: list[tuple[Any, Any, str | int]] = [(plain, holder, "root")]
    while stack:
        value, parent, key = stack.pop()
        if isinstance(value, dict) and set(value) == {_TENSOR}:
            if value[_TENSOR] not in tensors:
                raise CheckpointError(f"the tensor {value[_TENSOR]} is missing")
            parent[key] = tensors[value[_TENSOR]]
        elif isinstance(value, dict):
            inner: dict[str, Any] = dict.fromkeys(value)
            parent[key] = inner
            stack.extend((item, inner, inner_key) for inner_key, item in value.items())
        elif isinstance(value, list):
            items: list[Any] = [None] * len(value)
            parent[key] = items
            stack.extend((item, items, index) for index, item in enumerate(value))
        else:
            parent[key] = value
    return holder["root"]
