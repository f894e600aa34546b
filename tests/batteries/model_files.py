"""Files of arrays and tables that are broken or made to do harm: npy, npz, HDF5, Parquet, Arrow,
safetensors, JSON."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
from battery import Battery, Trial
from data_files import opening
from hostile_pickles import mutant
from plugin_run import scratch
from safetensors.numpy import save as save_safetensors

COLUMNS: Final[dict[str, np.ndarray[Any, Any]]] = {
    "input": np.random.default_rng(0).random((40, 3), np.float32),
    "target": np.arange(40),
}


def npy(array: Any = COLUMNS["input"]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npy_with(header: str, body: bytes = bytes(96)) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def npz(*, packed: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packed) as archive:
        for name, raw in members.items():
            archive.writestr(f"{name}.npy", raw)
    return stream.getvalue()


def table() -> Any:
    rows = pyarrow.array(COLUMNS["input"].tolist(), pyarrow.list_(pyarrow.float32(), 3))
    return pyarrow.table({"input": rows, "target": COLUMNS["target"]})


def parquet(of: Any = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table() if of is None else of, stream, **options)
    return stream.getvalue()


def parquet_bomb() -> bytes:
    zeros = pyarrow.table({"input": np.zeros(2**22)})
    stream = io.BytesIO()
    with pyarrow.parquet.ParquetWriter(stream, zeros.schema, compression="zstd") as writer:
        for _ in range(64):
            writer.write_table(zeros)
    return stream.getvalue()


def nested(depth: int) -> bytes:
    column = pyarrow.array([1.0] * 4)
    for _ in range(depth):
        column = pyarrow.FixedSizeListArray.from_arrays(column, 1)
    return parquet(pyarrow.table({"input": column}))


def arrow(of: Any = None, compression: str = "uncompressed") -> bytes:
    stream = io.BytesIO()
    pyarrow.feather.write_feather(table() if of is None else of, stream, compression=compression)
    return stream.getvalue()


def hdf5(fill: Callable[[Any], Any]) -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        fill(file)
    return stream.getvalue()


def whole_hdf5(file: Any) -> None:
    for name, values in COLUMNS.items():
        file.create_dataset(name, data=values, chunks=True, compression="gzip")


def huge_chunk(file: Any) -> None:
    file.create_dataset("input", (2**20, 1024), "f4", chunks=(2**14, 1024), compression="gzip")


def huge_shape(file: Any) -> None:
    file.create_dataset("input", (2**40, 2**10), "f8", chunks=(64, 64))


def outside(file: Any) -> None:
    file.create_dataset("input", (4, 4), "f8", external=[("/etc/passwd", 0, 128)])


def soft_link(file: Any) -> None:
    file["input"] = h5py.SoftLink("/elsewhere")


def external_link(file: Any) -> None:
    file["input"] = h5py.ExternalLink("/etc/passwd", "/input")


def ring(file: Any) -> None:
    group = file.create_group("input")
    group["input"] = group


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4, 4), "f8")
    layout[:] = h5py.VirtualSource("/etc/passwd", "input", (4, 4))
    file.create_virtual_dataset("input", layout)


def texts(file: Any) -> None:
    file.create_dataset("input", data=["a", "b"], dtype=h5py.string_dtype())


def references(file: Any) -> None:
    file.create_dataset("input", data=[file.ref] * 3, dtype=h5py.ref_dtype)


def tensors(header: Any, body: bytes = bytes(480), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(dtype: str = "F32", shape: Any = (40, 3), at: Any = (0, 480)) -> dict[str, Any]:
    return {"input": {"dtype": dtype, "shape": shape, "data_offsets": at}}


WHOLE: Final[dict[str, Callable[[], bytes]]] = {
    "x.npy": npy,
    "x.npz": lambda: npz(**{name: npy(values) for name, values in COLUMNS.items()}),
    "x.h5": lambda: hdf5(whole_hdf5),
    "x.parquet": parquet,
    "x.arrow": arrow,
    "y.arrow": lambda: arrow(compression="zstd"),
    "x.safetensors": lambda: save_safetensors(COLUMNS),
    "x.json": lambda: json.dumps([{"input": [1.5, 2], "target": 1}] * 40).encode(),
    "x.jsonl": lambda: b'{"input": [1.5, 2], "target": 1}\n' * 40,
    "x.jsonl.gz": lambda: gzip.compress(b'{"input": [1.5, 2], "target": 1}\n' * 40, mtime=0),
    "x.csv": lambda: b"input,name,target\n" + b'1.5,"a ""b""",1\n2.5,c,0\n' * 20,
    "x.tsv.gz": lambda: gzip.compress(b"input\tname\ttarget\n" + b"1.5\ta\t1\n" * 40, mtime=0),
}
HEAD: Final = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }"
CRAFTED: Final[dict[str, tuple[str, Callable[[], bytes]]]] = {
    "objects": ("x.npy", lambda: npy(np.array([print, None], object))),
    "a huge shape": ("x.npy", lambda: npy_with(HEAD % "1099511627776, 4")),
    "a shape that wraps round": ("x.npy", lambda: npy_with(HEAD % "4294967296, 4294967296")),
    "a shape below 0": ("x.npy", lambda: npy_with(HEAD % "-1, 24")),
    "a header that calls": ("x.npy", lambda: npy_with("__import__('os').system('touch ran')")),
    "a header of brackets": ("x.npy", lambda: npy_with("(" * 100)),
    "a type with objects": ("x.npy", lambda: npy_with(HEAD.replace("'<f4'", "[('a', '|O')]") % "3,")),
    "a header of 60 KB": ("x.npy", lambda: b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535),
    "a header of 4 GB": ("x.npy", lambda: b"\x93NUMPY\x02\x00\xff\xff\xff\xff{"),
    "an archive that expands": ("x.npz", lambda: npz(packed=8, input=npy(np.zeros(2**25)))),
    "an archive that leads out": ("x.npz", lambda: npz(**{"../input": npy(), "input": npy()})),
    "an archive with objects": ("x.npz", lambda: npz(input=npy(np.array([print] * 3, object)))),
    "an archive of texts": ("x.npz", lambda: npz(input=b"text")),
    "a Parquet file that expands": ("x.parquet", parquet_bomb),
    "lists in lists": ("x.parquet", lambda: nested(15)),
    "lists too deep": ("x.parquet", lambda: nested(40)),
    "texts in Parquet": ("x.parquet", lambda: parquet(pyarrow.table({"input": ["a", "b"]}))),
    "one name twice": (
        "x.arrow",
        lambda: arrow(pyarrow.Table.from_arrays([pyarrow.array([1.0])] * 2, ["input", "input"])),
    ),
    "a footer that is too long": ("x.parquet", lambda: parquet()[:-8] + b"\xff\xff\xff\x7fPAR1"),
    "Arrow that expands": (
        "x.arrow",
        lambda: arrow(pyarrow.table({"input": np.zeros(2**26)}), compression="zstd"),
    ),
    **{
        f"HDF5, {fill.__name__}": ("x.h5", lambda fill=fill: hdf5(fill))
        for fill in (
            huge_chunk, huge_shape, outside, soft_link, external_link, ring, virtual, texts,
            references,
        )
    },
    "tensors that overlap": (
        "x.safetensors",
        lambda: tensors({**tensor(), "target": tensor(at=(8, 488))["input"]}, bytes(488)),
    ),
    "a tensor beyond the end": ("x.safetensors", lambda: tensors(tensor(at=(0, 2**40)))),
    "a tensor below 0": ("x.safetensors", lambda: tensors(tensor(at=(-480, 0)))),
    "a tensor backwards": ("x.safetensors", lambda: tensors(tensor(at=(480, 0)))),
    "a huge tensor": ("x.safetensors", lambda: tensors(tensor(shape=(2**40, 2**24)))),
    "a shape of floats": ("x.safetensors", lambda: tensors(tensor(shape=(40.0, 3)))),
    "a shape of texts": ("x.safetensors", lambda: tensors(tensor(shape="40"))),
    "an unknown type": ("x.safetensors", lambda: tensors(tensor("PICKLE"))),
    "a header that is a list": ("x.safetensors", lambda: tensors([1, 2])),
    "a deep header": ("x.safetensors", lambda: tensors(b"[" * 100_000)),
    "a name twice": (
        "x.safetensors",
        lambda: tensors(json.dumps(tensor()).encode()[:-1] + b"," + json.dumps(tensor()).encode()[1:]),
    ),
    "a header of 2 GB": ("x.safetensors", lambda: tensors(b"{}", length=2**31)),
    "a header of 16 EB": ("x.safetensors", lambda: tensors(b"{}", length=2**64 - 1)),
    "gaps": ("x.safetensors", lambda: tensors(tensor(at=(400, 880)), bytes(880))),
    "deep JSON": ("x.json", lambda: b"[" * 10**6),
    "a table that expands": ("x.csv.gz", lambda: gzip.compress(b"input\n" + b"1" * 2**28, mtime=0)),
    "a field of 64 MB": ("x.csv", lambda: b'input,target\n"' + b"1" * 2**26 + b'",1\n'),
    "a quote that never ends": ("x.csv", lambda: b'input,target\n"1,1\n' + b"2,0\n" * 2**20),
    "a header of a million columns": ("x.csv", lambda: b"a," * 10**6 + b"input\n" + b"1," * 10**6 + b"1\n"),
    "UTF-16 cut in two": ("x.csv", lambda: "input,target\n1,1\n".encode("utf-16")[:-1]),
    "zeros": ("x.csv", lambda: bytes(2**20)),
    "JSON that expands": ("x.jsonl.gz", lambda: gzip.compress(b"{" + b" " * 2**28, mtime=0)),
    "a line of 64 MB": ("x.jsonl", lambda: b'{"input": [' + b"1," * 2**25 + b"1]}\n"),
    "a number of a million digits": ("x.json", lambda: b'[{"input": [' + b"9" * 10**6 + b"]}]"),
}  # fmt: skip


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """All that are crafted in a drawn order, then mutants of whole files of each format."""
    crafted = list(CRAFTED)
    draw.shuffle(crafted)
    wholes = {name: make() for name, make in WHOLE.items()}
    mutants = (
        (f"mutant {number} of {name}", name, mutant(draw, wholes[name]))
        for number, name in enumerate(itertools.cycle(WHOLE))
    )
    made = ((f"{name} ({CRAFTED[name][0]})", *CRAFTED[name]) for name in crafted)
    files = itertools.chain(((name, place, make()) for name, place, make in made), mutants)
    for name, place, raw in itertools.islice(files, count):
        with scratch() as folder:
            file: Path = folder / place
            file.write_bytes(raw)
            yield Trial(name, opening(file))


BATTERY = Battery(
    "model-files",
    "opened or refused by name, in bounded memory, without a crash",
    ci=300,
    deep=20_000,
    trials=trials,
)
