"""No opcode of a pickle runs what the pickle names, makes an object of it, or changes one of ours.

Planted faults: `find_class` that imports (red: each route), a `Constructor` without `__setstate__`
whose attributes can be set (red: states).
"""

from __future__ import annotations

import copyreg
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers import sandbox
from forge_plugins.formats.readers.pickle_values import NAMES

MARK = Path("ran")


class Trap:
    """Leaves a mark on the disk when it is made or changed; it may be in another process."""

    def __new__(cls, *_: Any, **__: Any) -> Trap:
        MARK.touch()
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        MARK.touch()

    def __setitem__(self, key: Any, value: Any) -> None:
        MARK.touch()

    def append(self, value: Any) -> None:
        MARK.touch()

    extend = add = append


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


SHELL = text(f"touch {MARK}")
SYSTEM = b"cposix\nsystem\n"
STACKED = text("posix") + text("system") + b"\x93"
TRAP = f"c{__name__}\nTrap\n".encode()
GETATTR = b"cbuiltins\ngetattr\n"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
NDARRAY = b"cnumpy\nndarray\n"
FLOAT = b"cnumpy\ndtype\n" + text("f8") + b"\x85R"
EMPTY = RECONSTRUCT + b"(" + NDARRAY + b"K\x00\x85C\x01btR"

