"""Pickles, through an allow-list: containers, numbers, texts, numpy arrays and torch tensors.

Nothing that a pickle names is called: the few names that arrays need stand for functions of this
module, which build arrays from bytes that are there. It is a restriction, not a sandbox.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from forge_plugins.formats.column_file import ColumnFolder
from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.records import BLOCK, RecordColumns, records_of
from forge_plugins.formats.table import Column, check_numeric

_HINT: Final = (
    "pickle containers, numbers, numpy arrays or torch tensors only; or, if you trust whoever "
    "wrote the file with your account, set trust_pickle: true"
)


class _RefusedError(Exception):
    """The pickle holds what the allow-list does not."""


class _Name:
    """What an allowed name stands for; nothing can be set on it."""

    __slots__ = ("_make", "_name")

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self._name, self._make = name, make

    def __call__(self, *values: Any) -> Any:
        try:
            return self._make(*values)
        except (TypeError, ValueError, OverflowError, AttributeError, KeyError) as error:
            raise _RefusedError(f"{self._name} is called as no library does") from error

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError(f"{self._name} is given a state")


class _Dtype:
    """A numpy dtype of plain numbers."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any) -> None:
        dtype = np.dtype(code)
        if not isinstance(code, str) or dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise _RefusedError(f"an array of the type {code!r}, not of numbers")
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise _RefusedError("an array of records")
        self.dtype = self.dtype.newbyteorder(order)


def _array(raw: Any, dtype: Any, shape: Any, *, columns_first: bool) -> Column:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise _RefusedError("an array whose values are objects")
    if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
        raise _RefusedError("an array without a shape")
    array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if columns_first else "C")
    return array.astype(array.dtype.newbyteorder("="))


class _Array:
    """A numpy array before its state is known."""

    __slots__ = ("array",)

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        if not isinstance(kind, _Name):
            raise _RefusedError("an array of an unknown class")
        del shape, code  # of the empty array that numpy begins with
        self.array: Column | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, raw = state
        self.array = _array(raw, dtype, shape, columns_first=bool(columns_first))


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Column:
    return _array(raw, dtype, shape, columns_first=order == "F")


def _scalar(dtype: Any, raw: Any) -> int | float | bool:
    value: int | float | bool = _array(raw, dtype, (), columns_first=False).item()
    return value


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _RefusedError(f"the encoding {encoding!r}")
    return text.encode("latin1")


