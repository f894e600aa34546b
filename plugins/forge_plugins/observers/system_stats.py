"""What the machine is doing: processor, memory and device, as their own counters tell."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import LazyModule

if TYPE_CHECKING:
    import psutil
    import torch
else:
    psutil = LazyModule("psutil")
    torch = LazyModule("torch")

LEAST_SECONDS: Final = 0.2
"""The operating system counts in hundredths of a second: in less than this there is nothing to tell
but noise."""

Readings = dict[str, float | None]


class SystemStats:
    """Reads counters; what is not there is None, never 0.

    Args:
        device: whose counters are read beside those of the processor.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process = psutil.Process()
        self._driver = Driver(device)
        self._begin()

    def load(self) -> Readings:
        """How busy it has been since the last reading.

        Returns:
            `cpu_percent` of this process (100 is one core) and `system_cpu_percent` of the machine
            (100 is all cores), as the operating system counts them, None where it is too soon
            since the last reading to tell; `device_percent`, the share of the driver's last
            sampling period in which a kernel was running.
        """
        result: Readings = {
            "cpu_percent": None,
            "system_cpu_percent": None,
            "device_percent": self._driver.busy_percent(),
        }
        if time.monotonic() - self._read >= LEAST_SECONDS:
            result["cpu_percent"], result["system_cpu_percent"] = self._begin()
        return result

    def _begin(self) -> tuple[float, float]:
        """Read the processor's counters since the last time, and begin anew."""
        self._read = time.monotonic()
        return self._process.cpu_percent(), psutil.cpu_percent()

    def memory(self) -> Readings:
        """Memory in use now.

        Returns:
            `memory_bytes` of this process, `memory_share` of the machine's; `device_memory_bytes`
            and `device_memory_peak_bytes` of torch's tensors on the device,
            `device_memory_share` of the device's by all programs.
        """
        result: Readings = {
            "memory_bytes": float(self._process.memory_info().rss),
            "memory_share": psutil.virtual_memory().percent / 100.0,
            "device_memory_bytes": None,
            "device_memory_peak_bytes": None,
            "device_memory_share": None,
        }
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            result["device_memory_bytes"] = float(torch.cuda.memory_allocated(self.device))
            result["device_memory_peak_bytes"] = float(torch.cuda.max_memory_allocated(self.device))
            result["device_memory_share"] = 1.0 - free / total
        return result


class Driver:
    """The driver's counters of an NVIDIA device (NVML), where there is one.

    Args:
        device: another kind of device has no counters here.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = False
        self._nvml: Any = None
        self._handle: Any = None

    @property
    def there(self) -> bool:
        """Whether the driver knows the device."""
        if not self._asked:
            self._asked = True
            if self._device.type == "cuda":
                self._open(str(torch.cuda.get_device_properties(self._device).uuid))
        return self._handle is not None

    def _open(self, uuid: str) -> None:
        """Find the device by its identity: its number may be another one for the driver."""
        import pynvml

        for name in (f"GPU-{uuid}", f"MIG-{uuid}", uuid):
            try:
                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            except pynvml.NVMLError:
                continue
            self._nvml = pynvml
            return

    def busy_percent(self) -> float | None:
        """Share of the driver's last sampling period in which a kernel was running.

        None where the driver does not know the device, or has no such counter (a part of one).
        """
        if not self.there:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
        except self._nvml.NVMLError:
            return None
