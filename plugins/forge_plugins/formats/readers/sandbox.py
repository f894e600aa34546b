"""A reader in a process of its own, so that a file that crashes its library is refused by name.

The process is forked, has a bound on its memory, and is ended when it does nothing for long. Where
processes cannot be forked, readers run in this one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from forge_plugins.formats.errors import DataError

MEMORY: Final = 2**28
"""Bytes that the process may have beside what it was forked with."""
PATIENCE: Final = 120.0
"""Seconds without a sign of life."""
_HINT: Final = "it is broken or was made to do so: write it anew"

Work = Callable[[Callable[[], None]], Any]
"""Does it, calls its argument now and then as a sign of life, and gives something for JSON."""


def run_sandboxed(
    file: Path, work: Work, *, patience: float = PATIENCE, memory: int = MEMORY
) -> Any:
    """What `work` gives, done in a process of its own.

    Args:
        file: the data file, for messages.
        work: what is done.
        patience: seconds without a sign of life.
        memory: bytes that the process may have beside what it was forked with.

    Raises:
        DataError: what the work raised, or the process crashed, needed too much memory or hung.
    """
    if not sys.platform.startswith("linux"):
        return work(lambda: None)
    read, write = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks beside threads; the child calls the reader's library only
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os.close(read)
        _in_child(work, write, memory)
    os.close(write)
    with open(read, "rb", buffering=0) as stream:
        try:
            text = _heard(file, stream, patience)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
    _, status = os.waitpid(child, 0)
    return _result(file, text, status)


def _heard(file: Path, stream: BinaryIO, patience: float) -> bytes:
    """All that the child writes but its signs of life."""
    parts = []
    while part := _part(file, stream, patience):
        parts.append(part)
    return b"".join(parts).lstrip(b".")


def _part(file: Path, stream: BinaryIO, patience: float) -> bytes:
    ready, _, _ = select.select([stream], [], [], patience)
    if not ready:
        message = f"its library has done nothing for {patience:g} seconds"
        raise DataError(file, f"cannot be read: {message}", hint=_HINT)
    return stream.read(2**16)


def _result(file: Path, text: bytes, status: int) -> Any:
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        raise DataError(file, f"crashes the library that reads it ({name})", hint=_HINT)
    try:
        result = json.loads(text)
    except ValueError as error:
        message = f"its reader ended with status {os.waitstatus_to_exitcode(status)}"
        raise DataError(file, f"cannot be read: {message}", hint=_HINT) from error
    if "fault" in result:
        raise DataError(file, **result["fault"])
    if "error" in result:
        raise OSError(*result["error"])
    if "bug" in result:
        raise RuntimeError(f"the reader of {file} failed:\n{result['bug']}")
    return result["value"]


def _in_child(work: Work, write: int, memory: int) -> NoReturn:
    """Do it and end, without the ends of the process that was forked."""
    try:
        faulthandler.disable()  # a crash is told by the parent
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked, and ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # last words of a library that gives up
        _bound_memory(memory)
        text = json.dumps(_done(work, lambda: _tell(write, b"."), memory)).encode()
        for begin in range(0, len(text), 2**16):
            _tell(write, text[begin : begin + 2**16])
    finally:
        os._exit(0)


def _tell(write: int, text: bytes) -> None:
    """Raises BrokenPipeError when the parent is gone."""
    left = memoryview(text)
    while left:
        left = left[os.write(write, left) :]


def _done(work: Work, alive: Callable[[], None], memory: int) -> dict[str, Any]:
    try:
        return {"value": work(alive)}
    except DataError as fault:
        return {"fault": fault.to_data()}
    except MemoryError:
        message = f"needs more than {memory} bytes of memory"
        return {"fault": {"message": message, "hint": _HINT}}
    except OSError as error:
        return {"error": [error.errno, error.strerror or str(error)]}
    except Exception:  # noqa: BLE001  raised again where it is read
        return {"bug": traceback.format_exc()}


def _bound_memory(memory: int) -> None:
    import resource

    with open("/proc/self/statm", encoding="ascii") as stream:
        held = int(stream.read().split()[5]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + memory
    resource.setrlimit(
        resource.RLIMIT_DATA,
        (limit if most == resource.RLIM_INFINITY else min(limit, most), most),
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
