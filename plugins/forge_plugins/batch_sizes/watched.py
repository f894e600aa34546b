"""A trial in a process of its own that is ended when it takes too much memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from typing import Any, Final

import psutil

from forge_kernel.errors import RunError
from forge_plugins.batch_sizes.measurement import Measurement

POLL_SECONDS: Final = 0.02
MODULE: Final = "forge_plugins.batch_sizes.trial"


def watched_trial(
    file: str,
    settings: list[str],
    key: str,
    size: int,
    *,
    seconds: float,
    memory_limit: int,
    timeout: float = 600.0,
) -> Measurement:
    """Measure one size.

    Args:
        file: pipeline, or the name of a shipped one.
        settings: `--set` arguments.
        key: the setting that holds the batch size.
        size: its value.
        seconds: of measured steps.
        memory_limit: bytes of the process at which it is ended.
        timeout: seconds after which it is given up.

    Raises:
        RunError: the pipeline does not train, at whatever size.
    """
    asked = {"file": file, "settings": [*settings, f"{key}={size}"], "batch_size": size,
             "seconds": seconds}  # fmt: skip
    with tempfile.TemporaryFile("w+") as message, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(  # noqa: S603  this interpreter, a module of ours
            [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=message, stderr=errors,
            text=True,
        )  # fmt: skip
        assert child.stdin is not None
        with child.stdin as pipe:
            pipe.write(json.dumps(asked))
        if not _ended_by_itself(child, memory_limit, timeout):
            return Measurement(size, "memory")
        message.seek(0)
        errors.seek(0)
        if child.returncode in (-9, 137):  # the system ended it: there was no memory
            return Measurement(size, "memory")
        if child.returncode:
            lines = errors.read().strip().splitlines() or ["no message"]
            raise RunError(f"the pipeline does not train with {key}={size}: {lines[-1]}")
        result: dict[str, Any] = json.loads(message.read().splitlines()[-1])
    return Measurement(size, **result)


def _ended_by_itself(child: subprocess.Popen[str], memory_limit: int, timeout: float) -> bool:
    """Wait; end the child when it grows beyond the limit.

    Raises:
        RunError: it takes too long.
    """
    process, began = psutil.Process(child.pid), time.monotonic()
    polls = int(timeout / POLL_SECONDS)
    for _ in range(polls):
        if child.poll() is not None:
            return True
        try:
            used = process.memory_info().rss
        except psutil.NoSuchProcess:
            used = 0
        if used > memory_limit:
            break
        time.sleep(POLL_SECONDS)
        if time.monotonic() - began > timeout:
            break
    over = child.poll() is None and time.monotonic() - began > timeout
    child.kill()
    _ = child.wait()
    if over:
        raise RunError(f"a trial took longer than {timeout:.0f} s: give a smaller --largest")
    return False
