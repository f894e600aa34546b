"""A pickle read by a machine of our own: containers, numbers, texts, arrays, tensors, no more.

It has no opcode that imports, calls or makes anything else, so there is nothing to escape from.
What else a pickle names is kept as a name (`Opaque`) and refused when it is read as data: fields
that nobody asks for may hold dates, texts or objects of any class.
Numbers of arrays stay where they are in the file; the floats of lists are read in runs; and a long
list of records, or a long column in an object of columns, is handed on in parts while it grows. So
a file of any size is read in bounded memory.

Opcodes: the standard library's `pickletools`, protocols 0 to 5.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from forge_plugins.formats.columns.gather import Column
from forge_plugins.formats.readers.pickle_codes import (
    BrokenError,
    argument,
    byte,
    fetched,
    integer,
    line,
)
from forge_plugins.formats.readers.pickle_values import (
    ALLOWED,
    STORAGES,
    Array,
    Dtype,
    Name,
    Opaque,
    RefusedError,
    Storage,
    stored,
)

PART: Final = 4096
"""Items of a list that are handed on at a time."""
HELD: Final = 2**25
"""Bytes of objects, roughly, that may be held at once."""
_NUMBERS: Final = 2**20  # numbers of a column that are handed on at a time
_SMALL: Final = 512  # bytes up to which they are copied out of the file
_INTEGER: Final = 64  # bytes
_LINE: Final = 100  # digits
_TORCH: Final = 0x1950A86A20F9469CFC6C  # what torch's own format begins with
_FLOATS: Final = re.compile(rb"(?:G[\x00-\xff]{8}){4,}+")
_FLOAT: Final = np.dtype([("code", "u1"), ("number", ">f8")])
_SMALL_INTEGERS: Final = re.compile(rb"(?:K[\x00-\xff]){4,}+")
_RUN: Final = 2**16
_CLOSERS: Final = frozenset(b"et")  # opcodes that take all since the mark
_ODD: Final = object()
"""Key of what is wrong with a dict as a whole."""

Take = Callable[["str | None", list[Any]], None]
"""Takes a part of the list that a pickle is (None), or of a column by its name."""


class Growing(list[Any]):
    """A list in the making.

    Args:
        column: where its items are handed on: the name of a column, None for the whole; () when
            they are not.
        held: bytes that were held when it began.
    """

    __slots__ = ("column", "handed", "held", "numbers")

    def __init__(self, column: str | tuple[()] | None, held: int) -> None:
        super().__init__()
        self.column, self.held = column, held
        self.handed = 0
        self.numbers: list[Column] = []

    def add(self, items: list[Any]) -> None:
        """Append items, of which some may be runs of numbers."""
        if not self and all(type(item) is _Run for item in items):
            self.numbers += [item.numbers for item in items]
            return
        self.spread()
        for item in items:
            if type(item) is _Run:
                self += item.numbers.tolist()
            else:
                self.append(item)

    def spread(self) -> None:
        """Hold runs of numbers as items."""
        for numbers in self.numbers:
            self += numbers.tolist()
        self.numbers = []

    def count(self) -> int:  # type: ignore[override]  # of all, not of one value
        """Items that are held."""
        return len(self) + sum(map(len, self.numbers))

    def whole(self) -> Any:
        """Its items: an array when they are floats, or small integers; else a list."""
        kinds = {numbers.dtype for numbers in self.numbers}
        if len(kinds) == 1 and not self:
            return np.concatenate(self.numbers)
        self.spread()
        return list(self)


class _Run:
    """Numbers that follow each other."""

    __slots__ = ("numbers",)

    def __init__(self, numbers: Column) -> None:
        self.numbers = numbers


def plain(value: Any, depth: int = 0) -> Any:
    """A value as readers of records know it: lists, arrays and numbers.

    Raises:
        RefusedError: it is deeper than any record, or something that is no data.
    """
    if depth > 16:
        raise RefusedError("containers inside themselves or nested too deeply")
    result = opened(value)
    if isinstance(result, Mapping):
        if _ODD in result:
            raise RefusedError(result[_ODD])
        return {name: plain(part, depth + 1) for name, part in result.items()}
    if not isinstance(result, list | tuple):
        return result
    if set(map(type, result)) <= {int, float}:
        return list(result)
    items = [plain(part, depth + 1) for part in result]
    return _stacked(items) if depth > 1 else items  # below: rows of one record's field


def opened(value: Any) -> Any:
    """What a shell holds; what a library has made of a trusted pickle, as arrays and numbers.

    Raises:
        RefusedError: it is something that is no data.
    """
    if isinstance(value, Array):
        if value.array is None:
            raise RefusedError(value.told)
        return value.array
    if isinstance(value, Opaque):
        raise RefusedError(value.told)
    if isinstance(value, Name | Dtype | Storage):
        raise RefusedError("a name that is no data")
    if isinstance(value, Growing):
        if value.handed:
            raise RefusedError("a list that is there twice")
        return value.whole()
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, np.generic):
        return value.item()
    return _of_tensor(value) if hasattr(value, "detach") else value


def _of_tensor(tensor: Any) -> Column:
    """The numbers of a torch tensor, of which numpy may not have the type."""
    plain = tensor.detach().cpu()
    try:
        result: Column = plain.numpy()
    except TypeError:
        try:
            result = plain.float().numpy()
        except (TypeError, RuntimeError) as error:
            raise RefusedError(f"a tensor that is no array of numbers ({plain.dtype})") from error
    return result


def _stacked(items: list[Any]) -> Any:
    if not any(type(part) is np.ndarray for part in items):
        return items
    arrays = all(type(part) is np.ndarray for part in items)
    if arrays and len({(part.shape, part.dtype) for part in items}) == 1:
        return np.stack(items)
    return [part.tolist() if type(part) is np.ndarray else part for part in items]


class Machine:
    """Reads one pickle.

    Args:
        view: the file.
        take: takes parts of long lists; None: they are held as a whole.
        torch: names of torch's storages are allowed, and one may be referred to.
    """

    def __init__(self, view: memoryview, take: Take | None = None, *, torch: bool = False) -> None:
        self._view, self._take, self._torch = view, take, torch
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._again: set[int] = set()
        self._memoized = 0
        self.held = 0
        self._codes: dict[int, Callable[[int], int]] = {
            code: getattr(self, f"_{name}") for name, codes in _HANDLERS.items() for code in codes
        }

    def run(self, place: int) -> tuple[Any, int]:
        """The value of the pickle at a place, and the place after it.

        Raises:
            BrokenError: it is no whole pickle.
            RefusedError: it holds what is not allowed, or too much at once.
        """
        self._again, end = fetched(self._view, place)
        codes, view = self._codes, self._view
        for _ in range(place, end - 1):
            if place >= end - 1:
                break
            code = view[place]
            handler = codes.get(code)
            if handler is None:
                raise BrokenError(f"there is no opcode {code:#04x}", place)
            try:
                place = handler(place)
            except (IndexError, struct.error, UnicodeError) as error:
                raise BrokenError("its opcodes do not fit each other", place) from error
            if self.held > HELD:
                message = f"more than {HELD} bytes of objects at once, beside arrays"
                raise RefusedError(f"{message}: give a list of records, columns or arrays")
        if self._marks or len(self._stack) != 1:
            raise BrokenError("its opcodes do not fit each other", end - 1)
        return self._stack.pop(), end

    # numbers

    def _float(self, place: int) -> int:
        """Of 8 bytes; a run of them is taken at once where all go into one list."""
        view = self._view
        run = _FLOATS.match(view, place, min(len(view), place + 9 * _RUN))
        if run is not None and run.end() < len(view) and view[run.end()] in _CLOSERS:
            result = np.frombuffer(view[place : run.end()], _FLOAT)["number"].astype(np.float64)
            self._push(_Run(result), 100 + result.nbytes)
            return run.end()
        self._push(struct.unpack(">d", view[place + 1 : place + 9])[0], 32)
        return place + 9

    def _small_integer(self, place: int) -> int:
        view = self._view
        run = _SMALL_INTEGERS.match(view, place, min(len(view), place + 2 * _RUN))
        if run is not None and run.end() < len(view) and view[run.end()] in _CLOSERS:
            result = np.frombuffer(view[place + 1 : run.end() : 2].tobytes(), np.uint8)
            self._push(_Run(result.astype(np.int64)), 100 + 8 * len(result))
            return run.end()
        self._push(byte(view, place + 1), 32)
        return place + 2

    def _integer(self, place: int) -> int:
        width, signed = (2, False) if self._view[place] == 0x4D else (4, True)
        raw = self._view[place + 1 : place + 1 + width]
        self._push(int.from_bytes(raw, "little", signed=signed), 32)
        return place + 1 + width

    def _long_integer(self, place: int) -> int:
        begin, end = argument(self._view, place)
        if end - begin > _INTEGER:
            self._push(Opaque(f"an integer of {end - begin} bytes"), 64)
            return end
        self._push(int.from_bytes(self._view[begin:end], "little", signed=True), 64)
        return end

    def _integer_line(self, place: int) -> int:
        text, after = line(self._view, place + 1)
        truth = {b"00": False, b"01": True}.get(text)
        if len(text) > _LINE and text.strip(b"+-L").isdigit():
            self._push(Opaque(f"an integer of {len(text)} digits"), 64)
            return after
        number = integer(text.removesuffix(b"L"), place)
        self._push(number if truth is None else truth, 64)
        return after

    def _float_line(self, place: int) -> int:
        text, after = line(self._view, place + 1)
        try:
            self._push(float(text), 32)
        except ValueError:
            raise BrokenError(f"{text[:40]!r} is no number", place) from None
        return after

    def _constant(self, place: int) -> int:
        self._push({0x4E: None, 0x88: True, 0x89: False}[self._view[place]], 8)
        return place + 1

    # texts and bytes

    def _text(self, place: int) -> int:
        begin, end = argument(self._view, place)
        code = self._view[place]
        kind = "latin1" if code in b"TU" else "utf-8"
        self.held += 4 * (end - begin)
        if self.held <= HELD:
            self._push(str(self._view[begin:end], kind, "surrogatepass"), 60)
        return end

    def _text_line(self, place: int) -> int:
        text, after = line(self._view, place + 1)
        self.held += 8 * len(text)
        if self._view[place] == 0x56:
            self._push(str(text, "raw-unicode-escape"), 60)
            return after
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in b"'\"":
            raise BrokenError("a text without quotes", place)
        try:
            raw, _ = codecs.escape_decode(text[1:-1])
        except ValueError:
            raise BrokenError("a text with a strange escape", place) from None
        self._push(str(raw, "latin1"), 60)
        return after

    def _bytes(self, place: int) -> int:
        """Where they lie, if they are many."""
        begin, end = argument(self._view, place)
        part = self._view[begin:end]
        self._push(bytes(part) if end - begin <= _SMALL else part, 200)
        return end

    # containers

    def _mark(self, place: int) -> int:
        self._marks.append(self._stack)
        self._stack = []
        self.held += 80
        return place + 1

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _empty_list(self, place: int) -> int:
        self._push(Growing(self._column(), self.held), 150)
        return place + 1

    def _column(self) -> str | tuple[()] | None:
        """Where the items of a list that begins here are handed on."""
        stack, marks = self._stack, self._marks
        if self._take is None or len(marks) > 1:
            return ()
        if not marks and not stack:
            return None
        outer = marks[0] if marks else stack[:1]
        key = stack[-1] if stack else None
        named = len(stack) % 2 == (1 if marks else 0) and isinstance(key, str)
        inside = len(outer) == 1 and type(outer[0]) is dict
        return str(key) if named and inside else ()

    def _append(self, place: int) -> int:
        item = self._stack.pop()
        self._grown(self._stack[-1], [item])
        return place + 1

    def _appends(self, place: int) -> int:
        items = self._since_mark()
        self._grown(self._stack[-1], items)
        return place + 1

    def _grown(self, found: Any, items: list[Any]) -> None:
        if type(found) is Opaque:
            return
        if type(found) is not Growing:
            raise RefusedError("a list that is none")
        found.add(items)
        if found.column == () or self._take is None:
            return
        if len(found) >= PART or sum(map(len, found.numbers)) >= _NUMBERS:
            self._hand_on(found)

    def _hand_on(self, found: Growing) -> None:
        assert self._take is not None
        assert found.column != ()
        items = found.whole()
        self._take(found.column, items)  # type: ignore[arg-type]  # not ()
        found.handed += len(items)
        found.clear()
        found.numbers = []
        self.held = found.held + 150

    def rest(self, found: Growing) -> None:
        """Hand on what is left of a list of which a part was."""
        if found.count():
            self._hand_on(found)

    def _list(self, place: int) -> int:
        items = self._since_mark()
        made = Growing(() if items else self._column(), self.held)
        made.add(items)
        self._push(made, 150)
        return place + 1

    def _tuple(self, place: int) -> int:
        made = Growing((), self.held)
        made.add(self._since_mark())
        made.spread()
        self._push(tuple(made), 60)
        return place + 1

    def _short_tuple(self, place: int) -> int:
        count = self._view[place] - 0x84 if self._view[place] != 0x29 else 0
        items = self._stack[len(self._stack) - count :]
        if len(items) != count:
            raise IndexError
        del self._stack[len(self._stack) - count :]
        self._push(tuple(items), 80)
        return place + 1

    def _empty_dict(self, place: int) -> int:
        self._push({}, 240)
        return place + 1

    def _dict(self, place: int) -> int:
        items = self._since_mark()
        self._push({}, 240)
        self._set(items)
        return place + 1

    def _set_item(self, place: int) -> int:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])
        return place + 1

    def _set_items(self, place: int) -> int:
        self._set(self._since_mark())
        return place + 1

    def _set(self, items: list[Any]) -> None:
        result = self._stack[-1]
        if type(result) is Opaque:
            return
        if type(result) is not dict or len(items) % 2:
            raise RefusedError("items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float):
                result[_ODD] = f"a dict with a key of the type {type(key).__name__}"
                continue
            if key in result:
                raise RefusedError(f"a dict with the key {key!r:.40} twice")
            result[key] = value
        self.held += 60 * len(items)

    # the stack and the memo

    def _push(self, value: Any, cost: int) -> None:
        self._stack.append(value)
        self.held += cost

    def _pop(self, place: int) -> int:
        if self._stack:
            self._stack.pop()
        else:
            self._since_mark()
        return place + 1

    def _pop_mark(self, place: int) -> int:
        self._since_mark()
        return place + 1

    def _double(self, place: int) -> int:
        self._push(self._stack[-1], 8)
        return place + 1

    def _memoize(self, place: int) -> int:
        self._remember(self._memoized)
        return place + 1

    def _put(self, place: int) -> int:
        code = self._view[place]
        if code == 0x70:
            text, after = line(self._view, place + 1)
            number = integer(text, place)
        else:
            after = place + (2 if code == 0x71 else 5)
            number = int.from_bytes(self._view[place + 1 : after], "little")
        self._remember(number)
        return after

    def _remember(self, number: int) -> None:
        value = self._stack[-1]
        self._memoized += 1
        if number in self._again:
            self._memo[number] = value

    def _get(self, place: int) -> int:
        code = self._view[place]
        if code == 0x67:
            text, after = line(self._view, place + 1)
            number = integer(text, place)
        else:
            after = place + (2 if code == 0x68 else 5)
            number = int.from_bytes(self._view[place + 1 : after], "little")
        if number not in self._memo:
            raise BrokenError(f"the memo has no {number}", place)
        self._push(self._memo[number], 8)
        return after

    # names

    def _name_lines(self, place: int) -> int:
        module, after = line(self._view, place + 1)
        name, after = line(self._view, after)
        self._look_up(str(module, "utf-8"), str(name, "utf-8"))
        return after

    def _name(self, place: int) -> int:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise RefusedError("a name that is no text")
        self._look_up(module, name)
        return place + 1

    def _look_up(self, module: str, name: str) -> None:
        make = ALLOWED.get((module, name))
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            make = _storage
        if make is None and self._torch and module == "torch" and name in STORAGES:
            make = stored
        message = f"it names {module[:100]}.{name[:100]}"
        self._push(Opaque(message) if make is None else Name(f"{module}.{name}", make), 60)

    def _reduce(self, place: int) -> int:
        values, name = self._stack.pop(), self._stack.pop()
        if type(name) is not Opaque:
            if type(name) is not Name or not isinstance(values, tuple):
                raise RefusedError("a call of what is no name")
            try:
                name = name.call(values)
            except RefusedError as error:
                name = Opaque(str(error))
        self._push(name, 200)
        return place + 1

    def _build(self, place: int) -> int:
        state, result = self._stack.pop(), self._stack[-1]
        if type(result) is Opaque:
            return place + 1
        if not isinstance(result, Name | Dtype | Array):
            raise RefusedError(f"a state for a {type(result).__name__}")
        try:
            result.build(state)
        except RefusedError as error:
            if isinstance(result, Array):  # which the memo may have
                result.told = str(error)
            self._stack[-1] = result if isinstance(result, Array) else Opaque(str(error))
        return place + 1

    def _reference(self, place: int) -> int:
        key = self._stack.pop()
        if not self._torch:
            key = Opaque(f"it refers to an object outside the file ({str(key)[:40]})")
        self._push(key, 8)
        return place + 1

    # what is kept as a name

    def _outside_line(self, place: int) -> int:
        text, after = line(self._view, place + 1)
        message = f"it refers to an object outside the file ({str(text[:40], 'latin1')})"
        self._push(Opaque(message), 60)
        return after

    def _outside_bytes(self, place: int) -> int:
        self._push(Opaque("bytes outside the file"), 60)
        return place + 1

    def _read_only(self, place: int) -> int:
        self._stack[-1] = Opaque("bytes outside the file")
        return place + 1

    def _registered(self, place: int) -> int:
        self._push(Opaque("a name by its number in a registry"), 60)
        return place + 1 + {0x82: 1, 0x83: 2, 0x84: 4}[self._view[place]]

    def _instance_line(self, place: int) -> int:
        after = self._name_lines(place)
        name = self._stack.pop()
        self._since_mark()
        self._push(self._object(name), 200)
        return after

    def _instance(self, place: int) -> int:
        self._push(self._object(self._since_mark()[0]), 200)
        return place + 1

    def _new(self, place: int) -> int:
        count = 1 if self._view[place] == 0x81 else 2  # positional, and named arguments
        for _ in range(count):
            self._stack.pop()
        self._push(self._object(self._stack.pop()), 200)
        return place + 1

    def _object(self, name: Any) -> Opaque:
        """An object of a class, of any way to ask for one."""
        message = name.told if isinstance(name, Opaque) else "an object of a class"
        return Opaque(message)

    def _set_of(self, place: int) -> int:
        code = self._view[place]
        if code != 0x8F:  # items for it, or that it is made of
            self._since_mark()
        if code == 0x90:
            self._stack.pop()
        self._push(Opaque("a set"), 200)
        return place + 1

    def _protocol(self, place: int) -> int:
        if byte(self._view, place + 1) > 5:
            raise BrokenError(f"there is no protocol {self._view[place + 1]}", place)
        return place + 2

    def _frame(self, place: int) -> int:
        return place + 9  # its length is of use to those who read in parts


_HANDLERS: Final[dict[str, bytes]] = {
    "float": b"G", "small_integer": b"K", "integer": b"MJ", "long_integer": b"\x8a\x8b",
    "integer_line": b"IL", "float_line": b"F", "constant": b"N\x88\x89", "text": b"XTU\x8c\x8d",
    "text_line": b"VS", "bytes": b"BC\x8e\x96", "mark": b"(", "empty_list": b"]", "append": b"a",
    "appends": b"e", "list": b"l", "tuple": b"t", "short_tuple": b")\x85\x86\x87",
    "empty_dict": b"}", "dict": b"d", "set_item": b"s", "set_items": b"u", "pop": b"0",
    "pop_mark": b"1", "double": b"2", "memoize": b"\x94", "put": b"pqr", "get": b"ghj",
    "name_lines": b"c", "name": b"\x93", "reduce": b"R", "build": b"b", "reference": b"Q",
    "outside_line": b"P", "outside_bytes": b"\x97", "read_only": b"\x98",
    "registered": b"\x82\x83\x84", "instance_line": b"i", "instance": b"o",
    "new": b"\x81\x92", "set_of": b"\x8f\x90\x91", "protocol": b"\x80", "frame": b"\x95",
}  # fmt: skip


def _storage(raw: Any) -> Storage:
    """The numbers that torch wrote by itself into bytes, in the form it had before archives.

    Raises:
        RefusedError: it is no such form.
    """
    if not isinstance(raw, bytes | memoryview):
        raise RefusedError("a tensor without bytes")
    view, place, parts = memoryview(raw), 0, []
    try:
        for _ in range(5):  # a number, a version, about the machine, the storage, its name
            value, place = Machine(view, torch=True).run(place)
            parts.append(value)
    except BrokenError as error:
        raise RefusedError(f"a tensor's storage that is broken: {error}") from error
    about = parts[3]
    whole = isinstance(about, tuple) and len(about) >= 5 and about[0] == "storage"
    if parts[0] != _TORCH or not whole or type(about[1]) is not Name or about[1].make is not stored:
        raise RefusedError("a tensor without a storage")
    values = view[place + 8 :]
    count = int.from_bytes(view[place : place + 8], "little")
    kind = about[1].name.removeprefix("torch.")
    if count * _WIDTHS[kind] != len(values):
        raise RefusedError(f"a tensor's storage of {count} numbers in {len(values)} bytes")
    return Storage(stored(kind, values))


_WIDTHS: Final = {
    kind: 2 if code == "bf16" else np.dtype(code).itemsize for kind, code in STORAGES.items()
}