ROUTES: dict[str, tuple[bytes, str]] = {
    "GLOBAL, REDUCE": (SYSTEM + SHELL + b"\x85R", "posix.system"),
    "STACK_GLOBAL, REDUCE": (STACKED + SHELL + b"\x85R", "posix.system"),
    "by way of the memo": (SYSTEM + b"q\x050" + b"h\x05" + SHELL + b"\x85R", "posix.system"),
    "INST": (b"(" + SHELL + b"iposix\nsystem\n", "posix.system"),
    "OBJ": (b"(" + SYSTEM + SHELL + b"o", "posix.system"),
    "NEWOBJ of a function": (SYSTEM + SHELL + b"\x85\x81", "posix.system"),
    "NEWOBJ": (TRAP + b")\x81", "Trap"),
    "NEWOBJ_EX": (TRAP + b")}" + text("a") + b"K\x01s\x92", "Trap"),
    "INST of a class": (b"(i" + TRAP[1:], "Trap"),
    "OBJ of a class": (b"(" + TRAP + b"o", "Trap"),
    "REDUCE of a class": (TRAP + b")R", "Trap"),
    "BUILD": (TRAP + b")\x81}" + text("a") + b"K\x01sb", "Trap"),
    "BUILD with slots": (TRAP + b")\x81}}" + text("a") + b"K\x01s\x86b", "Trap"),
    "BUILD of a dict": (TRAP + b")\x81}" + text("__class__") + SYSTEM + b"sb", "Trap"),
    "SETITEMS": (TRAP + b")\x81(K\x01K\x02u", "Trap"),
    "APPENDS": (TRAP + b")\x81(K\x01K\x02e", "Trap"),
    "ADDITEMS": (TRAP + b")\x81(K\x01\x90", "Trap"),
    "getattr": (GETATTR + TRAP + text("append") + b"\x86RK\x01\x85R", "builtins.getattr"),
    "getattr of getattr": (
        GETATTR * 3 + text("__self__") + b"\x86R" + text("exec") + b"\x86R" + SHELL + b"\x85R",
        "builtins.getattr",
    ),
    "apply": (b"c__builtin__\napply\n" + SYSTEM + SHELL + b"\x85\x86R", "apply"),
    "map": (b"cbuiltins\nmap\n" + SYSTEM + SHELL + b"\x85\x86R", "builtins.map"),
    "exec": (b"cbuiltins\nexec\n" + text("open('ran','w')") + b"\x85R", "builtins.exec"),
    "a name in a name": (text("numpy") + text("f2py.os.system") + b"\x93" + SHELL + b"\x85R", "numpy"),
    "a module in a name": (text("os.path") + text("os.system") + b"\x93" + SHELL + b"\x85R", "os.path"),
    "partial": (b"cfunctools\npartial\n" + SYSTEM + SHELL + b"\x86R)R", "functools.partial"),
    "loads": (b"c_pickle\nloads\nC\x02N.\x85R", "_pickle.loads"),
    "load of torch": (b"ctorch\nload\n" + text("x") + b"\x85R", "torch.load"),
    "load of numpy": (b"cnumpy\nload\n" + text("x") + b"NI01\n\x87R", "numpy.load"),
    "an array of a class": (RECONSTRUCT + b"(" + TRAP + b"K\x00\x85C\x01btR", "unknown class"),
    "an array of objects": (
        EMPTY + b"(K\x01K\x01\x85cnumpy\ndtype\n" + text("O") + b"\x85R\x89](" + SYSTEM + b"etb",
        "type 'O'",
    ),
    "an array of a list": (EMPTY + b"(K\x01K\x01\x85" + FLOAT + b"\x89](" + SYSTEM + b"etb", "objects"),
    "an array of huge shape": (
        EMPTY + b"(K\x01\x8a\x08" + b"\xff" * 7 + b"\x7f\x85" + FLOAT + b"\x89C\x08........tb",
        "in 8 bytes",
    ),
    "an array of negative shape": (
        EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + FLOAT + b"\x89C\x08........tb", "without a shape",
    ),
    "a type that is a list": (b"cnumpy\ndtype\n](" + text("f8") + b"e\x85R", "type"),
    "a type with fields": (
        b"cnumpy.core.multiarray\nscalar\n" + b"cnumpy\ndtype\n" + text("V8") + b"\x85RC\x08........\x86R",
        "'V8'",
    ),
    "a scalar of objects": (
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("O") + b"\x85R" + SYSTEM + b"\x86R",
        "type 'O'",
    ),
    "a buffer of a text": (
        b"cnumpy.core.numeric\n_frombuffer\n(" + text("x" * 8) + FLOAT + b"K\x01\x85" + text("C") + b"tR",
        "objects",
    ),
    "a tensor of a bad storage": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"ctorch.storage\n_load_from_bytes\nC\x01N\x85R"
        b"K\x00K\x01\x85K\x01\x85\x89NtR",
        "storage that is broken",
    ),
    "a tensor of a storage that calls": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"ctorch.storage\n_load_from_bytes\nC"
        + bytes([len(SYSTEM + SHELL) + 3]) + SYSTEM + SHELL + b"\x85R.\x85RK\x00K\x01\x85K\x01\x85\x89NtR",
        "storage",
    ),
    "persistent": (text("x") + b"Q", "outside the file"),
    "persistent, of objects": (SYSTEM + SHELL + b"\x85RQ", "outside the file"),
}  # fmt: skip
REFUSED_AT_ONCE: dict[str, bytes] = {
    "a state on a constructor": NDARRAY + b"}" + text("make") + SYSTEM + b"sb",
    "slots of a constructor": NDARRAY + b"N}" + text("make") + SYSTEM + b"s\x86b",
    "a state on a class": TRAP + b"}" + text("message") + SYSTEM + b"sb",
    "items of a class": TRAP + b"(K\x01e",
    "a state on a list": b"]}" + text("append") + SYSTEM + b"sb",
    "a state on a number": b"K\x01}" + text("real") + SYSTEM + b"sb",
    "NEWOBJ of a constructor": NDARRAY + b")\x81",
    "items of a constructor": NDARRAY + b"(K\x01K\x02u",
    "a call of a number": b"K\x01)R",
    "EXT1": b"\x82\x01",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "a buffer outside": b"\x97",
    "a list as a key": b"}]K\x01s",
    "a name that is no text": b"K\x01K\x02\x93",
    "protocol 9": b"\x80\x09N",
    "an unknown opcode": b"\xff",
    "cut in a length": b"\x8d\xff",
    "cut in a text": b"\x8c\xffabc",
    "a frame beyond the end": b"\x95" + struct.pack("<Q", 2**62) + b"N",
    "a frame of no length": b"\x95" + struct.pack("<Q", 2**64 - 1) + b"N",
    "bytes of 8 EiB": b"\x8e" + struct.pack("<Q", 2**63 - 1),
    "bytes of 2 GiB": b"\x8e" + struct.pack("<Q", 2**31),
    "a bytearray of 1 TiB": b"\x96" + struct.pack("<Q", 2**40),
    "a text of 1 TiB": b"\x8d" + struct.pack("<Q", 2**40),
    "an integer of 2 GiB": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "an integer of negative length": b"\x8b" + struct.pack("<i", -1),
    "an integer of many digits": b"L" + b"9" * 10_000 + b"L\n",
    "a memo of a gigabyte": b"Nr\xff\xff\xff\x03",
    "lists that double": b"](K\x01K\x01e" + b"q\x00(h\x00h\x00h\x00h\x00l" * 40,
    "marks": b"(" * 2**20,
    "nothing to pop": b"0000",
}


