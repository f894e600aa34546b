"""A file of any size is converted in bounded memory.

The reading process may have so many bytes of its own (RLIMIT_DATA) and no more: the kernel refuses
them. Planted fault: `JsonText` that held the whole text ended with MemoryError in each JSON form.
"""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

BOUND = 64 * 2**20
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
    elif form == "lists.pkl":
        values = [json.loads(row) for row in rows]
        with file.open("wb") as stream:
            pickle.dump(
                [dict(value, input=list(value["input"])) for value in values * COPIES], stream
            )
    else:
        many = count * 4
        block = np.random.default_rng(0).random((many // COPIES, WIDTH), np.float32)
        columns = {"input": np.tile(block, (COPIES, 1)), "target": np.arange(many) % 7}
        if form == "npz":
            np.savez(file, **columns)
        elif form == "arrays.pkl":
            file.write_bytes(pickle.dumps(columns))
        elif form == "fortran.npy":
            np.save(file, np.asfortranarray(columns["input"]))
        elif form in ("parquet", "arrow", "zstd.arrow"):
            write_arrow(file, form, columns)
        elif form == "gzip.h5":
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
    """Parquet in one row group of 400 MB; Arrow in batches of as many bytes."""
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
        "json", "jsonl", "jsonl.gz", "columns.json", "npz", "h5", "gzip.h5", "lists.pkl", "arrays.pkl",
        "parquet", "arrow", "zstd.arrow", "fortran.npy",
    ],
)  # fmt: skip
def test_a_file_larger_than_the_memory_is_converted(form: str, tmp_path: Path) -> None:
    large, small = write(form, tmp_path, RECORDS), write(form, tmp_path, 20)
    texts_of = ("json", "jsonl", "jsonl.gz", "columns.json", "lists.pkl")
    step = (1 if form in texts_of else 4) * RECORDS // COPIES
    reader = READER.replace("COPY", str(step - 1))
    command = [sys.executable, "-c", reader, str(large), str(small), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(step * COPIES), "True"]


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
        assert "memory" not in str(fault), fault
        refused += 1
print(refused, len(cases.CASES))
"""


@pytest.mark.spec("B12", "B13")
def test_no_broken_file_takes_more_memory_than_a_whole_one(tmp_path: Path) -> None:
    """None of them declares more that is there than a few megabytes; some claim a terabyte."""
    pytest.importorskip("pyarrow")
    cases = Path(__file__).with_name("test_broken_files.py")
    command = [sys.executable, "-c", HOSTILE, str(cases), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, count = map(int, done.stdout.split())
    assert refused == count >= 80
