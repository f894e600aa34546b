"""What the few names that a pickle of numbers needs stand for. None of them calls what it names.

Arrays and tensors are views of the bytes that lie in the file: nothing of them is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns.gather import Column

Bytes = bytes | memoryview


class RefusedError(Exception):
    """The pickle holds what is not allowed; the text says what."""


class Opaque:
    """What is no number, no text and no container of them, and was not made: only named.

    It stands where the object would, so that a field that nobody reads may hold anything.

    Args:
        told: what it is; what is said when it is read after all.
    """

    __slots__ = ("told",)

    def __init__(self, told: str) -> None:
        self.told = told


class Name:
    """What an allowed name stands for; nothing can be set on it."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self.name, self.make = name, make

    def call(self, values: tuple[Any, ...]) -> Any:
        """What the name makes of values.

        Raises:
            RefusedError: no library calls it so.
        """
        try:
            return self.make(*values)
        except (TypeError, ValueError, OverflowError, AttributeError, KeyError) as error:
            raise RefusedError(f"{self.name} is called as no library does") from error

    def build(self, state: Any) -> None:
        """Refuse to be given a state."""
        del state
        raise RefusedError(f"{self.name} is given a state")


class Dtype:
    """A numpy dtype of plain numbers."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_: Any) -> None:
        dtype = np.dtype(code) if isinstance(code, str) and len(code) < 8 else None
        if dtype is None or dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise RefusedError(f"an array of the type {str(code)[:40]!r}, not of numbers")
        self.dtype = dtype

    def build(self, state: Any) -> None:
        """Take the byte order."""
        if not isinstance(state, tuple) or len(state) < 5:
            raise RefusedError("a type of numbers with a strange state")
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise RefusedError("an array of records")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A numpy array before its state is known."""

    __slots__ = ("array", "told")

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        if not isinstance(kind, Name) or kind.name != "numpy.ndarray":
            raise RefusedError("an array of an unknown class")
        del shape, code  # of the empty array that numpy begins with
        self.array: Column | None = None
        self.told = "an array without values"

    def build(self, state: Any) -> None:
        """Take shape, type and numbers."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedError("an array with a strange state")
        _, shape, dtype, columns_first, raw = state
        self.array = array_of(raw, dtype, shape, columns_first=bool(columns_first))


def array_of(raw: Any, dtype: Any, shape: Any, *, columns_first: bool) -> Column:
    """An array that views bytes.

    Raises:
        RefusedError: they are no bytes, of no type of numbers, or not as many as the shape needs.
    """
    if isinstance(dtype, Opaque):
        raise RefusedError(dtype.told)
    if not isinstance(dtype, Dtype) or not isinstance(raw, bytes | memoryview):
        raise RefusedError("an array whose values are objects")
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
        raise RefusedError("an array without a shape")
    wanted = math.prod(shape) * dtype.dtype.itemsize
    if wanted != len(raw) or len(shape) > 32:
        raise RefusedError(f"an array of the shape {str(shape)[:60]} in {len(raw)} bytes")
    flat = np.frombuffer(raw, dtype.dtype) if wanted else np.zeros(0, dtype.dtype)
    return flat.reshape(shape, order="F" if columns_first else "C")


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Column:
    return array_of(raw, dtype, shape, columns_first=order == "F")


def _scalar(dtype: Any, raw: Any) -> int | float | bool:
    value: int | float | bool = array_of(raw, dtype, (), columns_first=False).item()
    return value


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise RefusedError(f"the encoding {str(encoding)[:40]!r}")
    return text.encode("latin1")


class Storage:
    """The numbers of a torch tensor, of one dimension."""

    __slots__ = ("values",)

    def __init__(self, values: Column) -> None:
        self.values = values


STORAGES: Final[Mapping[str, str]] = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "bf16",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1",
    "ByteStorage": "u1", "BoolStorage": "?",
}  # fmt: skip
"""Codes of the classes that torch names for its numbers."""


def stored(kind: str, raw: Bytes) -> Column:
    """The numbers of a storage; bfloat16 is brought to float32."""
    code = STORAGES[kind]
    if code != "bf16":
        return np.frombuffer(raw, code) if len(raw) else np.zeros(0, code)
    upper = np.frombuffer(raw, "<u2") if len(raw) else np.zeros(0, "<u2")
    return (upper.astype(np.uint32) << 16).view(np.float32)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Column:
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > 32:
        raise RefusedError("a tensor without a storage")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise RefusedError("a tensor of a strange shape")
    values = storage.values
    if not math.prod(size):
        return np.zeros(size, values.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(values) or last >= len(values):
        raise RefusedError("a tensor larger than its storage")
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)


def _nothing(*values: Any) -> dict[str, Any]:
    if values:
        raise RefusedError("collections.OrderedDict with a beginning")
    return {}


def _never(*_: Any) -> None:
    raise RefusedError("numpy.ndarray is called directly")


ALLOWED: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("numpy", "ndarray"): _never,
    ("numpy", "dtype"): Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _nothing,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    ALLOWED[_module, "_reconstruct"] = Array
    ALLOWED[_module, "scalar"] = _scalar
for _module in ("numpy.core.numeric", "numpy._core.numeric"):
    ALLOWED[_module, "_frombuffer"] = _from_buffer
