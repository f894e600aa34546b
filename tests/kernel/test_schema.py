"""Schemas: closed, of one mind with the binder, and a filled pipeline says the same again."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from forge_kernel.api import Kind, PluginInfo, UseSchedule, hookimpl
from forge_kernel.config.check import check
from forge_kernel.config.document import Document, walk
from forge_kernel.config.pipeline import PipelineConfig, takes_many
from forge_kernel.config.schema import bind_config, config_data, config_schema
from forge_kernel.config.use import UseGradients, UseLoss, UseOptimizer
from forge_kernel.config.yaml_file import parse_yaml, write_yaml
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import ConfigError, Mark, PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import (
    check_document,
    check_pipeline,
    compose_schema,
    fill,
    load_named,
    load_pipeline,
)

QUICK = settings(deadline=None, max_examples=80)
FULL: dict[str, Any] = {
    "forge": 1,
    "run": {"max_steps": 10},
    "data": {"use": "modular_arithmetic"},
    "model": {"use": "mlp"},
    "optimizer": {"use": "adamw"},
    "loss": {"use": "cross_entropy"},
}


class Speed(enum.Enum):
    """A choice."""

    SLOW = "slow"
    FAST = "fast"


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A dataclass inside another."""

    size: Annotated[int, Meta(ge=1)] = 1
    again: Inner | None = None


@dataclass(frozen=True, kw_only=True)
class WideConfig:
    """Every form that settings may have."""

    needed: int
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    speed: Speed = Speed.SLOW
    by_name: dict[str, float] = field(default_factory=dict)
    properties: dict[str, int] = field(default_factory=dict)
    part: UseSchedule[Any] | None = None
    parts: tuple[UseSchedule[Any], ...] = ()

    def __post_init__(self) -> None:
        if self.needed == 13:
            raise RuntimeError("thirteen")
        if self.needed == 14:
            raise ValueError("fourteen - at `$.inner` of course")


class Wide:
    """A plugin with those settings."""

    info = PluginInfo(name="wide", kind=Kind.SCHEDULE, config=WideConfig)

    def __init__(self, config: WideConfig) -> None:
        self.config = config

    @hookimpl
    def compute_schedule_factors(self, run: Any, step: Any) -> Any:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class BareDefaultConfig:
    """A default that msgspec cannot describe."""

    part: UseSchedule[Any] = UseSchedule("constant")  # noqa: RUF009  the mistake


@cache
def catalog() -> Catalog:
    offers = Catalog.installed().offers()
    found = Catalog(offer for offer in offers if offer.distribution == "forge-kernel")
    found.add(Wide)
    return found


def config_of(kind: Kind, name: str) -> type[Any]:
    config: type[Any] = catalog().load(kind, name).info.config
    return config


OURS = [(offer.kind, offer.name) for offer in catalog().offers()]
EVERY = pytest.mark.parametrize(("kind", "name"), OURS, ids=[f"{k}.{n}" for k, n in OURS])


def pipeline_with(kind: Kind, name: str, values: Any) -> Document:
    """A pipeline that gives a plugin these settings."""
    use = {"use": name, "with": values}
    data = {**FULL, kind.value: [use] if takes_many(kind) else use}
    document = Document("test", data)
    document.values[()] = Mark("test")
    return document


def told(document: Document) -> list[str]:
    """The faults that the schema finds."""
    classes, faults = load_named(document, catalog())
    assert faults == []
    schema = compose_schema(catalog(), classes)
    return [str(fault) for fault in check(document, schema, lambda *_: None)]


# Settings of every sort: what a schema allows, and what is just beside it.

ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, 0, 1, -1, 2**32, 2**63 - 1, 0.5, 1.0, -0.0, 1e308, 16.0, math.inf, "",
     "ema", "1", "x", "yes", "a\n", [], [1], [0.5, 0.5], [[1]], {}, {"use": "constant"}]
)  # fmt: skip


ONE_OF = {"schedule": "constant", "loss": "cross_entropy", "data": "modular_arithmetic"}


