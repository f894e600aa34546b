"""A reader that crashes, hangs or eats memory is refused by name, and this process goes on."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge_plugins.formats import registry
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.readers import sandbox as module
from forge_plugins.formats.readers.sandbox import run_sandboxed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
FILE = Path("x.h5")


def killed(_: Callable[[], None]) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def greedy(_: Callable[[], None]) -> Any:
    return len(bytearray(2**31))


def refused(_: Callable[[], None]) -> Any:
    raise DataError(FILE, "is broken", record=3, field="input", place="byte 7", hint="mend it")


def silent(_: Callable[[], None]) -> Any:
    time.sleep(60)


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (killed, r"x\.h5: crashes the library that reads it \(SIGSEGV\)"),
        (lambda _: os._exit(4), r"its reader ended with status 4"),
        (greedy, r"needs more than \d+ bytes of memory"),
        (refused, r"x\.h5, byte 7, record 3, field 'input': is broken; mend it"),
    ],
)
def test_what_ends_the_reader_is_told(work: Any, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        run_sandboxed(FILE, work)
    assert caught.value.hint


def children() -> set[int]:
    """Process ids of this process's children, zombies among them."""
    return {child.pid for child in psutil.Process().children()}


def test_a_reader_that_does_nothing_is_ended() -> None:
    before = children()  # a helper process of another test may go on
    with pytest.raises(DataError, match=r"nothing for 0\.3 seconds"):
        run_sandboxed(FILE, silent, patience=0.3)
    assert children() <= before


def test_signs_of_life_keep_a_slow_reader_alive() -> None:
    def slow(alive: Callable[[], None]) -> list[int]:
        for _ in range(8):
            time.sleep(0.15)
            alive()
        return [*range(100_000)]

    assert run_sandboxed(FILE, slow, patience=1.0) == [*range(100_000)]


def test_other_errors_keep_what_they_say() -> None:
    def full(_: Callable[[], None]) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        run_sandboxed(FILE, full)
    assert caught.value.errno == errno.ENOSPC

    def wrong(_: Callable[[], None]) -> Any:
        raise KeyError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run_sandboxed(FILE, wrong)


def test_the_readers_of_libraries_that_crash_are_sandboxed() -> None:
    """Bit flips crash HDF5 (SIGSEGV, one of 4,000) and Arrow (SIGABRT, one of 2,600).

    A pickle crashes nothing, but takes what memory it likes.
    """
    assert {name for name in registry.names() if registry.load(name).sandboxed} >= {
        "arrow", "hdf5", "parquet", "pickle",
    }  # fmt: skip


def test_the_memory_of_the_reader_is_bounded_not_this_processs() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limits = run_sandboxed(FILE, lambda _: list(resource.getrlimit(resource.RLIMIT_DATA)))
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert 0 < limits[0] < module.MEMORY + 2**40
