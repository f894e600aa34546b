"""Who runs in each hook, in what order and why: known before a device is touched."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Final

import pluggy

from forge_kernel.config.document import Document, Path, show_path
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.spelling import did_you_mean
from forge_kernel.config.use import Use
from forge_kernel.contract import hookspecs
from forge_kernel.contract.plugin import RULES, SINGLE_ANSWERS, Kind, Order, PluginInfo, facts
from forge_kernel.errors import Fault, Mark, PlanError, PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.missing_facts import missing
from forge_kernel.planning.order import CycleError, stable_order
from forge_kernel.planning.pipeline_file import check_pipeline, nested_uses
from forge_kernel.planning.secret_settings import asked_for, resolved, secrets_of, words_of
from forge_kernel.secrecy import keep_secret
from forge_kernel.trust import HINT, code_is_allowed

HOOKS: Final = tuple(
    name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")
)
"""All hooks in life-cycle order."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One plugin's place in a run."""

    path: Path  # where the pipeline names it
    info: PluginInfo
    plugin: type[Any]
    config: Any
    origin: str  # distribution and version, or "handed in"
    hooks: tuple[str, ...]  # those it answers in this run, in life-cycle order
    instance: Any = None  # live, when handed in
    parent: Path | None = None  # the composite that it is a part of

    @property
    def label(self) -> str:
        """Its name in messages and in checkpoints: `gradients[0] grokfast`."""
        return f"{show_path(self.path)} {self.info.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A run, decided: what is built, and the one order of plugins for every hook."""

    pipeline: PipelineConfig
    entries: tuple[Planned, ...]  # in the order in which hooks call them
    reasons: Mapping[Path, str] = field(default_factory=dict)
    code: tuple[str, ...] = ()  # what runs beside plugins, in words

    def answering(self, hook: str) -> list[Planned]:
        """Those that answer a hook, in order."""
        return [entry for entry in self.entries if hook in entry.hooks]

    def to_data(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "plugins": [
                {
                    "path": show_path(entry.path),
                    "kind": entry.info.kind.value,
                    "name": entry.info.name,
                    "origin": entry.origin,
                    "hooks": list(entry.hooks),
                    "reason": self.reasons.get(entry.path, ""),
                }
                for entry in self.entries
            ],
            "hooks": {
                hook: [entry.label for entry in self.answering(hook)]
                for hook in HOOKS
                if self.answering(hook)
            },
        }


