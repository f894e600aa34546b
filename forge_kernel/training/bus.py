"""The bus: a plan's plugins built, registered with pluggy, and each hook compiled once.

A live pluggy call costs about a microsecond even when nobody listens. So pluggy owns
registration and signature checks, and the loop calls what is compiled here: for each hook a tuple
of plain callables that take the hook's arguments by position. An event without listeners is an
empty tuple: no call at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import CodeType, TracebackType
from typing import Any, Final, Protocol

import pluggy

from forge_kernel.config.document import Path
from forge_kernel.contract import hookspecs
from forge_kernel.contract.answers import ANSWERED, IN_A_STEP, shown, wrong_answer
from forge_kernel.contract.plugin import RULES, SINGLE_ANSWERS, Kind, Stateful
from forge_kernel.errors import INTERRUPTS, OwnershipError, PluginError
from forge_kernel.planning.pipeline_file import nested_uses, replace_uses
from forge_kernel.planning.plan import HOOKS, HookManager, Plan, Planned, implemented_hooks
from forge_kernel.planning.secret_settings import resolved

Call = Callable[..., Any]
Report = Callable[[str, str, BaseException], None]
FAILURES_IN_A_ROW: Final = 10  # after which an observer is no longer asked


def build(plan: Plan) -> dict[Path, Any]:
    """The plugin objects of a plan by path, parts before their composites.

    Raises:
        PluginError: a constructor failed.
    """
    built: dict[Path, Any] = {}
    by_depth = sorted(plan.entries, key=lambda entry: len(entry.path), reverse=True)
    for entry in by_depth:
        if entry.instance is not None:
            built[entry.path] = entry.instance
            continue
        parts = {
            inner: built[(*entry.path, "with", *inner)] for inner, _ in nested_uses(entry.config)
        }
        try:
            built[entry.path] = entry.plugin(
                replace_uses(resolved(entry.info, entry.config), parts)
            )
        except INTERRUPTS:
            raise
        except BaseException as error:
            why = f"{type(error).__name__}: {error}"
            raise PluginError(f"{entry.label} ({entry.origin}) cannot be built: {why}") from error
        if entry.parent is not None:
            _answer_by_position(built[entry.path], entry)
    return built


def _answer_by_position(part: Any, entry: Planned) -> None:
    """Let a composite ask its part by the hook's full arguments, whichever the part takes."""
    for hook in RULES[entry.info.kind].asked:
        method = getattr(part, hook, None)
        if hook in SINGLE_ANSWERS and method is not None:
            call = _positional(method, hook)
            if call is not method:
                setattr(part, hook, call)


def _positional(method: Call, hook: str) -> Call:
    """The hook's arguments by position, whichever of them the implementation takes."""
    spec = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    wanted = list(inspect.signature(method).parameters)
    if wanted == spec:
        return method
    indices = [spec.index(name) for name in wanted]

    def chosen(*arguments: Any) -> Any:
        return method(*[arguments[index] for index in indices])

    return chosen


class Guard(Protocol):
    """Wraps each call of the checked mode."""

    def __call__(self, hook: str, label: str, call: Call, *, watches: bool) -> Call:
        """The call, watched; `watches`: an observer's."""


