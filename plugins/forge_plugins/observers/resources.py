"""Memory and throughput."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forge_kernel.api import Batch, Kind, LazyModule, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import psutil
    import torch
else:
    psutil = LazyModule("psutil")
    torch = LazyModule("torch")


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """No settings."""


class Resources:
    """Samples per second over the log interval's wall time, and memory in bytes.

    The time is that of the whole interval: steps, validation and saving. A device that is not
    there has no figure.
    """

    info = PluginInfo(name="resources", kind=Kind.OBSERVERS, config=ResourcesConfig)

    def __init__(self, config: ResourcesConfig) -> None:
        self.config = config
        self._samples = 0
        self._since = 0.0

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Start the clock."""
        del run
        self._samples, self._since = 0, time.perf_counter()

    @hookimpl
    def on_batch(self, run: Run, step: Step, batch: Batch) -> None:
        """Count samples."""
        del run, step
        self._samples += len(batch.inputs)

    @hookimpl
    def measure(self, run: Run, step: Step) -> Mapping[str, float | None]:
        """Figures since the last log line."""
        del step
        now = time.perf_counter()
        passed, samples = now - self._since, self._samples
        self._samples, self._since = 0, now
        found: dict[str, float | None] = {
            "samples_per_second": samples / passed if passed > 0 and samples else None,
            "memory_bytes": float(psutil.Process().memory_info().rss),
        }
        if run.device.type == "cuda":
            found["device_memory_peak_bytes"] = float(torch.cuda.max_memory_allocated(run.device))
        return found
