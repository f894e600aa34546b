"""A file of any size is converted in bounded memory.

The reading process may have so many bytes of its own (RLIMIT_DATA) and no more: the kernel refuses
them. Planted fault: `JsonText` that held the whole text ended with MemoryError in each JSON form.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

BOUND = 64 * 2**20
RECORDS, WIDTH = 200_000, 128  # 270 MB of JSON
COPIES = 10  # of each record's text: random numbers are dear to write

READER = f"""
import resource, sys
from pathlib import Path
import numpy as np
from forge_plugins.formats.opening import open_table
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
    else:
        many = count * 4
        block = np.random.default_rng(0).random((many // COPIES, WIDTH), np.float32)
        columns = {"input": np.tile(block, (COPIES, 1)), "target": np.arange(many) % 7}
        if form == "npz":
            np.savez(file, **columns)
        else:
            with h5py.File(file, "w") as opened:
                for name, column in columns.items():
                    opened.create_dataset(name, data=column, chunks=True, compression="lzf")
    return file


@pytest.mark.spec("B7")
@pytest.mark.parametrize("form", ["json", "jsonl", "jsonl.gz", "columns.json", "npz", "h5"])
def test_a_file_larger_than_the_memory_is_converted(form: str, tmp_path: Path) -> None:
    large, small = write(form, tmp_path, RECORDS), write(form, tmp_path, 20)
    step = {"npz": 4, "h5": 4}.get(form, 1) * RECORDS // COPIES
    reader = READER.replace("COPY", str(step - 1))
    command = [sys.executable, "-c", reader, str(large), str(small), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(step * COPIES), "True"]
