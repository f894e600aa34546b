"""Pickles of data, read by the standard library's unpickler with an allow-list of names.

A pickle is a program: it names functions and classes, and asks the unpickler to call them. Here no
name is ever imported. The few that arrays and tensors need stand for functions of our own (see
`pickle_values`), and each other name stands for a placeholder, so that fields that nobody reads may
hold dates or objects of any class; a placeholder is refused by its name when it is read as data.

The library's machine makes numbers, texts and containers as large as a pickle says, often ten
times the bytes of the file: whoever reads a file that is not trusted must bound the memory of its
process (`sandbox`).

Source: "Restricting Globals" in the documentation of `pickle`; `pickletools` tells the opcodes.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from typing import Any, BinaryIO, Final

import numpy as np

from forge_plugins.formats.readers.pickle_values import (
    NAMES,
    STORAGES,
    Constructor,
    RefusedError,
    Storage,
    placeholder_class,
    stored,
)

_TORCH: Final = 0x1950A86A20F9469CFC6C  # what torch's form of one storage begins with
_WIDTHS: Final = {
    kind: 2 if code == "bf16" else np.dtype(code).itemsize for kind, code in STORAGES.items()
}


class BrokenError(Exception):
    """It is no whole pickle; the text says why."""


class DataUnpickler(pickle.Unpickler):
    """Reads one pickle of a stream, which is left at the pickle's end.

    Args:
        stream: where the pickle begins.
    """

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="latin1")  # texts of Python 2 may be of any bytes
        self.has_names = False
        """Whether the pickle names anything: without, it is of numbers, texts and containers."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """A constructor of ours or a placeholder; nothing is imported."""
        self.has_names = True
        if (module_name, global_name) == ("torch.storage", "_load_from_bytes"):
            return _LOAD_STORAGE
        name = f"{module_name[:100]}.{global_name[:100]}"
        return NAMES.get((module_name, global_name)) or placeholder_class(f"it names {name}")

    def persistent_load(self, pid: Any) -> Any:
        """A placeholder: nothing outside the file is read."""
        self.has_names = True
        key = pid[:40] if isinstance(pid, str) else type(pid).__name__
        return placeholder_class(f"it refers to an object outside the file ({key})")()

    def read(self) -> Any:
        """The value of the pickle.

        Raises:
            BrokenError: it is no whole pickle.
            RefusedError: it asks what no library asks of a name.
            MemoryError: it asks for more than this process may have.
        """
        # the cache of numbered names (EXT1 to EXT4) is asked before find_class
        copyreg.clear_extension_cache()
        try:
            return self.load()
        except (RefusedError, MemoryError):
            raise
        except Exception as error:
            # opcodes that do not fit each other raise whatever the objects raise that they meet
            text = str(error).partition("\n")[0][:160]
            raise BrokenError(text or type(error).__name__) from error
        finally:
            copyreg.clear_extension_cache()


class _StorageUnpickler(DataUnpickler):
    """Reads a pickle in torch's form of one storage, which refers to the storage that follows."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and global_name in STORAGES:
            return Constructor(global_name, stored)
        return placeholder_class(f"it names {module_name[:100]}.{global_name[:100]}")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _storage(raw: Any) -> Storage:
    """The numbers of a tensor that was pickled, in the form that torch had before archives.

    Raises:
        RefusedError: it is no such form.
    """
    if not isinstance(raw, bytes | bytearray):
        raise RefusedError("a tensor without bytes")
    stream = io.BytesIO(raw)
    try:
        # a number, a version, about the machine, the storage, its name
        parts = [_StorageUnpickler(stream).read() for _ in range(5)]
    except BrokenError as error:
        raise RefusedError(f"a tensor's storage that is broken: {error}") from error
    about = parts[3]
    whole = isinstance(about, tuple) and len(about) >= 5 and about[0] == "storage"
    if parts[0] != _TORCH or not whole or not isinstance(about[1], Constructor):
        raise RefusedError("a tensor without a storage")
    values = memoryview(raw)[stream.tell() :]
    kind, count = about[1].name, int.from_bytes(values[:8], "little")
    if count * _WIDTHS[kind] != len(values) - 8:
        raise RefusedError(f"a tensor's storage of {count} numbers in {len(values) - 8} bytes")
    return Storage(stored(kind, values[8:]))


_LOAD_STORAGE: Final = Constructor("torch.storage._load_from_bytes", _storage)
