"""A file of any size is converted in bounded memory; a pickle, in memory bounded by its size.

The reading process may have so many bytes of its own (RLIMIT_DATA) and no more: the kernel refuses
them. Planted fault: `JsonText` that held the whole text ended with MemoryError in each JSON form.
"""

from __future__ import annotations

import functools
import gzip
import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import h5py
import numpy as np
import pytest

from forge_plugins.formats.readers.sandbox import MEMORY

BOUND = 64 * 2**20  # beside 14 MB that a forked process has free
RECORDS, WIDTH = 60_000, 128  # 81 MB of JSON, 123 MB of numbers
COPIES = 10  # of each record's text: random numbers are dear to write

READER = f"""
import resource, sys
import h5py
if "arrow" in sys.argv[1] or "parquet" in sys.argv[1]:
    import pyarrow.parquet  # its own tables and stacks are not the reader's
from pathlib import Path
import numpy as np
from forge_plugins.formats.open_table import open_table
open_table(Path(sys.argv[2]), cache_dir=Path(sys.argv[3]))  # imports and first buffers
for line in open("/proc/self/status"):
    if line.startswith("VmData"):
        held = int(line.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + {BOUND},) * 2)
table = open_table(Path(sys.argv[1]), cache_dir=Path(sys.argv[3]))
print(len(table), table.columns["input"][-1].tolist() == table.columns["input"][COPY].tolist())
"""


@functools.cache
def texts(count: int) -> list[str]:
    numbers = np.random.default_rng(0).random((count, WIDTH)).round(7)
    return [json.dumps({"input": row.tolist(), "target": at % 7}) for at, row in enumerate(numbers)]


