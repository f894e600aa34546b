"""What the few names that a pickle of numbers needs stand for. None of them calls what it names.

Arrays and tensors are views of the pickle's bytes, whose number is checked against their shapes: no
function of numpy or torch that is written for pickles is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final, Self

import numpy as np

from forge_plugins.formats.columns.gather import Column

Bytes = bytes | bytearray | memoryview
_DEPTH: Final = 16  # containers in each other that no record needs


class RefusedError(Exception):
    """The pickle holds what is not allowed; the text says what."""


class Placeholder:
    """What stands for an object that is not made: only what is said when it is read after all.

    Each opcode that changes an object accepts it and leaves it as it is.
    """

    __slots__ = ()
    message = ""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Of no matter what: REDUCE, NEWOBJ, NEWOBJ_EX, INST and OBJ."""
        return super().__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> Self:
        """A call of what was not made, such as of what `getattr` gives."""
        return self

    def __setstate__(self, state: Any) -> None:
        """BUILD."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """SETITEM, SETITEMS."""

    def extend(self, items: Any) -> None:
        """APPEND, APPENDS."""

    append = add = extend  # ADDITEMS


@lru_cache(maxsize=1024)
def placeholder_class(message: str) -> type[Placeholder]:
    """A class of placeholders, for NEWOBJ makes nothing of what is no class.

    Args:
        message: what they stand for, such as `it names os.system`.
    """
    return type("Placeholder", (Placeholder,), {"message": message, "__slots__": ()})


class Constructor:
    """What an allowed name stands for: a function of ours, on which nothing can be set.

    Args:
        name: the name, for messages.
        make: makes the value; raises RefusedError for what no library asks of the name.
    """

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self.name, self.make = name, make

    def __call__(self, *values: Any) -> Any:
        """What the name makes of values; a placeholder when that is refused.

        So the error is raised only where the value is read.
        """
        try:
            return self.make(*values)
        except RefusedError as error:
            return placeholder_class(str(error))()
        except (TypeError, ValueError, OverflowError, AttributeError, KeyError):
            return placeholder_class(f"{self.name} is called as no library does")()

    def __setstate__(self, state: Any) -> None:
        del state
        raise RefusedError(f"{self.name} is given a state")


class NumberType:
    """A numpy dtype of plain numbers, before and after its state is known.

    Args:
        code: as numpy writes it, such as `f8`.
    """

    __slots__ = ("dtype", "refused")

    def __init__(self, code: Any, *_: Any) -> None:
        dtype = np.dtype(code) if isinstance(code, str) and len(code) < 8 else None
        if dtype is None or dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise RefusedError(f"an array of the type {str(code)[:40]!r}, not of numbers")
        self.dtype, self.refused = dtype, ""

    def __setstate__(self, state: Any) -> None:
        """Take the byte order."""
        if not isinstance(state, tuple) or len(state) < 5:
            self.refused = "a type of numbers with a strange state"
        elif state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            self.refused = "an array of records"
        else:
            self.dtype = self.dtype.newbyteorder(state[1])


class PendingArray:
    """A numpy array of protocol 4 and before: made empty first, then given its state."""

    __slots__ = ("array", "refused")

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        if not isinstance(kind, Constructor) or kind.name != "numpy.ndarray":
            raise RefusedError("an array of an unknown class")
        del shape, code  # of the empty array that numpy begins with
        self.array: Column | None = None
        self.refused = "an array without values"

    def __setstate__(self, state: Any) -> None:
        """Take shape, type and numbers."""
        try:
            _, shape, dtype, columns_first, raw = state
            self.array = array_of(raw, dtype, shape, columns_first=bool(columns_first))
        except RefusedError as error:
            self.array, self.refused = None, str(error)
        except (TypeError, ValueError):
            self.array, self.refused = None, "an array with a strange state"


def opened(value: Any) -> Any:
    """What stands for a value as the value: an array, a number, or what it was.

    Args:
        value: of a pickle, or, where the pickle is trusted, what a library has made of it.

    Raises:
        RefusedError: it is something that is no data.
    """
    if isinstance(value, PendingArray):
        if value.array is None:
            raise RefusedError(value.refused)
        return value.array
    if isinstance(value, Placeholder) or _is_placeholder_class(value):
        raise RefusedError(value.message)
    if isinstance(value, Constructor | NumberType | Storage):
        raise RefusedError("a name that is no data")
    if isinstance(value, np.generic):
        return value.item()
    return _of_tensor(value) if hasattr(value, "detach") else value


def _is_placeholder_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Placeholder)


def plain(value: Any, depth: int = 0) -> Any:
    """A value as readers of records know it: lists, arrays and numbers.

    Args:
        value: see `opened`.
        depth: of containers around it; from 2 on it is one field of one record, whose lists of
            arrays become arrays.

    Raises:
        RefusedError: it is deeper than any record, or something that is no data.
    """
    if depth > _DEPTH:
        raise RefusedError("containers inside themselves or nested too deeply")
    result = opened(value)
    if isinstance(result, Mapping):
        return {name: plain(part, depth + 1) for name, part in result.items()}
    if isinstance(result, set | frozenset):
        raise RefusedError("a set")
    if not isinstance(result, list | tuple):
        return result
    if set(map(type, result)) <= {int, float}:
        return list(result)
    items = [plain(part, depth + 1) for part in result]
    return _stacked(items) if depth > 1 else items  # below: rows of one record's field


def _of_tensor(tensor: Any) -> Column:
    """The numbers of a torch tensor, of which numpy may not have the type."""
    plain = tensor.detach().cpu()
    try:
        result: Column = plain.numpy()
    except TypeError:
        try:
            result = plain.float().numpy()
        except (TypeError, RuntimeError) as error:
            raise RefusedError(f"a tensor that is no array of numbers ({plain.dtype})") from error
    return result


def _stacked(items: list[Any]) -> Any:
    if not any(type(part) is np.ndarray for part in items):
        return items
    arrays = all(type(part) is np.ndarray for part in items)
    if arrays and len({(part.shape, part.dtype) for part in items}) == 1:
        return np.stack(items)
    return [part.tolist() if type(part) is np.ndarray else part for part in items]


def array_of(raw: Any, dtype: Any, shape: Any, *, columns_first: bool) -> Column:
    """An array that views bytes.

    Raises:
        RefusedError: they are no bytes, of no type of numbers, or not as many as the shape needs.
    """
    if isinstance(dtype, Placeholder):
        raise RefusedError(dtype.message)
    if isinstance(dtype, NumberType) and dtype.refused:
        raise RefusedError(dtype.refused)
    if not isinstance(dtype, NumberType) or not isinstance(raw, Bytes):
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


_NO_STORAGE: Final = "a tensor without a storage"


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Column:
    if not isinstance(storage, Storage):
        raise RefusedError(storage.message if isinstance(storage, Placeholder) else _NO_STORAGE)
    if not (isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)):
        raise RefusedError("a tensor of a strange shape")
    if len(size) > 32 or any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
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


_NUMPY: Final[dict[str, Callable[..., Any]]] = {
    "multiarray._reconstruct": PendingArray,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _from_buffer,
}
_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "numpy.ndarray": _never,
    "numpy.dtype": NumberType,
    "_codecs.encode": _encode,
    "collections.OrderedDict": _nothing,
    "torch._utils._rebuild_tensor_v2": _tensor,
    **{f"numpy.core.{name}": make for name, make in _NUMPY.items()},  # numpy 1
    **{f"numpy._core.{name}": make for name, make in _NUMPY.items()},
}
NAMES: Final[Mapping[tuple[str, str], Constructor]] = {
    (name.rpartition(".")[0], name.rpartition(".")[2]): Constructor(name, make)
    for name, make in _FUNCTIONS.items()
}
"""The names that arrays and tensors are pickled with, by module and name in it."""
