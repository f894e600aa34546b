"""Commands of the product in forked children, watched from outside: output, end, memory, files."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from forged import forge_main

LONGEST: Final = 60.0  # seconds until a child counts as hung


@dataclass(frozen=True)
class Finished:
    """How a child ended, as a shell has it (None: it hung and was killed), and what it took."""

    status: int | None
    said: str
    cpu: float = 0.0
    megabytes: float = 0.0  # beyond what it was forked with

    @property
    def wrong(self) -> str:
        """What no input may bring about."""
        if self.status is None:
            return f"it hangs: {self.said[-300:]}"
        if "Traceback (most recent call last)" in self.said:
            return f"a traceback: {self.said[-500:]}"
        crashed = self.status > 128 or self.status in (70, 71)
        return f"exit status {self.status}: {self.said[-300:]}" if crashed else ""


def resident() -> int:
    """Bytes of memory that this process has; a child begins with fewer than its parent has."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()


def forked(work: Callable[[], None], output: Path) -> int:
    """A child that works with its output in a file; its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        output.with_suffix(".held").write_text(str(resident()))
        with output.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(os.dup(1), "w", 1, errors="backslashreplace")
        sys.stderr = os.fdopen(os.dup(2), "w", 1, errors="backslashreplace")
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  what a process would end with
        traceback.print_exc()
        status = 71
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def ended(pid: int, limit: float = LONGEST) -> tuple[int | None, resource.struct_rusage | None]:
    """How a child ended, and what it used; one that hangs is killed."""
    end = time.monotonic() + limit
    pause = 0.001
    while time.monotonic() < end:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return (code if code >= 0 else 128 - code), usage
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, None


def command(
    *arguments: str, folder: Path, variables: Mapping[str, str] | None = None
) -> Callable[[], None]:
    """`forge ARGUMENTS` in a folder, with these variables beside those of this process."""

    def work() -> None:
        os.chdir(folder)
        os.environ.update(variables or {})
        sys.path.insert(0, str(folder))
        sys.argv = ["forge", *arguments]
        forge_main()

    return work


def finish(work: Callable[[], None], output: Path, limit: float = LONGEST) -> Finished:
    """Do it in a child, and say how it went."""
    output.unlink(missing_ok=True)
    status, usage = ended(forked(work, output), limit)
    said = output.read_text(encoding="utf-8", errors="replace")
    if usage is None:
        return Finished(status, said)
    held = int(output.with_suffix(".held").read_text())
    grown = max(0.0, (usage.ru_maxrss * 2**10 - held) / 2**20)
    return Finished(status, said, usage.ru_utime + usage.ru_stime, grown)


def forge(*arguments: str, folder: Path, said: Path, **options: Any) -> Finished:
    """`forge ARGUMENTS` in a child."""
    limit = options.pop("limit", LONGEST)
    return finish(command(*arguments, folder=folder, **options), said, limit)


def tree(root: Path, leave: Iterable[Path] = ()) -> dict[str, str]:
    """What lies below a folder, to see what was written: kind, mode and contents by path."""
    left = [str(path) for path in leave]
    result: dict[str, str] = {}
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if os.path.join(place, name) not in left]
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            if path in left:
                continue
            about = os.lstat(path)
            what = f"{about.st_mode:o}"
            if os.path.islink(path):
                what += os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as stream:
                    what += hashlib.blake2b(stream.read(), digest_size=8).hexdigest()
            result[os.path.relpath(path, root)] = what
    return result


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What was written, removed or changed."""
    return sorted(
        path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
    )
