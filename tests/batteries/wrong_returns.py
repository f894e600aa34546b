"""Wrong answers of plugins: each hook that is answered gets eight and more of them."""

from __future__ import annotations

import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from battery import Battery, Trial
from kernel_parts import make_plugin
from plugin_run import CLASSES, SmallData, features, network, scratch, small_run
from torch import nn

from forge_kernel.api import Kind, LossTerm, ScheduleFactors
from forge_kernel.contract import hookspecs
from forge_kernel.contract.answers import ANSWERED

NAN, INFINITY = float("nan"), float("inf")


def generator() -> Any:
    yield 1


async def coroutine() -> int:
    return 1


@dataclass(frozen=True)
class Wrong:
    """A wrong answer, made anew for each trial."""

    name: str
    make: Callable[[], Any]


COMMON: Final = (
    Wrong("None", lambda: None),
    Wrong("a string", lambda: "wrong"),
    Wrong("a number", lambda: 7),
    Wrong("NaN", lambda: NAN),
    Wrong("infinity", lambda: INFINITY),
    Wrong("a generator", generator),
    Wrong("a coroutine", coroutine),
    Wrong("an object", object),
    Wrong("a class", lambda: dict),
    Wrong("a list of objects", lambda: [object()]),
    Wrong("a huge number", lambda: 10**400),
    Wrong("bytes", lambda: b"wrong"),
)


def scalar(value: float, **options: Any) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(value, **options)


def sgd(rate: float) -> Callable[[], Any]:
    def make() -> Any:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        optimizer.param_groups[0]["lr"] = rate
        return optimizer

    return make


OWN: Final[Mapping[str, tuple[Wrong, ...]]] = {
    "make_data": (Wrong("the class of data", lambda: type(features())),),
    "transform_data": (Wrong("a plugin", SmallData),),
    "make_model": (Wrong("the class of a model", lambda: nn.Linear),),
    "transform_model": (Wrong("a function", lambda: network().forward),),
    "make_modules": (
        Wrong("numbers by name", lambda: {"head": 3}),
        Wrong("modules by number", lambda: {3: nn.Linear(1, 1)}),
        Wrong("a list of modules", lambda: [nn.Linear(1, 1)]),
    ),
    "make_optimizer": (
        Wrong("the class", lambda: torch.optim.SGD),
        Wrong("a NaN rate", sgd(NAN)),
        Wrong("an infinite rate", sgd(INFINITY)),
        Wrong("a negative rate", sgd(-1.0)),
    ),
    "make_metrics": (
        Wrong("a generator of metrics", lambda: (part for part in [nn.Linear(1, 1)])),
        Wrong("a mapping", lambda: {"accuracy": 1.0}),
    ),
    "compute_phase": (
        Wrong("a tensor", lambda: torch.zeros(2)),
        Wrong("several", lambda: ("warmup", "search")),
    ),
    "compute_loss": (
        Wrong("a tensor without gradients", scalar(1.0)),
        Wrong("whole numbers", lambda: torch.tensor([1, 2, 3, 4])),
        Wrong("too many values", lambda: torch.zeros(17, requires_grad=True)),
        Wrong("NaN as a tensor", scalar(NAN, requires_grad=True)),
        Wrong("infinity as a tensor", scalar(INFINITY, requires_grad=True)),
        Wrong("a term of text", lambda: LossTerm("values")),  # type: ignore[arg-type]
        Wrong("a pair of numbers", lambda: (1.0, 1.0)),
        Wrong("no terms", list),
    ),
    "compute_loss_weights": (
        Wrong("NaN", lambda: [NAN, 1.0]),
        Wrong("infinity", lambda: [INFINITY, 4.0]),
        Wrong("below 0", lambda: [-1.0, 4.0]),
        Wrong("too many", lambda: [4.0, 4.0, 4.0]),
        Wrong("too few", lambda: [4.0]),
        Wrong("texts", lambda: ["a", "b"]),
    ),
    "compute_outputs": (
        Wrong("another shape", lambda: torch.zeros(5, 7, 2, requires_grad=True)),
        Wrong("a mapping of texts", lambda: {"logits": "none"}),
        Wrong("NaN", lambda: torch.full((4, CLASSES), NAN, requires_grad=True)),
        Wrong("infinities", lambda: torch.full((4, CLASSES), INFINITY, requires_grad=True)),
    ),
    "regularize": (
        Wrong("several values", lambda: torch.zeros(3, requires_grad=True)),
        Wrong("NaN as a tensor", scalar(NAN, requires_grad=True)),
        Wrong("infinity as a tensor", scalar(INFINITY, requires_grad=True)),
        Wrong("without gradients", scalar(1.0)),
    ),
    "compute_schedule_factors": (
        Wrong("factors of NaN", lambda: ScheduleFactors(NAN)),
        Wrong("infinite factors", lambda: ScheduleFactors(INFINITY)),
        Wrong("factors below 0", lambda: ScheduleFactors(-1.0)),
        Wrong("huge factors", lambda: ScheduleFactors(10**400)),
        Wrong("factors of text", lambda: ScheduleFactors("1")),  # type: ignore[arg-type]
        Wrong("too many", lambda: ScheduleFactors((1.0, 1.0, 1.0))),
        Wrong("the class", lambda: ScheduleFactors),
    ),
    "compute_evaluation_model": (Wrong("the class", lambda: nn.Linear),),
    "log_metrics": (
        Wrong("a tensor of several", lambda: {"speed": torch.zeros(3)}),
        Wrong("texts by name", lambda: {"speed": "fast"}),
        Wrong("numbers by number", lambda: {1: 1.0}),
        Wrong("lists by name", lambda: {"speed": [1.0]}),
        Wrong("huge numbers", lambda: {"speed": 10**400}),
    ),
}
"""Beside those that are wrong everywhere."""

