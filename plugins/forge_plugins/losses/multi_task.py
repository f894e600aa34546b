"""Several losses over the named outputs of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, cast

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    Step,
    UseLoss,
    hookimpl,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from forge_plugins.mathematics import task_weights
else:
    torch = LazyModule("torch")
    task_weights = LazyModule("forge_plugins.mathematics.task_weights")


class Loss(Protocol):
    """What a nested plugin is asked for."""

    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """Mean loss and its weight."""
        ...


@dataclass(frozen=True, kw_only=True)
class MultiTaskConfig:
    """The tasks, and how their losses are weighed."""

    tasks: Annotated[
        dict[str, UseLoss[Loss]],
        Meta(
            min_length=1, description="loss by task, which reads the output and target of its name"
        ),
    ] = field(default_factory=lambda: {"main": UseLoss("cross_entropy")})
    weights: Annotated[
        dict[str, Annotated[float, Meta(ge=0)]],
        Meta(description="factor of a task's loss; tasks that are not named: 1"),
    ] = field(default_factory=dict)
    weighting: Annotated[
        Literal["fixed", "uncertainty", "adaptive"],
        Meta(
            description="fixed; uncertainty: learned with the model; adaptive: tasks whose loss "
            "falls more slowly weigh more"
        ),
    ] = "fixed"
    temperature: Annotated[
        float, Meta(gt=0, description="how even adaptive weights are; large: equal")
    ] = 2.0
    decay: Annotated[
        float, Meta(ge=0, le=0.99999, description="decay of the adaptive weighting's averages")
    ] = 0.99

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(self.tasks))
        if unknown:
            raise ValueError(f"weights of unknown tasks {unknown}; there are {sorted(self.tasks)}")


class MultiTask:
    """Several losses over the named outputs of one model.

    The weighted sum of the tasks' mean losses; its weight is the number of samples.

    Outputs and targets are mappings by task; a single output or target is every task's.
    """

    info = PluginInfo(name="multi_task", kind=Kind.LOSS, config=MultiTaskConfig)

    def __init__(self, config: MultiTaskConfig) -> None:
        self.config = config
        self._names = tuple(config.tasks)
        self._module: Any = None
        self._progress: Any = None

    @hookimpl
    def make_modules(self, run: Run) -> Mapping[str, nn.Module]:
        """The learned logarithms of the variances: the optimizer gets them with the model's."""
        del run
        if self.config.weighting != "uncertainty":
            return {}
        self._module = task_weights.Uncertainty(self._names)
        return {"task_uncertainty": self._module}

    @hookimpl
    def compute_loss(
        self, run: Run, step: Step, batch: Batch, outputs: Any
    ) -> tuple[Tensor, float | Tensor]:
        """One loss of all tasks."""
        losses: dict[str, Tensor] = {}
        for name, loss in self.config.tasks.items():
            part = dataclasses.replace(batch, targets=_part(batch.targets, name, "target"))
            found, _ = cast(Loss, loss).compute_loss(
                run, step, part, _part(outputs, name, "output")
            )
            losses[name] = found
            if step.logs:
                run.metrics.put(f"loss/{name}", found.detach())
        return self._weighted(run, step, losses), _samples(batch.inputs)

    def _weighted(self, run: Run, step: Step, losses: Mapping[str, Tensor]) -> Tensor:
        fixed = torch.stack([torch.as_tensor(self.config.weights.get(n, 1.0)) for n in self._names])
        stacked = torch.stack([losses[name] for name in self._names])
        fixed = fixed.to(stacked)
        if self._module is not None:
            learned: Tensor = self._module(stacked * fixed)
            return learned
        if self.config.weighting == "fixed":
            return (stacked * fixed).sum()
        if self._progress is None:
            self._progress = task_weights.RateOfFall(len(self._names), self.config.decay)
        if torch.is_grad_enabled():  # a validation leaves the averages alone
            self._progress.take(stacked.detach())
        adaptive = self._progress.weights(self.config.temperature, like=stacked)
        if step.logs:
            for name, weight in zip(self._names, adaptive, strict=True):
                run.metrics.put(f"weight/{name}", weight)
        total: Tensor = (stacked * fixed * adaptive).sum()
        return total

    def state_dict(self) -> dict[str, Any]:
        """The averages of the adaptive weighting."""
        return {} if self._progress is None else self._progress.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the averages."""
        self._progress = None
        if state:
            self._progress = task_weights.RateOfFall(len(self._names), self.config.decay)
            self._progress.load_state_dict(state)


def _part(values: Any, name: str, what: str) -> Any:
    if not isinstance(values, Mapping):
        return values
    if name not in values:
        raise PluginError(f"multi_task: there is no {what} '{name}'; there are {sorted(values)}")
    return values[name]


def _samples(inputs: Any) -> int:
    found = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return len(found)