def write(form: str, folder: Path, count: int) -> Path:
    file = folder / f"{count}.{form}"
    rows = texts(count // COPIES)
    if form == "json":
        file.write_text("[" + ",".join(rows * COPIES) + "]")
    elif form == "jsonl":
        file.write_text("\n".join(rows * COPIES))
    elif form == "jsonl.gz":
        with gzip.open(file, "wb", 1) as stream:
            for _ in range(COPIES):
                stream.write(("\n".join(rows) + "\n").encode())
    elif form == "columns.json":
        inputs = [row[len('{"input": ') : row.index("]") + 1] for row in rows]
        targets = [row.rsplit(" ", 1)[1][:-1] for row in rows]
        file.write_text(
            '{"input": [' + ",".join(inputs * COPIES) + '], "target": ['
            + ",".join(targets * COPIES) + "]}"
        )  # fmt: skip
    else:
        many = count * 4
        block = np.random.default_rng(0).random((many // COPIES, WIDTH), np.float32)
        columns = {"input": np.tile(block, (COPIES, 1)), "target": np.arange(many) % 7}
        if form == "npz":
            np.savez(file, **columns)
        elif form == "fortran.npy":
            np.save(file, np.asfortranarray(columns["input"]))
        elif form in ("parquet", "arrow", "zstd.arrow"):
            write_arrow(file, form, columns)
        elif form == "gzip.h5":
            columns["input"] = columns["input"].round(1)  # packed three times as fast
            with h5py.File(file, "w") as opened:
                for name, column in columns.items():
                    opened.create_dataset(
                        name, data=column, chunks=True, compression="gzip", compression_opts=1
                    )
        else:
            with h5py.File(file, "w") as opened:
                for name, column in columns.items():
                    opened.create_dataset(name, data=column, chunks=True, compression="lzf")
    return file


def write_arrow(file: Path, form: str, columns: dict[str, np.ndarray]) -> None:
    """Parquet in one row group; Arrow in batches of as many bytes."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    flat = columns["input"].reshape(-1)
    inputs = pyarrow.FixedSizeListArray.from_arrays(flat, WIDTH)
    table = pyarrow.table({"input": inputs, "target": columns["target"]})
    if form == "parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=len(table), use_dictionary=False)
        return
    packed = "zstd" if form == "zstd.arrow" else None
    options = pyarrow.ipc.IpcWriteOptions(compression=packed)
    with pyarrow.ipc.new_file(str(file), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=10_000 if packed else None)


@pytest.mark.spec("B7")
@pytest.mark.parametrize(
    "form",
    [
        "json", "jsonl", "jsonl.gz", "columns.json", "npz", "h5", "gzip.h5", "parquet", "arrow",
        "zstd.arrow", "fortran.npy",
    ],
)  # fmt: skip
def test_a_file_larger_than_the_memory_is_converted(form: str, tmp_path: Path) -> None:
    large, small = write(form, tmp_path, RECORDS), write(form, tmp_path, 20)
    texts_of = ("json", "jsonl", "jsonl.gz", "columns.json")
    step = (1 if form in texts_of else 4) * RECORDS // COPIES
    reader = READER.replace("COPY", str(step - 1))
    command = [sys.executable, "-c", reader, str(large), str(small), str(tmp_path / "cache")]
    done = forked.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(step * COPIES), "True"]


PEAK = """
import resource, sys
from pathlib import Path
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.open_table import open_table
open_table(Path(sys.argv[2]), cache_dir=Path(sys.argv[3]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(len(open_table(Path(sys.argv[1]), cache_dir=Path(sys.argv[3]))))
except DataError as fault:
    print("needs more memory" in str(fault))
for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
    print(1024 * (resource.getrusage(who).ru_maxrss - before))
"""
ROWS = 200_000


def long_lists(batches: int = 2100) -> bytes:
    """As `pickle.dumps` writes two million records, without the wait for it."""
    numbers = b"]\x94(" + 2 * (b"G" + struct.pack(">d", 0.5)) + b"es"
    first, record = b"}\x94\x8c\x05input\x94" + numbers, b"}\x94h\x02" + numbers
    batch = b"(" + record * 1000 + b"e"
    return b"\x80\x04]\x94(" + first + record * 999 + b"e" + batch * batches + b"."


PICKLES: dict[str, Callable[[], bytes]] = {
    "arrays": lambda: pickle.dumps({"input": np.ones((ROWS, WIDTH), np.float32)}),
    "old arrays": lambda: pickle.dumps({"input": np.ones((ROWS // 2, WIDTH), np.float32)}, 2),
    "lists": lambda: pickle.dumps([{"input": [at, at + 0.5, 1.0]} for at in range(ROWS)]),
    "long lists": long_lists,
    "a list in each byte": lambda: b"\x80\x04(" + b"]" * 2**23 + b"l.",
    "a memo of a gigabyte": lambda: b"\x80\x04Nr\xff\xff\xff\x03.",
}


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
@pytest.mark.parametrize("form", PICKLES)
def test_a_pickle_takes_at_most_twice_its_size_and_none_of_this_process(
    form: str, tmp_path: Path
) -> None:
    """Beside a fixed amount. Planted fault: without a limit, the lists in each byte were read."""
    large, small = tmp_path / "large.pkl", tmp_path / "small.pkl"
    large.write_bytes(PICKLES[form]())
    small.write_bytes(pickle.dumps([{"input": [1.0]}]))
    command = [sys.executable, "-c", PEAK, str(large), str(small), str(tmp_path / "cache")]
    done = forked.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result, here, child = done.stdout.split()
    expected = {"arrays": str(ROWS), "old arrays": str(ROWS // 2), "lists": str(ROWS)}
    assert result == expected.get(form, "True")
    assert int(here) < 2**25
    assert int(child) < MEMORY + 2 * large.stat().st_size


HOSTILE = f"""
import importlib.util, resource, sys, tempfile, time
from pathlib import Path
import h5py, pyarrow.parquet
spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
sys.modules["cases"] = cases
spec.loader.exec_module(cases)
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.open_table import open_table
for line in open("/proc/self/status"):
    if line.startswith("VmData"):
        held = int(line.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + {BOUND},) * 2)
refused = 0
folder = Path(sys.argv[2])
for _, name, content, _ in cases.CASES:
    (folder / name).write_bytes(content)
    try:
        open_table(folder / name, cache_dir=folder / "cache")
    except DataError as fault:
        # the library's unpickler believes a length before it reads: the system refuses it
        assert "memory" not in str(fault) or "pickle at byte 0" in str(fault), fault
        refused += 1
print(refused, len(cases.CASES))
"""


def test_long_lists_are_a_pickle() -> None:
    assert pickle.loads(long_lists(2)) == [{"input": [0.5, 0.5]}] * 3000


@pytest.mark.spec("B12", "B13")
def test_no_broken_file_takes_more_memory_than_a_whole_one(tmp_path: Path) -> None:
    """None of them declares more that is there than a few megabytes; some claim a terabyte."""
    pytest.importorskip("pyarrow")
    cases = Path(__file__).with_name("test_broken_files.py")
    command = [sys.executable, "-c", HOSTILE, str(cases), str(tmp_path)]
    done = forked.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, count = map(int, done.stdout.split())
    assert refused == count >= 80
