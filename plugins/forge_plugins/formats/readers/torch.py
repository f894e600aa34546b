"""Files of torch.save: a mapping of tensors, two tensors, or a list of records.

They are read by torch's safe loader, which makes tensors, containers and numbers and calls nothing
else; what lies in the file's storages is mapped.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Format, Reading
from forge_plugins.formats.readers.pickle import Content
from forge_plugins.formats.readers.pickle_values import RefusedError

_BEFORE_ARCHIVES: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""What torch.save wrote first before it wrote archives: a number, pickled."""
_MEMBER: Final = re.compile(rb"[^/]+/(?:data\.pkl|data/|constants\.pkl|code/|version|\.)")
_NAME: Final = 30  # bytes of an archive's entry before its name
_GLOBAL: Final = re.compile(r"GLOBAL ([\w.]+)")
_HINT: Final = (
    "save tensors, numbers and lists of them only: torch.save({'input': x, 'target': y}, file); "
    "or, if you trust whoever wrote the file with your account, set trust_pickle: true and run "
    "with --allow-code"
)


def _begins(start: bytes) -> bool:
    """Whether an archive's first member is one that torch writes."""
    length = int.from_bytes(start[26:28], "little")
    return start.startswith(b"PK") and bool(_MEMBER.match(start[_NAME : _NAME + length]))


def read_torch(file: Path, columns: ColumnFolder, reading: Reading, names: Collection[str]) -> None:
    """Write the columns of a file of torch.save.

    Args:
        file: the file.
        columns: where they are written.
        reading: which columns are read, whether it is `lenient`, see `RecordColumns`, and whether
            the file is trusted.
        names: those that `reading` tells.

    Raises:
        DataError: it is no such archive, holds what the safe loader does not read, or no records
            of numbers.
    """
    del names
    _check_archive(file)
    content = Content(file, columns, reading)
    try:
        content.add(_loaded(file, trusted=reading.trust_pickle))
    except RefusedError as error:
        raise DataError(file, f"is refused: {error}", hint=_HINT) from error
    content.close()


def _check_archive(file: Path) -> None:
    """Whether it is an archive of torch.save.

    Raises:
        DataError: it is of another form, a program, or packed: torch packs none.
    """
    with file.open("rb") as stream:
        if stream.read(len(_BEFORE_ARCHIVES)) == _BEFORE_ARCHIVES:
            message = "torch.save wrote it in the form that it had before torch 1.6"
            hint = "load it with torch.load and save it anew with torch.save"
            raise DataError(file, message, hint=hint)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        message = f"is no archive of torch.save: {str(error)[:120]}"
        raise DataError(file, message, hint="write it anew with torch.save") from error
    parts = {member.filename.partition("/")[2] for member in members}
    if "constants.pkl" in parts:
        message = "is a TorchScript program (torch.jit.save), not data"
        raise DataError(
            file, message, hint="save tensors with torch.save({'input': x, 'target': y})"
        )
    if "data.pkl" not in parts or any(member.compress_type for member in members):
        hint = "write it anew with torch.save"
        raise DataError(file, "is no archive of torch.save", hint=hint)


def _loaded(file: Path, *, trusted: bool) -> Any:
    """What torch.save was given.

    Raises:
        DataError: torch cannot read it, or only by running what it names.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=not trusted)
    except MemoryError:
        raise
    except Exception as error:
        named = _GLOBAL.search(str(error))
        if named is not None and not trusted:
            message = f"is refused: it names {named[1]}"
            raise DataError(file, message, hint=_HINT) from error
        first = str(error).strip().partition("\n")[0][:160]
        message = f"cannot be read by torch: {type(error).__name__}: {first}"
        raise DataError(file, message, hint="write it anew with torch.save") from error


FORMAT: Final = Format(
    name="torch",
    suffixes=(".pt", ".pth"),
    magic=(b"PK\x03\x04", _BEFORE_ARCHIVES),
    begins=_begins,
    read=read_torch,
    shaped_by=("lenient", "trust_pickle"),  # what was read with trust must not be found without it
)
"""Read by torch."""
