"""Throughput, the share of the device's arithmetic that it comes to, processor and memory."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

from msgspec import Meta

from forge_kernel.api import Batch, Kind, LazyModule, MetricInfo, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch

    from forge_plugins.mathematics.metrics import batch_size, flops
    from forge_plugins.observers import system_stats
else:
    torch = LazyModule("torch")
    flops = LazyModule("forge_plugins.mathematics.metrics.flops")
    batch_size = LazyModule("forge_plugins.mathematics.metrics.batch_size")
    system_stats = LazyModule("forge_plugins.observers.system_stats")

FILE: Final = "resources.json"
_TYPES: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_NUMBER: Final[dict[str, Any]] = {"type": ["number", "null"], "exclusiveMinimum": 0}
_SOURCE: Final[dict[str, Any]] = {"enum": ["given", "measured", None]}
RECORD: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "description": "resources.json: what the metric mfu of a run was taken from; null is unknown",
    "type": "object",
    "properties": {
        "flops_per_sample": {
            **_NUMBER,
            "description": "floating-point operations of a sample's forward pass",
        },
        "flops_per_sample_source": _SOURCE,
        "peak_flops": {
            **_NUMBER,
            "description": "operations in a second that the device can do in this precision",
        },
        "peak_flops_source": _SOURCE,
        "precision": {"enum": sorted(_TYPES)},
        "device": {"type": "string"},
    },
    "required": [
        "device", "flops_per_sample", "flops_per_sample_source", "peak_flops",
        "peak_flops_source", "precision",
    ],
    "additionalProperties": False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What is known of the network and of the device, and which metrics are told."""

    flops_per_sample: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="floating-point operations of a sample's forward pass; null: counted in "
            "the first batch (not in compiled code: there it stays unknown)"
        ),
    ] = None
    peak_flops: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(
            description="operations in a second that the device can do in the run's precision; "
            "null: measured when the run begins, by large matrix products for some tenths of a "
            "second"
        ),
    ] = None
    throughput: Annotated[
        bool, Meta(description="samples, tokens and steps in a second, and mfu")
    ] = True
    memory: Annotated[bool, Meta(description="memory of the process and the machine")] = True
    device: Annotated[bool, Meta(description="use and memory of the device")] = True


