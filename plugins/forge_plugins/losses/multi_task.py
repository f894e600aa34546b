"""Several losses over the named outputs of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, cast

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    LossAnswer,
    LossTerm,
    MetricInfo,
    PluginError,
    PluginInfo,
    Run,
    Step,
    UseLoss,
    hookimpl,
    loss_terms,
    loss_weights,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from forge_plugins.mathematics.losses import loss_weights as task_weights
else:
    torch = LazyModule("torch")
    task_weights = LazyModule("forge_plugins.mathematics.losses.loss_weights")


class Loss(Protocol):
    """What a nested plugin is asked for."""

    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> LossAnswer:
        """Values of which the kernel takes the mean."""
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

    The weighted sum of the tasks' losses, each the mean over the task's own targets that count.

    Outputs and targets are mappings by task; a single output or target is every task's.
    """

    info = PluginInfo(
        name="multi_task",
        kind=Kind.LOSS,
        config=MultiTaskConfig,
        metrics=(MetricInfo("weight", title="Weight of the task"),),
    )

    def __init__(self, config: MultiTaskConfig) -> None:
        self.config = config
        self._names = tuple(config.tasks)
        self._module: Any = None
        self._progress: Any = None
        self._shown: dict[str, list[tuple[str, float]]] = {}  # of a task: terms and their scales
        self._weights: Any = None  # adaptive ones of the step in progress

    @hookimpl
    def make_modules(self, run: Run) -> Mapping[str, nn.Module]:
        """The learned logarithms of the variances: the optimizer gets them with the model's."""
        del run
        if self.config.weighting != "uncertainty":
            return {}
        self._module = task_weights.Uncertainty(self._names)
        return {"task_uncertainty": self._module}

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> list[LossTerm]:
        """The terms of all tasks."""
        factors = self._factors()
        result: list[LossTerm] = []
        for task, factor in zip(self._names, factors, strict=True):
            loss = cast(Loss, self.config.tasks[task])
            part = _task(batch, task)
            answer = loss.compute_loss(run, step, part, _part(outputs, task, "output"))
            result += self._terms(task, loss_terms(answer), factor, part)
        if self._module is not None:
            result.append(LossTerm(self._module.regularizer()))
        return result

    def _terms(
        self, task: str, terms: Sequence[LossTerm], factor: float | Tensor, part: Batch
    ) -> list[LossTerm]:
        """A task's terms, under its name, times its factor."""
        fixed = self.config.weights.get(task, 1.0)
        item = len(terms) == 1
        names = [
            f"loss/{task}" if item else f"loss/{task}/{term.name or number}"
            for number, term in enumerate(terms)
        ]
        self._shown[task] = [
            (name, float(torch.as_tensor(term.scale).detach()))
            for name, term in zip(names, terms, strict=True)
        ]
        return [
            dataclasses.replace(
                term,
                scale=term.scale * fixed * factor,
                counted=term.counted or part.counted,
                name=name,
            )
            for name, term in zip(names, terms, strict=True)
        ]

    def _factors(self) -> Sequence[float | Tensor]:
        """What each task's loss is multiplied by besides its fixed weight."""
        if self._module is not None:
            factors: Tensor = self._module.factors()
            return list(factors.unbind())
        if self.config.weighting == "fixed" or self._progress is None:
            return [1.0] * len(self._names)
        self._weights = self._progress.weights(self.config.temperature)
        return list(self._weights.unbind())

    @hookimpl
    def compute_loss_weights(self, run: Run, batch: Batch) -> Sequence[float | Tensor]:
        """What each task's terms count."""
        result: list[float | Tensor] = []
        for task, loss in self.config.tasks.items():
            result += loss_weights(loss, run, _task(batch, task))
        return [*result, batch.counted.total] if self._module is not None else result

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """Take the tasks' means of the step into the averages of the adaptive weighting."""
        del run
        if self.config.weighting != "adaptive" or not self._shown:
            return
        means = [
            torch.stack([step.losses[name] * scale for name, scale in self._shown[task]]).sum()
            for task in self._names
        ]
        if self._progress is None:
            self._progress = task_weights.RateOfFall(len(self._names), self.config.decay)
        self._progress.take(torch.stack(means))

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, Tensor | None]:
        """The tasks' losses over the whole optimizer step, and their adaptive weights."""
        del run
        result: dict[str, Tensor | None] = dict(step.losses)
        if self._weights is not None:
            result |= {f"weight/{n}": w for n, w in zip(self._names, self._weights, strict=True)}
        return result

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


def _task(batch: Batch, task: str) -> Batch:
    """The batch with one task's targets."""
    return dataclasses.replace(batch, targets=_part(batch.targets, task, "target"))
