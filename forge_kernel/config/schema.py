"""JSON Schemas of the configuration: one source, the configuration dataclasses."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final, get_origin

import msgspec

from forge_kernel.config.document import walk
from forge_kernel.config.pipeline import FORMAT, takes_many
from forge_kernel.config.schema_limits import check_schema
from forge_kernel.config.use import Use, plain
from forge_kernel.contract.plugin import RULES, Kind
from forge_kernel.contract.plugin_rules import PluginRules
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import Fault, PluginError
from forge_kernel.renamed import KINDS, PLUGINS

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def _use_type(annotation: Any) -> type[Use[Any]] | None:
    result = get_origin(annotation) or annotation
    return result if isinstance(result, type) and issubclass(result, Use) else None


def _schema_hook(annotation: Any) -> Schema:
    use = _use_type(annotation)
    if use is None:
        raise NotImplementedError(f"{annotation!r} has no JSON Schema")
    return {"$ref": f"#/$defs/use.{use.kind}"}


def _decode_use(annotation: Any, value: Any) -> Any:
    use = _use_type(annotation)
    if use is None or not isinstance(value, Mapping):
        raise NotImplementedError(f"cannot read a {annotation!r}")
    return use(value["use"], value.get("with") or {})


def config_schema(config: type[Any], name: str) -> tuple[Schema, dict[str, Schema]]:
    """The closed schema of a configuration dataclass and of the dataclasses inside it.

    Args:
        config: the dataclass.
        name: unique prefix of the inner definitions (`"gradients.grokfast"`).

    Returns:
        The schema, and inner definitions by their names under `$defs`.

    Raises:
        PluginError: a setting is of a type that has no schema.
    """
    return _read_schema(config, name)  # type: ignore[arg-type]  # a class is hashable


@functools.lru_cache(maxsize=512)  # annotations are text: reading them is most of the cost
def _read_schema(config: type[Any], name: str) -> tuple[Schema, dict[str, Schema]]:
    template = f"#/$defs/{name}:{{name}}"  # a slash would have to be escaped in a reference
    try:
        top, parts = msgspec.json.schema_components(
            [config], schema_hook=_schema_hook, ref_template=template
        )
    except (TypeError, NotImplementedError, NameError) as error:
        hint = "write a default plugin as field(default_factory=lambda: UseSchedule('constant'))"
        hints = (hint,) if "Use" in str(error) else ()
        message = f"the settings of {name} ({config.__name__}) have no schema: {error}"
        raise PluginError([Fault(message, hints=hints)]) from error
    check_schema(name, parts, template.removesuffix("{name}"))
    closed = {title: copy.deepcopy(part) for title, part in parts.items()}
    for part in closed.values():
        if "description" in part:  # a docstring: Python 3.13 and later take its indent away
            part["description"] = inspect.cleandoc(part["description"])
        if part.get("type") == "object" and "properties" in part:
            part.setdefault("additionalProperties", False)
    own = closed[top[0]["$ref"].removeprefix(f"#/$defs/{name}:")]
    for old, new in getattr(config, "renamed", {}).items():
        within, _, last = old.rpartition(".")  # `adapt.figure`: of settings inside a setting
        for part in closed.values() if within else (own,):
            if not within or new in part.get("properties", ()):
                part.setdefault("x-renamed", {})[last] = new
    used = {part["$ref"] for _, part in walk(closed) if isinstance(part, dict) and "$ref" in part}
    inner = {f"{name}:{title}": part for title, part in closed.items()}
    return own, {title: part for title, part in inner.items() if f"#/$defs/{title}" in used}


def bind_config(config: type[Any], values: Mapping[str, Any]) -> Any:
    """Make the configuration object from checked values.

    Raises:
        msgspec.ValidationError: the values do not fit, or contradict each other.
    """
    bound = msgspec.convert(dict(values), config, dec_hook=_decode_use)
    todo = [bound]
    while todo:  # msgspec leaves defaults to the class, and then does not write them out either
        value = todo.pop()
        if is_dataclass(value):
            parts = {field.name: getattr(value, field.name) for field in fields(value)}
            for name, part in parts.items():
                object.__setattr__(value, name, part)
            todo += parts.values()
        elif isinstance(value, tuple | list):
            todo += value
        elif isinstance(value, Mapping):
            todo += value.values()
    return bound


def config_data(config: Any) -> dict[str, Any]:
    """A configuration object as plain data, every default written out."""
    data = plain(config)
    assert isinstance(data, dict)
    return data


def use_schema(kind: Kind, names: Iterable[str], known: Mapping[str, Schema]) -> Schema:
    """The schema of `{use: name, with: {...}}` for one kind.

    Args:
        kind: the kind.
        names: all names that the kind has.
        known: the configuration schemas of those names whose settings are to be checked.
    """
    rules: list[Schema] = []
    for name, schema in known.items():
        then: Schema = {"properties": {"with": {"$ref": f"#/$defs/{kind}.{name}"}}}
        if schema.get("required"):
            then["required"] = ["with"]
        named = {"properties": {"use": {"const": name}}, "required": ["use"]}
        rules.append({"if": named, "then": then})
    result: Schema = {
        "type": "object",
        "description": RULES[kind].about,
        "properties": {
            "use": {
                "enum": sorted(names),
                "description": f"which plugin of the kind {kind}",
                **({"x-renamed": dict(PLUGINS[kind])} if kind in PLUGINS else {}),
            },
            "with": {"type": "object", "description": "its settings"},
        },
        "required": ["use"],
        "additionalProperties": False,
    }
    if rules:
        result["allOf"] = rules
    return result


def pipeline_schema(
    names: Mapping[Kind, Iterable[str]],
    configs: Mapping[tuple[Kind, str], type[Any]],
    *,
    live: Iterable[Kind] = (),
) -> Schema:
    """The schema of a pipeline file.

    Args:
        names: all plugin names of each kind.
        configs: the configuration dataclasses of those that the schema spells out.
        live: kinds that a program hands in, so that the file need not name them.
    """
    definitions: dict[str, Schema] = {}
    known: dict[Kind, dict[str, Schema]] = {kind: {} for kind in Kind}
    for (kind, name), config in configs.items():
        own, inner = config_schema(config, f"{kind}.{name}")
        definitions[f"{kind}.{name}"] = own
        definitions.update(inner)
        known[kind][name] = own
    for kind in Kind:
        definitions[f"use.{kind}"] = use_schema(kind, names.get(kind, ()), known[kind])
    for name, config in (("run", RunConfig), ("plugins", PluginRules)):
        definitions[name], inner = config_schema(config, name)
        definitions.update(inner)
    properties: dict[str, Schema] = {
        "forge": {"const": FORMAT, "description": "version of this file format"},
        "extends": {"type": "string", "description": "file (relative to this) to build on"},
        "run": {"$ref": "#/$defs/run"},
        "plugins": {"$ref": "#/$defs/plugins"},
    }
    for kind in Kind:
        reference = {"$ref": f"#/$defs/use.{kind}"}
        properties[kind.value] = (
            {"type": "array", "items": reference, "description": RULES[kind].about}
            if takes_many(kind)
            else reference
        )
    required = [kind.value for kind in Kind if RULES[kind].at_least and kind not in set(live)]
    return {
        "$schema": DIALECT,
        "title": "forge pipeline",
        "type": "object",
        "properties": properties,
        "patternProperties": {"^x-": {}},
        "required": ["forge", "run", *required],
        "additionalProperties": False,
        "x-renamed": dict(KINDS),
        "$defs": definitions,
    }