RIGHT: Final[Mapping[str, frozenset[str]]] = {
    "compute_phase": frozenset({"None", "a string"}),
    "make_modules": frozenset({"None"}),
    "regularize": frozenset({"None"}),
    "unfinished": frozenset({"None", "a string"}),
    "check_export": frozenset({"None", "a string"}),
    "compute_loss_weights": frozenset({"None"}),
}
"""What of the common ones the hook may be given."""

KINDS: Final = {
    "make_data": Kind.DATA, "transform_data": Kind.WRAPPERS, "make_model": Kind.MODEL,
    "make_modules": Kind.CALLBACKS, "transform_model": Kind.WRAPPERS,
    "make_optimizer": Kind.OPTIMIZER, "make_metrics": Kind.VALIDATORS,
    "compute_phase": Kind.PHASES, "compute_outputs": Kind.CALLBACKS, "compute_loss": Kind.LOSS,
    "compute_loss_weights": Kind.LOSS, "regularize": Kind.REGULARIZERS,
    "compute_schedule_factors": Kind.SCHEDULE, "compute_evaluation_model": Kind.CALLBACKS,
    "unfinished": Kind.CALLBACKS, "log_metrics": Kind.OBSERVERS, "check_export": Kind.EXPORTERS,
    "export": Kind.EXPORTERS,
}  # fmt: skip


def two_terms(self: Any, run: Any, step: Any, batch: Any, outputs: Any) -> Any:
    values = nn.functional.cross_entropy(outputs, batch.targets, reduction="none")
    return [LossTerm(values, name="first"), LossTerm(values, name="second")]


def answering(hook: str, answer: Callable[[], Any]) -> Any:
    """A plugin that gives what `answer` gives in a hook."""
    names = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    scope: dict[str, Any] = {"answer": answer}
    exec(f"def {hook}(self, {names}): return answer()", scope)
    hooks: dict[str, Any] = {hook: scope[hook]}
    if hook == "compute_loss_weights":
        hooks["compute_loss"] = two_terms
    if hook == "check_export":
        hooks["export"] = lambda self, run, folder: {}
    if hook == "transform_model":
        hooks = {hook: scope[hook]}
    elif KINDS[hook] is Kind.WRAPPERS:
        hooks["transform_model"] = lambda self, run, model: model
    return make_plugin("culprit", KINDS[hook], **hooks)


def judged(hook: str, wrong: Wrong, folder: Path) -> str:
    """What was not as promised; empty for nothing."""
    plugin = answering(hook, wrong.make)
    outcome = small_run([plugin], folder, accumulate=2 if hook == "compute_loss_weights" else 1)
    words = outcome.words
    if KINDS[hook] is Kind.OBSERVERS:  # what only watches ends no run
        if outcome.error is not None:
            return f"an observer ended the run: {words}"
        words = outcome.log
    elif hook == "export":
        words = outcome.log
    elif outcome.error is None:
        return "nothing was said"
    if "culprit" not in words or f"in {hook}" not in words or not named_file(words):
        return f"not named: {words[-600:]} {outcome.where[-600:]}"
    others = [name for name in ("small_data", "small_model", "sgd_part") if f"by {name}" in words]
    return f"blames {others}: {words}" if others else ""


def named_file(words: str) -> bool:
    return "<string>:1" in words or "wrong_returns.py:" in words


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Every hook with each wrong answer, in a drawn order."""
    cases = [
        (hook, wrong)
        for hook in sorted(ANSWERED)
        for wrong in (*COMMON, *OWN.get(hook, ()))
        if wrong.name not in RIGHT.get(hook, ())
    ]
    draw.shuffle(cases)
    warnings.simplefilter("ignore")  # of coroutines that nobody awaits
    for hook, wrong in itertools.islice(itertools.cycle(cases), count):
        with scratch() as folder:
            yield Trial(f"{hook} answers {wrong.name}", judged(hook, wrong, folder / "r"))


BATTERY = Battery(
    "wrong-returns",
    "plugin, hook, version and place are named, and nobody else",
    ci=260,
    deep=520,
    trials=trials,
)
