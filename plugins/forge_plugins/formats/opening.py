"""A data file of any format as a table: its format found, its columns mapped."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from forge_plugins.formats import cache
from forge_plugins.formats.arrow_file import read_arrow
from forge_plugins.formats.column_file import ColumnFolder
from forge_plugins.formats.fault import DataFault
from forge_plugins.formats.hdf5_file import map_hdf5, read_hdf5
from forge_plugins.formats.json_file import read_json
from forge_plugins.formats.numpy_file import map_npy, read_npz
from forge_plugins.formats.pickle_file import read_pickle
from forge_plugins.formats.record_file import MAGIC, map_records
from forge_plugins.formats.safetensors_file import map_safetensors
from forge_plugins.formats.table import PROBLEM, Column, Table
from forge_plugins.formats.token_file import map_tokens

FORMATS: Final = (
    "json", "hdf5", "pickle", "binary", "npy", "npz", "safetensors", "tokens", "parquet", "arrow",
)  # fmt: skip
_SUFFIXES: Final = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".h5": "hdf5", ".hdf5": "hdf5",
    ".pkl": "pickle", ".pickle": "pickle", ".frec": "binary", ".npy": "npy", ".npz": "npz",
    ".safetensors": "safetensors", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow",
    ".feather": "arrow",
}  # fmt: skip


def sniff(file: Path) -> str:
    """The format of a file, by its first bytes and else by its suffix.

    Raises:
        DataFault: neither tells.
    """
    with file.open("rb") as stream:
        start = stream.read(16)
    for magic, found in (
        (MAGIC, "binary"), (b"\x89HDF\r\n\x1a\n", "hdf5"), (b"\x93NUMPY", "npy"),
        (b"PAR1", "parquet"), (b"ARROW1", "arrow"),
    ):  # fmt: skip
        if start.startswith(magic):
            return found
    if start.startswith(b"PK") and zipfile.is_zipfile(file):
        return "npz"
    suffixes = [suffix for suffix in reversed(file.suffixes) if suffix != ".gz"]
    if suffixes and suffixes[0].lower() in _SUFFIXES:
        return _SUFFIXES[suffixes[0].lower()]
    if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return "json"
    raise DataFault(
        file,
        "neither its first bytes nor its name tell the format",
        hint=f"name it with format, one of {', '.join(FORMATS)}",
    )


def open_table(
    file: Path,
    format: str = "auto",
    *,
    cache_dir: Path | None = None,
    lenient: bool = False,
    trust_pickle: bool = False,
    integers: str = "uint16",
    length: int = 128,
) -> Table:
    """Open a data file; nothing of it is loaded that can be mapped.

    JSON, pickles, archives, Parquet and HDF5 in chunks are converted once, into a cache under the
    hash of their content, and mapped from there.

    Args:
        file: the file.
        format: one of `FORMATS`, or `auto`.
        cache_dir: where converted columns are kept; None: below the user's cache folder.
        lenient: JSON and pickles: note records with a defect instead of refusing the file.
        trust_pickle: run pickles as they are. They may do whatever their authors like.
        integers: type of the tokens of the format `tokens`.
        length: tokens in a window of the format `tokens`.

    Raises:
        DataFault: the file cannot be read as asked.
    """
    try:
        if not file.is_file():
            raise DataFault(
                file, "there is no such file", hint="paths are relative to where you are"
            )
        if not file.stat().st_size:
            raise DataFault(file, "the file is empty", hint="write it anew")
        found = sniff(file) if format == "auto" else format
        content = cache.content_hash(file)
        columns: Mapping[str, Column] | None = None
        if found == "tokens":
            columns = map_tokens(file, integers, length)
        elif found in _MAPPED:
            columns = _MAPPED[found](file)
        if columns is None:
            columns = _converted(
                file,
                found,
                content,
                cache_dir or cache.default_folder(),
                lenient=lenient,
                trust=trust_pickle,
            )
    except (OSError, MemoryError, RuntimeError) as error:  # RuntimeError: there is no home folder
        told = f"cannot be read: {error}"
        raise DataFault(file, told, hint="look at its rights and size") from error
    return _table(file, found, columns, content)


_MAPPED: Final = {
    "hdf5": map_hdf5,
    "binary": map_records,
    "npy": map_npy,
    "safetensors": map_safetensors,
}


def _converted(
    file: Path, found: str, content: str, folder: Path, *, lenient: bool, trust: bool
) -> dict[str, Column]:
    # what was read with trust must not be found without it
    key = cache.content_key(content, found, f"lenient={lenient}", f"trust={trust}")
    kept = cache.cached(folder, key)
    if kept is not None:
        return kept

    def fill(columns: ColumnFolder) -> None:
        if found == "json":
            read_json(file, columns, lenient=lenient)
        elif found == "pickle":
            read_pickle(file, columns, lenient=lenient, trusted=trust)
        elif found == "npz":
            read_npz(file, columns)
        elif found in ("parquet", "arrow"):
            read_arrow(file, columns, parquet=found == "parquet")
        else:
            read_hdf5(file, columns)

    # what is refused is not kept
    return cache.keep(file, folder, key, fill, lambda columns: _table(file, found, columns))


def _table(file: Path, found: str, columns: Mapping[str, Column], content: str = "") -> Table:
    plain = {name: column for name, column in columns.items() if name != PROBLEM}
    return Table(file, found, plain, columns.get(PROBLEM), content)
