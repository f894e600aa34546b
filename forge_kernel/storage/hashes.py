"""Hashes that find damage: XXH3-128 of files, SHA-256 of what lists them.

XXH3 is no match for somebody who wants to deceive, and need not be: whoever can write a folder can
write its manifest too. Over random damage its 128 bits are as good as any, at a tenth of the cost.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import xxhash

BLOCK: Final = 1 << 20


def xxh3_128(file: Path) -> str:
    """The XXH3-128 of a file's content, in hex.

    Read, not mapped: of a disk that cannot be read, reading raises, and a mapping ends the process.
    """
    digest, block = xxhash.xxh3_128(), bytearray(BLOCK)
    view = memoryview(block)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(view[:count])
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class HashedFile:
    """A new file whose content is hashed as it is written.

    Args:
        file: it must not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self._stream = file.open("xb", buffering=0)
        self._digest = xxhash.xxh3_128()
        self.size = 0

    def write(self, content: memoryview | bytes) -> None:
        """Append; a block at a time, which is in the cache for both."""
        view = memoryview(content)
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            self._digest.update(block)
            self.size += len(block)
            while block:
                block = block[self._stream.write(block) :]

    def close(self) -> dict[str, int | str]:
        """Close it; its entry in a manifest."""
        self._stream.close()
        return {"bytes": self.size, "xxh3_128": self._digest.hexdigest()}
