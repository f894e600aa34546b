"""The cache of converted columns: whole or absent, whoever is killed and whatever is full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest

from forge_plugins.formats.columns import cache as columns_cache
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.open_table import open_table

OPEN = """
import sys, time
from pathlib import Path
from forge_plugins.formats import open_table
from forge_plugins.formats.readers import json as json_file
plain = json_file.RecordColumns.take
def slow(*words, **named):
    Path(sys.argv[3]).open("a").write("x")
    time.sleep(float(sys.argv[4]))
    return plain(*words, **named)
json_file.RecordColumns.take = slow
print(len(open_table.open_table(Path(sys.argv[1]), cache_dir=Path(sys.argv[2]))))
"""


def lines(path: Path, count: int = 60_000) -> Path:
    rows = (json.dumps({"input": [at, at + 0.5, 1.25], "target": at % 3}) for at in range(count))
    path.write_text("\n".join(rows))
    return path


def opened(file: Path, cache: Path, marks: Path, pause: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, str(file), str(cache), str(marks), str(pause)]
    return forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(file: Path) -> None:
    for _ in range(600):
        if file.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} does not come")


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "memos")


@pytest.mark.spec("B10")
def test_of_two_processes_one_converts_and_the_other_waits_for_it(tmp_path: Path) -> None:
    """Planted fault: without the lock both parsed the file, twice as many marks."""
    file, cache = lines(tmp_path / "x.jsonl"), tmp_path / "cache"
    racers = [opened(file, cache, tmp_path / f"m{number}", 0.2) for number in range(3)]
    assert [racer.communicate(timeout=120)[0].strip() for racer in racers] == ["60000"] * 3
    assert len([mark for mark in tmp_path.glob("m?") if mark.stat().st_size]) == 1
    assert len(entries(cache)) == 1


def test_a_killed_conversion_leaves_nothing_that_is_found_and_its_rest_is_removed(
    tmp_path: Path,
) -> None:
    file, cache = lines(tmp_path / "x.jsonl"), tmp_path / "cache"
    first = opened(file, cache, tmp_path / "m", 60.0)
    until(tmp_path / "m")
    waiting = opened(file, cache, tmp_path / "n", 0.0)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert waiting.communicate(timeout=120)[0].strip() == "60000"  # the claim ended with it
    [kept] = entries(cache)
    assert not kept.startswith(".")
    assert len(open_table(file, cache_dir=cache)) == 60_000


LIMITED = """
import resource, sys
from pathlib import Path
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.columns import cache as columns_cache
from forge_plugins.formats.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)
try:
    open_table(Path(sys.argv[1]), cache_dir=Path(sys.argv[2]))
except DataError as fault:
    print(fault)
