"""The printable characters by which byte-level vocabularies write bytes (GPT-2)."""

from __future__ import annotations

from typing import Final

_PLAIN: Final = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def byte_alphabet() -> list[str]:
    """A printable character for each byte, as byte-level vocabularies write them (GPT-2).

    Bytes that print stand for themselves, the others for the characters from U+0100 on.
    """
    letters = {value: chr(value) for value in _PLAIN}
    others = [value for value in range(256) if value not in letters]
    letters |= {value: chr(0x100 + place) for place, value in enumerate(others)}
    return [letters[value] for value in range(256)]
