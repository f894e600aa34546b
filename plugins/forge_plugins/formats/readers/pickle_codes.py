"""How long the opcodes of a pickle are, and which memo numbers it fetches again."""

from __future__ import annotations

import re
from typing import Final

_ANY: Final = r"[\x00-\xff]"
PLAIN: Final = re.compile(
    rf"(?:G{_ANY}{{8}}|K{_ANY}|M{_ANY}{{2}}|J{_ANY}{{4}}"
    r"|[\x94()\]}etulasdbR012NQo\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x97\x98]"
    rf"|q{_ANY}|r{_ANY}{{4}}|\x80{_ANY}|\x95{_ANY}{{8}}|\x82{_ANY}|\x83{_ANY}{{2}}"
    rf"|\x84{_ANY}{{4}})++".encode("latin1")
)
"""A run of opcodes of a known length that fetch nothing and end nothing."""
LENGTHS: Final = {
    0x42: 4, 0x43: 1, 0x54: 4, 0x55: 1, 0x58: 4, 0x8A: 1, 0x8B: 4, 0x8C: 1, 0x8D: 8, 0x8E: 8,
    0x96: 8,
}  # fmt: skip
"""Bytes of the length that stands between an opcode and its argument."""
LINES: Final = {code: 2 if code in b"ci" else 1 for code in b"ILFSVPpgci"}
"""Lines of text that an opcode's argument has."""
_STEP: Final = 2**20
_LINE: Final = 2**22  # bytes: arrays stand on lines in protocol 0
_STOP, _BINGET, _LONG_BINGET, _GET = b".hjg"


class BrokenError(Exception):
    """It is no whole pickle; `place` is the byte."""

    def __init__(self, told: str, place: int) -> None:
        self.place = place
        super().__init__(told)


def argument(view: memoryview, place: int) -> tuple[int, int]:
    """Where the argument of the opcode at a place begins and ends; its length stands before it.

    Raises:
        BrokenError: it is longer than the file.
    """
    begin = place + 1 + LENGTHS[view[place]]
    end = begin + int.from_bytes(view[place + 1 : begin], "little")
    if end > len(view):
        raise BrokenError(f"{end - len(view)} bytes are missing", place)
    return begin, end


def line(view: memoryview, place: int) -> tuple[bytes, int]:
    """The line of text at a place, and the place after its end.

    Raises:
        BrokenError: it has none.
    """
    for begin in range(place, min(len(view), place + _LINE), 4096):
        result = bytes(view[begin : begin + 4096]).find(b"\n")
        if result >= 0:
            return bytes(view[place : begin + result]), begin + result + 1
    raise BrokenError("a line does not end", place)


def fetched(view: memoryview, place: int) -> tuple[set[int], int]:
    """Which memo numbers a pickle fetches again, so that all else may be forgotten.

    Args:
        view: the file.
        place: where the pickle begins.

    Returns:
        The numbers, and the place after the pickle.

    Raises:
        BrokenError: it is no whole pickle.
    """
    numbers: set[int] = set()
    size = len(view)
    for _ in range(place, size):
        run = PLAIN.match(view, place, min(size, place + _STEP))
        place = place if run is None else run.end()
        if place >= size:
            break
        code = view[place]
        if code == _STOP:
            return numbers, place + 1
        place = _passed(view, place, code, numbers)
    raise BrokenError("it has no end", size)


def _passed(view: memoryview, place: int, code: int, numbers: set[int]) -> int:
    """The place after one opcode; what it fetches is noted."""
    if code == _BINGET:
        numbers.add(byte(view, place + 1))
        return place + 2
    if code == _LONG_BINGET:
        numbers.add(int.from_bytes(view[place + 1 : place + 5], "little"))
        return place + 5
    if code in LENGTHS:
        return argument(view, place)[1]
    if code in LINES:
        text, after = line(view, place + 1)
        if code == _GET:
            numbers.add(integer(text, place))
        return after if LINES[code] == 1 else line(view, after)[1]
    if PLAIN.match(view, place, place + 10) is not None:
        return place  # a run that the step has cut
    raise BrokenError(f"there is no opcode {code:#04x}, or it is cut short", place)


def byte(view: memoryview, place: int) -> int:
    """The byte at a place.

    Raises:
        BrokenError: the file ends before it.
    """
    if place >= len(view):
        raise BrokenError("1 bytes are missing", place)
    return view[place]


def integer(text: bytes, place: int) -> int:
    """A whole number that is written out.

    Raises:
        BrokenError: it is none, or has more than 100 digits.
    """
    digits = text.strip().lstrip(b"+-")
    if len(text) > 100 or not digits.isdigit():
        raise BrokenError(f"{text[:40]!r} is no whole number", place)
    return int(text)
