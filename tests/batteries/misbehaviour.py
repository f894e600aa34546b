"""Plugins that misbehave: sixteen ways, in every hook and kind."""

from __future__ import annotations

import inspect
import itertools
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from battery import Battery, Trial
from kernel_parts import make_plugin
from plugin_run import features, network, scratch, small_run
from wrong_returns import KINDS, two_terms

from forge_kernel.api import Kind, PluginInfo, ScheduleFactors
from forge_kernel.contract import hookspecs
from forge_kernel.contract.answers import ANSWERED
from forge_kernel.errors import ForgeError, PluginError
from forge_kernel.planning.catalog import Catalog, Offer
from forge_kernel.planning.plan import HOOKS
from forge_kernel.training.loaders.in_memory import NoConfig


class Private(BaseException):
    """An exception that no `except Exception` catches."""


RIGHT: Final[Mapping[str, Callable[..., Any]]] = {
    "make_data": lambda run: features(),
    "transform_data": lambda run, data: data,
    "make_model": lambda run: network(),
    "make_modules": lambda run: {},
    "transform_model": lambda run, model: model,
    "make_optimizer": lambda run, parameters: torch.optim.SGD([p for _, p in parameters], lr=0.1),
    "make_metrics": lambda run: [],
    "compute_phase": lambda run, step: "first" if step.number < 3 else "second",
    "compute_outputs": lambda run, step, batch: run.active_model(batch.inputs),
    "compute_loss": lambda run, step, batch, outputs: two_terms(None, run, step, batch, outputs),
    "compute_loss_weights": lambda run, batch: [batch.counted.total] * 2,
    "regularize": lambda run, step: None,
    "compute_schedule_factors": lambda run, step: ScheduleFactors(),
    "compute_evaluation_model": lambda run: run.model,
    "unfinished": lambda run: None,
    "log_metrics": lambda run, step: {},
    "check_export": lambda run: None,
    "export": lambda run, folder: {},
}


def raises() -> None:
    raise ArithmeticError("planned")


def raises_what_nobody_catches() -> None:
    raise Private("planned")


def ends_the_program() -> None:
    sys.exit(0)


def prints() -> None:
    print("x" * 10_000)
    print("\x1b[2J\udce9", file=sys.stderr)


def starts_a_thread() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def warns() -> None:
    warnings.warn("planned", stacklevel=1)


FATAL: Final = (raises, raises_what_nobody_catches, ends_the_program)
HARMLESS: Final = (prints, starts_a_thread, warns)


def misbehaving(hook: str, kind: Kind, act: Callable[..., None], *, sees: bool = False) -> Any:
    """A plugin that acts in a hook, and answers it as it should; `sees`: it is given what comes."""
    names = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    right = RIGHT.get(hook, lambda *_: None)
    given = names if sees else ""
    scope: dict[str, Any] = {"act": act, "right": right}
    text = f"def {hook}(self, {names}):\n    act({given})\n    return right({names})"
    exec(compile(text, __file__, "exec"), scope)
    hooks: dict[str, Any] = {hook: scope[hook]}
    if hook == "compute_loss_weights":
        hooks["compute_loss"] = two_terms
    if hook == "check_export":
        hooks["export"] = lambda self, run, folder: {}
    if kind is Kind.GRADIENTS:
        hooks.setdefault("on_gradients", lambda self, run, step: None)
    if kind is Kind.WRAPPERS and hook != "transform_model":
        hooks["transform_model"] = lambda self, run, model: model
    return make_plugin("culprit", kind, **hooks)


def beside(hook: str, kind: Kind) -> list[Any]:
    """What makes a hook come: a phase that changes, something that is told, a failure."""
    result = []
    if kind is not Kind.PHASES:
        phase = RIGHT["compute_phase"]
        result.append(
            make_plugin(
                "clock", Kind.PHASES, compute_phase=lambda self, run, step: phase(run, step)
            )
        )

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        run.emit_event("told", "Something.", number=1)
        if hook == "on_error" and run.progress.step == 2:
            raise KeyError("the first error")

    return [*result, make_plugin("teller", Kind.CALLBACKS, on_step_end=on_step_end)]


