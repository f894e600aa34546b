"""A JSON text read block by block, and where in it an array's elements end."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from forge_plugins.formats.errors import DataError

BLOCK: Final = 2**18
"""Bytes that are read at a time: what they become stays in the processor's cache for a while."""
MAX_RECORD: Final = 2**21
"""Bytes of text that one record, or one element of a column, may have."""
MAX_EXPANSION: Final = 1000
"""Bytes that one byte of a gzip file may become; more is taken for a bomb."""
_BOM: Final = b"\xef\xbb\xbf"
_BLANKS: Final = b" \t\r\n"
_SHOWN: Final = np.zeros(256, np.bool_)
_SHOWN[[*b'"[]{}']] = True
_STEP: Final = np.zeros(256, np.int8)
_STEP[[*b"[{"]] = 1
_STEP[[*b"]}"]] = -1


def cut(block: bytes) -> tuple[int, bool]:
    """Where whole elements of an array end, in a text that begins inside the array.

    Returns:
        The place of the bracket that closes the array, and True; or of the last comma between two
        elements, and False; -1 when there is neither.
    """
    if b"\\" in block:  # what is escaped ends no text
        block = block.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    codes = np.frombuffer(block, np.uint8)
    places = np.flatnonzero(_SHOWN[codes])
    kinds = codes[places]
    quotes = kinds == ord('"')
    inside = np.cumsum(quotes, dtype=np.int32) & 1
    steps = np.where(inside == 0, _STEP[kinds], 0)
    depth = np.cumsum(steps, dtype=np.int32)
    closed = np.flatnonzero(depth < 0)
    if len(closed):
        return int(places[closed[0]]), True
    # gaps between elements: behind the places where all that was opened is closed
    gaps = np.flatnonzero((depth == 0) & (inside == 0))[-3:][::-1]
    for gap in gaps.tolist():
        end = int(places[gap + 1]) if gap + 1 < len(places) else len(block)
        comma = block.rfind(b",", int(places[gap]), end)
        if comma >= 0:
            return comma, False
    return block.rfind(b",", 0, int(places[0]) if len(places) else len(block)), False


def signs(block: bytes, sign: str) -> int:
    """How often a character is in a text; numpy counts frequent ones faster than `bytes`."""
    return int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord(sign)))


class JsonText:
    """A file's text, of which a part is held; lines and columns are counted on the way.

    Args:
        file: the file, plain or compressed with gzip.
        stream: the file, opened.
    """

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file = file
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        self._stream = gzip.GzipFile(fileobj=stream) if packed else stream
        self._limit = file.stat().st_size * MAX_EXPANSION + 2**20 if packed else None
        self._read = 0
        self.held = b""
        self.ended = False
        self.line = 0  # of the first byte held, counted from 0
        self._column = 0
        self.fill(len(_BOM))
        self.begin = len(_BOM) if self.held.startswith(_BOM) else 0  # in the text, in bytes
        self.held = self.held[self.begin :]

    def more(self) -> bool:
        """Hold another block.

        Returns:
            Whether there was one.

        Raises:
            DataError: the gzip data are broken, or expand beyond bounds.
        """
        if self.ended:
            return False
        try:
            result = self._stream.read(BLOCK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            message = f"the gzip data are broken: {error}"
            raise DataError(self.file, message, hint="compress anew") from error
        self._read += len(result)
        if self._limit is not None and self._read > self._limit:
            message = f"expands to more than {MAX_EXPANSION} times its size"
            raise DataError(self.file, message, hint="decompress it yourself if you trust it")
        self.held += result
        self.ended = not result
        return bool(result)

    def fill(self, size: int) -> None:
        """Hold at least so many bytes, if there are so many."""
        for _ in range(-(-size // BLOCK) + 1):
            if len(self.held) >= size or not self.more():
                break

    def drop(self, count: int) -> None:
        """Let go of the first bytes."""
        gone = self.held[:count]
        lines = signs(gone, "\n")
        self.line += lines
        self._column = len(gone) - gone.rfind(b"\n") - 1 if lines else self._column + len(gone)
        self.held = self.held[count:]

    def next(self) -> bytes:
        """The next byte that is no blank, which then is the first one held; b"" at the end."""
        while self.held or self.more():
            self.drop(len(self.held) - len(self.held.lstrip(_BLANKS)))
            if self.held:
                break
        return self.held[:1]

    def expect(self, wanted: bytes, what: str) -> bytes:
        """Take the next byte, which must be one of those wanted.

        Raises:
            DataError: it is another.
        """
        result = self.next()
        if not result or result not in wanted:
            shown = "the end" if not result else repr(self.held[:8].decode("utf-8", "replace"))
            raise self.fault(f"is not JSON: {what} is expected, not {shown}")
        self.drop(1)
        return result

    def end(self) -> None:
        """Nothing may follow.

        Raises:
            DataError: something does.
        """
        if self.next():
            raise self.fault("is not JSON: text follows the end")

    def fault(self, message: str, record: int | None = None) -> DataError:
        """What is wrong at the first byte held."""
        place = f"line {self.line + 1} column {self._column + 1}"
        hint = "mend or remove the text there"
        return DataError(self.file, message, record=record, place=place, hint=hint)

    def not_json(self, error: json.JSONDecodeError, record: int, before: int = 0) -> DataError:
        """What a parser says of a text that began with the first byte held.

        Args:
            error: of the parser.
            record: number of the first record of the text.
            before: characters that were put before the text.
        """
        column = error.colno + (self._column - before if error.lineno == 1 else 0)
        place = f"line {self.line + error.lineno} column {column}"
        text = error.doc or ""
        message, hint = f"is not JSON: {error.msg}", "mend or remove the text there"
        record += text[: error.pos].count("}")
        return DataError(self.file, message, record=record, place=place, hint=hint)
