"""Files that are odd but fine are read; paths that are no files are refused at once."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers.fixed_records import MAGIC

ROWS = [{"input": [1.5, 2.0], "target": 1}, {"input": [3.0, 4.5], "target": 0}]
LINES = [json.dumps(row) for row in ROWS]


@pytest.mark.spec("B10")
@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("x.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
        ("x.jsonl", b"\xef\xbb\xbf" + "\n".join(LINES).encode()),
        ("x.jsonl", "\r\n".join(LINES).encode() + b"\r\n"),
        ("x.jsonl", "\n\n  \n".join(LINES).encode() + b"\n\n\n"),
        ("x.json", json.dumps(ROWS, indent="\t").replace("\n", "\r\n").encode()),
        ("x.json", b" \r\n\t" + json.dumps(ROWS).encode() + b"\n\n"),
        ("x.JSONL", "\n".join(LINES).encode()),
        ("x.json.GZ", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("x.jsonl.gz", b"".join(gzip.compress(f"{line}\n".encode(), mtime=0) for line in LINES)),
        ("no-suffix", json.dumps(ROWS).encode()),
        ("name.with.dots and blanks é.jsonl", "\n".join(LINES).encode()),
    ],
)
def test_texts_of_any_habit_are_the_same_table(name: str, raw: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    table = open_table(tmp_path / name, cache_dir=tmp_path / "c")
    assert table.columns["input"].tolist() == [row["input"] for row in ROWS]
    assert table.columns["target"].tolist() == [1, 0]


def test_one_record_is_a_table(tmp_path: Path) -> None:
    forms: dict[str, Any] = {
        "a.json": ROWS[:1], "b.json": ROWS[0], "c.json": {"input": [[1.5, 2.0]], "target": [1]},
    }  # fmt: skip
    for name, value in forms.items():
        (tmp_path / name).write_text(json.dumps(value))
        table = open_table(tmp_path / name, cache_dir=tmp_path / "c")
        assert table.columns["input"].tolist() == [[1.5, 2.0]]


def test_fields_may_have_any_name(tmp_path: Path) -> None:
    names = ["größe", "日本", "a b", 'quo"te', "back\\slash", "new\nline", "../up", "é" * 300]
    rows = [{"input": [1.0], **{name: at for at, name in enumerate(names)}}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "y.json").write_text(json.dumps({name: [value] for name, value in rows[0].items()}))
    for name in ("x.json", "y.json"):
        for _ in range(2):  # converted, then from the cache
            for at, key in enumerate(names):
                asked = Reading(target=key)
                table = open_table(tmp_path / name, "auto", asked, cache_dir=tmp_path / "c")
                assert table.columns["target"].tolist() == [at]
    np.savez(tmp_path / "x.npz", 日本=np.arange(2))
    asked = Reading(input="日本", target=None)
    table = open_table(tmp_path / "x.npz", "auto", asked, cache_dir=tmp_path / "c")
    assert table.columns["input"].tolist() == [0, 1]


@pytest.mark.spec("B13")
def test_swapped_bytes_are_read_as_the_header_says(tmp_path: Path) -> None:
    fields = [
        {"name": "input", "dtype": ">f4", "shape": [2]},
        {"name": "target", "dtype": ">i2", "shape": []},
    ]
    text = json.dumps({"version": 1, "records": 2, "fields": fields}).encode()
    body = struct.pack(">ffhffh", 1.5, 2.0, 1, 3.0, 4.5, 0)
    (tmp_path / "x.frec").write_bytes(MAGIC + len(text).to_bytes(8, "little") + text + body)
    columns = open_table(tmp_path / "x.frec", cache_dir=tmp_path / "c").columns
    assert columns["input"].tolist() == [row["input"] for row in ROWS]
    assert columns["target"].tolist() == [1, 0]


def test_a_link_is_the_file_and_is_watched_as_the_file(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(json.dumps(ROWS))
    (tmp_path / "link.json").symlink_to("real.json")
    assert len(open_table(tmp_path / "link.json", cache_dir=tmp_path / "c")) == 2
    (tmp_path / "other.json").write_text(json.dumps(ROWS[:1]))
    (tmp_path / "link.json").unlink()
    (tmp_path / "link.json").symlink_to("other.json")
    assert len(open_table(tmp_path / "link.json", cache_dir=tmp_path / "c")) == 1
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(DataError, match="cannot be opened.*symbolic links"):
        open_table(tmp_path / "loop.json", cache_dir=tmp_path / "c")


@pytest.mark.parametrize("form", ["auto", "json", "tokens", "pickle", "hdf5"])
def test_what_is_no_file_is_refused_at_once(form: str, tmp_path: Path) -> None:
    """Planted fault: to open a pipe that nobody writes to waits for ever."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "empty.json").touch()
    here = socket.socket(socket.AF_UNIX)
    here.bind(str(tmp_path / "s"))
    told = {
        "pipe.json": "a pipe, socket or device", "folder.json": "a folder", "empty.json": "empty",
        "s": "cannot be opened", "none.json": "no such file", "a\0b": "cannot be opened",
        "x" * 300: "cannot be opened", "empty.json/x": "cannot be opened",
    }  # fmt: skip
    for name, words in told.items():
        with pytest.raises(DataError, match=words) as caught:
            open_table(tmp_path / name, form, Reading(), cache_dir=tmp_path / "c")
        assert caught.value.hint
    here.close()
    for device in ("/dev/null", "/dev/zero"):
        with pytest.raises(DataError, match="a pipe, socket or device"):
            open_table(Path(device), form, cache_dir=tmp_path / "c")


def test_a_file_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    monkeypatch.setattr("forge_plugins.formats.columns.source_file.os.open", refused)
    with pytest.raises(DataError, match="may not be read; look at its rights"):
        open_table(tmp_path / "x.json", cache_dir=tmp_path / "c")


@pytest.mark.parametrize(
    ("name", "raw", "told"),
    [
        ("x.frec", {"records": 2**62}, r"\d+ records of 8 bytes need"),
        ("x.frec", {"records": 2, "shape": [2**31]}, "too large"),
        ("x.npy", "(9223372036854775807, 9223372036854775807)", "needs"),
        ("x.npy", "(-1,)", "shape"),
        ("x.npy", "(1e3,)", "header is broken|shape"),
        ("x.npy", "(True,)", "shape|needs"),
    ],
)  # fmt: skip
def test_sizes_that_no_file_has_are_refused(name: str, raw: Any, told: str, tmp_path: Path) -> None:
    if name == "x.frec":
        field = {"name": "input", "dtype": "<f4", "shape": raw.get("shape", [2])}
        text = json.dumps({"version": 1, "records": raw["records"], "fields": [field]}).encode()
        content = MAGIC + len(text).to_bytes(8, "little") + text + bytes(64)
    else:
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {raw}, }}".encode()
        header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + b"\n"
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        open_table(tmp_path / name, cache_dir=tmp_path / "c")
