"""The device of a run by its name in the settings."""

from __future__ import annotations

import torch

from forge_kernel.errors import RunError


def resolve_device(name: str) -> torch.device:
    """The device of `run.device`.

    Raises:
        RunError: it is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise RunError(
                f"run.device is {name}, but torch sees {count} CUDA devices: set run.device: cpu, "
                "or auto for the fastest that there is"
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise RunError("run.device is mps, but torch does not see it: set run.device: cpu")
    return device
