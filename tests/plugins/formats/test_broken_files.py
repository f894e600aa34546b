"""Broken and hostile files: each is refused by name and place, and nothing in one is run."""

from __future__ import annotations

import collections
import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers.fixed_records import MAGIC, write_records

GOOD = {"input": np.ones((3, 2), np.float32), "target": np.arange(3)}


def records(*rows: Any) -> bytes:
    return json.dumps(list(rows)).encode()


ONE = {"input": [1.0, 2.0], "target": 1}
J = "x.json"

JSON: list[tuple[str, str, bytes, str]] = [
    ("empty", J, b"", "empty"),
    ("blanks", J, b"  \n ", "empty"),
    ("no record", J, b"[]", "no records"),
    ("an empty object", J, b"{}", "no field"),
    ("scalars", J, b"[1, 2]", r"record 0: .*not an object"),
    ("a text", J, b'"abc"', "begins with"),
    ("cut short", J, records(ONE, ONE)[:-9], r"line 1 column \d+, record 1"),
    ("trailing comma", J, b'[{"input": [1]},]', r"line 1 column"),
    ("two tops", J, b'[{"input": [1]}] [2]', r"line 1 column"),
    ("NaN", J, b'[{"input": [1]}, {"input": [NaN]}]', r"record 1, field 'input': NaN and Infinity are not JSON"),
    ("Infinity", J, b'[{"input": [Infinity]}]', r"record 0, field 'input': NaN and Inf"),
    ("beyond floats", J, b'[{"input": [1e999]}]', "record 0"),
    ("beyond 32-bit floats", J, records(ONE, {**ONE, "input": [1e39, 0.5]}), "record 1.*'input'.*large"),
    ("doubled key", J, b'[{"input": [1]}, {"input": [1], "input": [2]}]', "record 1.*'input'.*twice"),
    ("doubled, blanks", J, b'[{"input"\t: [1], "input" :[2]}]', "record 0.*'input'.*twice"),
    ("doubled, quotes", J, b'[{"input": [1], "a\\":": 2, "a\\":": 2}]', "record 0.*twice"),
    ("ragged inside", J, records({"input": [[1, 2], [3]]}), "record 0.*'input'.*ragged"),
    ("ragged rows", J, records(ONE, {**ONE, "input": [1.0]}), r"record 1.*'input'.*\[1\], not \[2\]"),
    ("missing field", J, records(ONE, {"input": [1, 2]}), "record 1.*'target'.*missing"),
    ("late target", J, records({"input": [1, 2]}, ONE), "record 1.*'target'.*do not have"),
    ("null", J, records({"input": [None]}), "record 0.*'input'.*null"),
    ("text for a number", J, records({"input": ["1"]}), "record 0.*'input'.*str"),
    ("object for a number", J, records({"input": {"a": 1}}), "record 0.*'input'.*dict"),
    ("no input", J, records({"x": [1]}), "'input'.*no field"),
    ("empty features", J, records({"input": []}), "'input'.*no number"),
    ("beyond 64 bits", J, records({"input": [2**63]}), "record 0.*'input'.*64 bits"),
    ("rounded integer", J, records({"input": [0.5, 2**60 + 1]}), "record 0.*'input'.*rounded"),
    ("brackets", J, b"[" * 100_000, "line 1 column"),
    ("nested lists", J, b'[{"input":' + b"[" * 12 + b"1" + b"]" * 12 + b"}]", "nested deeper"),
    ("nested objects", J, b'[{"a":' * 400 + b"1" + b"}]" * 400, "there is no field 'input'; there are \\['a'\\]"),
    ("bad UTF-8", J, b'[{"input": [1], "\xff": 2}]', "line 1"),
    ("lone surrogate", J, b'[{"input": [1], "\\ud800": 2}]', "line 1"),
    ("columns of two lengths", J, b'{"input": [[1], [2]], "target": [1]}', "'target'.*1 records"),
    ("a column that is none", J, b'{"input": [[1], [2]], "target": null}', "'target'.*not a list"),
    ("lines: bad line", "x.jsonl", b'{"input": [1]}\n\n{"input": [1\n', "line 3"),
    ("lines: no object", "x.jsonl", b'{"input": [1]}\n\n3\n', "line 3, record 1"),
    ("lines: doubled", "x.jsonl", b'{"input": [1]}\n{"input": [1], "input": [1]}\n', "line 2.*twice"),
    ("lines: ragged", "x.jsonl", b'{"input": [1]}\n{"input": [1, 2]}\n', "line 2, record 1, field 'input'"),
    ("gzip cut", "x.json.gz", gzip.compress(records(*[ONE] * 99), mtime=0)[:-12], "gzip data are broken"),
    ("gzip flipped", "x.json.gz", gzip.compress(records(ONE), mtime=0)[:12] + b"\xff\xff" + bytes(9), "gzip"),
    ("gzip bomb", "x.json.gz", gzip.compress(gzip.compress(bytes(2**20), mtime=0)[:2] + bytes(2**26), mtime=0), "expands|begins"),
]  # fmt: skip


