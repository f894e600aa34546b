"""Training batches of one source, validation batches of another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Protocol, cast

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Data,
    DataSpec,
    Kind,
    PluginError,
    PluginInfo,
    Run,
    UseData,
    hookimpl,
)


class Source(Protocol):
    """What a nested plugin is asked for."""

    def make_data(self, run: Run) -> Data:
        """Its batches."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainValidationConfig:
    """The two sources."""

    training: Annotated[
        UseData[Source], Meta(description="its training batches are trained on")
    ] = field(default_factory=lambda: UseData("file", {"validation_split": 0.0}))
    validation: Annotated[
        UseData[Source],
        Meta(description="its training batches of the first epoch are validated with: give it "
             "neither a split nor shuffling"),
    ] = field(
        default_factory=lambda: UseData("file", {"validation_split": 0.0, "shuffle": False})
    )  # fmt: skip


class TrainValidationData:
    """One source's training batches, the other's as validation."""

    def __init__(self, training: Data, validation: Data) -> None:
        self.training, self._validation = training, validation
        self.batches_per_epoch = training.batches_per_epoch
        self.spec = merged(training.spec, validation.spec)
        self.preparation = getattr(training, "preparation", None)

    def batches(self, epoch: int, place: int) -> Iterator[Batch]:
        """The training batches of an epoch from a place on."""
        return self.training.batches(epoch, place)

    def validation(self) -> Iterator[Batch]:
        """The other source's batches, always in the order of its first epoch."""
        return self._validation.batches(0, 0)


def merged(training: DataSpec, validation: DataSpec) -> DataSpec:
    """What a model must know of both.

    Raises:
        PluginError: the samples differ in form.
    """
    for name in ("features", "sequence", "shape", "labels"):
        ours, theirs = getattr(training, name), getattr(validation, name)
        if ours != theirs:
            raise PluginError(
                f"train_validation: {name} is {ours} in the training samples, and {theirs} in the "
                "others"
            )
    largest = {}
    for name in ("classes", "vocabulary"):
        known = [getattr(spec, name) for spec in (training, validation)]
        largest[name] = None if None in known else max(known)
    return replace(training, **largest)


class TrainValidation:
    """Training batches of one source, validation batches of another."""

    info = PluginInfo(name="train_validation", kind=Kind.DATA, config=TrainValidationConfig)

    def __init__(self, config: TrainValidationConfig) -> None:
        self.config = config

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The batches of both."""
        training = cast(Source, self.config.training).make_data(run)
        prepared = getattr(training, "preparation", None)
        if prepared is not None and hasattr(self.config.validation, "preparation"):
            self.config.validation.preparation = prepared  # both read their columns alike
        return TrainValidationData(training, cast(Source, self.config.validation).make_data(run))
