"""Where the configurations of a sweep come from: a list, or Optuna, which learns from the results.

Optuna (Akiba et al., KDD 2019) is an extra, imported when it is asked for: its tree-structured
Parzen estimator proposes, its median pruner ends runs that are behind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from forge_plugins.sweeps.axis import Axis
from forge_plugins.sweeps.variant import Variant, fixed

if TYPE_CHECKING:
    import optuna


class Search(Protocol):
    """Gives configurations and hears what they came to."""

    def next(self) -> Variant | None:
        """The next configuration; None: there is no other."""
        ...

    def is_behind(self, variant: Variant, values: Mapping[int, float]) -> bool:
        """Whether a configuration is so far behind, by its validations so far, that it may end."""
        ...

    def learn(self, variant: Variant, value: float | None, *, pruned: bool) -> None:
        """What it came to: the median of its seeds."""
        ...


class ListSearch:
    """Configurations that are known from the start."""

    def __init__(self, variants: Iterable[Variant]) -> None:
        self._rest = iter(variants)

    def next(self) -> Variant | None:
        """The next one."""
        return next(self._rest, None)

    def is_behind(self, variant: Variant, values: Mapping[int, float]) -> bool:
        """None is ended early."""
        del variant, values
        return False

    def learn(self, variant: Variant, value: float | None, *, pruned: bool) -> None:
        """Nothing is learned."""


class OptunaSearch:
    """Configurations that Optuna proposes.

    Args:
        axes: of the sweep.
        count: of configurations.
        seed: of the proposals.
        largest: whether larger values are better.
        known: of a sweep that goes on: the configurations that it had.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        count: int,
        seed: int,
        *,
        largest: bool,
        known: Sequence[Mapping[str, str]] = (),
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._axes = [axis for axis in axes if axis.varies]
        self._fixed = fixed(axes)
        self._count, self._number = count, 0
        self._trials: dict[int, optuna.Trial] = {}
        self._reported: dict[int, set[int]] = {}  # steps
        self._study = optuna.create_study(
            direction="maximize" if largest else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )
        for values in known:
            self._study.enqueue_trial(
                {axis.key: self._parameter(axis, values) for axis in self._axes}
            )

    @staticmethod
    def _parameter(axis: Axis, values: Mapping[str, str]) -> Any:
        text = values[axis.key]
        if axis.span is None:
            return text
        return int(text) if axis.span.whole else float(text)

    def next(self) -> Variant | None:
        """What is proposed next; first those that the sweep had before."""
        if self._number >= self._count:
            return None
        trial = self._study.ask()
        number, self._number = self._number, self._number + 1
        self._trials[number] = trial
        values = tuple((axis.key, self._suggested(trial, axis)) for axis in self._axes)
        return Variant(number, values, self._fixed)

    @staticmethod
    def _suggested(trial: optuna.Trial, axis: Axis) -> str:
        span = axis.span
        if span is None:
            return str(trial.suggest_categorical(axis.key, axis.values))
        if span.whole:
            return str(trial.suggest_int(axis.key, int(span.low), int(span.high), log=span.log))
        return span.shown(trial.suggest_float(axis.key, span.low, span.high, log=span.log))

    def is_behind(self, variant: Variant, values: Mapping[int, float]) -> bool:
        """Whether the median pruner would end it."""
        trial = self._trials[variant.number]
        reported = self._reported.setdefault(variant.number, set())
        for step in sorted(values.keys() - reported):
            reported.add(step)
            trial.report(values[step], step)
        return bool(values) and trial.should_prune()

    def learn(self, variant: Variant, value: float | None, *, pruned: bool) -> None:
        """What it came to."""
        from optuna.trial import TrialState

        trial = self._trials[variant.number]
        if value is None or pruned:
            state = TrialState.PRUNED if pruned else TrialState.FAIL
            _ = self._study.tell(trial, state=state)
        else:
            _ = self._study.tell(trial, value)