def allowed(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema of the forms used here allows."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        if name.startswith("use."):
            return st.just({"use": ONE_OF[name.removeprefix("use.")]})
        return st.deferred(lambda: allowed(definitions[name], definitions))
    if "anyOf" in schema:
        return st.one_of(*(allowed(branch, definitions) for branch in schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "object" and "properties" in schema:
        required = set(schema.get("required", ()))
        inner = {key: allowed(part, definitions) for key, part in schema["properties"].items()}
        return st.fixed_dictionaries(
            {key: part for key, part in inner.items() if key in required},
            optional={key: part for key, part in inner.items() if key not in required},
        )
    if schema["type"] == "object":
        part = allowed(schema["additionalProperties"], definitions)
        least = schema.get("minProperties", 0)
        return st.dictionaries(st.text("abc", max_size=3), part, min_size=least, max_size=2)
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return st.tuples(*(allowed(p, definitions) for p in schema["prefixItems"])).map(list)
        items = allowed(schema["items"], definitions)
        return st.lists(items, min_size=schema.get("minItems", 0), max_size=3)
    return SIMPLE[schema["type"]](schema)


def _numbers(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    return st.floats(
        above if low is None else low,
        below if high is None else high,
        exclude_min=above is not None,
        exclude_max=below is not None,
        allow_nan=False,
        allow_infinity=False,
    )


SIMPLE: dict[str, Any] = {
    "boolean": lambda _: st.booleans(),
    "null": lambda _: st.none(),
    "integer": lambda schema: st.integers(schema.get("minimum", -9), schema.get("maximum", 999)),
    "number": _numbers,
    "string": lambda schema: (
        st.from_regex(schema["pattern"].replace("$", r"\Z"))
        if "pattern" in schema
        else st.text("abc*. ", min_size=schema.get("minLength", 0), max_size=5)
    ),
}


@st.composite
def settings_of(draw: st.DrawFn, *, odd: bool) -> tuple[Kind, str, dict[str, Any]]:
    """Settings of some plugin; odd ones may be wrong in type, range or name."""
    kind, name = draw(st.sampled_from(OURS))
    own, inner = config_schema(config_of(kind, name), f"{kind}.{name}")
    values = draw(allowed(own, inner))
    if odd:
        keys = st.sampled_from([*own["properties"], "no_such_key"])
        values.update(draw(st.dictionaries(keys, ODD, max_size=2)))
    return kind, name, values


def bind(config: type[Any], values: dict[str, Any]) -> Exception | None:
    """What the binder says against settings."""
    try:
        bind_config(config, values)
    except (msgspec.ValidationError, RuntimeError) as error:
        return error
    return None


@QUICK
@given(settings_of(odd=True))
def test_what_the_checker_lets_pass_binds_but_for_contradictions(
    case: tuple[Kind, str, dict[str, Any]],
) -> None:
    kind, name, values = case
    error = bind(config_of(kind, name), values)
    if not told(pipeline_with(kind, name, values)):
        contradicted = isinstance(error, RuntimeError) or isinstance(
            getattr(error, "__cause__", None), ValueError
        )
        assert error is None or contradicted, error


@QUICK
@given(settings_of(odd=True))
def test_what_does_not_bind_is_refused_as_a_fault_of_the_user(
    case: tuple[Kind, str, dict[str, Any]],
) -> None:
    kind, name, values = case
    document = pipeline_with(kind, name, values)
    wrong = bool(told(document)) or bind(config_of(kind, name), values) is not None
    refused = False
    try:
        check_document(document, catalog())
    except ConfigError:
        refused = True
    assert refused == wrong


@QUICK
@given(settings_of(odd=False))
def test_what_a_schema_describes_it_accepts(case: tuple[Kind, str, dict[str, Any]]) -> None:
    assert told(pipeline_with(*case)) == []


@QUICK
@given(settings_of(odd=False))
def test_a_filled_pipeline_says_the_same_again(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[Kind, str, dict[str, Any]]
) -> None:
    try:
        pipeline = check_document(pipeline_with(*case), catalog())
    except ConfigError:
        return  # a contradiction
    filled = fill(pipeline)
    file = tmp_path_factory.getbasetemp() / "filled.yaml"
    file.write_text(write_yaml(filled), encoding="utf-8")
    again = load_pipeline(file, catalog=catalog())
    assert again == pipeline
    assert fill(again) == filled


@settings(deadline=None, max_examples=40)
@given(allowed(*config_schema(RunConfig, "run")))
def test_the_settings_of_the_loop_make_the_round_trip_too(values: dict[str, Any]) -> None:
    data = {**FULL, "run": {"max_steps": 5, **values}}
    try:
        pipeline = check_document(Document("test", data), catalog())
    except ConfigError as error:
        assert "the run has no end" in str(error)  # noqa: PT017  the one contradiction there is
        return
    assert parse_yaml(write_yaml(fill(pipeline)), "test").data == fill(pipeline)
    assert bind_config(RunConfig, fill(pipeline)["run"]) == pipeline.run


@EVERY
def test_every_schema_is_closed(kind: Kind, name: str) -> None:
    own, inner = config_schema(config_of(kind, name), f"{kind}.{name}")
    for schema in (own, *inner.values()):
        jsonschema.Draft202012Validator.check_schema(schema)
        if "properties" in schema:
            assert schema["additionalProperties"] is False
    required = dict.fromkeys(own.get("required", ()), 1)
    (fault,) = told(pipeline_with(kind, name, {**required, "no_such_key": 1}))
    assert "the key 'no_such_key' is not known here" in fault


@EVERY
def test_a_filled_plugin_has_every_setting_written_out(kind: Kind, name: str) -> None:
    config = config_of(kind, name)
    bound = bind_config(config, {"needed": 1} if config is WideConfig else {})
    assert set(config_data(bound)) == {item.name for item in fields(config)}


def test_a_filled_pipeline_has_every_setting_of_the_loop_written_out() -> None:
    pipeline = check_document(Document("test", dict(FULL)), catalog())
    filled = fill(pipeline)
    assert set(filled["run"]) == {item.name for item in fields(RunConfig)}
    assert filled["optimizer"]["with"]["betas"] == [0.9, 0.999]
    assert filled["run"]["max_epochs"] is None


def test_the_composed_schema_is_a_schema_and_refers_to_nothing_outside() -> None:
    document = pipeline_with(Kind.SCHEDULE, "wide", {"needed": 1})
    classes, _ = load_named(document, catalog())
    schema = compose_schema(catalog(), classes)
    jsonschema.Draft202012Validator.check_schema(schema)
    references = {
        part["$ref"] for _, part in walk(schema) if isinstance(part, dict) and "$ref" in part
    }
    for reference in references:
        assert reference.removeprefix("#/$defs/") in schema["$defs"], reference
    assert "#/$defs/schedule.wide:Inner" in references


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "the key 'needed' is missing"),
        ({"needed": 1, "inner": {"sise": 2}}, "did you mean 'size'?"),
        ({"needed": 2.0}, "must be a whole number, not 2.0"),
        ({"needed": True}, "must be a whole number, not true"),
        ({"needed": 1, "inner": {"size": 0}}, "0 must be at least 1"),
        ({"needed": 1, "inner": {"again": {"again": {"size": 0}}}}, "0 must be at least 1"),
        ({"needed": 1, "several": [{}, {"size": "x"}]}, "must be a whole number, not 'x'"),
        ({"needed": 1, "speed": "fats"}, "did you mean 'fast'?"),
        ({"needed": 1, "by_name": {"a": "b"}}, "must be a number, not 'b'"),
        ({"needed": 1, "properties": {"additionalProperties": "b"}}, "must be a whole number"),
        ({"needed": 1, "additionalProperties": 1}, "is not known here"),
        ({"needed": 1, "part": {"use": "constnat"}}, "did you mean 'constant'?"),
        ({"needed": 1, "part": {"use": "constant", "with": {"factro": 1}}}, "mean 'factor'?"),
        ({"needed": 1, "parts": [{"use": "constant", "with": {"factor": 0}}]}, "must be above 0"),
        ({"needed": 1, "part": {"use": "wide", "with": {}}}, "the key 'needed' is missing"),
        ({"needed": 13}, "RuntimeError: thirteen"),
        ({"needed": 14}, "fourteen - at `$.inner` of course"),
    ],
)
def test_settings_inside_settings_are_checked_too(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_document(pipeline_with(Kind.SCHEDULE, "wide", values), catalog())
    (fault,) = caught.value.faults
    assert said in str(fault)
    assert fault.path.startswith("schedule.with")


def test_settings_inside_settings_bind_and_are_written_out() -> None:
    values = {"needed": 1, "inner": {"again": {"size": 3}}, "part": {"use": "constant"}}
    pipeline = check_document(pipeline_with(Kind.SCHEDULE, "wide", values), catalog())
    assert pipeline.schedule is not None
    assert pipeline.schedule.config.inner == Inner(again=Inner(size=3))
    written = fill(pipeline)["schedule"]["with"]
    assert written["inner"] == {"size": 1, "again": {"size": 3, "again": None}}
    assert written["part"] == {"use": "constant", "with": {"factor": 1.0}}
    assert written["speed"] == "slow"


def test_settings_that_have_no_schema_are_the_fault_of_the_plugin() -> None:
    with pytest.raises(PluginError, match="have no schema") as caught:
        config_schema(BareDefaultConfig, "schedule.bare")
    assert "default_factory" in str(caught.value)


def test_an_entry_without_use_is_not_measured_by_the_settings_of_others() -> None:
    entries = [{"use": "grokfast", "with": {"alpha": 0.9}}, {"with": {"max_norm": 1.0}}]
    document = Document("test", {**FULL, "gradients": entries})
    with pytest.raises(ConfigError) as caught:
        check_document(document, catalog())
    assert [fault.path for fault in caught.value.faults] == ["gradients[1].use"]


def test_contradictions_are_told_beside_the_faults_of_other_parts() -> None:
    data = {**FULL, "run": {}, "optimizer": {"use": "sgd", "with": {"nesterov": True}}, "los": 1}
    with pytest.raises(ConfigError) as caught:
        check_document(Document("test", data), catalog())
    paths = sorted(fault.path for fault in caught.value.faults)
    assert paths == ["los", "optimizer.with", "run"]


def program(**changes: Any) -> PipelineConfig:
    """A pipeline that a program built."""
    parts: dict[str, Any] = {
        "run": RunConfig(max_steps=10),
        "data": None,
        "model": None,
        "optimizer": UseOptimizer("adamw", {"betas": (0.9, 0.98)}),
        "loss": UseLoss("cross_entropy"),
    }
    return PipelineConfig(**{**parts, **changes})


def checked(**changes: Any) -> PipelineConfig:
    return check_pipeline(program(**changes), catalog(), [Kind.DATA, Kind.MODEL])


def test_a_pipeline_of_a_program_is_checked_and_bound_as_a_file_is() -> None:
    pipeline = checked()
    assert pipeline.optimizer is not None
    assert pipeline.optimizer.config.betas == (0.9, 0.98)
    assert checked(optimizer=pipeline.optimizer) == pipeline, "bound settings are taken as well"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": UseOptimizer("admaw")}, "did you mean 'adamw'"),
        ({"optimizer": UseOptimizer("adamw", {"lr": math.nan})}, "nan is not a finite number"),
        ({"optimizer": UseOptimizer("adamw", {"lr": -math.inf})}, "-inf is not a finite number"),
        ({"optimizer": UseOptimizer("adamw", {"lr": object()})}, "no place in a file"),
        ({"optimizer": UseOptimizer("adamw", {"lr": "1e-3"})}, "must be a number"),
        ({"optimizer": None}, "the key 'optimizer' is missing"),
        ({"run": RunConfig(max_seconds=math.nan)}, "must be a number or null, not nan"),
        ({"run": RunConfig(max_steps=1, seed=-1)}, "-1 must be at least 0"),
        ({"gradients": (UseGradients("grokfast", {"alpha": 3, "lambda_reg": 0.5}),)}, "swapped"),
    ],
)
def test_a_pipeline_of_a_program_is_refused_as_a_file_is(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(**changes)


def test_a_named_plugin_is_a_value() -> None:
    use = UseSchedule("constant", {"factor": 2})
    assert use == UseSchedule("constant", {"factor": 2})
    assert use != UseSchedule("constant")
    assert use != UseLoss("constant", {"factor": 2})
    assert len({use, UseSchedule("constant", {"factor": 2})}) == 1
    assert repr(use) == "UseSchedule('constant', {'factor': 2})"
    with pytest.raises(AttributeError):
        use.name = "other"  # type: ignore[misc]


def test_the_users_own_keys_are_kept_and_not_read(tmp_path: Path) -> None:
    document = Document("test", {**FULL, "x-notes": {"use": "bitnet", "n": None}, "x-none": None})
    pipeline = check_document(document, catalog())
    assert pipeline.notes == {"x-notes": {"use": "bitnet", "n": None}, "x-none": None}
    file = tmp_path / "again.yaml"
    file.write_text(write_yaml(fill(pipeline)))
    assert load_pipeline(file, catalog=catalog()) == pipeline


@pytest.mark.parametrize(
    "pattern",
    [
        r"^(a+)+$",
        r"^(a|aa)+$",
        r"^(.*a){20}$",
        r"^(a{0,100}){0,100}$",
        r"(a+)*\1$",
        r"^a*a*a*a*a*$",
        r"^((a*){4}){2}$",
        r"^(x|(a+)+)$",
        r"(?=(a+)+$)a",
        r"(?!(a|aa)+b)a",
        r"(?>(a+)+)b",
        r"^(a)?(?(1)b|c)$",
        "(",
        "a" * 1001,
    ],
)
def test_a_pattern_that_may_never_end_is_refused(pattern: str) -> None:
    """Red when it is handed to `re`, which tries all ways to match."""
    meta = Meta(extra_json_schema={"pattern": pattern})
    own = make_dataclass("Settings", [("text", Annotated[str, meta])], kw_only=True)
    with pytest.raises(
        PluginError, match=r"the schema of loss\.odd \(Settings\) is refused: the p"
    ):
        config_schema(own, "loss.odd")


@pytest.mark.parametrize(
    "pattern",
    [
        r"^[a-z]+(:[0-9]+)?$",
        r"^([0-9]{1,3}\.){3}[0-9]{1,3}$",
        r"^\w+:[\w.]+$",
        r"^(a|b)$",
        r"^a*b*c*d*$",
        r"^(a{64}){64}$",
        r"^(?=a)[ab]+(?!c)$",
        r"^((a|b){0,64}|c)$",
        "a" * 1000,
    ],
)
def test_a_pattern_that_ends_is_taken(pattern: str) -> None:
    meta = Meta(extra_json_schema={"pattern": pattern})
    own = make_dataclass("Settings", [("text", Annotated[str, meta])], kw_only=True)
    assert config_schema(own, "loss.even")[0]["properties"]["text"]["pattern"] == pattern


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://example.invalid/schema.json"}, {"$ref": "other.json"}, {"$id": "http://a/b"},
        {"anyOf": [{"$ref": "http://127.0.0.1:9/s.json#/$defs/a"}]}, {"$dynamicRef": "#node"},
        {"enum": list(range(30_000))}, {"patternProperties": {"^a": {}, "^(a+)+$": {}}},
    ],
)  # fmt: skip
def test_a_schema_that_asks_elsewhere_or_is_huge_is_refused(schema: dict[str, Any]) -> None:
    """Red when the check of a file asks an address."""
    own = make_dataclass(
        "Settings", [("text", Annotated[str, Meta(extra_json_schema=schema)])], kw_only=True
    )
    with pytest.raises(PluginError, match="is refused"):
        config_schema(own, "loss.odd")
