"""The settings of a distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

from msgspec import Meta

from forge_kernel.api import Batch, LossAnswer, Run, Step, UseLoss


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
            description="folder of the run that trained the teacher, or of a model of "
            "transformers; null: this run's model as it was made, before it is quantized (what is "
            "frozen is held once)",
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

    relations: Annotated[
        tuple[str, ...],
        Meta(description="attention layers whose queries, keys and values are to relate to each "
             "other as the teacher's do, by name; glob pattern; of one layer is enough"),
    ] = ()  # fmt: skip
    relation_heads: Annotated[
        int, Meta(ge=1, description="parts of equal width that are related each by itself")
    ] = 8
    relation_weight: Annotated[
        float, Meta(ge=0, description="of the divergence between the relations")
    ] = 1.0
    cache: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="folder for the teacher's likeliest answers to all that the run reads: "
            "made before the first step where they are not there yet, then trained from without "
            "the teacher; null: the teacher is asked in each step",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    cache_top_k: Annotated[
        int,
        Meta(ge=1, description="answers that are kept to each target; what is left of the "
             "probability counts as one class"),
    ] = 64  # fmt: skip

    def __post_init__(self) -> None:
        layers = (self.hidden and self.hidden_weight) or (self.relations and self.relation_weight)
        if not (self.weight or layers):
            raise ValueError(
                "nothing is learned from the teacher: weight is 0, hidden and relations are empty"
            )
        if self.cache is None and self.cache_top_k != 64:
            raise ValueError("cache_top_k is read with a cache only: name its folder")
        if self.cache is not None and (self.hidden or self.relations or not self.weight):
            raise ValueError(
                "a cache holds the teacher's answers alone: hidden and relations need the teacher "
                "itself, and weight must be above 0"
            )
