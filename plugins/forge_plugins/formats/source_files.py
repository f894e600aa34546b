"""The files that one setting means: a file, those of a folder, or those of a pattern."""

from __future__ import annotations

import glob
from collections.abc import Collection
from pathlib import Path

from forge_plugins.formats.errors import DataError


def suffix_of(file: Path) -> str:
    """The suffix that tells a file's form, without the one that says that it is compressed."""
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    return suffixes[-1] if suffixes else ""


def source_files(path: str, suffixes: Collection[str]) -> list[Path]:
    """The files in the order of their names.

    Args:
        path: of a file, of a folder, or a glob pattern (`*`, `?`, `[...]`; `**` for any folders).
        suffixes: of the files of a folder that are meant; others in it are passed over.

    Raises:
        DataError: there is none.
    """
    place = Path(path)
    if place.is_dir():
        inside = (file for file in place.iterdir() if suffix_of(file) in suffixes)
        result = sorted(file for file in inside if file.is_file())
        hint = f"files of {', '.join(sorted(suffixes))} are looked for, not in folders inside it"
        what = "the folder has no such file"
    elif glob.has_magic(path) and not place.exists():
        result = sorted(map(Path, glob.glob(path, recursive=True)))
        result = [file for file in result if file.is_file()]
        hint, what = "patterns are relative to where you are", "no file has a name like this"
    else:
        return [place]
    if not result:
        raise DataError(place, what, hint=hint)
    return result
