"""A loss with a teacher: what a trained model answers, beside the targets."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Protocol, cast

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
    call_model,
    hookimpl,
    loss_terms,
    loss_weights,
    trained_model,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from forge_plugins.mathematics.losses import distillation as mathematics
    from forge_plugins.mathematics.metrics import label_positions
else:
    torch = LazyModule("torch")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
    mathematics = LazyModule("forge_plugins.mathematics.losses.distillation")


class Loss(Protocol):
    """What the nested plugin is asked for."""

    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> LossAnswer:
        """Values of which the kernel takes the mean."""
        ...


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """The teacher, and how much is learned from it."""

    teacher: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="folder of the run that trained the teacher; null: this run's model as it "
            "was made, before it is quantized",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    loss: Annotated[UseLoss[Loss], Meta(description="the loss towards the targets")] = field(
        default_factory=lambda: UseLoss("cross_entropy")
    )
    target_weight: Annotated[float, Meta(ge=0, description="of the loss towards the targets")] = 0.5
    weight: Annotated[
        float, Meta(ge=0, description="of the divergence from the teacher's answers")
    ] = 0.5
    temperature: Annotated[
        float, Meta(gt=0, le=100, description="of both answers, before they are compared")
    ] = 2.0
    hidden: Annotated[
        tuple[str, ...],
        Meta(description="layers whose outputs are compared too, by name; glob pattern; they have "
             "the same names and widths in both models"),
    ] = ()  # fmt: skip
    hidden_weight: Annotated[
        float, Meta(ge=0, description="of the hidden layers' relative squared distance")
    ] = 1.0

    def __post_init__(self) -> None:
        if not (self.weight or (self.hidden and self.hidden_weight)):
            raise ValueError("nothing is learned from the teacher: weight is 0, hidden is empty")


class Distillation:
    """A loss with a teacher: what a trained model answers, beside the targets.

    `target_weight * loss + weight * T^2 KL(teacher || student) + hidden_weight * distance`, each a
    mean over the targets that count: a row that counts for nothing teaches nothing.

    In a validation the nested loss alone is computed, so that its metric can be compared with that
    of other runs.
    """

    info = PluginInfo(
        name="distillation",
        kind=Kind.LOSS,
        config=DistillationConfig,
        metrics=(
            MetricInfo("distillation", goal="min"),
            MetricInfo("hidden_distance", goal="min"),
            MetricInfo("target_loss", goal="min"),
        ),
    )

    def __init__(self, config: DistillationConfig) -> None:
        self.config = config
        self._made: nn.Module | None = None
        self._teacher: nn.Module | None = None
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._digest = ""

    @hookimpl
    def make_modules(self, run: Run) -> Mapping[str, nn.Module]:
        """No companion to train; the model is still as it was made."""
        if self.config.teacher is None:
            self._made = copy.deepcopy(run.model).eval()
        return {}

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Load the teacher; it is neither trained nor saved with the run.

        Raises:
            PluginError: another teacher than that of the run that is resumed, or a hidden layer
                that one of the models has not.
            ConfigError, CheckpointError: its run folder cannot be read.
        """
        if self._teacher is not None:
            return
        named = self.config.teacher
        teacher = self._made if named is None else trained_model(named)
        assert teacher is not None
        digest = weights_digest(teacher)
        if self._digest and digest != self._digest:
            raise PluginError(
                f"distillation: {named or 'the model'} has other weights than when this run began"
            )
        self._digest = digest
        self._teacher = teacher.to(run.device).requires_grad_(requires_grad=False)
        for pattern in self.config.hidden:
            self._watch(run.model, pattern, self._seen[0])
            self._watch(teacher, pattern, self._seen[1])

    def _watch(self, model: nn.Module, pattern: str, seen: dict[str, Tensor]) -> None:
        names = [name for name, _ in model.named_modules() if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise PluginError(
                f"distillation: no layer '{pattern}' in {type(model).__name__}; it has "
                f"{', '.join(name for name, _ in model.named_children())}"
            )
        for name in names:
            model.get_submodule(name).register_forward_hook(_keeping(seen, name))

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> LossAnswer:
        """The nested loss with what is learned from the teacher, from the rows that count."""
        config = self.config
        answer = cast(Loss, config.loss).compute_loss(run, step, batch, outputs)
        if not torch.is_grad_enabled():
            return answer
        terms = [
            replace(term, scale=term.scale * config.target_weight, name=term.name or "target_loss")
            for term in loss_terms(answer)
        ]
        outputs = label_positions.main_output(outputs)
        outputs = label_positions.at_targets(outputs, batch.targets, batch.positions)
        answers = _like(self._answers(batch), outputs, batch)
        divergences = mathematics.divergences(outputs, answers, config.temperature)
        terms.append(LossTerm(divergences, scale=config.weight, name="distillation"))
        if config.hidden:
            distances = self._distances(batch)
            terms.append(LossTerm(distances, scale=config.hidden_weight, name="hidden_distance"))
        return terms

    @hookimpl
    def compute_loss_weights(self, run: Run, batch: Batch) -> Sequence[float | Tensor]:
        """What the nested loss counts, and the rows that the teacher is asked about."""
        total = batch.counted.total
        own = loss_weights(self.config.loss, run, batch)
        return [*own, total, *([total] if self.config.hidden else [])]

    @hookimpl
    def log_metrics(self, run: Run, step: Step) -> Mapping[str, Tensor | None]:
        """The parts of the loss, over the whole optimizer step."""
        del run
        return dict(step.losses)

    def _answers(self, batch: Batch) -> Tensor:
        assert self._teacher is not None
        with torch.no_grad():
            result = call_model(self._teacher, batch)
        return cast("Tensor", label_positions.main_output(result))

    def _distances(self, batch: Batch) -> Tensor:
        """Mean over layers of `|s - t|^2 / |t|^2` of each target's row, or of each sample."""
        student, teacher = self._seen
        if student.keys() != teacher.keys():
            raise PluginError(
                "distillation: hidden layers of only one of the models: "
                f"{sorted(student.keys() ^ teacher.keys())}"
            )
        parts = []
        for name, own in student.items():
            other = teacher[name]
            if own.shape != other.shape:
                raise PluginError(
                    f"distillation: {name} has outputs of shape {tuple(own.shape)}, and "
                    f"{tuple(other.shape)} in the teacher"
                )
            parts.append(mathematics.row_distances(own, other, batch.targets, batch.positions))
        student.clear()
        teacher.clear()
        if len({len(part) for part in parts}) > 1:  # a sample's distance is that of its rows
            rows = max(len(part) for part in parts)
            parts = [part.repeat_interleave(rows // len(part)) for part in parts]
        return torch.stack(parts).mean(0)

    def state_dict(self) -> dict[str, Any]:
        """Which teacher it was."""
        return {"teacher": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember which teacher it was."""
        self._digest = str(state["teacher"])


def _keeping(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        seen[name] = output[0] if isinstance(output, tuple) else output

    return keep


def _like(answers: Tensor, outputs: Tensor, batch: Batch) -> Tensor:
    """The teacher's answers at the positions that the student answers."""
    if answers.shape == outputs.shape:
        return answers
    if answers.ndim == 3 and batch.positions is not None:
        answers = answers[:, batch.positions]
    if answers.shape != outputs.shape:
        raise PluginError(
            f"distillation: the teacher answers with shape {tuple(answers.shape)}, the model with "
            f"{tuple(outputs.shape)}"
        )
    return answers


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights, in hex."""
    result = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        result.update(name.encode())
        result.update(
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return result.hexdigest()
