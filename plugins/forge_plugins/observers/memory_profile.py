"""Profiles the memory of a training step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Batch, Kind, LazyModule, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch

    from forge_plugins.mathematics.metrics import saved_for_backward
    from forge_plugins.mathematics.metrics.saved_for_backward import SavedForBackward
else:
    torch = LazyModule("torch")
    saved_for_backward = LazyModule("forge_plugins.mathematics.metrics.saved_for_backward")

FILE = "memory_profile.json"
PARTS = ("weights", "buffers", "gradients", "optimizer", "saved_for_backward")
_BYTES = {"type": "integer", "minimum": 0}
RECORD = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "description": f"{FILE}: bytes of one training step",
    "type": "object",
    "properties": {
        "step": {"type": "integer", "minimum": 1},
        "samples": {"type": "integer", "minimum": 0, "description": "in the micro-batch counted"},
        "bytes": {
            "type": "object",
            "properties": dict.fromkeys(PARTS, _BYTES),
            "required": sorted(PARTS),
            "additionalProperties": False,
        },
        "layers": {
            "type": "object",
            "description": "saved_for_backward by layer, in the order of the forward pass",
            "additionalProperties": _BYTES,
        },
    },
    "required": ["bytes", "layers", "samples", "step"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class MemoryProfileConfig:
    """Which step is looked at, and how closely."""

    step: Annotated[
        int,
        Meta(ge=1, description="optimizer step that is profiled; from the second on the optimizer "
             "has its memory"),
    ] = 2  # fmt: skip
    depth: Annotated[
        int, Meta(ge=1, description="parts of a layer's name that get a row of their own")
    ] = 2


class MemoryProfile:
    """Profiles the memory of a training step.

    Writes memory_profile.json: weights, gradients, optimizer, and what each layer keeps.

    Only the first micro-batch of the one step is looked at; all others cost nothing. Activation
    checkpointing and low-bit arithmetic show in `saved_for_backward`.
    """

    info = PluginInfo(
        name="memory_profile",
        kind=Kind.OBSERVERS,
        config=MemoryProfileConfig,
        records={"memory_profile": RECORD},
    )

    def __init__(self, config: MemoryProfileConfig) -> None:
        self.config = config
        self._open: SavedForBackward | None = None
        self._layers: dict[str, int] | None = None
        self._samples = 0
        self._gradients = 0

    def _close(self) -> None:
        if self._open is not None:
            self._layers, self._open = self._open.close(), None

    @hookimpl
    def on_batch(self, run: Run, step: Step, batch: Batch) -> None:
        """Begin to count with the step's first micro-batch."""
        self._close()
        if step.number == self.config.step and self._layers is None:
            self._samples = len(batch.inputs)
            self._open = saved_for_backward.SavedForBackward(run.model, self.config.depth)

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """Backward is over."""
        del run
        self._close()
        if step.number == self.config.step:
            self._gradients = saved_for_backward.bytes_of(step.gradients)

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """Add up, write, tell."""
        if step.number != self.config.step or self._layers is None:
            return
        state = [
            value
            for memory in run.optimizer.state.values()
            for value in memory.values()
            if isinstance(value, torch.Tensor)
        ]
        result = {
            "weights": saved_for_backward.bytes_of(run.parameters.values()),
            "buffers": saved_for_backward.bytes_of(run.model.buffers()),
            "gradients": self._gradients,
            "optimizer": saved_for_backward.bytes_of(state),
            "saved_for_backward": sum(self._layers.values()),
        }
        if run.folder is not None:
            record = {"step": step.number, "samples": self._samples, "bytes": result,
                      "layers": self._layers}  # fmt: skip
            (run.folder / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        words = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in result.items())
        run.emit_event("memory_profile", f"Memory of step {step.number}: {words}.", **result)

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Leave the model without hooks."""
        del run, error
        self._close()