def in_a_hook(hook: str, kind: Kind, act: Callable[[], None], folder: Path) -> str:
    plugin = misbehaving(hook, kind, act)
    several = 2 if hook == "compute_loss_weights" else 1
    outcome = small_run(
        [plugin, *beside(hook, kind)], folder, accumulate=several, max_epochs=None, save_every=2
    )
    if hook == "on_error":
        named = "the first error" in outcome.words
        return "" if named else f"the first error is lost: {outcome.words}"
    watches = kind is Kind.OBSERVERS and hook != "on_run_start"
    if act in HARMLESS or watches:
        if outcome.error is not None:
            return f"the run was ended: {outcome.words[-500:]}"
        named = act in HARMLESS or f"culprit failed in {hook}" in outcome.log
        named = named or hook in ("on_run_end", "on_event")
        return "" if named else f"nobody was told: {outcome.log[-300:]}"
    words = outcome.log if hook == "export" else outcome.words
    if hook == "export" and act is raises_what_nobody_catches:
        words = outcome.words
    if hook != "export" and not isinstance(outcome.error, Exception):
        return f"ended by {outcome.error!r}"
    wanted = ["culprit", hook, "misbehaviour.py:"] if hook != "export" else ["culprit"]
    missing = [word for word in wanted if word not in words]
    return f"{missing} not named: {words[-500:]}" if missing else ""


def writes_metrics(run: Any, metrics: Any) -> None:
    metrics["loss"] = -1.0


def writes_a_record(run: Any, record: Any) -> None:
    record.metrics["loss"] = -1.0


def writes_an_event(run: Any, event: Any) -> None:
    event.facts["number"] = 2


def replaces_a_record(run: Any, record: Any) -> None:
    record.metrics = {}


WRITERS: Final[Mapping[str, tuple[Callable[..., None], ...]]] = {
    "on_validation": (writes_metrics,),
    "on_log": (writes_a_record, replaces_a_record),
    "on_event": (writes_an_event,),
}


def writes_what_it_is_told(hook: str, kind: Kind, act: Callable[..., None], folder: Path) -> str:
    """The next listener must be told what the first one was."""
    seen: list[Any] = []

    def on_log(self: Any, run: Any, record: Any) -> None:
        seen.append(dict(record.metrics).get("loss"))

    def on_validation(self: Any, run: Any, metrics: Any) -> None:
        seen.append(dict(metrics).get("loss"))

    def on_event(self: Any, run: Any, event: Any) -> None:
        seen.append(dict(event.facts).get("number"))

    last = make_plugin(
        "last", Kind.OBSERVERS, on_log=on_log, on_validation=on_validation, on_event=on_event
    )
    plugin = misbehaving(hook, kind, act, sees=True)
    outcome = small_run([plugin, *beside(hook, kind), last], folder)
    if {-1.0, 2} & set(seen):
        return f"the next listener saw what the first one wrote: {seen}"
    if kind is Kind.OBSERVERS:
        return outcome.words and f"the run was ended: {outcome.words}"
    return "" if "culprit" in outcome.words else f"not named: {outcome.words}"


# -- cards --------------------------------------------------------------------------------------


def card(kind: Kind, **info: Any) -> type[Any]:
    class Culprit:
        def __init__(self, config: Any) -> None:
            self.config = config

    values = {"name": "culprit", "kind": kind, "config": NoConfig, **info}
    Culprit.info = PluginInfo(**values)  # type: ignore[attr-defined]
    return Culprit


def loads(kind: Kind, plugin: Any) -> None:
    offer = Offer(kind, "culprit", "acme:Culprit", "acme-forge", "1.2")
    catalog = Catalog([offer])
    catalog._classes[kind, "culprit"] = plugin
    catalog.load(kind, "culprit")


def wrong_version(kind: Kind, folder: Path) -> None:
    loads(kind, card(kind, api=(7, 9)))


def other_name(kind: Kind, folder: Path) -> None:
    loads(kind, card(kind, name="stranger"))


