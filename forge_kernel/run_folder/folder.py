"""A run folder as it is read: by whom else than its owner, and never written to."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.contract.metric_info import MetricInfos
from forge_kernel.errors import ConfigError, Fault
from forge_kernel.renamed import record_today

if TYPE_CHECKING:
    from forge_kernel.storage.checkpoint_store import CheckpointReader

CONFIG: Final = "config.yaml"
ENVIRONMENT: Final = "environment.json"
RESULT: Final = "result.json"
STATUS: Final = "status.json"
LOG: Final = "forge.log"
METRICS: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints"
_LARGEST: Final = 64 * 2**20  # bytes of a file that is read at once


class RunFolder:
    """The files of a run, for whoever looks at it; nothing is written, no lock is held.

    What is no plain file (a pipe, a device, a link to one) is as good as absent: reading it might
    wait for ever.

    Args:
        path: of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check(self) -> RunFolder:
        """The folder itself.

        Raises:
            ConfigError: it is no run folder.
        """
        if not os.path.isfile(self.path / CONFIG):  # is_file() raises for a name that is too long
            hint = f"a run folder holds {CONFIG} and {CHECKPOINTS}/, written by: forge run"
            raise ConfigError([Fault(f"{self.path} is no run folder", hints=(hint,))])
        return self

    def text(self, name: str) -> str:
        """A file's text; bytes that are no UTF-8 are replaced.

        Raises:
            OSError: as `content` does.
        """
        return self.content(name).decode("utf-8", errors="replace")

    def content(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: there is no such plain file.
            OSError: it cannot be read, or is larger than such a file can be.
        """
        descriptor = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise FileNotFoundError(f"{self.path / name} is no plain file")
            if about.st_size > _LARGEST:
                raise OSError(f"{self.path / name} has {about.st_size:,} bytes: too many for it")
            return stream.read()

    def data(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where it is absent or not readable."""
        try:
            data = json.loads(self.text(name))
        except (OSError, ValueError, RecursionError):
            return {}
        return data if isinstance(data, dict) else {}

    def status(self) -> dict[str, Any]:
        """`status.json`, by today's names; empty where it is absent, not readable or damaged."""
        from forge_kernel.storage.seal import SEAL, is_as_written

        try:
            content = self.content(STATUS)
            data = json.loads(content)
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(data, dict) or (SEAL in data and not is_as_written(content, data)):
            return {}
        data.pop(SEAL, None)
        return dict(record_today(data))

    def metric_infos(self) -> MetricInfos:
        """What the run's metrics are, as it has written; plain ones where it has not."""
        return MetricInfos.from_data(self.data(ENVIRONMENT).get("metrics"))

    def checkpoints(self) -> CheckpointReader:
        """Its checkpoints."""
        from forge_kernel.storage.checkpoint_store import CheckpointReader

        return CheckpointReader(self.path / CHECKPOINTS)