class _Storage:
    """The numbers of a torch tensor."""

    __slots__ = ("values",)

    def __init__(self, raw: Any) -> None:
        import torch

        if not isinstance(raw, bytes):
            raise _RefusedError("a tensor without bytes")
        # torch's own reader of plain values; it refuses all else
        storage = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")
        if not isinstance(storage, torch.storage.TypedStorage):
            raise _RefusedError("a tensor without a storage")
        self.values = torch.tensor([], dtype=storage.dtype).set_(storage)


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Column:
    if not isinstance(storage, _Storage) or len(size) != len(stride):
        raise _RefusedError("a tensor without a storage")
    if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
        raise _RefusedError("a tensor of a strange shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = int(np.prod([int(n) for n in size], dtype=object)) if size else 1
    if count > len(storage.values) or (count and last >= len(storage.values)):
        raise _RefusedError("a tensor larger than its storage")
    view = storage.values.as_strided(size, stride, offset)
    wide = view.float() if view.dtype.is_floating_point and view.itemsize == 2 else view
    array: Column = wide.detach().clone().numpy()
    return array


def _nothing() -> dict[str, Any]:
    return {}


def _never() -> None:
    raise _RefusedError("numpy.ndarray is called directly")


_ALLOWED: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("numpy", "ndarray"): _never,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _nothing,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _Storage,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _ALLOWED[_module, "_reconstruct"] = _Array
    _ALLOWED[_module, "scalar"] = _scalar
for _module in ("numpy.core.numeric", "numpy._core.numeric"):
    _ALLOWED[_module, "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        make = _ALLOWED.get((module, name))
        if make is None:
            raise _RefusedError(f"it names {module}.{name}")
        return _Name(f"{module}.{name}", make)

    def persistent_load(self, key: Any) -> Any:
        raise _RefusedError(f"it refers to an object outside the file ({str(key)[:40]})")


def _check_codes(file: Path, raw: bytes) -> None:
    """Walk the opcodes without running them: lengths must lie in the file."""
    place = 0
    end = None
    try:
        for count, (code, argument, at) in enumerate(pickletools.genops(raw)):
            place = at or 0
            if "PUT" in code.name and argument is not None and int(argument) > count:
                raise DataFault(
                    file, "a memo number out of order", place=f"byte {place}", hint=_HINT
                )
            end = place if code.name == "STOP" else None
    except (ValueError, IndexError, OverflowError, UnicodeError) as error:
        hint = "it is no whole pickle: write it anew"
        raise DataFault(file, f"is broken: {error}", place=f"after byte {place}", hint=hint) from (
            error
        )
    assert end is not None, "pickletools ends at STOP only"
    if len(raw) > end + 1:
        raise DataFault(
            file,
            f"{len(raw) - end - 1} bytes follow the pickle",
            place=f"byte {end + 1}",
            hint="write one object into one file",
        )


def _unwrapped(value: Any, seen: set[int], depth: int = 0) -> Any:
    """Arrays in place of their shells; sets and cycles are not followed."""
    if isinstance(value, _Array):
        if value.array is None:
            raise _RefusedError("an array without values")
        return value.array
    if isinstance(value, _Name | _Dtype | _Storage):
        raise _RefusedError("a name that is no data")
    if isinstance(value, Mapping | list | tuple):
        if id(value) in seen or depth > 16:
            raise _RefusedError("containers inside themselves or nested too deeply")
        inner = seen | {id(value)}
        if isinstance(value, Mapping):
            return {name: _unwrapped(part, inner, depth + 1) for name, part in value.items()}
        plain = all(type(part) in (int, float) for part in value)
        return value if plain else [_unwrapped(part, inner, depth + 1) for part in value]
    # only a trusted pickle has tensors as they are
    if isinstance(value, np.generic):
        return value.item()
    return value.detach().cpu().numpy() if type(value).__module__.startswith("torch") else value


class _Budget:
    """How many containers may be walked: shared ones are cheap to write and dear to read."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def spend(self, value: Any, depth: int = 0) -> None:
        """Count a value and what is in it.

        Raises:
            _RefusedError: there is more than the file has bytes for.
        """
        self.left -= 1
        if self.left < 0 or depth > 16:
            raise _RefusedError("containers that repeat each other without end")
        if isinstance(value, Mapping):
            self.left -= len(value)
            for part in value.values():
                if isinstance(part, Mapping | list | tuple):
                    self.spend(part, depth + 1)
        elif isinstance(value, list | tuple):
            self.left -= len(value)
            for part in value:
                if isinstance(part, Mapping | list | tuple):
                    self.spend(part, depth + 1)


MAX_BYTES: Final = 2**28
"""Of a pickle. It is one graph of objects, which cannot be read in parts."""


def read_pickle(
    file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str] | None = None
) -> None:
    """Write the columns of a pickle: a list of records, or an object or pair of columns.

    Args:
        file: the pickle. All of it is in memory while it is read, the file and the objects: twice
            its size for arrays, up to twenty times for lists of numbers; so it may have at most
            `MAX_BYTES`.
        columns: where they are written.
        reading: whether it is `lenient`, see `RecordColumns`, and whether the pickle is trusted.
        names: all are written.

    Raises:
        DataFault: it is too large, broken, names what is not allowed, or holds no records of
            numbers.
    """
    del names
    lenient, trusted = reading.lenient, reading.trust_pickle
    if file.stat().st_size > MAX_BYTES:
        told = (
            f"{file.stat().st_size} bytes; a pickle is in memory as a whole, so {MAX_BYTES} may be"
        )
        hint = "write it as HDF5, .npz, binary records or JSON Lines, which are read in parts"
        raise DataFault(file, told, hint=hint)
    raw = file.read_bytes()
    if not trusted:
        _check_codes(file, raw)
    try:
        value = pickle.loads(raw) if trusted else _Unpickler(io.BytesIO(raw)).load()  # noqa: S301
        _Budget(max(2**20, 64 * len(raw))).spend(value)
        value = _unwrapped(value, set())
    except _RefusedError as error:
        raise DataFault(file, f"is refused: {error}", hint=_HINT) from error
    except Exception as error:
        told = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataFault(file, f"cannot be unpickled: {told}", hint=_HINT) from error
    if isinstance(value, list) and len(value) in (2, 3) and _are_arrays(value):
        value = dict(zip(("input", "target", "weight"), value, strict=False))
    if isinstance(value, Mapping) and value and _are_arrays(list(value.values())):
        if any(not isinstance(name, str) for name in value):
            raise DataFault(file, "a column's name is no text", hint="name the columns by texts")
        for name, column in value.items():
            check_numeric(file, name, column.dtype)
        for name, column in value.items():
            columns.append(name, column)
        return
    if isinstance(value, Mapping):
        value = {n: list(v) if isinstance(v, np.ndarray) else v for n, v in value.items()}
        value = {n: v.tolist() if isinstance(v, np.generic) else v for n, v in value.items()}
    records = RecordColumns(file, columns, max(64, len(raw)), lenient=lenient)
    found = records_of(file, value)
    for begin in range(0, len(found), BLOCK):
        records.take([_plain(record) for record in found[begin : begin + BLOCK]])
    records.close()


def _plain(record: Any) -> Any:
    if not isinstance(record, Mapping):
        return record
    return {n: v.item() if isinstance(v, np.generic) else v for n, v in record.items()}


def _are_arrays(values: list[Any]) -> bool:
    return all(isinstance(value, np.ndarray) and value.ndim for value in values)


FORMAT: Final = Format(
    name="pickle",
    suffixes=(".pkl", ".pickle"),
    read=read_pickle,
    shaped_by=("lenient", "trust_pickle"),  # what was read with trust must not be found without it
)
"""Read through an allow-list."""