def no_settings(kind: Kind, folder: Path) -> None:
    loads(kind, card(kind, config=int))


def no_card(kind: Kind, folder: Path) -> None:
    loads(kind, type("Culprit", (), {}))


def offered_twice(kind: Kind, folder: Path) -> None:
    offers = [Offer(kind, "culprit", "a:b", f"{name}-forge", "1.2") for name in ("acme", "other")]
    Catalog(offers).load(kind, "culprit")


def broken_module(kind: Kind, folder: Path) -> None:
    from importlib.metadata import EntryPoint

    name = f"acme_broken_{kind.value}"
    folder.mkdir()
    (folder / f"{name}.py").write_text(random.Random(kind).choice(["1 / 0", "import acme_nowhere"]))
    sys.path.insert(0, str(folder))
    try:
        entry = EntryPoint(f"{kind}.culprit", f"{name}:Culprit", "forge_kernel.plugins")
        Catalog([Offer(kind, "culprit", entry.value, "acme-forge", "1.2", entry)]).load(
            kind, "culprit"
        )
    finally:
        sys.path.remove(str(folder))


def in_its_class(kind: Kind, folder: Path, **hooks: Any) -> None:
    outcome = small_run([make_plugin("culprit", kind, **hooks)], folder)
    if outcome.error is not None:
        raise outcome.error


def unknown_hook(kind: Kind, folder: Path) -> None:
    in_its_class(kind, folder, on_step_ende=lambda self, run, step: None)


def unknown_argument(kind: Kind, folder: Path) -> None:
    in_its_class(kind, folder, on_step_end=lambda self, run, stepp: None)


def argument_with_default(kind: Kind, folder: Path) -> None:
    in_its_class(kind, folder, on_step_end=lambda self, run, step=None: None)


async def _later(self: Any, run: Any) -> None: ...


def async_hook(kind: Kind, folder: Path) -> None:
    in_its_class(kind, folder, on_epoch_end=_later)


CARDS: Final = (
    wrong_version, other_name, no_settings, no_card, offered_twice, broken_module, unknown_hook,
    unknown_argument, argument_with_default, async_hook,
)  # fmt: skip


def of_a_card(act: Callable[[Kind, Path], None], kind: Kind, folder: Path) -> str:
    try:
        act(kind, folder)
    except ForgeError as error:
        words = str(error)
        versions = "acme-forge 1.2" in words or "handed in" in words
        named = "culprit" in words and versions and isinstance(error, PluginError | ForgeError)
        return "" if named else f"not named: {words}"
    except BaseException as error:  # noqa: BLE001  any other is what is looked for
        return f"raises {error!r}"
    return "nothing was said"


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Every hook with each misbehaviour, each kind with each wrong card, in a drawn order."""
    cases: list[tuple[str, Callable[[Path], str]]] = []

    def add(name: str, judge: Callable[..., str], *arguments: Any) -> None:
        cases.append((name, lambda folder: judge(*arguments, folder)))

    for hook in HOOKS:
        kinds = [KINDS[hook]] if hook in ANSWERED else [Kind.CALLBACKS, Kind.OBSERVERS]
        for kind, act in itertools.product(kinds, (*FATAL, *HARMLESS)):
            add(f"{act.__name__} in {hook} ({kind})", in_a_hook, hook, kind, act)
        for kind, act in itertools.product(kinds, WRITERS.get(hook, ())):
            add(f"{act.__name__} ({kind})", writes_what_it_is_told, hook, kind, act)
    for act, kind in itertools.product(CARDS, Kind):
        add(f"{act.__name__} of {kind}", of_a_card, act, kind)
    draw.shuffle(cases)
    warnings.simplefilter("ignore")
    for name, judge in itertools.islice(itertools.cycle(cases), count):
        with scratch() as folder:
            yield Trial(name, judge(folder / "r"))


BATTERY = Battery(
    "misbehaviour",
    "plugin, version, hook and place are named; what only watches ends no run",
    ci=450,
    deep=900,
    trials=trials,
)