"""


@pytest.mark.parametrize("name", ["x.jsonl", "x.h5", "x.npz"])
def test_a_full_disk_is_told_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    """RLIMIT_FSIZE: no file may have more than 100,000 bytes, as if there were no room."""
    file, cache = tmp_path / name, tmp_path / "cache"
    if name == "x.jsonl":
        lines(file)
    elif name == "x.npz":
        np.savez(file, input=np.ones((50_000, 4)))
    else:
        import h5py

        with h5py.File(file, "w") as opened_file:
            opened_file.create_dataset("input", data=np.ones((50_000, 4)), compression="lzf")
    command = [sys.executable, "-c", LIMITED, str(file), str(cache)]
    done = forked.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "cannot be written: [Errno 27]" in done.stdout, done.stderr
    assert "has room" in done.stdout
    assert entries(cache) == []
    assert len(open_table(file, cache_dir=cache)) >= 50_000  # with room it is converted


def test_a_file_that_changes_while_it_is_converted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: without the second look the columns of the new content were kept as the old's."""
    file = lines(tmp_path / "x.jsonl")
    from forge_plugins.formats.readers import json as json_file

    plain = json_file.RecordColumns.close

    def close(self: json_file.RecordColumns) -> None:
        plain(self)
        with file.open("a") as stream:
            stream.write('\n{"input": [1, 2, 3], "target": 0}')

    monkeypatch.setattr(json_file.RecordColumns, "close", close)
    with pytest.raises(DataError, match="changed while it was read: it had"):
        open_table(file, cache_dir=tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    replaced = lines(tmp_path / "y.jsonl", 3)
    monkeypatch.setattr(
        json_file.RecordColumns, "close", lambda self: (plain(self), replaced.replace(file))[0]
    )
    with pytest.raises(DataError, match="it was replaced"):
        open_table(file, cache_dir=tmp_path / "cache")
    monkeypatch.undo()
    assert len(open_table(file, cache_dir=tmp_path / "cache")) == 3


def old(file: Path) -> None:
    os.utime(file, (1_700_000_000, 1_700_000_000))


def test_a_settled_file_is_hashed_once_and_again_after_each_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: without the change time in the stamp, a file made old again was not noticed."""
    from forge_plugins.formats.columns import source_file

    monkeypatch.setattr(source_file, "SETTLED", -1.0)  # tests cannot wait for the clock's grain
    file, cache = tmp_path / "x.json", tmp_path / "cache"
    hashed = []
    plain = source_file.hashlib.sha256
    monkeypatch.setattr(
        source_file.hashlib, "sha256", lambda *w: hashed.append(len(w)) or plain(*w)
    )

    def read() -> tuple[list[list[int]], int]:
        before = hashed.count(0)
        table = open_table(file, cache_dir=cache)
        return np.asarray(table.columns["input"]).tolist(), hashed.count(0) - before

    file.write_text('[{"input": [1]}]')
    old(file)
    assert read() == ([[1]], 1)
    assert read() == ([[1]], 0)
    time.sleep(0.02)
    file.write_text('[{"input": [2]}]')  # as long, and made as old
    old(file)
    assert read() == ([[2]], 1)
    other = tmp_path / "y.json"
    other.write_text('[{"input": [3]}]')
    old(other)
    other.replace(file)
    assert read() == ([[3]], 1)
    assert np.asarray(open_table(file, cache_dir=cache, verify=True).columns["input"]) == 3
    assert hashed.count(0) == 4


def test_a_flipped_bit_in_the_cache_is_found(tmp_path: Path) -> None:
    """Red when the columns are believed as long as they have their size."""
    file, cache = lines(tmp_path / "x.jsonl", 50), tmp_path / "cache"
    open_table(file, cache_dir=cache)
    [column] = cache.glob("*/0.npy")
    raw = bytearray(column.read_bytes())
    raw[-1] ^= 1
    column.write_bytes(raw)
    found = open_table(file, cache_dir=cache)
    assert np.asarray(found.columns["input"])[-1].tolist() == [49.0, 49.5, 1.25]


def test_columns_that_stand_still_are_hashed_once_and_again_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when each start reads the whole cache, or when a file that was written to is believed."""
    monkeypatch.setattr(columns_cache, "SETTLED", 0.0)
    file, cache = lines(tmp_path / "x.jsonl", 50), tmp_path / "cache"
    hashed: list[str] = []
    plain = columns_cache.file_hash

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return plain(path)

    open_table(file, cache_dir=cache)
    monkeypatch.setattr(columns_cache, "file_hash", counted)
    open_table(file, cache_dir=cache)
    assert sorted(hashed) == ["0.npy", "1.npy"]
    open_table(file, cache_dir=cache)
    assert len(hashed) == 2
    open_table(file, cache_dir=cache, verify=True)
    assert len(hashed) == 4
    [column] = cache.glob("*/0.npy")
    raw = bytearray(column.read_bytes())
    about = column.stat()
    time.sleep(0.02)
    raw[-1] ^= 1
    column.write_bytes(raw)
    os.utime(column, ns=(about.st_atime_ns, about.st_mtime_ns))  # it looks as old
    found = open_table(file, cache_dir=cache)
    assert np.asarray(found.columns["input"])[-1].tolist() == [49.0, 49.5, 1.25]


def test_mapped_files_need_no_cache_that_can_be_written(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    (tmp_path / "cache").write_text("a file stands here")
    assert len(open_table(tmp_path / "x.npy", cache_dir=tmp_path / "cache")) == 3
