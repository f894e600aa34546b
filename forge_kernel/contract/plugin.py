"""What a plugin is: its kind, its card (`PluginInfo`) and the protocols it may follow."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

from forge_kernel.contract.metric_info import MetricInfo

API_VERSION: Final = 1


class Kind(enum.StrEnum):
    """Where in a run a plugin stands; the members stand in canonical order."""

    DATA = "data"
    MODEL = "model"
    QUANTIZER = "quantizer"
    WRAPPERS = "wrappers"
    STRATEGY = "strategy"
    OPTIMIZER = "optimizer"
    LOSS = "loss"
    REGULARIZERS = "regularizers"
    GRADIENTS = "gradients"
    PHASES = "phases"
    SCHEDULE = "schedule"
    VALIDATORS = "validators"
    CALLBACKS = "callbacks"
    EXPORTERS = "exporters"
    OBSERVERS = "observers"


@dataclass(frozen=True, slots=True)
class KindRule:
    """How many plugins of a kind a run has, and the hooks that they answer."""

    at_least: int
    at_most: int | None  # None: any number
    answers: tuple[str, ...] = ()
    about: str = ""
    may_answer: tuple[str, ...] = ()  # too; of a part, its composite asks

    @property
    def asked(self) -> tuple[str, ...]:
        """What a composite asks its parts of this kind."""
        return (*self.answers, *self.may_answer)


RULES: Final[dict[Kind, KindRule]] = {
    Kind.DATA: KindRule(1, 1, ("make_data",), "training and validation batches"),
    Kind.MODEL: KindRule(1, 1, ("make_model",), "the network"),
    Kind.QUANTIZER: KindRule(0, 1, ("transform_model",), "turns layers into low-bit ones"),
    Kind.WRAPPERS: KindRule(
        0, None, ("transform_model",), "wrap the model (torch.compile, activation checkpointing)"
    ),
    Kind.STRATEGY: KindRule(0, 1, (), "how the run spreads over processes"),
    Kind.OPTIMIZER: KindRule(1, 1, ("make_optimizer",), "updates the weights"),
    Kind.LOSS: KindRule(1, 1, ("compute_loss",), "what is minimised", ("compute_loss_weights",)),
    Kind.REGULARIZERS: KindRule(0, None, ("regularize",), "terms of the weights added to the loss"),
    Kind.GRADIENTS: KindRule(0, None, ("on_gradients",), "filters between backward and step"),
    Kind.PHASES: KindRule(0, 1, ("compute_phase",), "the one phase clock"),
    Kind.SCHEDULE: KindRule(0, 1, ("compute_schedule_factors",), "learning rate and momentum"),
    Kind.VALIDATORS: KindRule(0, None, ("make_metrics",), "metrics of the validation set"),
    Kind.CALLBACKS: KindRule(0, None, (), "decide when to stop, save, restore or validate"),
    Kind.EXPORTERS: KindRule(0, None, ("export",), "write the result for others"),
    Kind.OBSERVERS: KindRule(0, None, (), "watch and report; read only"),
}

SINGLE_ANSWERS: Final = frozenset(
    {
        "make_data", "make_model", "make_optimizer", "compute_phase", "compute_outputs",
        "compute_loss", "compute_loss_weights", "compute_schedule_factors",
        "compute_evaluation_model",
    }
)  # fmt: skip
"""Hooks that at most one plugin of a run may answer."""


@dataclass(frozen=True, slots=True)
class Order:
    """Names of the same kind that a plugin must follow (`after`) or precede (`before`)."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


Facts = tuple[str, ...] | Callable[[Any], tuple[str, ...]]
"""Words that the planner matches, fixed or a function of the plugin's configuration.

A function raises `PluginError` to refuse the settings when they are planned, such as a folder that
is not there; the path of each `Fault` is a setting's.
"""


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """A plugin's card.

    Args:
        name: the word in the pipeline file, unique within the kind.
        kind: where it stands in a run.
        config: frozen, keyword-only dataclass with the settings.
        order: what it must follow or precede within its kind.
        provides: facts it brings into a run, such as `"data:tokens"` or `"metric:accuracy"`.
        requires: facts that some other plugin of the run must bring.
        alternatives: said where a fact that it requires is missing: what can be done instead.
        conflicts: plugins (`"<kind>.<name>"`) that it cannot run beside.
        api: first and last version of the plugin interface that it is written for.
        records: JSON Schema of each JSON file that it writes, by the file's name without suffix.
        packages: optional modules that it cannot work without, each with what installs it; a run
            without one of them is refused when it is planned.
        metrics: those that it logs or computes.
        foreign_code: what its settings would let run, beside the plugin itself: (in words, whether
            somebody must allow it from outside the file).
        hears_unfinished: a callback that hears of validations of a network that is not yet what
            will be exported, since it judges no metrics.
        couples_samples: a loss whose value for a sample depends on the other samples of the
            micro-batch (pairs, groups): micro-batches do not add up to the whole batch, which a
            run with `run.accumulate` above 1 is told.
    """

    name: str
    kind: Kind
    config: type[Any]
    order: Order = field(default_factory=Order)
    provides: Facts = ()
    requires: Facts = ()
    alternatives: str = ""
    conflicts: tuple[str, ...] = ()
    api: tuple[int, int] = (API_VERSION, API_VERSION)
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[MetricInfo, ...] = ()
    foreign_code: Callable[[Any], Sequence[tuple[str, bool]]] | None = None
    hears_unfinished: bool = False
    couples_samples: bool = False

    @property
    def key(self) -> str:
        """The name of its entry point, `"<kind>.<name>"`."""
        return f"{self.kind}.{self.name}"


def facts(declared: Facts, config: Any) -> tuple[str, ...]:
    """The facts of a plugin that has this configuration."""
    return declared(config) if callable(declared) else declared


class Plugin(Protocol):
    """A class with a card and a constructor that stores its configuration and does no more."""

    info: PluginInfo

    def __init__(self, config: Any) -> None: ...


@runtime_checkable
class Stateful(Protocol):
    """A plugin with memory: what a checkpoint keeps of it."""

    def state_dict(self) -> dict[str, Any]:
        """A tree with string keys; leaves are tensors, finite numbers, strings, bools or None."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that `state_dict` gave."""
        ...
