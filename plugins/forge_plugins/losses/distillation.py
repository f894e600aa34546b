"""A loss with a teacher: what a trained model answers, beside the targets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
    call_model,
    hookimpl,
    loss_terms,
    loss_weights,
)
from forge_plugins.losses.distillation_config import DistillationConfig, Loss
from forge_plugins.losses.language_model import LanguageModelLoss
from forge_plugins.losses.teacher import (
    check_heads,
    check_plain_head,
    counted_rows,
    head_of,
    loaded_teacher,
    rows_before_head,
    source_of,
    tie_frozen,
    weights_digest,
)
from forge_plugins.losses.teacher_cache import TeacherCache
from forge_plugins.losses.teacher_layers import ComparedLayers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from forge_plugins.mathematics.losses import chunked_distillation
    from forge_plugins.mathematics.losses import distillation as mathematics
    from forge_plugins.mathematics.metrics import label_positions
else:
    torch = LazyModule("torch")
    label_positions = LazyModule("forge_plugins.mathematics.metrics.label_positions")
    chunked_distillation = LazyModule("forge_plugins.mathematics.losses.chunked_distillation")
    mathematics = LazyModule("forge_plugins.mathematics.losses.distillation")


class Distillation:
    """A loss with a teacher: what a trained model answers, beside the targets.

    `target_weight * loss + weight * T^2 KL(teacher || student) + hidden_weight * distance +
    relation_weight * KL(relations)`, each a mean over the targets that count: a row that counts for
    nothing teaches nothing.

    Around the loss `language_model`, both models' logits are there in pieces of at most 512 rows.

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
            MetricInfo("relation_divergence", goal="min"),
            MetricInfo("target_loss", goal="min"),
        ),
    )

    def __init__(self, config: DistillationConfig) -> None:
        self.config = config
        self._made: nn.Module | None = None
        self._teacher: nn.Module | None = None
        self._head = ""  # of the teacher, where its logits are asked for in pieces
        self._head_checked = False
        self._cache: TeacherCache | None = None
        self._layers = ComparedLayers(config.hidden, config.relations, config.relation_heads)
        self._digest = ""

    @property
    def _in_pieces(self) -> bool:
        return isinstance(self.config.loss, LanguageModelLoss)

    @hookimpl
    def make_modules(self, run: Run) -> Mapping[str, nn.Module]:
        """No companion to train; the model is still as it was made.

        Raises:
            PluginError: more answers are to be kept than there are classes.
        """
        config = self.config
        classes, digest = run.data.spec.classes, ""
        if config.cache is not None:
            if classes is not None and config.cache_top_k > classes:
                raise PluginError(
                    f"distillation: cache_top_k {config.cache_top_k} is more than the {classes} "
                    "classes of the data"
                )
            if config.teacher is None:
                digest = weights_digest(run.model)
            about = {
                "teacher": Path(config.teacher).name if config.teacher else "",
                "source": source_of(config.teacher) if config.teacher else digest,
                "k": config.cache_top_k,
                "temperature": config.temperature,
            }
            self._cache = TeacherCache(config.cache, about)
        known = self._cache is not None and self._cache.known_digest(run) == digest
        if config.teacher is None and not known:
            self._made = copy.deepcopy(run.model).eval()
        return {}

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Load the teacher; it is neither trained nor saved with the run.

        With a cache it is loaded only where answers are missing, and let go of when it has given
        them.

        Raises:
            PluginError: another teacher than that of the run that is resumed, one that does not
                fit, or a hidden layer that one of the models has not.
            ConfigError, CheckpointError: its folder cannot be read.
        """
        if self._teacher is not None:
            return
        cache = self._cache
        if cache is not None and cache.open(run):
            self._made = None
            self._check_digest(cache.digest)
            return
        teacher = self._load(run)
        self._check_digest(weights_digest(teacher))
        if self._in_pieces:
            self._check_heads(run, teacher)
        if cache is not None:
            self._teacher = teacher
            cache.make(run, self._digest, self._rows_of)
            self._teacher = self._made = None
            return
        tie_frozen(run.model, teacher)
        self._teacher = teacher
        self._layers.watch(run.model, teacher)

    def _load(self, run: Run) -> nn.Module:
        if self.config.teacher is not None:
            return loaded_teacher(self.config.teacher, run).model
        if self._made is None:
            raise PluginError(
                f"distillation: the cache {self.config.cache} says that it has all answers, and "
                "has not: remove it, and it is made anew"
            )
        return self._made.to(run.device).requires_grad_(False)

    def _check_digest(self, digest: str) -> None:
        if self._digest and digest != self._digest:
            raise PluginError(
                f"distillation: {self.config.teacher or 'the model'} has other weights than when "
                "this run began"
            )
        self._digest = digest

    def _check_heads(self, run: Run, teacher: nn.Module) -> None:
        loss = self.config.loss
        assert isinstance(loss, LanguageModelLoss)
        self._head = head_of(teacher, loss.config.head)
        check_heads(run.model, teacher, (head_of(run.model, loss.config.head), self._head))

    @hookimpl
    def compute_outputs(self, run: Run, step: Step, batch: Batch) -> Any:
        """What the nested loss asks the model for, or what the model gives."""
        asked = getattr(self.config.loss, "compute_outputs", None)
        if asked is not None:
            return asked(run, step, batch)
        return call_model(run.active_model, batch)

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> LossAnswer:
        """The nested loss with what is learned from the teacher, from the rows that count."""
        config = self.config
        if not torch.is_grad_enabled():
            return cast(Loss, config.loss).compute_loss(run, step, batch, outputs)
        if self._in_pieces:
            terms = self._piece_terms(batch, outputs)
        else:
            answer = cast(Loss, config.loss).compute_loss(run, step, batch, outputs)
            terms = [
                replace(
                    term, scale=term.scale * config.target_weight, name=term.name or "target_loss"
                )
                for term in loss_terms(answer)
            ]
            divergences = self._divergences(batch, outputs)
            terms.append(LossTerm(divergences, scale=config.weight, name="distillation"))
        if config.hidden:
            distances = self._layers.distances(batch)
            terms.append(LossTerm(distances, scale=config.hidden_weight, name="hidden_distance"))
        if config.relations:
            related = self._layers.relations(batch)
            terms.append(
                LossTerm(related, scale=config.relation_weight, name="relation_divergence")
            )
        return terms

    @hookimpl
    def compute_loss_weights(self, run: Run, batch: Batch) -> Sequence[float | Tensor]:
        """What the nested loss counts, and the rows that the teacher is asked about."""
        total, config = batch.counted.total, self.config
        layers = [total] * (bool(config.hidden) + bool(config.relations))
        if self._in_pieces:  # the loss and its two parts
            return [total, total, total, *layers]
        return [*loss_weights(config.loss, run, batch), total, *layers]

    def _divergences(self, batch: Batch, outputs: Any) -> Tensor:
        """Of each row; 0 where the teacher was not asked, since the row counts for nothing."""
        outputs = label_positions.main_output(outputs)
        temperature = self.config.temperature
        if self._cache is None:
            outputs = label_positions.at_targets(outputs, batch.targets, batch.positions)
            answers = _like(self._answers(batch), outputs, batch)
            return mathematics.divergences(outputs, answers, temperature)
        kept = self._cache.answers(batch)
        rows, _ = label_positions.answer_rows(outputs, batch.targets, batch.positions)
        counted = counted_rows(batch)
        if counted is None:
            return chunked_distillation.top_divergences(rows, kept, temperature)
        some = chunked_distillation.top_divergences(rows[counted], kept, temperature)
        return some.new_zeros(len(rows)).index_put((counted,), some)

    def _piece_terms(self, batch: Batch, outputs: Any) -> list[LossTerm]:
        """The whole loss, and its parts as metrics, without all logits of either model at once.

        Raises:
            PluginError: there are not as many answers as targets.
        """
        config, loss = self.config, self.config.loss
        assert isinstance(loss, LanguageModelLoss)
        hidden, targets = outputs.hidden.flatten(0, -2), batch.targets.reshape(-1)
        if len(hidden) != len(targets):
            raise PluginError(f"distillation: {len(hidden)} answers for {len(targets)} targets")
        counted, weights = counted_rows(batch), batch.counted.weights
        if counted is not None and weights is not None:
            hidden, targets, weights = hidden[counted], targets[counted], weights[counted]
        means = chunked_distillation.chunked_distillation(
            hidden,
            targets,
            outputs.head,
            self._piece_answers(batch, counted),
            chunked_distillation.LossFactors(
                target=config.target_weight,
                teacher=config.weight,
                temperature=config.temperature,
                label_smoothing=loss.config.label_smoothing,
                ignored=batch.ignore_index,
            ),
            piece=loss.config.piece,
            weights=weights,
        )
        return [
            LossTerm(means.loss),
            LossTerm(means.cross_entropy, scale=0.0, name="target_loss"),
            LossTerm(means.divergence, scale=0.0, name="distillation"),
        ]

    def _piece_answers(self, batch: Batch, counted: Tensor | None) -> Callable[[slice], Any]:
        """The teacher's answers to some of the rows that count."""
        if self._cache is not None:
            kept = self._cache.answers(batch)
            return lambda rows: type(kept)(*(part[rows] for part in kept))
        assert self._teacher is not None
        if not self._head_checked:
            check_plain_head(self._teacher, self._head, batch)
            self._head_checked = True
        whole, head = rows_before_head(self._teacher, self._head, batch)
        some = whole if counted is None else whole[counted]
        return lambda rows: head(some[rows])

    def _rows_of(self, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What the cache is made of: a row for each target, and what makes it logits."""
        assert self._teacher is not None
        if self._in_pieces:
            if not self._head_checked:
                check_plain_head(self._teacher, self._head, batch)
                self._head_checked = True
            return rows_before_head(self._teacher, self._head, batch)
        answers = self._answers(batch)
        try:
            rows, _ = label_positions.answer_rows(answers, batch.targets, batch.positions)
        except ValueError as error:
            raise PluginError(f"distillation: the teacher: {error}") from error
        return rows, lambda some: some

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

    def state_dict(self) -> dict[str, Any]:
        """Which teacher it was."""
        return {"teacher": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember which teacher it was."""
        self._digest = str(state["teacher"])


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
