"""The plan: who runs beside whom, in what order, and what is refused before it is built."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from forge_kernel.api import Kind, Order, PluginInfo, UseGradients, UseSchedule, hookimpl
from forge_kernel.config.document import Document
from forge_kernel.config.pipeline import PipelineConfig, takes_many
from forge_kernel.config.use import USE_OF_KIND
from forge_kernel.config.yaml_file import parse_yaml
from forge_kernel.contract import hookspecs
from forge_kernel.contract.plugin import RULES
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import ConfigError, PlanError, PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import check_document
from forge_kernel.planning.plan import HOOKS, Plan, plan
from forge_kernel.training.bus import build


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """None."""


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """A metric by name."""

    metric: str = "accuracy"


def method(hook: str, arguments: Sequence[str] | None = None) -> Callable[..., Any]:
    """A hook that does nothing."""
    names = arguments or list(inspect.signature(getattr(hookspecs, hook)).parameters)
    function: Callable[..., Any] = eval(f"lambda self, {', '.join(names)}: None")
    function.__name__, function.__qualname__ = hook, f"Part.{hook}"
    return function


def part(kind: Kind, name: str, *hooks: str, config: Any = NoSettings, **card: Any) -> type[Any]:
    """A plugin class with the hooks of its kind and further ones."""
    body: dict[str, Any] = {hook: hookimpl(method(hook)) for hook in (*RULES[kind].answers, *hooks)}
    body["info"] = PluginInfo(name=name, kind=kind, config=config, **card)
    body["__init__"] = lambda self, config: setattr(self, "config", config)
    return type(name.title(), (), body)


def bare(kind: Kind, name: str, **members: Any) -> type[Any]:
    """A plugin class with just these members."""
    info = PluginInfo(name=name, kind=kind, config=NoSettings)
    return type(name.title(), (), {"info": info, **members})


CORE = [
    part(Kind.DATA, "table", provides=("data:tokens",)),
    part(Kind.MODEL, "net"),
    part(Kind.OPTIMIZER, "descent"),
    part(Kind.LOSS, "distance"),
]


def pipeline_of(*parts: type[Any], run: RunConfig | None = None) -> PipelineConfig:
    """A pipeline that names these beside the four that every run needs."""
    named: dict[str, Any] = {}
    kinds = {found.info.kind for found in parts}
    for found in (*(core for core in CORE if core.info.kind not in kinds), *parts):
        kind = found.info.kind
        use = USE_OF_KIND[kind](found.info.name)
        named[kind.value] = (*named.get(kind.value, ()), use) if takes_many(kind) else use
    return PipelineConfig(run=run or RunConfig(max_steps=1), **named)


def catalog_of(*parts: type[Any]) -> Catalog:
    catalog = Catalog()
    for found in dict.fromkeys((*CORE, *parts)):
        catalog.add(found)
    return catalog


def planned(*parts: type[Any], live: Sequence[Any] = ()) -> Plan:
    return plan(pipeline_of(*parts), catalog_of(*parts), plugins=live)


def refusal(*parts: type[Any], live: Sequence[Any] = ()) -> str:
    with pytest.raises(PlanError) as caught:
        planned(*parts, live=live)
    assert caught.value.exit_status == 2
    return str(caught.value)


def names(found: Plan) -> list[str]:
    return [entry.info.name for entry in found.entries]


# Kinds and answers


def test_kinds_come_in_canonical_order_and_entries_as_they_are_named() -> None:
    parts = [
        part(Kind.OBSERVERS, "eye"),
        part(Kind.GRADIENTS, "second"),
        part(Kind.GRADIENTS, "first"),
        part(Kind.QUANTIZER, "coarse"),
        part(Kind.CALLBACKS, "rule"),
    ]
    assert names(planned(*parts)) == [
        "table", "net", "coarse", "descent", "distance", "second", "first", "rule", "eye",
    ]  # fmt: skip


def test_a_plan_is_plain_data_and_says_who_answers_what() -> None:
    data = json.loads(json.dumps(planned(part(Kind.GRADIENTS, "a", "on_step_end")).to_data()))
    assert data["hooks"]["on_gradients"] == ["gradients[0] a"]
    assert data["hooks"]["on_step_end"] == ["gradients[0] a"]
    assert "regularize" not in data["hooks"]
    assert list(data["hooks"]) == [hook for hook in HOOKS if hook in data["hooks"]]
    assert [entry["reason"] for entry in data["plugins"]] == ["as in the file"] * 5


@pytest.mark.parametrize("kind", [kind for kind in Kind if RULES[kind].answers])
def test_a_plugin_that_does_not_answer_for_its_kind_is_refused(kind: Kind) -> None:
    silent = bare(kind, "silent", on_step_end=hookimpl(method("on_step_end")))
    (hook,) = RULES[kind].answers
    assert f"a plugin of the kind {kind} must answer {hook}" in refusal(silent)


def test_a_hook_that_belongs_to_another_kind_is_refused() -> None:
    message = refusal(part(Kind.CALLBACKS, "thief", "make_data"))
    assert "callbacks[0] thief: make_data is answered by the kind data alone" in message


def test_two_answers_to_a_single_hook_are_refused_and_both_are_named() -> None:
    one = part(Kind.CALLBACKS, "one", "compute_outputs")
    two = part(Kind.VALIDATORS, "two", "compute_outputs")
    assert "compute_outputs" in planned(one).to_data()["hooks"]
    message = refusal(one, two)
    assert "compute_outputs has two answers" in message
    assert "callbacks[0] one (this process" in message
    assert "validators[0] two (this process" in message


@pytest.mark.parametrize("hook", ["make_modules", "make_metrics", "transform_data", "log_metrics"])
def test_hooks_that_are_collected_may_have_many_answers(hook: str) -> None:
    found = planned(part(Kind.CALLBACKS, "one", hook), part(Kind.CALLBACKS, "two", hook))
    assert [entry.info.name for entry in found.answering(hook)] == ["one", "two"]


def test_a_missing_kind_is_refused() -> None:
    pipeline = PipelineConfig(run=RunConfig(max_steps=1))
    with pytest.raises(PlanError) as caught:
        plan(pipeline, Catalog())
    message = str(caught.value)
    for kind in ("data", "model", "optimizer", "loss"):
        assert f"the run has no {kind} (" in message
    assert "the run has no quantizer" not in message


def test_a_live_plugin_beside_one_of_the_file_is_one_too_many_for_a_single_kind() -> None:
    other = part(Kind.MODEL, "other")(NoSettings())
    message = refusal(live=[other])
    assert "the run can have one model only: model net and live.model[0] other" in message


def test_a_live_plugin_may_take_the_place_of_one_that_is_not_named() -> None:
    core = [found for found in CORE if found.info.kind is not Kind.MODEL]
    named = {found.info.kind.value: USE_OF_KIND[found.info.kind](found.info.name) for found in core}
    pipeline = PipelineConfig(run=RunConfig(max_steps=1), **named)
    found = plan(pipeline, catalog_of(), plugins=[part(Kind.MODEL, "mine")(NoSettings())])
    assert names(found) == ["table", "mine", "descent", "distance"]
    assert found.entries[1].origin == "handed in"
    assert found.reasons[found.entries[1].path] == "handed in"


def test_a_live_object_that_counts_as_false_is_a_plugin_like_any_other() -> None:
    empty = part(Kind.CALLBACKS, "empty", requires=("metric:loss",))
    empty.__len__ = lambda self: 0  # type: ignore[attr-defined]
    instance = empty(NoSettings())
    found = planned(live=[instance])
    assert found.entries[-1].instance is instance


def test_an_object_without_a_card_is_no_plugin() -> None:
    assert "object is no plugin: it has no `info`" in refusal(live=[object()])


@pytest.mark.parametrize("hook", ["on_gradients", "log_metrics", "on_run_end"])
def test_an_observer_may_watch(hook: str) -> None:
    assert planned(part(Kind.OBSERVERS, "eye", hook)).answering(hook)


@pytest.mark.parametrize(
    "hook", ["transform_model", "transform_data", "make_modules", "regularize", "compute_outputs"]
)
def test_an_observer_may_do_no_more_than_watch(hook: str) -> None:
    message = refusal(part(Kind.OBSERVERS, "eye", hook))
    assert f"observers[0] eye: an observer only watches, it cannot {hook}" in message


# Facts and conflicts


def test_a_fact_that_nobody_brings_is_told_with_the_nearest() -> None:
    message = refusal(part(Kind.CALLBACKS, "needy", requires=("data:token",)))
    assert "needy needs the data 'token', which no part of this run brings" in message
    assert "did you mean 'tokens'?" in message


def test_a_fact_that_resembles_none_is_told_with_all_of_its_topic() -> None:
    message = refusal(part(Kind.CALLBACKS, "needy", requires=("data:pictures_and_sounds",)))
    assert "this run has: tokens" in message
    assert "this run has: nothing of the sort" in refusal(
        part(Kind.CALLBACKS, "needy", requires=("model:of_wood",))
    )


def test_facts_may_depend_on_the_settings() -> None:
    giver = part(
        Kind.VALIDATORS, "giver", config=MetricConfig,
        provides=lambda config: (f"metric:{config.metric}",),
    )  # fmt: skip
    taker = part(
        Kind.CALLBACKS, "taker", config=MetricConfig,
        requires=lambda config: (f"metric:{config.metric}",),
    )  # fmt: skip
    assert names(planned(giver, taker))[-2:] == ["giver", "taker"]
    assert "taker needs the metric 'accuracy'" in refusal(taker)


def test_a_plugin_does_not_meet_its_own_needs() -> None:
    dreamer = part(
        Kind.CALLBACKS, "dreamer", requires=("model:ternary",), provides=("model:ternary",)
    )
    assert "dreamer needs weights of three levels" in refusal(dreamer)
    assert len(planned(dreamer, part(Kind.WRAPPERS, "true", provides=("model:ternary",))).entries)


def test_the_loss_is_a_metric_of_the_kernel() -> None:
    assert planned(part(Kind.CALLBACKS, "rule", requires=("metric:loss",)))


def test_live_data_may_bring_what_it_does_not_say() -> None:
    needy = part(Kind.CALLBACKS, "needy", requires=("data:pictures",))
    pipeline = PipelineConfig(
        run=RunConfig(max_steps=1),
        **{
            found.info.kind.value: USE_OF_KIND[found.info.kind](found.info.name)
            for found in CORE[1:]
        },
        callbacks=(USE_OF_KIND[Kind.CALLBACKS]("needy"),),
    )
    live = [part(Kind.DATA, "mine")(NoSettings())]
    assert plan(pipeline, catalog_of(needy), plugins=live).entries


def test_facts_that_cannot_be_told_are_the_fault_of_that_plugin() -> None:
    broken = part(Kind.CALLBACKS, "broken", requires=lambda config: (config.no_such_setting,))
    message = refusal(broken)
    assert "callbacks[0] broken: its `requires` cannot be told: AttributeError" in message


def test_plugins_that_exclude_each_other_are_refused() -> None:
    oil = part(Kind.CALLBACKS, "oil", conflicts=("callbacks.water", "gradients.fire"))
    water = part(Kind.CALLBACKS, "water")
    assert planned(oil)
    assert "callbacks.oil cannot run beside callbacks.water" in refusal(water, oil)


def test_a_plugin_that_excludes_itself_may_stand_once() -> None:
    hermit = part(Kind.CALLBACKS, "hermit", conflicts=("callbacks.hermit",))
    assert planned(hermit)
    assert "callbacks.hermit cannot run beside callbacks.hermit" in refusal(hermit, hermit)


# Order


def filters(*named: tuple[str, Order]) -> list[type[Any]]:
    return [part(Kind.GRADIENTS, name, order=order) for name, order in named]


def test_after_and_before_act_within_a_kind_and_the_plan_says_why() -> None:
    found = planned(
        *filters(
            ("clip", Order(after=("slow",))),
            ("noise", Order()),
            ("slow", Order()),
            ("centre", Order(before=("clip",))),
        )
    )
    assert names(found)[-4:] == ["slow", "centre", "clip", "noise"]
    reasons = {entry.info.name: found.reasons[entry.path] for entry in found.entries}
    assert reasons["clip"] == "after slow, centre"
    assert reasons["noise"] == "as in the file"


def test_a_constraint_may_name_the_kind_too() -> None:
    found = planned(*filters(("clip", Order(after=("gradients.slow",))), ("slow", Order())))
    assert names(found)[-2:] == ["slow", "clip"]


def test_a_constraint_that_both_sides_state_is_told_once() -> None:
    found = planned(*filters(("clip", Order(after=("slow",))), ("slow", Order(before=("clip",)))))
    reasons = [found.reasons[entry.path] for entry in found.entries]
    assert "after slow" in reasons


def test_a_constraint_on_a_plugin_that_is_not_there_is_passed_over() -> None:
    found = planned(*filters(("a", Order(after=("z",), before=("y",))), ("b", Order())))
    assert names(found)[-2:] == ["a", "b"]


def test_the_same_plugin_twice_keeps_its_order() -> None:
    clip, slow = filters(("clip", Order(after=("slow",))), ("slow", Order()))
    assert names(planned(clip, slow, clip, slow))[-4:] == ["slow", "slow", "clip", "clip"]


def test_a_ring_is_refused_and_named() -> None:
    message = refusal(
        *filters(("a", Order(after=("b",))), ("b", Order(after=("c",))), ("c", Order(after=("a",))))
    )
    assert "the order of gradients is a ring: a -> b -> c -> a" in message


def test_a_constraint_across_kinds_against_their_order_is_refused() -> None:
    late = part(Kind.GRADIENTS, "late", order=Order(after=("callbacks.rule",)))
    rule = part(Kind.CALLBACKS, "rule")
    message = refusal(late, rule)
    assert "gradients.late wants to stand after callbacks.rule" in message
    assert "the kind gradients stands before callbacks" in message
    early = part(Kind.GRADIENTS, "early", order=Order(before=("optimizer.descent",)))
    assert "wants to stand before optimizer.descent" in refusal(early)


def test_a_constraint_across_kinds_along_their_order_is_kept_as_it_is() -> None:
    order = Order(before=("callbacks.rule",), after=("optimizer.descent",))
    found = planned(part(Kind.GRADIENTS, "calm", order=order), part(Kind.CALLBACKS, "rule"))
    assert names(found)[-2:] == ["calm", "rule"]


# Hooks as they are written


def test_a_hook_that_does_not_exist_is_told_with_the_nearest() -> None:
    typo = bare(Kind.CALLBACKS, "typo", on_stepend=hookimpl(method("on_step_end")))
    message = refusal(typo)
    assert "callbacks.typo (this process" in message
    assert "there is no hook 'on_stepend'" in message
    assert "did you mean 'on_step_end'?" in message


def test_a_hook_may_take_some_of_the_arguments_in_any_order() -> None:
    few = bare(
        Kind.CALLBACKS, "few",
        on_step_end=hookimpl(method("on_step_end", ["step"])),
        on_batch=hookimpl(method("on_batch", ["batch", "run"])),
    )  # fmt: skip
    assert planned(few).answering("on_batch")


def test_an_argument_that_the_hook_does_not_have_is_refused() -> None:
    message = refusal(
        bare(Kind.CALLBACKS, "odd", on_step_end=hookimpl(method("on_step_end", ["run", "model"])))
    )
    assert "'model'" in message
    assert "on_step_end" in message


@pytest.mark.parametrize("option", ["tryfirst", "trylast", "hookwrapper", "wrapper"])
def test_options_of_pluggy_that_change_the_order_are_refused(option: str) -> None:
    def on_step_end(self: Any, run: Any) -> Any:
        yield

    marked = hookimpl(**{option: True})(on_step_end)  # type: ignore[call-overload]
    message = refusal(bare(Kind.CALLBACKS, "pushy", on_step_end=marked))
    assert f"pushy (this process).on_step_end: {option} is not supported" in message
    assert "Order(before=..., after=...)" in message


class Defaulted:
    """An argument that pluggy would never pass."""

    info = PluginInfo(name="defaulted", kind=Kind.CALLBACKS, config=NoSettings)

    @hookimpl
    def on_step_end(self, run: Any, step: Any = None) -> None: ...


class Starred:
    """Arguments that have no name."""

    info = PluginInfo(name="starred", kind=Kind.CALLBACKS, config=NoSettings)

    @hookimpl
    def on_step_end(self, *arguments: Any) -> None: ...


class DoubleStarred:
    """Arguments that have no name."""

    info = PluginInfo(name="double_starred", kind=Kind.CALLBACKS, config=NoSettings)

    @hookimpl
    def on_step_end(self, **arguments: Any) -> None: ...


class ByKeyword:
    """An argument that cannot be passed by position."""

    info = PluginInfo(name="by_keyword", kind=Kind.CALLBACKS, config=NoSettings)

    @hookimpl
    def on_step_end(self, *, run: Any) -> None: ...


class Awaited:
    """A hook that nobody would await."""

    info = PluginInfo(name="awaited", kind=Kind.CALLBACKS, config=NoSettings)

    @hookimpl
    async def on_step_end(self, run: Any) -> None: ...


class Doubled:
    """Two methods for one hook."""

    info = PluginInfo(name="doubled", kind=Kind.CALLBACKS, config=NoSettings)

    @hookimpl
    def on_step_end(self, run: Any) -> None: ...

    @hookimpl(specname="on_step_end")
    def count(self, run: Any) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        (Defaulted, "'step' has a default, which is never used"),
        (Starred, "'*arguments' cannot be passed"),
        (DoubleStarred, "'**arguments' cannot be passed"),
        (ByKeyword, "'run' cannot be passed"),
        (Awaited, "a hook cannot be async"),
        (Doubled, "on_step_end is answered by two of its methods"),
    ],
)
def test_a_hook_that_could_not_be_called_is_refused(plugin: type[Any], said: str) -> None:
    assert said in refusal(plugin)


class Renamed:
    """A hook under another name."""

    info = PluginInfo(name="renamed", kind=Kind.CALLBACKS, config=NoSettings)

    @hookimpl(specname="on_step_end")
    def count(self, run: Any) -> None: ...


def test_a_hook_may_stand_under_another_name() -> None:
    assert [entry.info.name for entry in planned(Renamed).answering("on_step_end")] == ["renamed"]


# Composites


@dataclass(frozen=True, kw_only=True)
class RampConfig:
    """Settings of a part."""

    steps: int = 1


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """A composite with every form of nesting."""

    first: UseSchedule[Any]
    rest: tuple[UseSchedule[Any], ...] = ()
    by_phase: dict[str, UseSchedule[Any]] = field(default_factory=dict)
    last: UseSchedule[Any] = field(default_factory=lambda: UseSchedule("ramp", {"steps": 7}))
    maybe: UseSchedule[Any] | None = None
    filter: UseGradients[Any] | None = None

    def __post_init__(self) -> None:
        if self.first.name == "nobody":
            raise ValueError("nobody cannot come first")


RAMP = part(Kind.SCHEDULE, "ramp", "on_step_end", config=RampConfig)
CHAIN = part(Kind.SCHEDULE, "chain", config=ChainConfig)
SMOOTH = part(Kind.GRADIENTS, "smooth", requires=("metric:smoothness",))

TEXT = """forge: 1
run: {max_steps: 1}
data: {use: table}
model: {use: net}
optimizer: {use: descent}
loss: {use: distance}
schedule:
  use: chain
  with:
