"""The state of a run, read from another process; imports no torch."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from forge_kernel.run_folder import owner
from forge_kernel.run_folder.folder import STATUS, RunFolder

SILENT_AFTER: Final = 30.0  # seconds without a sign of life; a long validation may take that
_CLOCK_STEP: Final = 5.0  # seconds by which clocks of one machine may disagree
_ENDED: Final = frozenset({"completed", "stopped", "failed"})

Condition = Literal["ended", "running", "silent", "gone", "unknown"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What is known of a run from outside.

    Args:
        folder: the run folder.
        condition: `ended`; `running`; `silent`: no sign of life for long, and the process is there
            or cannot be looked at; `gone`: the process has ended and the run has not; `unknown`:
            nothing readable was written yet.
        said: the condition as a sentence.
        age: seconds since the last sign of life, if there was one.
        data: `status.json`; empty when there is none.
    """

    folder: Path
    condition: Condition
    said: str
    age: float | None
    data: Mapping[str, Any]

    @property
    def over(self) -> bool:
        """Whether nothing more is to be expected of the process."""
        return self.condition in ("ended", "gone")

    def to_data(self) -> dict[str, Any]:
        """Plain data for programs."""
        age = None if self.age is None else round(self.age, 3)
        return {
            "folder": str(self.folder),
            "condition": self.condition,
            "said": self.said,
            "age_seconds": age,
            "status": dict(self.data) or None,
        }


def read_status(folder: Path) -> RunStatus:
    """Look at a run folder and at the process that writes it.

    Raises:
        ConfigError: it is no run folder.
    """
    data = RunFolder(folder).check().status()
    if not data:
        there = (folder / STATUS).exists()
        said = "is not as it was written" if there else "is absent: the run has hardly begun"
        said = f"{STATUS} {said}"
        return RunStatus(folder, "unknown", said, None, {})
    heartbeat = data.get("heartbeat")
    age = max(0.0, time.time() - heartbeat) if isinstance(heartbeat, int | float) else None
    condition, said = _judged(folder, data, age)
    return RunStatus(folder, condition, said, age, data)


def _judged(folder: Path, data: Mapping[str, Any], age: float | None) -> tuple[Condition, str]:
    """The condition and its sentence; that the process is there, the lock says, no clock."""
    state = str(data.get("state"))
    if state in _ENDED:
        return "ended", state
    pid, since = data.get("pid"), "never" if age is None else f"{age:.0f} s ago"
    owned, _ = owner.look(folder)
    local = data.get("host") in (None, platform.node())
    gone = owned == "free"
    if owned == "none" and local and isinstance(pid, int):  # of an older kernel
        gone = not _lives(pid, data.get("heartbeat"))
    if gone:
        return "gone", (
            f"the process {pid} is gone without ending the run (last sign of life: {since}); "
            "go on with: forge resume"
        )
    if age is None or age <= SILENT_AFTER:
        return "running", state
    where = f"the process {pid} is there" if local else f"its machine is {data.get('host')}"
    return "silent", f"no sign of life since {age:.0f} s; {where}: it is busy, or it hangs"


def _lives(pid: int, heartbeat: Any) -> bool:
    """Whether the process is there and is the one that gave the sign of life."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        begun = process.create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it is there, and not ours to look at
    return not isinstance(heartbeat, int | float) or begun <= heartbeat + _CLOCK_STEP


class LogFollower:
    """Reads what is added to a file of JSON lines.

    Args:
        file: the file; it need not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read = 0  # bytes of whole lines

    def new(self) -> Iterator[dict[str, Any]]:
        """The objects of whole lines added since the last call; other lines are passed over.

        A file that has become shorter is read from its beginning.
        """
        try:
            with self._file.open("rb") as stream:
                if stream.seek(0, 2) < self._read:
                    self._read = 0
                stream.seek(self._read)
                added = stream.read()
        except OSError:
            return
        whole = added[: added.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                data = json.loads(line)
            except ValueError:
                continue
            if isinstance(data, dict):
                yield data
