"""A data file while it is used: its content's hash, and whether it is still the same file."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from pathlib import Path
from typing import Final

from forge_plugins.formats.columns.metadata_cache import Memos
from forge_plugins.formats.errors import DataError

SETTLED: Final = 2.0
"""Seconds after its last change from which a file's times tell whether it changes again."""


class Source:
    """A data file, opened and watched.

    Its content is hashed once: the hash is kept under the file's path and found again as long as
    device, inode, size and both times are what they were. Whoever changes a file changes the second
    of them, unless within the clock's grain; so a file that was changed just now is hashed anew.

    Args:
        file: the file.

    Raises:
        DataError: there is none, it is no file, is empty or may not be read.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._descriptor = file, -1
        try:
            # a pipe must not be waited for: what is opened is looked at first
            self._descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError as error:
            hint = "paths are relative to where you are"
            raise DataError(file, "there is no such file", hint=hint) from error
        except PermissionError as error:
            raise DataError(file, "may not be read", hint="look at its rights") from error
        except (OSError, ValueError) as error:
            raise DataError(file, f"cannot be opened: {error}", hint="look at the path") from error
        try:
            self._found = self._look()
        except DataError:
            self.close()
            raise

    def _look(self) -> os.stat_result:
        result = os.fstat(self._descriptor)
        if not stat.S_ISREG(result.st_mode):
            kind = "a folder" if stat.S_ISDIR(result.st_mode) else "a pipe, socket or device"
            raise DataError(self.file, f"is {kind}, no such file", hint="name a file")
        if not result.st_size:
            raise DataError(self.file, "the file is empty", hint="write it anew")
        return result

    def close(self) -> None:
        """Let go of the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()

    def content(self, memos: Memos, *, again: bool = False) -> str:
        """SHA-256 of the content, in hex.

        Args:
            memos: where hashes are kept.
            again: hash the content even if it is known.

        Raises:
            DataError: the file changes while it is read.
        """
        path = str(self.file.absolute())
        known = memos.find("content", path)
        result = self._found
        stamp = [
            result.st_dev, result.st_ino, result.st_size, result.st_mtime_ns, result.st_ctime_ns,
        ]  # fmt: skip
        if not again and known is not None and known.get("stamp") == stamp:
            return str(known["content"])
        now = time.time()
        digest = hashlib.sha256()
        with self.file.open("rb", buffering=0) as stream:
            while block := stream.read(2**20):
                digest.update(block)
        self.check_whole()
        content = digest.hexdigest()
        settled = abs(now - max(result.st_mtime, result.st_ctime)) > SETTLED
        if settled:
            memos.keep("content", path, value={"stamp": stamp, "content": content})
        return content

    def check_whole(self) -> None:
        """After a reading by name: it was this file that was read, and it did not change.

        Raises:
            DataError: it was another or it did.
        """
        try:
            here = self.file.stat()
        except OSError as error:
            raise self._changed("is gone") from error
        if (here.st_dev, here.st_ino) != (self._found.st_dev, self._found.st_ino):
            raise self._changed("was replaced")
        self.check()

    def check(self) -> None:
        """Whether the content is what it was.

        Raises:
            DataError: it is not.
        """
        now, then = os.fstat(self._descriptor), self._found
        if now.st_size != then.st_size:
            raise self._changed(f"had {then.st_size} bytes and has {now.st_size}")
        if now.st_mtime_ns != then.st_mtime_ns:
            raise self._changed("was written to")

    def check_size(self) -> None:
        """Whether the file is still as long: dear enough to ask before each batch.

        To read a mapped file beyond its end is the end of the process.

        Raises:
            DataError: it is not.
        """
        if os.lseek(self._descriptor, 0, os.SEEK_END) != self._found.st_size:
            self.check()

    def _changed(self, how: str) -> DataError:
        message = f"changed while it was read: it {how}"
        return DataError(self.file, message, hint="give a file that nobody writes to, or a copy")