"""


def composed(settings: str) -> tuple[Plan, Document]:
    catalog = catalog_of(RAMP, CHAIN, SMOOTH)
    document = parse_yaml(TEXT + settings, "test")
    pipeline = check_document(document, catalog)
    return plan(pipeline, catalog, document=document), document


NESTED = """\
    first: {use: ramp, with: {steps: 2}}
    rest:
      - {use: ramp, with: {steps: 3}}
      - use: chain
        with: {first: {use: ramp, with: {steps: 4}}}
    by_phase: {hot: {use: ramp, with: {steps: 5}}}
"""


def test_parts_are_found_by_their_paths_however_deep() -> None:
    found, _ = composed(NESTED)
    paths = {
        ".".join(map(str, entry.path)): entry.config
        for entry in found.entries
        if entry.parent is not None
    }
    assert {path: getattr(config, "steps", None) for path, config in paths.items()} == {
        "schedule.with.first": 2,
        "schedule.with.rest.0": 3,
        "schedule.with.rest.1": None,
        "schedule.with.rest.1.with.first": 4,
        "schedule.with.rest.1.with.last": 7,
        "schedule.with.by_phase.hot": 5,
        "schedule.with.last": 7,
    }
    parents = {entry.path: entry.parent for entry in found.entries}
    inner = ("schedule", "with", "rest", 1, "with", "first")
    assert parents[inner] == ("schedule", "with", "rest", 1)
    assert found.reasons[inner] == "part of schedule.with.rest[1]"


def test_parts_join_every_hook_but_the_single_answers_of_their_kind() -> None:
    found, _ = composed(NESTED)
    assert [entry.path for entry in found.answering("compute_schedule_factors")] == [("schedule",)]
    joined = found.answering("on_step_end")
    assert len(joined) == 6
    assert {entry.info.name for entry in joined} == {"ramp"}


def test_built_parts_are_handed_to_the_constructor() -> None:
    found, _ = composed(NESTED)
    built = build(found)
    chain = built["schedule",]
    assert type(chain.config.first).__name__ == "Ramp"
    assert chain.config.first is built["schedule", "with", "first"]
    assert chain.config.first.config.steps == 2
    assert chain.config.rest == (
        built["schedule", "with", "rest", 0], built["schedule", "with", "rest", 1],
    )  # fmt: skip
    assert chain.config.rest[1].config.first.config.steps == 4
    assert chain.config.by_phase == {"hot": built["schedule", "with", "by_phase", "hot"]}
    assert chain.config.maybe is None
    (entry,) = [entry for entry in found.entries if entry.path == ("schedule",)]
    assert isinstance(entry.config.first, UseSchedule), "the plan itself is not changed"


def test_a_constructor_that_fails_is_told_with_its_place() -> None:
    explosive = part(Kind.CALLBACKS, "explosive")
    explosive.__init__ = lambda self, config: 1 / 0  # type: ignore[misc]
    decided = planned(explosive)
    with pytest.raises(PluginError, match=r"callbacks\[0\] explosive .*ZeroDivisionError"):
        build(decided)


@pytest.mark.parametrize(
    ("settings", "line", "column", "said"),
    [
        ("    first: {use: rmap}\n", 10, 18, "did you mean 'ramp'"),
        ("    first: {use: ramp, with: {stesp: 2}}\n", 10, 31, "did you mean 'steps'"),
        ("    first: {use: ramp, with: {steps: two}}\n", 10, 38, "must be a whole number"),
        ("    first: {use: ramp}\n    rest: {use: ramp}\n", 11, 11, "must be a list"),
        ("    first: {use: ramp}\n    rest: [{with: {}}]\n", 11, 12, "the key 'use' is missing"),
        ("    first: {use: smooth}\n", 10, 18, "'smooth' is not known here"),
        ("    rest: []\n", 10, 5, "the key 'first' is missing"),
    ],
)
def test_a_fault_in_a_part_is_told_at_its_place(
    settings: str, line: int, column: int, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(settings)
    (fault,) = caught.value.faults
    assert fault.mark is not None
    assert (fault.mark.line, fault.mark.column) == (line, column)
    assert said in str(fault)


def test_what_a_part_needs_the_run_must_have() -> None:
    with pytest.raises(PlanError, match="smooth needs the metric 'smoothness'") as caught:
        composed("    first: {use: ramp}\n    filter: {use: smooth}\n")
    (fault,) = caught.value.faults
    assert fault.path == "schedule.with.filter"
    assert fault.mark is not None
    assert (fault.mark.line, fault.mark.column) == (11, 13)


def test_the_checks_of_a_composite_read_settings_and_never_parts() -> None:
    found, _ = composed("    first: {use: ramp}\n")
    assert build(found)["schedule",].config.first.config.steps == 1


def test_a_composite_that_contradicts_itself_is_refused() -> None:
    nobody = part(Kind.SCHEDULE, "nobody", config=RampConfig)
    catalog = catalog_of(RAMP, CHAIN, nobody)
    document = parse_yaml(TEXT + "    first: {use: nobody}\n", "test")
    with pytest.raises(ConfigError, match="nobody cannot come first") as caught:
        check_document(document, catalog)
    assert caught.value.faults[0].path == "schedule.with"


def test_a_default_part_that_is_not_installed_is_told_at_the_composite() -> None:
    catalog = catalog_of(CHAIN, part(Kind.SCHEDULE, "flat"))
    document = parse_yaml(TEXT + "    first: {use: flat}\n", "test")
    with pytest.raises(ConfigError, match="no plugin 'ramp' of the kind schedule") as caught:
        check_document(document, catalog)
    (fault,) = caught.value.faults
    assert fault.mark is not None
    assert (str(fault.mark), fault.path) == ("test:10:5", "schedule.with.last.use")


def test_a_plan_fault_is_told_at_its_place_in_the_file() -> None:
    catalog = catalog_of(part(Kind.CALLBACKS, "needy", requires=("data:sound",)))
    text = TEXT.partition("schedule")[0] + "callbacks:\n  - use: needy\n"
    document = parse_yaml(text, "test")
    with pytest.raises(PlanError) as caught:
        plan(check_document(document, catalog), catalog, document=document)
    (fault,) = caught.value.faults
    assert fault.mark is not None
    assert (str(fault.mark), fault.path) == ("test:8:5", "callbacks[0]")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (part(Kind.CALLBACKS, "thief", "make_data"), "answered by the kind data alone"),
        (bare(Kind.CALLBACKS, "typo", on_stop=hookimpl(method("on_step_end"))), "no hook"),
        (Awaited, "async"),
        (part(Kind.CALLBACKS, "lost", requires=lambda config: 1 / 0), "cannot be told"),
        (part(Kind.CALLBACKS, "own", order=Order(after=("own",))), "is a ring"),
        (part(Kind.CALLBACKS, "far", order=Order(after=("observers.eye",))), "stands before"),
    ],
    ids=["answer", "hook", "async", "facts", "ring", "kinds"],
)
def test_every_fault_of_a_plugin_is_told_where_the_file_names_it(bad: type[Any], said: str) -> None:
    catalog = catalog_of(bad, part(Kind.OBSERVERS, "eye"))
    text = TEXT.partition("schedule")[0]
    document = parse_yaml(
        f"{text}observers: [{{use: eye}}]\ncallbacks:\n  - use: {bad.info.name}\n", "test"
    )
    with pytest.raises(PlanError, match=said) as caught:
        plan(check_document(document, catalog), catalog, document=document)
    assert {str(fault.mark) for fault in caught.value.faults} == {"test:9:5"}


def test_a_pipeline_that_a_program_built_is_checked_before_it_is_planned() -> None:
    pipeline = pipeline_of(part(Kind.CALLBACKS, "unheard_of"))
    with pytest.raises(ConfigError, match="'unheard_of' is not known here"):
        plan(pipeline, catalog_of())


def test_several_threads_may_plan_at_once() -> None:
    """Red when they share the manager that checks the hooks."""
    import sys
    import threading

    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(40):
                planned(*CORE)
        except BaseException as error:  # noqa: BLE001  told below
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_a_package_that_is_not_installed_is_refused_with_what_installs_it() -> None:
    """Red when it is found out only when the plugin is used."""
    lacking = {"no_such_package_at_all": "pip install 'acme[sink]'", "json": "it is there"}
    message = refusal(part(Kind.OBSERVERS, "sink", packages=lacking))
    assert "observers.sink needs the package no_such_package_at_all, which is not" in message
    assert "install it with: pip install 'acme[sink]'" in message
    assert "json" not in message
