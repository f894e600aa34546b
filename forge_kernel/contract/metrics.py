"""Metrics: what a validator computes, and where the last values are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from forge_kernel.contract.metric_info import Goal, MetricInfos
from forge_kernel.contract.values import Batch

if TYPE_CHECKING:
    from torch import Tensor


class Metric(Protocol):
    """Metrics over a whole validation set.

    Which way each is better its plugin's `PluginInfo.metrics` declares; a metric whose names only
    it knows has `goals`, a mapping of them to "max" or "min".
    """

    def reset(self) -> None:
        """Begin a pass."""
        ...

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        """Take in one batch, without reading a value back to the host."""
        ...

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        """The metrics; `add` sums a tensor over all processes."""
        ...


class MetricStore:
    """Metrics of the run: put as tensors at any time, read only when a log line is due."""

    def __init__(self) -> None:
        self._pending: dict[str, float | Tensor | None] = {}
        self.latest: dict[str, float | None] = {}
        self.validation: dict[str, float | None] = {}
        self.best: dict[str, float] = {}
        self.infos = MetricInfos()
        self._goals: dict[str, Goal] = {}

    def declare(self, infos: MetricInfos, goals: Mapping[str, Goal]) -> None:
        """Say what the run's metrics are.

        Args:
            infos: what the plugins declare.
            goals: which way those are better whose names only the validation knows.
        """
        self.infos, self._goals = infos, dict(goals)

    def goal(self, name: str) -> Goal | None:
        """Which way a metric of the validation is better, as far as anybody said."""
        return self._goals.get(name) or self.infos.of(name).goal

    def put(self, name: str, value: float | Tensor | None) -> None:
        """Set a metric; a tensor (0-d) is read later."""
        self._pending[name] = value

    def read(self) -> dict[str, float | None]:
        """Bring what was put since the last reading to the host; not finite becomes None.

        One transfer per device. What was not put anew is not in the answer, since it is of an
        earlier step; `latest` keeps it.
        """
        import torch

        result: dict[str, float | None] = {}
        tensors = {
            name: value for name, value in self._pending.items() if isinstance(value, torch.Tensor)
        }
        devices = {value.device for value in tensors.values()}
        for device in devices:
            names = [name for name, value in tensors.items() if value.device == device]
            stacked = torch.stack([tensors[name].detach().double().reshape(()) for name in names])
            self._pending.update(zip(names, stacked.tolist(), strict=True))
        for name, value in self._pending.items():
            number = None if value is None else float(value)
            result[name] = number if number is not None and math.isfinite(number) else None
        self._pending.clear()
        self.latest.update(result)
        return result

    def record_validation(self, metrics: Mapping[str, float], *, best: bool = True) -> None:
        """Take in a validation's metrics and keep the best of each.

        Args:
            metrics: by name.
            best: False for a network that is not what will be exported.
        """
        self.validation = {
            name: value if math.isfinite(value) else None for name, value in metrics.items()
        }
        for name, value in metrics.items() if best else ():
            known = self.best.get(name)
            higher = self.goal(name) == "max"
            if math.isfinite(value) and (
                known is None or (value > known if higher else value < known)
            ):
                self.best[name] = value

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {
            "latest": dict(self.latest),
            "validation": dict(self.validation),
            "best": dict(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        self._pending.clear()
        self.latest = dict(state["latest"])
        self.validation = dict(state["validation"])
        self.best = dict(state["best"])
