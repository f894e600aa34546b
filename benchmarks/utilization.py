"""Share of the wall time of whole epochs in which the GPU was running a kernel.

The driver's own counter (NVML samples of "percent of time over the past sample period during which
one or more kernels was executing"), averaged over the time of the epochs, validation and log lines
included. The workload: a ternary Llama of 12 layers, 768 wide, in bf16, windows of 512 bytes, on
the help texts of Python. Needs an NVIDIA device; without one it says so and gives no figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SETTINGS = [
    "run.max_steps=null", "run.max_seconds=null", "run.precision=bf16", "run.device=cuda",
    "run.save_every=null", "run.log_every=20", "run.validate_every=60", "exporters=[]",
    "model.with.layers=12", "model.with.width=768", "model.with.heads=12",
    "model.with.groups=12", "model.with.hidden=2048", "data.with.sequence_length=512",
    "data.with.batch_size=64", "schedule.with.warmup_steps=20",
]  # fmt: skip
WORKLOAD = "ternary Llama, 12 layers, 768 wide, bf16, 64 windows of 512 bytes in a step"

Sample = tuple[float, float]  # end of its period in seconds since 1970, percent


def busy_share(samples: Sequence[Sample], begin: float, end: float) -> float | None:
    """Mean of the driver's percentages over a span, each weighed by its part of the span.

    Args:
        samples: in order; each is of the time since the one before.
        begin, end: of the span.

    Returns:
        From 0 to 1; None where the samples do not cover nine tenths of the span.
    """
    covered = total = 0.0
    for (start, _), (stop, percent) in itertools.pairwise(samples):
        part = min(stop, end) - max(start, begin)
        if part > 0:
            covered += part
            total += part * percent / 100.0
    return total / covered if covered >= 0.9 * (end - begin) else None


class Sampler:
    """Gathers the driver's samples in a thread; its buffer holds some seconds only."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._seen = 0
        self._over = threading.Event()
        self.samples: list[Sample] = []
        self._thread = threading.Thread(target=self._gather, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        nvml = self._nvml
        try:
            kind, result = nvml.nvmlDeviceGetSamples(
                self._handle, nvml.NVML_GPU_UTILIZATION_SAMPLES, self._seen
            )
        except nvml.NVMLError_NotFound:
            return  # nothing new
        name = {nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal", nvml.NVML_VALUE_TYPE_DOUBLE: "dVal"}
        for item in result:
            if item.timeStamp > self._seen:
                value = float(getattr(item.sampleValue, name[kind]))
                self.samples.append((item.timeStamp / 1e6, value))
                self._seen = item.timeStamp

    def _gather(self) -> None:
        while not self._over.wait(0.5):
            self._take()

    def stop(self) -> list[Sample]:
        self._over.set()
        self._thread.join()
        self._take()
        return self.samples


def without_device() -> str | None:
    """Why nothing can be measured here, or None."""
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device: the share of time with a kernel running is not measured"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"the driver's counters cannot be read ({error}): nothing is measured"
    return None


def measured(epochs: int) -> dict[str, Any]:
    import pynvml
    import torch

    from forge_kernel.api import Kind, PluginInfo, hookimpl
    from forge_kernel.planning.pipeline_file import load_pipeline
    from forge_kernel.runner import run
    from forge_kernel.training.loaders.in_memory import NoConfig

    device = torch.device("cuda", torch.cuda.current_device())
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    others = len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
    edges: list[float] = []

    class Edges:
        """When each epoch ends, with the device's work done."""

        info = PluginInfo(name="edges", kind=Kind.CALLBACKS, config=NoConfig)
        config = NoConfig()

        @hookimpl
        def on_epoch_end(self, run: Any) -> None:
            torch.cuda.synchronize(device)
            edges.append(time.time())

    sampler = Sampler(pynvml, handle)
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, f"run.max_epochs={epochs + 1}"]
        pipeline = load_pipeline("char_llama_gguf", settings)
        result = run(pipeline, output_dir=Path(folder) / "run", plugins=[Edges()], quiet=True)
    samples = sampler.stop()
    # the first epoch warms up
    return {
        "device": torch.cuda.get_device_name(device),
        "workload": WORKLOAD,
        "epochs": epochs,
        "steps": result.steps * epochs // (epochs + 1),
        "seconds": edges[-1] - edges[0],
        "busy_share": busy_share(samples, edges[0], edges[-1]),
        "each_epoch": [busy_share(samples, begin, end) for begin, end in itertools.pairwise(edges)],
        "other_processes": others,
        "samples_per_second": result.final.get("samples_per_second"),
        "mfu": result.final.get("mfu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3, help="measured, after one that warms up")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    why = without_device()
    if why is not None:
        sys.exit(why)
    result = measured(options.epochs)
    for name, value in result.items():
        print(f"  {name:<20} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