class Payload:
    """What a hostile author writes: a call that the pickle makes when it is read."""

    def __init__(self, function: Any, *values: Any) -> None:
        self._call = function, values

    def __reduce__(self) -> Any:
        return self._call


MARK = "ran-by-pickle"
P = "x.pkl"
touch = Payload(os.system, f"touch {MARK}")
REAL = pickle.dumps({"input": np.arange(6.0).reshape(3, 2)})
NDARRAY = b"\x80\x02cnumpy\nndarray\n(J\x00\x00\x00\x10tR."  # ndarray(2**28), asked for directly


ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    b"(I1\n(I1\nt%sI00\nS'8 bytes.'\ntb."
)


class Odd:
    """A class of the author's own."""


PICKLES: list[tuple[str, str, bytes, str]] = [
    ("os.system", P, pickle.dumps([touch]), r"names posix\.system"),
    ("os.system, protocol 0", P, pickle.dumps(touch, 0), r"names posix\.system"),
    ("eval", P, pickle.dumps({"input": Payload(eval, f"open('{MARK}', 'w')")}), r"builtins\.eval"),
    ("open", P, pickle.dumps(Payload(open, MARK, "w")), r"names io\.open|_io\.open"),
    ("in an object array", P, pickle.dumps({"input": np.array([touch], object)}), "'O8'|posix"),
    ("INST", P, b"(S'touch %s'\nios\nsystem\n." % MARK.encode(), r"names os\.system"),
    ("getattr", P, b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'x'\ntR.", r"builtins\.getattr"),
    ("dotted name", P, b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.", "names numpy"),
    ("numpy by prefix", P, b"cnumpy.testing\nrundocs\n.", r"numpy\.testing\.rundocs"),
    ("defaultdict", P, pickle.dumps([collections.defaultdict(int, ONE)]), r"names collections\.defaultdict"),
    ("own class", P, pickle.dumps([{"input": Odd()}]), "names .*Odd"),
    ("copyreg", P, b"ccopyreg\n_reconstructor\n.", "copyreg"),
    ("persistent id", P, b"\x80\x02X\x01\x00\x00\x00aQ.", "outside the file"),
    ("extension", P, b"\x80\x02\x82\x01.", "byte 0: is broken: unregistered extension"),
    ("state on a name", P, b"cnumpy\nndarray\n}S'a'\nI1\nsb.", "given a state"),
    ("direct array", P, NDARRAY, "is called as|called directly"),
    ("array without values", P, b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nI0\nS'b'\ntR.", "without values"),
    ("hostile dtype", P, ARRAY % b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'<'\nS'x'\nNNI-1\nI-1\nI63\ntb", "records"),
    ("object dtype", P, pickle.dumps({"input": np.array(["a", None], object)}), "not of numbers"),
    ("text array", P, pickle.dumps({"input": np.array(["a"])}), "not of numbers"),
    ("complex", P, pickle.dumps([{"input": 1j}]), "names builtins.complex"),
    ("short buffer", P, REAL.replace(b"K\x03K\x02", b"K\x63K\x02"), r"an array of the shape \(99, 2\) in 48 bytes"),
    ("cut short", P, REAL[:-20], r"byte \d+: is broken"),
    ("no stop", P, REAL[:-1], "byte 0: is broken: pickle data was truncated"),
    ("trailing bytes", P, REAL + b"x", rf"byte {len(REAL)}: is broken"),
    ("two objects of two shapes", P, REAL + pickle.dumps({"input": np.ones((3, 3))}), r"record 3, field 'input': has the shape \[3\], not \[2\]"),
    ("1 TiB of bytes", P, b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "byte 0: needs more memory than a file of 13 bytes may have"),
    ("huge memo", P, b"\x80\x02Nr\xff\xff\xff\x7f.", "byte 0: needs more memory"),
    ("no pickle", P, b"hello, this is text", r"byte \d+: is broken"),
    ("empty stack", P, b"\x80\x020.", "byte 0: is broken: unpickling stack underflow"),
    ("append to a name", P, b"cnumpy\nndarray\nI1\na.", "byte 0: is broken"),
    ("a number", P, pickle.dumps(3), "the whole is a int"),
    ("a set", P, pickle.dumps([{"input": {1, 2}}]), "record 0, field 'input': .* the type set"),
    ("text records", P, pickle.dumps([{"input": "abc"}]), "record 0.*'input'.*str"),
    ("ragged arrays", P, pickle.dumps([{"input": np.ones(2)}, {"input": np.ones(3)}]), "record 1.*'input'"),
    ("numbers as names", P, pickle.dumps([{1: 2}]), "record 0.*name"),
    ("two lengths", P, pickle.dumps({"input": np.ones(2), "target": np.ones(3)}), "'target'.*3 records"),
]  # fmt: skip


def doubling() -> bytes:
    value: Any = [0.5]
    for _ in range(40):
        value = [value, value]
    return pickle.dumps([{"input": value}])


def circle() -> bytes:
    value: list[Any] = []
    value.append(value)
    return pickle.dumps([{"input": value}])


PICKLES += [
    ("doubled lists", P, doubling(), "nested deeper"),
    ("a circle", P, circle(), "nested deeper"),
]


def hdf5(write: Callable[[h5py.File], Any]) -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        write(file)
    return stream.getvalue()


def chunked() -> bytes:
    values = np.random.default_rng(0).integers(0, 99, (2000, 8))
    return hdf5(
        lambda f: f.create_dataset("input", data=values, chunks=(500, 8), compression="gzip")
    )


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes(64) + raw[at + 64 :]


def bomb(f: h5py.File) -> None:
    f.create_dataset("input", (2**22, 64), "f8", chunks=(2**16, 64), compression="gzip")
    f["input"][:65536] = 0


def virtual(f: h5py.File) -> None:
    layout = h5py.VirtualLayout((3, 2), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "input", (3, 2))
    f.create_virtual_dataset("input", layout)


H = "x.h5"
HDF5: list[tuple[str, str, bytes, str]] = [
    ("no HDF5", H, b"\x89HDF\r\n\x1a\n" + bytes(99), "cannot be opened"),
    ("text", H, b"hello", "cannot be opened"),
    ("cut short", H, hdf5(lambda f: f.create_dataset("input", data=np.ones((99, 9))))[:-500], "cannot be opened"),
    ("cut chunk", H, chunked()[:-300], "cannot be opened"),
    ("flipped chunk", H, flipped(chunked(), len(chunked()) * 3 // 4), "'input'.*cannot be|'input'.*chunk"),
    ("no input", H, hdf5(lambda f: f.create_dataset("x", data=np.ones(3))), "no field 'input'"),
    ("two lengths", H, hdf5(lambda f: (f.create_dataset("input", data=np.ones((3, 2))), f.create_dataset("target", data=np.ones(2)))), "'target'.*2 records"),
    ("scalar", H, hdf5(lambda f: f.create_dataset("input", data=1.0)), "'input'.*single number"),
    ("null space", H, hdf5(lambda f: f.create_dataset("input", data=h5py.Empty("f4"))), "'input'.*empty"),
    ("no rows", H, hdf5(lambda f: f.create_dataset("input", (0, 3), "f4")), "no records"),
    ("objects", H, hdf5(lambda f: f.create_dataset("input", data=["a"], dtype=h5py.string_dtype())), "'input'.*objects"),
    ("ragged", H, hdf5(lambda f: f.create_dataset("input", (2,), dtype=h5py.vlen_dtype("f4"))), "'input'.*objects"),
    ("compound", H, hdf5(lambda f: f.create_dataset("input", (2,), dtype=[("a", "f4")])), "'input'.*not numbers"),
    ("a group", H, hdf5(lambda f: f.create_group("input")), "'input'.*group"),
    ("external link", H, hdf5(lambda f: f.__setitem__("input", h5py.ExternalLink("other.h5", "/x"))), "'input'.*ExternalLink"),
    ("soft link", H, hdf5(lambda f: f.__setitem__("input", h5py.SoftLink("/nowhere"))), "'input'.*SoftLink"),
    ("external storage", H, hdf5(lambda f: f.create_dataset("input", (4,), "u1", external=[("/etc/hostname", 0, 4)])), "'input'.*other files"),
    ("virtual", H, hdf5(virtual), "'input'.*other files"),
    ("nothing stored", H, hdf5(lambda f: f.create_dataset("input", (10**12,), "f4", chunks=(1024,))), "'input'.*stores"),
    ("bomb", H, hdf5(bomb), "'input'.*stores"),
]  # fmt: skip


def frec(header: Any, body: bytes = bytes(24)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(8, "little") + text + body


def about(**changes: Any) -> dict[str, Any]:
    field = {"name": "input", "dtype": "<f4", "shape": [2], **changes}
    return {"version": 1, "records": 3, "fields": [field]}


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def zipped(method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def tensors(header: Any, body: bytes = bytes(24)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(**changes: Any) -> dict[str, Any]:
    return {"input": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24], **changes}}


def saved(value: Any, *, archive: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=archive)
    return stream.getvalue()


def program() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    return stream.getvalue()


def repacked(raw: bytes) -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(raw)) as archive,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in archive.namelist():
            packed.writestr(member, archive.read(member))
    return stream.getvalue()


B, N, Z, S = "x.frec", "x.npy", "x.npz", "x.safetensors"
OTHERS: list[tuple[str, str, bytes, str]] = [
    ("binary: other magic", B, b"FORGEDAT" + bytes(40), "begins with"),
    ("binary: only magic", B, MAGIC, "header's length"),
    ("binary: endless header", B, MAGIC + b"\xff" * 8 + bytes(9), "byte 8.*header's length"),
    ("binary: header no JSON", B, frec(b"{nonsense"), "byte 16.*not JSON"),
    ("binary: nested header", B, frec(b"[" * 90_000), "not JSON"),
    ("binary: other version", B, frec({**about(), "version": 2}), "version 1"),
    ("binary: no fields", B, frec({"version": 1, "records": 3}), "lacks"),
    ("binary: negative count", B, frec({**about(), "records": -1}), "lacks"),
    ("binary: object type", B, frec(about(dtype="O")), "'input'.*not numbers"),
    ("binary: unknown type", B, frec(about(dtype="f99")), "'input'.*unknown"),
    ("binary: type of records", B, frec(about(dtype="f4,f4")), "'input'.*not numbers"),
    ("binary: shape", B, frec(about(shape=[-2])), "'input'.*shape"),
    ("binary: huge shape", B, frec(about(shape=[2**40])), "'input'.*too large"),
    ("binary: cut short", B, frec(about())[:-5], "record 2: 3 records of 8 bytes"),
    ("binary: too long", B, frec(about()) + b"x", "record 3: 3 records of 8 bytes"),
    ("binary: twice", B, frec({**about(), "fields": about()["fields"] * 2}), "twice"),
    ("npy: objects", N, npy(np.array([touch], object)), "objects"),
    ("npy: texts", N, npy(np.array(["a"])), "not numbers"),
    ("npy: complex", N, npy(np.ones(2, complex)), "not numbers"),
    ("npy: cut short", N, npy(np.ones((9, 9)))[:-8], r"needs 648 bytes; there are 640"),
    ("npy: too long", N, npy(np.ones((9, 9))) + b"x", "needs"),
    ("npy: header code", N, npy(np.ones(3)).replace(b"'<f8'", b"f(8) "), "header is broken"),
    ("npy: huge shape", N, npy(np.ones(3)).replace(b"(3,), }      ", b"(3000000000,)"), "header is broken|needs"),
    ("npy: no rows", N, npy(np.ones((0, 3))), "no records"),
    ("npy: one number", N, npy(np.array(1.0)), "single number"),
    ("npy: magic only", N, b"\x93NUMPY\x01\x00", "header is broken"),
    ("npy: fields without input", N, npy(np.zeros(3, [("a", "f4")])), "no field 'input'"),
    ("npz: cut", Z, zipped(input=npy(np.ones(99)))[:-30], "archive is broken"),
    ("npz: no array", Z, zipped(input=b"hello"), "'input'.*header"),
    ("npz: objects", Z, zipped(input=npy(np.array([touch], object))), "'input'.*objects"),
    ("npz: bomb", Z, zipped(input=npy(np.zeros(2**24))), "'input'.*expand"),
    ("npz: flipped", Z, flipped(zipped(input=npy(np.arange(999.0))), 500), "archive is broken"),
    ("npz: two lengths", Z, zipped(input=npy(np.ones(2)), target=npy(np.ones(3))), "'target'.*3 records"),
    ("npz: no input", Z, zipped(x=npy(np.ones(2))), "no field 'input'"),
    ("safetensors: short", S, b"abc", "header's length"),
    ("safetensors: endless header", S, b"\xff" * 8 + b"{}", "header's length"),
    ("safetensors: no JSON", S, tensors(b"{nope"), "not JSON"),
    ("safetensors: a list", S, tensors([]), "no object"),
    ("safetensors: no shape", S, tensors({"input": 3}), "'input'.*no shape"),
    ("safetensors: bfloat16", S, tensors(entry(dtype="BF16")), "'input'.*save it as float"),
    ("safetensors: outside", S, tensors(entry(data_offsets=[8, 32])), "'input'.*not 24 bytes"),
    ("safetensors: before", S, tensors(entry(data_offsets=[-8, 16])), "'input'.*not 24 bytes"),
    ("safetensors: size", S, tensors(entry(shape=[3, 3])), "'input'.*not 36 bytes"),
    ("safetensors: negative", S, tensors(entry(shape=[-3, -2])), "'input'.*shape"),
    ("safetensors: huge", S, tensors(entry(shape=[2**40, 2**40])), "'input'"),
    ("safetensors: no rows", S, tensors(entry(shape=[0, 2], data_offsets=[0, 0])), "no records"),
    ("unknown", "x.xyz", b"hello", "neither"),
    ("torch: text", "x.pt", b"hello", "no archive of torch.save"),
    ("torch: cut", "x.pt", saved({"input": torch.ones(9)})[:-30], "no archive of torch.save"),
    ("torch: a class", "x.pt", saved({"input": [Odd()]}), r"is refused: it names \S*Odd"),
    ("torch: a call", "x.pt", saved(touch), r"is refused: it names posix\.system"),
    ("torch: before archives", "x.pt", saved(GOOD["input"], archive=False), "before torch 1.6"),
    ("torch: the same as a pickle", P, saved(GOOD["input"], archive=False), "before torch 1.6"),
    ("torch: a program", "x.pt", program(), "TorchScript program"),
    ("torch: packed", "x.pt", repacked(saved({"input": torch.ones(9)})), "no archive of torch.save"),
    ("torch: no input", "x.pt", saved({"weight": torch.ones(9)}), "no field 'input'; there are .'weight'."),
]  # fmt: skip

CASES = [*JSON, *PICKLES, *HDF5, *OTHERS]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [pytest.param(*case[1:], id=f"{case[1]} {case[0]}") for case in CASES],
)
def test_a_broken_file_is_refused_by_name_and_place(
    name: str, content: bytes, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){told}") as caught:
        open_table(tmp_path / name, cache_dir=tmp_path / "cache")
    assert str(tmp_path / name) in str(caught.value)
    assert caught.value.hint, "no word of how to mend it"
    assert not (tmp_path / MARK).exists(), "code of the file was run"
    left = list((tmp_path / "cache").rglob("*")) if (tmp_path / "cache").exists() else []
    assert not left, "a refused file left something in the cache"


def test_there_are_many_broken_files() -> None:
    assert len({(case[0], case[1]) for case in CASES}) == len(CASES) >= 60


@pytest.mark.spec("B12")
def test_the_same_pickle_runs_when_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / P).write_bytes(pickle.dumps(touch))
    with pytest.raises(DataError, match="the whole is a int"):  # what the call returned
        trusting = Reading(trust_pickle=True)
        open_table(tmp_path / P, "auto", trusting, cache_dir=tmp_path / "cache")
    assert (tmp_path / MARK).exists()


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(DataError, match="no such file"):
            open_table(place)


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.bin").write_bytes(bytes(7))
    with pytest.raises(DataError, match="byte 6.*no whole number of uint16"):
        open_table(tmp_path / "t.bin", "tokens", Reading(length=2))
    with pytest.raises(DataError, match="no window"):
        open_table(tmp_path / "t.bin", "tokens", Reading(integers="uint8", length=7))


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(records(ONE))
    (tmp_path / "cache").write_text("a file stands here")
    with pytest.raises(DataError, match="cache_dir"):
        open_table(tmp_path / "x.json", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", [B, N, Z, S, H, P, J])
def test_no_cut_of_a_good_file_raises_anything_else(name: str, tmp_path: Path) -> None:
    writers: dict[str, Callable[[Path], Any]] = {
        B: lambda file: write_records(file, GOOD),
        N: lambda file: np.save(file, GOOD["input"]),
        Z: lambda file: np.savez(file, **GOOD),
        S: lambda file: file.write_bytes(tensors(entry())),
        H: lambda file: file.write_bytes(chunked()),
        P: lambda file: file.write_bytes(pickle.dumps(GOOD)),
        J: lambda file: file.write_bytes(records(ONE, ONE)),
    }
    writers[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    open_table(tmp_path / name, cache_dir=tmp_path / "cache")
    for length in range(0, len(whole), max(1, len(whole) // 30)):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(DataError):
            open_table(tmp_path / name, cache_dir=tmp_path / "cache")
    generator = np.random.default_rng(1)
    for _ in range(30):  # a flipped byte may pass unnoticed; it may not raise anything else
        broken = bytearray(whole)
        broken[int(generator.integers(len(whole)))] ^= int(generator.integers(1, 256))
        (tmp_path / name).write_bytes(broken)
        with contextlib.suppress(DataError):
            open_table(tmp_path / name, cache_dir=tmp_path / "cache")


def test_a_small_parquet_file_that_expands_to_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    """Red when it is unpacked until the disk or the memory is full."""
    import pyarrow
    import pyarrow.parquet

    columns = [("input", pyarrow.float64()), ("target", pyarrow.int64())]
    zeros = pyarrow.table(
        {"input": np.zeros(2**23), "target": np.zeros(2**23, np.int64)}, pyarrow.schema(columns)
    )
    file = tmp_path / "x.parquet"
    with pyarrow.parquet.ParquetWriter(file, zeros.schema, compression="zstd") as writer:
        for _ in range(5):
            writer.write_table(zeros)
    assert file.stat().st_size < 2**19
    with pytest.raises(DataError, match=r"field 'input': \d+ bytes expand to 671088640"):
        open_table(file, "auto", Reading(target="target"), cache_dir=tmp_path / "c")
    assert sum(part.stat().st_size for part in tmp_path.rglob("c/**/*") if part.is_file()) < 2**20