def pickled(payload: bytes, field: str) -> bytes:
    """One record with the payload in a field, beside an input that is whole."""
    whole = b"" if field == "input" else text("input") + b"](G" + struct.pack(">d", 1.5) + b"e"
    return b"\x80\x04](}(" + whole + text(field) + payload + b"ue."


def opened(folder: Path, raw: bytes) -> Any:
    (folder / "x.pkl").write_bytes(raw)
    return open_table(folder / "x.pkl", "auto", Reading(target=None), cache_dir=folder / "c")


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.spec("B12")
@pytest.mark.parametrize("route", ROUTES)
def test_what_a_pickle_names_is_refused_by_name_and_left_alone_elsewhere(
    route: str, tmp_path: Path
) -> None:
    payload, message = ROUTES[route]
    with pytest.raises(DataError, match=f"is refused: .*{message}.*trust_pickle"):
        opened(tmp_path, pickled(payload, "input"))
    table = opened(tmp_path, pickled(payload, "a user's own"))
    assert table.columns["input"].tolist() == [[1.5]]
    assert not MARK.exists()


@pytest.mark.parametrize("route", REFUSED_AT_ONCE)
def test_what_no_pickler_writes_is_refused_wherever_it_stands(route: str, tmp_path: Path) -> None:
    for field in ("input", "a user's own"):
        with pytest.raises(DataError) as caught:
            opened(tmp_path, pickled(REFUSED_AT_ONCE[route], field))
        assert caught.value.hint
    assert not MARK.exists()


def test_the_traps_work(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickled(TRAP + b")R", "input"))
    with pytest.raises(DataError, match="the type Trap"):
        open_table(
            tmp_path / "x.pkl", "auto", Reading(target=None, trust_pickle=True),
            cache_dir=tmp_path / "c",
        )  # fmt: skip
    assert MARK.exists()


def test_the_list_of_names_is_short_and_of_our_own_functions() -> None:
    assert len(NAMES) <= 11
    makers = {constructor.make.__module__ for constructor in NAMES.values()}
    assert makers == {"forge_plugins.formats.readers.pickle_values"}


def test_a_number_that_the_process_knows_a_class_by_is_no_way_around_the_list(
    tmp_path: Path,
) -> None:
    """Planted fault: without `clear_extension_cache` the class itself was called."""
    copyreg.add_extension(__name__, "Trap", 77)
    try:
        assert isinstance(pickle.loads(pickle.dumps(Trap, 2)), type)  # which fills the cache
        with pytest.raises(DataError, match="it names .*Trap"):
            opened(tmp_path, pickled(b"\x82\x4d)R", "input"))
        assert not MARK.exists()
        assert pickle.loads(pickle.dumps(Trap, 2)) is Trap
    finally:
        copyreg.remove_extension(__name__, "Trap", 77)


def test_a_pickle_that_computes_for_ever_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of a tuple of the same two tuples, sixty deep, is that of 2^60 numbers."""
    monkeypatch.setitem(sandbox.run_sandboxed.__kwdefaults__, "patience", 1.0)
    doubled = b"K\x01" + b"q\x00h\x00\x86" * 60
    with pytest.raises(DataError, match="nothing for 1 seconds"):
        opened(tmp_path, pickled(b"}" + doubled + b"K\x01s", "input"))


def test_deep_containers_end_no_process(tmp_path: Path) -> None:
    deep = 2 * 10**5  # of C's frames of a hundred bytes, twice a stack of 8 MB
    for payload in (b"]" * deep + b"a" * (deep - 1), b")" + b"\x85" * deep):
        with pytest.raises(DataError, match="nested deeper"):
            opened(tmp_path, pickled(payload, "input"))
        keyed = b"}" + b")" + b"\x85" * deep + b"K\x01s"
        with pytest.raises(DataError):
            opened(tmp_path, pickled(keyed, "input"))


def test_a_byte_order_of_a_shared_type_is_that_of_its_last_state(tmp_path: Path) -> None:
    array = np.arange(6, dtype=">f8").reshape(3, 2)
    for protocol in range(6):
        raw = pickle.dumps([{"input": row} for row in array], protocol)
        assert opened(tmp_path, raw).columns["input"].tolist() == array.tolist()