@functools.lru_cache(maxsize=1024)
def _implementations(cls: type[Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    """The hooks that a class implements: name, function and pluggy's options."""
    result: list[tuple[str, Any, dict[str, Any]]] = []
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        members |= vars(base)
    for name, function in sorted(members.items()):
        options = getattr(function, f"{hookspecs.PROJECT}_impl", None)
        if isinstance(options, dict):
            result.append((options.get("specname") or name, function, options))
    return result


def implemented_hooks(plugin: Any) -> dict[str, dict[str, Any]]:
    """The hooks that a class or instance implements, with pluggy's options."""
    cls = plugin if inspect.isclass(plugin) else type(plugin)
    return {hook: options for hook, _, options in _implementations(cls)}  # type: ignore[arg-type]  # a class is hashable


class HookManager(pluggy.PluginManager):
    """pluggy's manager, which knows the hooks; one for each plan, as threads may plan at once.

    pluggy asks each attribute of each plugin whether it is a hook, which was a tenth of a short
    run: of a class that is known once, only those that are hooks are looked at.
    """

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)
        self.add_hookspecs(hookspecs)

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """See pluggy: the options of a hook, None for any other attribute."""
        whole = inspect.isclass(plugin)
        if name not in _marked(plugin if whole else type(plugin)) and (  # type: ignore[arg-type]  # a class is hashable
            whole or name not in getattr(plugin, "__dict__", ())
        ):
            return None
        return super().parse_hookimpl_opts(plugin, name)


@functools.lru_cache(maxsize=1024)
def _marked(cls: type[Any]) -> frozenset[str]:
    """The attributes of a class that are hooks."""
    members = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
    mark = f"{hookspecs.PROJECT}_impl"
    return frozenset(name for name, value in members.items() if hasattr(value, mark))


def _wrong_with(function: Any, options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a hook asks for that the bus does not do: messages, each with a hint or none."""
    result: list[tuple[str, str]] = []
    asked = [key for key in ("tryfirst", "trylast", "hookwrapper", "wrapper") if options[key]]
    if asked:
        hint = "order is set by Order(before=..., after=...) in the plugin's info"
        result.append((f"{', '.join(asked)} is not supported", hint))
    plain = function.__func__ if isinstance(function, staticmethod | classmethod) else function
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        result.append(("a hook cannot be async: nobody would await it", ""))
    for parameter in inspect.signature(plain).parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            result.append((f"'{parameter.name}' has a default, which is never used", ""))
        elif parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            shown = parameter.replace(annotation=inspect.Parameter.empty)
            result.append((f"'{shown}' cannot be passed: name the arguments one by one", ""))
    return result


@functools.lru_cache(maxsize=1024)
def _wrong_signatures(plugin: type[Any]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Hooks that do not exist, take unknown arguments or ask for what the bus does not do.

    Returns:
        What stands after the plugin's name in a message, with hints.
    """
    wrong: list[tuple[str, tuple[str, ...]]] = []
    seen: set[str] = set()
    for name, function, options in _implementations(plugin):  # type: ignore[arg-type]  # a class is hashable
        if name not in HOOKS:
            wrong.append((f": there is no hook '{name}'", did_you_mean(name, HOOKS)))
            continue
        if name in seen:
            wrong.append((f": {name} is answered by two of its methods", ()))
        seen.add(name)
        wrong += [
            (f".{name}: {said}", (hint,) if hint else ())
            for said, hint in _wrong_with(function, options)
        ]
    if not wrong:
        manager = HookManager()
        try:
            manager.register(plugin)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            wrong.append((f": {' '.join(str(error).split())}", ()))
    return tuple(wrong)


class _Planner:
    """Collects entries and faults; `finish` decides."""

    def __init__(
        self,
        pipeline: PipelineConfig,
        catalog: Catalog,
        document: Document | None,
        given: Iterable[str],
    ) -> None:
        self.pipeline = pipeline
        self.given = ("metric:loss", *given)  # the loss is the kernel's own
        self.catalog = catalog
        self.document = document
        self.entries: list[Planned] = []
        self.faults: list[Fault] = []
        self.reasons: dict[Path, str] = {}
        self.code: list[str] = []

    def mark(self, path: Path) -> Mark | None:
        return self.document.mark(path) if self.document is not None else None

    def fault(self, message: str, path: Path = (), *hints: str) -> None:
        self.faults.append(Fault(message, show_path(path), self.mark(path), hints))

    def add_named(self) -> None:
        """The plugins of the pipeline, composites before their parts."""
        for top, _, use in self.pipeline.entries():
            todo: list[tuple[Path, Use[Any], Path | None]] = [(top, use, None)]
            while todo:
                path, current, parent = todo.pop()
                plugin = self.catalog.load(current.kind, current.name)
                origin = self.catalog.offer(current.kind, current.name).origin
                self._add(path, plugin, current.config, origin, None, parent)
                todo += [
                    ((*path, "with", *inner), part, path)
                    for inner, part in reversed(nested_uses(current.config))
                ]

    def add_instances(self, instances: Iterable[Any]) -> None:
        """Plugin objects handed in by a program stand after the file's of their kind."""
        counts: dict[Kind, int] = {}
        for instance in instances:
            info = getattr(instance, "info", None)
            if not isinstance(info, PluginInfo):
                self.fault(f"{type(instance).__name__} is no plugin: it has no `info`")
                continue
            counts[info.kind] = counts.get(info.kind, -1) + 1
            path: Path = ("live", info.kind.value, counts[info.kind])
            config = getattr(instance, "config", None)
            self._add(path, type(instance), config, "handed in", instance, None)

    def _add(
        self, path: Path, plugin: Any, config: Any, origin: str, instance: Any, parent: Path | None
    ) -> None:
        info: PluginInfo = (plugin if instance is None else instance).info
        if not any(entry.plugin is plugin for entry in self.entries):
            label = f"{info.key} ({origin})"
            self.faults += [
                Fault(label + said, "", self.mark(path), hints)
                for said, hints in _wrong_signatures(plugin)
            ]
        hooks = set(implemented_hooks(plugin))
        if parent is not None:
            hooks -= set(RULES[info.kind].asked) & SINGLE_ANSWERS  # the parent calls these
        ordered = tuple(hook for hook in HOOKS if hook in hooks)
        self.entries.append(Planned(path, info, plugin, config, origin, ordered, instance, parent))

    def check_kinds(self) -> None:
        """How many of each kind there are, and what each kind must and may answer."""
        for kind, rule in RULES.items():
            of_kind = [entry for entry in self.entries if entry.info.kind is kind]
            top = [entry for entry in of_kind if entry.parent is None]
            if len(top) < rule.at_least:
                self.fault(f"the run has no {kind} ({rule.about})")
            if rule.at_most is not None and len(top) > rule.at_most:
                names = " and ".join(entry.label for entry in top)
                self.fault(f"the run can have one {kind} only: {names}", top[1].path)
            for entry in of_kind:
                self._check_answers(entry)

    def _check_answers(self, entry: Planned) -> None:
        kind, rule = entry.info.kind, RULES[entry.info.kind]
        implemented = set(implemented_hooks(entry.plugin))
        for hook in rule.answers:
            if hook not in implemented:
                message = f"{entry.label}: a plugin of the kind {kind} must answer {hook}"
                self.fault(message, entry.path)
        owners = {hook: owner for owner in Kind for hook in RULES[owner].asked}
        for hook in sorted(implemented & SINGLE_ANSWERS):
            if hook in owners and owners[hook] is not kind:
                message = f"{entry.label}: {hook} is answered by the kind {owners[hook]} alone"
                self.fault(message, entry.path)
        if kind is Kind.OBSERVERS:
            for hook in sorted(implemented & set(HOOKS)):
                if not hook.startswith("on_") and hook != "log_metrics":
                    message = f"{entry.label}: an observer only watches, it cannot {hook}"
                    self.fault(message, entry.path)

    def check_single_answers(self) -> None:
        """At most one plugin answers a `compute_*` or `make_*` hook."""
        for hook in sorted(SINGLE_ANSWERS):
            result = [entry for entry in self.entries if hook in entry.hooks]
            kinds = {entry.info.kind for entry in result}
            if len(result) > 1 and not (
                len(kinds) == 1 and RULES[result[0].info.kind].at_most == 1
            ):
                names = " and ".join(f"{entry.label} ({entry.origin})" for entry in result)
                self.fault(f"{hook} has two answers: {names}", result[1].path, "keep one of them")

    def check_facts(self) -> None:
        """What plugins require, provide and cannot stand beside."""
        provided: dict[str, list[Path]] = {fact: [()] for fact in self.given}
        for entry in self.entries:
            for fact in self._facts(entry, "provides"):
                provided.setdefault(fact, []).append(entry.path)
        for entry in self.entries:
            for fact in self._facts(entry, "requires"):
                by_others = [path for path in provided.get(fact, ()) if path != entry.path]
                if by_others or self._met_live(fact):
                    continue
                said, hints = missing(entry.info.name, fact, provided)
                more = (entry.info.alternatives,) if entry.info.alternatives else ()
                self.fault(said, entry.path, *hints, *more)
            others = {other.info.key for other in self.entries if other is not entry}
            for key in entry.info.conflicts:
                if key in others:
                    self.fault(
                        f"{entry.info.key} cannot run beside {key}", entry.path, "keep one of them"
                    )

    def check_groups(self) -> None:
        """A micro-batch is not made smaller where it is the group that a loss compares within."""
        if self.pipeline.run.on_out_of_memory != "halve":
            return
        for entry in self.entries:
            if entry.info.couples_samples:
                self.fault(
                    f"run.on_out_of_memory: halve would change what {entry.label} computes: it "
                    "compares the samples of a micro-batch with each other",
                    ("run", "on_out_of_memory"),
                    "leave it at stop, and choose a batch_size that fits",
                )

    def check_code(self) -> None:
        """What settings would let run is allowed, from outside the file."""
        allowed = code_is_allowed()
        for entry in self.entries:
            ask = entry.info.foreign_code
            try:
                result = list(ask(entry.config)) if ask is not None else []
            except (Exception, SystemExit) as error:  # noqa: BLE001  a plugin's function may raise anything
                why = f"{type(error).__name__}: {error}"
                message = f"{entry.label}: its `foreign_code` cannot be told: {why}"
                self.fault(message, entry.path)
                continue
            for what, needs in result:
                self.code.append(f"{entry.label}: {what}")
                if needs and not allowed:
                    self.fault(f"{entry.label} would run {what}", entry.path, HINT)

    def check_secrets(self) -> None:
        """Variables that settings refer to are set; from now on nothing shows what they hold."""
        for entry in self.entries:
            if entry.instance is not None:  # the program's own, with what it holds
                continue
            for name, value in secrets_of(entry.info.key, entry.config):
                asked = asked_for(entry.path, name, value)
                if asked is not None:
                    self.fault(asked, (*entry.path, "with", name))
            held = resolved(entry.info, entry.config)
            for _, value in secrets_of(entry.info.key, held):
                keep_secret(words_of(value))

    def check_packages(self) -> None:
        """Optional modules are looked for, not imported."""
        for entry in self.entries:
            for module, remedy in entry.info.packages.items():
                if find_spec(module) is None:
                    self.fault(
                        f"{entry.info.key} needs the package {module}, which is not installed",
                        entry.path,
                        f"install it with: {remedy}",
                    )

    def _facts(self, entry: Planned, sense: str) -> tuple[str, ...]:
        """What a plugin provides or requires with its settings."""
        try:
            return facts(getattr(entry.info, sense), entry.config)
        except PluginError as error:  # settings that it refuses, in its own words
            for fault in error.faults:
                inner = ("with", *fault.path.split(".")) if fault.path else ()
                message = f"{entry.info.name}: {fault.message}"
                self.fault(message, (*entry.path, *inner), *fault.hints)
            return ()
        except (Exception, SystemExit) as error:  # noqa: BLE001  a plugin's function may raise anything
            why = f"{type(error).__name__}: {error}"
            self.fault(f"{entry.label}: its `{sense}` cannot be told: {why}", entry.path)
            return ()

    def _met_live(self, fact: str) -> bool:
        """Live objects do not say what they provide: a missing fact shows when they are used."""
        kind = {"data": Kind.DATA, "model": Kind.MODEL}.get(fact.partition(":")[0])
        return any(entry.info.kind is kind and entry.instance is not None for entry in self.entries)

    def ordered(self) -> list[Planned]:
        """Kinds in canonical order, entries in file order, `before` / `after` within a kind."""
        result: list[Planned] = []
        for kind in Kind:
            of_kind = [entry for entry in self.entries if entry.info.kind is kind]
            by_id = {str(index): entry for index, entry in enumerate(of_kind)}
            after: dict[str, list[str]] = {key: [] for key in by_id}
            for key, entry in by_id.items():
                order: Order = entry.info.order
                self._check_order_names(entry, order, kind)
                for other_key, other in by_id.items():
                    names = {other.info.name, other.info.key}
                    if names & set(order.after) and other_key not in after[key]:
                        after[key].append(other_key)
                    if names & set(order.before) and key not in after[other_key]:
                        after[other_key].append(key)
            try:
                sorted_keys = stable_order(list(by_id), after)
            except CycleError as error:
                ring = " -> ".join(by_id[key].info.name for key in error.cycle)
                message = f"the order of {kind} is a ring: {ring} (each must follow the next)"
                self.fault(message, by_id[error.cycle[0]].path)
                sorted_keys = list(by_id)
            for key in sorted_keys:
                entry = by_id[key]
                result.append(entry)
                self.reasons[entry.path] = self._reason(entry, after[key], by_id)
        return result

    def _check_order_names(self, entry: Planned, order: Order, kind: Kind) -> None:
        """A constraint that names a plugin of another kind cannot be kept: kinds are ordered."""
        kinds = list(Kind)
        for sense, names in (("after", order.after), ("before", order.before)):
            for other in self.entries:
                if other.info.kind is kind or other.info.key not in names:
                    continue
                follows = kinds.index(other.info.kind) < kinds.index(kind)
                if follows != (sense == "after"):
                    self.fault(
                        f"{entry.info.key} wants to stand {sense} {other.info.key}, but the kind "
                        f"{kind} stands {'after' if follows else 'before'} {other.info.kind}",
                        entry.path,
                    )

    @staticmethod
    def _reason(entry: Planned, after: Sequence[str], by_id: Mapping[str, Planned]) -> str:
        if entry.parent is not None:
            return f"part of {show_path(entry.parent)}"
        names = [by_id[key].info.name for key in after]
        if names:
            return f"after {', '.join(names)}"
        return "handed in" if entry.instance is not None else "as in the file"


def plan(
    pipeline: PipelineConfig,
    catalog: Catalog | None = None,
    *,
    plugins: Sequence[Any] = (),
    document: Document | None = None,
    given: Iterable[str] = (),
) -> Plan:
    """Decide a run.

    Args:
        pipeline: as `load_pipeline` gives it; one that a program built is checked first.
        catalog: plugins to choose from; the installed ones otherwise.
        plugins: plugin objects handed in, beside those that the pipeline names.
        document: where the pipeline was read from, for the places of faults.
        given: facts that plugins may require and that are so already.

    Raises:
        ConfigError: the pipeline was built by a program, and its settings are wrong.
        PlanError: with all faults at once.
        PluginError: a named plugin cannot be loaded.
    """
    catalog = catalog or Catalog.installed()
    if any(isinstance(use.config, Mapping) for _, _, use in pipeline.entries()):
        live = {plugin.info.kind for plugin in plugins if hasattr(plugin, "info")}
        pipeline = check_pipeline(pipeline, catalog, live)
    catalog = catalog.under(pipeline.plugins)
    planner = _Planner(pipeline, catalog, document, given)
    planner.add_named()
    planner.add_instances(plugins)
    planner.check_kinds()
    planner.check_groups()
    planner.check_single_answers()
    planner.check_facts()
    planner.check_packages()
    planner.check_code()
    planner.check_secrets()
    entries = planner.ordered()
    if planner.faults:
        raise PlanError(planner.faults)
    return Plan(pipeline, tuple(entries), planner.reasons, tuple(planner.code))