class Resources:
    """Throughput, the share of the device's arithmetic that it comes to, processor and memory.

    Metrics of each log line, over the interval's whole wall time: steps, validation, saving.

    `samples_per_second`, `tokens_per_second` (where samples are rows of tokens),
    `steps_per_second`; `mfu`, the model's operations (three times those of the forward pass) as a
    share of what the device can do (Chowdhery et al. 2022, arXiv 2204.02311); then processor,
    memory and device as `SystemStats` reads them. What is not there or not known is null. What
    `mfu` was taken from stands in `resources.json`.
    """

    info = PluginInfo(
        name="resources",
        kind=Kind.OBSERVERS,
        config=ResourcesConfig,
        records={"resources": RECORD},
        metrics=(
            *(
                MetricInfo(f"{what}_per_second", "1/s", section="Throughput")
                for what in ("samples", "tokens", "steps")
            ),
            *(
                MetricInfo(name, unit, digits=3, title=title, section=section)
                for name, unit, title, section in (
                    ("mfu", "share", "MFU, share of the device's peak", "Throughput"),
                    ("cpu_percent", "%", "Processor, this process", "Machine"),
                    ("system_cpu_percent", "%", "Processor, whole machine", "Machine"),
                    ("device_percent", "%", "Device busy", "Machine"),
                    ("memory_bytes", "bytes", "Memory, this process", "Machine"),
                    ("memory_share", "share", "Memory, whole machine, share", "Machine"),
                    ("device_memory_bytes", "bytes", "Device memory, tensors", "Machine"),
                    ("device_memory_peak_bytes", "bytes", "Device memory, peak", "Machine"),
                    (
                        "device_memory_share",
                        "share",
                        "Device memory, all programs, share",
                        "Machine",
                    ),
                )
            ),
        ),
    )

    def __init__(self, config: ResourcesConfig) -> None:
        self.config = config
        self._samples = self._tokens = self._step = 0
        self._since = 0.0
        self._machine: system_stats.SystemStats | None = None
        self._count: flops.FlopCount | None = None
        self._counted = False
        self._flops: float | None = None
        self._peak: float | None = None

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Measure the device where its peak is not given, then start the clock."""
        config, dtype = self.config, getattr(torch, _TYPES[run.settings.precision])
        self._machine = system_stats.SystemStats(run.device)
        self._flops = config.flops_per_sample
        self._counted = self._flops is not None or _is_compiled(run.model)
        self._peak = config.peak_flops
        if not config.throughput:
            self._counted = True  # nothing is measured that nobody reads
        elif self._peak is None:
            self._peak = _measured_peak(run, dtype)
        self._tell(run)
        self._samples = self._tokens = 0
        self._step, self._since = run.progress.step, time.perf_counter()

    def _tell(self, run: Run) -> None:
        if run.folder is None:
            return
        config = self.config
        counted = "measured" if self._flops is not None else None
        measured = "measured" if self._peak is not None else None
        about = {
            "flops_per_sample": self._flops,
            "flops_per_sample_source": "given" if config.flops_per_sample else counted,
            "peak_flops": self._peak,
            "peak_flops_source": "given" if config.peak_flops else measured,
            "precision": run.settings.precision,
            "device": str(run.device),
        }
        text = json.dumps(about, indent=1, allow_nan=False) + "\n"
        (run.folder / FILE).write_text(text, encoding="utf-8")

    @hookimpl
    def on_batch(self, run: Run, step: Step, batch: Batch) -> None:
        """Count samples; in the first batch, operations too."""
        del run, step
        inputs = batch.inputs
        self._samples += batch_size.samples_in(inputs)
        if _are_tokens(inputs):
            self._tokens += inputs.numel()
        if not self._counted:
            self._leave()
            self._count = flops.FlopCount()
            self._count.begin()

    @hookimpl
    def on_outputs(self, run: Run, step: Step, batch: Batch, outputs: Any) -> None:
        """The forward pass that was counted is over."""
        del step
        count = self._leave()
        if count is None:
            return
        self._counted = True
        count_of = batch_size.samples_in(batch.inputs)
        if outputs is not None and count_of:  # None: the loss runs the model itself
            self._flops = count.total / count_of or None
            self._tell(run)

    def _leave(self) -> flops.FlopCount | None:
        """Stop to count, whether the forward pass went well or not."""
        count, self._count = self._count, None
        if count is not None:
            count.end()
        return count

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """The error may have come in the forward pass that was counted."""
        del run, error
        self._leave()

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, float | None]:
        """Metrics since the last log line."""
        del step
        now, done = time.perf_counter(), run.progress.step
        passed, steps = now - self._since, done - self._step
        rates: dict[str, float | None] = {
            "samples_per_second": self._samples / passed if self._samples else None,
            "tokens_per_second": self._tokens / passed if self._tokens else None,
            "steps_per_second": steps / passed if steps > 0 else None,
        }
        pace = rates["samples_per_second"]
        known = pace is not None and self._flops is not None and self._peak is not None
        rates["mfu"] = (
            flops.training_flops(self._flops * pace) / self._peak  # type: ignore[operator]
            if known
            else None
        )
        self._samples = self._tokens = 0
        self._step, self._since = done, now
        assert self._machine is not None
        result = rates if self.config.throughput else {}
        read = {**self._machine.load(), **self._machine.memory()}
        return result | {name: value for name, value in read.items() if self._told(name)}

    def _told(self, metric: str) -> bool:
        if metric.startswith("device"):
            return self.config.device
        return self.config.memory or "memory" not in metric


def _measured_peak(run: Run, dtype: torch.dtype) -> float:
    return flops.product_peak(run.device, dtype, torch.get_num_threads())


def _are_tokens(inputs: Any) -> bool:
    """Whether a batch's inputs are rows of tokens, shape (samples, length)."""
    whole = isinstance(inputs, torch.Tensor) and not inputs.is_floating_point()
    return whole and inputs.ndim == 2 and not inputs.is_complex()


def _is_compiled(model: Any) -> bool:
    """Whether its forward pass is compiled: counting would keep it from being so."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