class Bus:
    """The compiled hooks of one run.

    Args:
        plan: what runs, in which order.
        guard: wraps each call; None outside the checked mode.
        report: hears of observers that failed, by label and hook; None: they end the run.
    """

    def __init__(
        self, plan: Plan, guard: Guard | None = None, report: Report | None = None
    ) -> None:
        self.plan, self._report = plan, report
        self.instances = build(plan)
        self.labels = {id(self.instances[entry.path]): entry.label for entry in plan.entries}
        manager = HookManager()
        for entry in plan.entries:
            manager.register(self.instances[entry.path], name=entry.label)
        self._codes: dict[CodeType, tuple[str, str]] = {}
        self._places: dict[tuple[str, str], str] = {}  # of plugin and hook: file and line
        self._given: dict[int, tuple[str, str]] = {}  # who gave an object, in which hook
        self._kept: list[Any] = []  # these objects, whose ids stay theirs
        self._calls: dict[str, tuple[Call, ...]] = {
            hook: tuple(self._compile(manager, hook, guard)) for hook in HOOKS
        }

    def _compile(self, manager: pluggy.PluginManager, hook: str, guard: Guard | None) -> list[Call]:
        result = {
            impl.plugin_name: impl.function for impl in getattr(manager.hook, hook).get_hookimpls()
        }
        calls: list[Call] = []
        for entry in self.plan.answering(hook):
            method = result[entry.label]
            code = inspect.unwrap(method).__code__
            self._codes[code] = (entry.label, hook)
            self._places[entry.label, hook] = f"{code.co_filename}:{code.co_firstlineno}"
            call = _positional(method, hook)
            if guard is not None:
                call = guard(hook, entry.label, call, watches=entry.info.kind is Kind.OBSERVERS)
            if hook in ANSWERED and hook not in IN_A_STEP:
                call = self._judged(call, hook, len(calls))
            watches = entry.info.kind is Kind.OBSERVERS and hook in _WATCHING
            watches = watches and not getattr(self.instances[entry.path], "ends_run", False)
            if watches and self._report is not None:
                call = _outlived(call, partial(self._report, entry.label, hook), _WATCHING[hook])
            calls.append(call)
        return calls

    def calls(self, hook: str) -> tuple[Call, ...]:
        """Everyone who answers the hook, in order, by position."""
        return self._calls[hook]

    def call(self, hook: str) -> Call | None:
        """The one who answers the hook, or None."""
        assert hook in SINGLE_ANSWERS, hook
        result = self._calls[hook]
        return result[0] if result else None

    def transform(self, hook: str, value: Any, *before: Any) -> Any:
        """Pass a value through everyone who answers `hook(*before, value)`.

        Raises:
            PluginError: one of them returned what cannot be used.
        """
        for call in self._calls[hook]:
            value = call(*before, value)
        return value

    def _judged(self, call: Call, hook: str, index: int) -> Call:
        """A call whose answer is looked at, and whose answer's methods are its plugin's."""

        def judged(*arguments: Any) -> Any:
            answer = call(*arguments)
            self.judge(hook, answer, index)
            for part in answer if hook == "make_metrics" else (answer,):
                self._keep(part, hook, index)
            return answer

        return judged

    def _keep(self, part: Any, hook: str, index: int) -> None:
        """Remember whose an object is, so that its failures are told by name."""
        if hook in _OBJECTS and id(part) not in self._given:
            self._given[id(part)] = (self.plan.answering(hook)[index].label, hook)
            self._kept.append(part)

    def judge(self, hook: str, answer: Any, index: int = 0) -> None:
        """Refuse an answer that cannot be used.

        Args:
            hook: that was asked.
            answer: what was given.
            index: of the plugin, of those that answer the hook.

        Raises:
            PluginError: naming plugin, hook, what was given and what is wanted.
        """
        wanted = wrong_answer(hook, answer)
        if wanted is not None:
            raise PluginError(f"{self.giver(hook, index)} returned {shown(answer)}: give {wanted}")

    def giver_of(self, part: Any) -> str:
        """Whose an object is that a plugin gave in a hook."""
        label, hook = self._given[id(part)]
        labels = [entry.label for entry in self.plan.answering(hook)]
        return self.giver(hook, labels.index(label))

    def giver(self, hook: str, index: int = 0) -> str:
        """Who answers a hook, with version and place: `loss focal (acme 1.0), compute_loss ...`."""
        entry = self.plan.answering(hook)[index]
        place = self._places[entry.label, hook]
        return f"{entry.label} ({entry.origin}) in {hook} ({place})"

    def stateful(self) -> list[tuple[Planned, Stateful]]:
        """The plugins with memory, in order."""
        return [
            (entry, self.instances[entry.path])
            for entry in self.plan.entries
            if isinstance(self.instances[entry.path], Stateful)
        ]

    def blame(self, traceback: TracebackType | None) -> tuple[str, str] | None:
        """The plugin and hook in which an error arose, read off its traceback.

        The innermost frame of a hook, or of an object that one gave, counts. Costs nothing until
        something raises.
        """
        return self._innermost(traceback)[0]

    def blame_in_words(self, traceback: TracebackType | None) -> str | None:
        """The same for people: plugin, version, hook, file and line."""
        blamed, place = self._innermost(traceback)
        if blamed is None:
            return None
        origins = {entry.label: entry.origin for entry in self.plan.entries}
        label, hook = blamed
        return f"{label} ({origins[label]}) in {hook} ({place})"

    def _innermost(self, traceback: TracebackType | None) -> tuple[tuple[str, str] | None, str]:
        result: tuple[str, str] | None = None
        place = ""
        for _ in range(10_000):
            if traceback is None:
                break
            frame = traceback.tb_frame
            known = self._codes.get(frame.f_code)
            owner = id(frame.f_locals.get("self"))
            if known is not None:
                result = (self.labels.get(owner, known[0]), known[1])
            else:
                known = self._given.get(owner)
                result = known or result
            if known is not None:
                place = f"{frame.f_code.co_filename}:{traceback.tb_lineno}"
            traceback = traceback.tb_next
        return result, place


_OBJECTS: Final = frozenset({"make_data", "transform_data", "make_optimizer", "make_metrics"})
"""Hooks that give objects whose methods the run calls; a model's are called by everyone."""

_WATCHING: Final[Mapping[str, Any]] = {
    **{
        hook: None
        for hook in HOOKS
        if hook.startswith("on_") and hook not in ("on_run_start", "on_error")
    },
    "log_metrics": {},
}
"""Hooks that an observer may fail in, and what is answered in its place; before the first step
nothing is lost by an error, which is then told at once; `on_error` has a guard of its own."""


def _outlived(call: Call, report: Callable[[BaseException], None], instead: Any) -> Call:
    """A call that what it raises does not end: who only watches cannot end a run.

    Not even by `sys.exit`; the user's own interrupt does.
    """
    failures = 0

    def watched(*arguments: Any) -> Any:
        nonlocal failures
        if failures >= FAILURES_IN_A_ROW:
            return instead
        try:
            answer = call(*arguments)
        except (OwnershipError, *INTERRUPTS):
            raise
        except BaseException as error:  # noqa: BLE001  whatever it is
            failures += 1
            if failures == 1:
                report(error)
            return instead
        failures = 0
        return answer

    return watched


def hook_table(plugin: type[Any]) -> Mapping[str, Sequence[str]]:
    """The hooks of a plugin class with their arguments, in life-cycle order."""
    result = implemented_hooks(plugin)
    return {
        hook: list(inspect.signature(getattr(hookspecs, hook)).parameters)
        for hook in HOOKS
        if hook in result
    }
