"""All JSON Schemas of an installation, as files: the pipeline, each plugin, the run's records."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from typing import Any, Final

from forge_kernel.config.pipeline import takes_many
from forge_kernel.config.schema import DIALECT, Schema, config_schema, pipeline_schema
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import PluginError
from forge_kernel.planning.catalog import Catalog

GROUP: Final = "forge_kernel.schemas"
"""Entry points of programs over the kernel: schemas of the files that they write, by name."""

_NUMBER_OR_NULL: Final[Schema] = {"type": ["number", "null"]}
_SEAL: Final[Schema] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_METRICS: Final[Schema] = {"type": "object", "additionalProperties": _NUMBER_OR_NULL}
_TEXT_OR_NULL: Final[Schema] = {"type": ["string", "null"]}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}


def _record(
    about: str,
    required: Schema,
    *,
    optional: Schema | None = None,
    further: Schema | bool = False,
) -> Schema:
    return {
        "$schema": DIALECT,
        "description": about,
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": sorted(required),
        "additionalProperties": further,
    }


_STATES: Final = ["initializing", "training", "completed", "stopped", "failed"]

RECORDS: Final[dict[str, Schema]] = {
    "result": _record(
        "result.json: the outcome of a run",
        {
            "outcome": {"enum": ["completed", "stopped", "failed"]},
            "steps": _COUNT,
            "epochs": _COUNT,
            "seconds": {"type": "number", "minimum": 0},
            "stop_reason": {"type": "string"},
            "final": _METRICS,
            "best": _METRICS,
            "exports": {"type": "object", "additionalProperties": {"type": "string"}},
            "failed_exports": {"type": "object", "additionalProperties": {"type": "string"}},
            "error": _TEXT_OR_NULL,
        },
    ),
    "status": _record(
        "status.json: the state of a run, replaced in one step",
        {
            "state": {"enum": _STATES},
            "step": _COUNT,
            "total_steps": {"type": ["integer", "null"]},
            "epoch": _COUNT,
            "phase": _TEXT_OR_NULL,
            "metrics": _METRICS,
            "metrics_step": {"type": ["integer", "null"], "description": "step of the metrics"},
            "events": {
                "type": "array",
                "items": _record(
                    "the newest of what plugins told",
                    {
                        "step": _COUNT,
                        "time": {"type": "number"},
                        "event": {"type": "string"},
                        "message": {"type": "string"},
                    },
                ),
            },
            "pid": _COUNT,
            "host": {"type": "string", "description": "the machine that the pid is of"},
            "started": {"type": "number"},
            "heartbeat": _NUMBER_OR_NULL,
        },
        optional={
            "left": {
                "type": "array",
                "items": {"type": "string"},
                "description": "of a run that failed before its first step: what it wrote, so that "
                "its folder can be used again",
            },
            "sha256": {**_SEAL, "description": "of this file's text without this"},
        },
    ),
    "metrics": _record(
        "a line of metrics.jsonl: beside these, one key for each metric (null: not measured)",
        {
            "step": _COUNT,
            "time": {"type": "number"},
            "kind": {"enum": ["log", "validation", "event"]},
            "epoch": _COUNT,
        },
        optional={
            "event": {"type": "string", "description": "of kind event: one word for programs"},
            "message": {"type": "string", "description": "of kind event: a sentence for people"},
            "facts": {"type": "object", "description": "of kind event: plain values"},
        },
        further=_NUMBER_OR_NULL,
    ),
    "environment": _record(
        "environment.json: what the run ran on",
        {
            "python": {"type": "string"},
            "platform": {"type": "string"},
            "packages": {"type": "object", "additionalProperties": _TEXT_OR_NULL},
            "device": {"type": "string"},
            "device_name": {"type": "string"},
            "precision": {"enum": ["fp32", "bf16", "fp16"]},
            "threads": {"type": "integer", "minimum": 1},
            "git_revision": _TEXT_OR_NULL,
            "plugins": {"type": "object", "additionalProperties": {"type": "string"}},
            "metrics": {
                "description": "what the metrics of the run are; a name's * stands for any letters",
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string"},
                        "unit": {"type": "string"},
                        "goal": {"enum": ["max", "min"]},
                        "digits": {"type": "integer", "minimum": 1},
                        "title": {"type": "string"},
                        "section": {"type": "string"},
                    },
                    "required": ["name"],
                    "additionalProperties": False,
                },
            },
            "command": {"type": "array", "items": {"type": "string"}},
        },
    ),
    "checkpoint": _record(
        "manifest.json of a checkpoint: its files with size and hash, and its own hash",
        {
            "format": {"type": "integer"},
            "step": _COUNT,
            "about": {"type": "object"},
            "aliases": {"type": "object"},
            "files": {"$ref": "#/$defs/files"},
        },
        optional={
            "finite": {"const": True, "description": "weights and memories were looked at"},
            "sha256": {**_SEAL, "description": "of this file's text without this; since format 3"},
        },
    ),
    "export": _record(
        "manifest.json of an export: its files with size and SHA-256, beside what it says itself",
        {"files": {"$ref": "#/$defs/files"}},
        further=True,
    ),
}


def _files(*hashes: str) -> Schema:
    """Files by name, each with its size and one of the hashes, in hex."""
    digits = {"sha256": 64, "xxh3_128": 32}
    kinds = [
        {
            "type": "object",
            "properties": {
                "bytes": _COUNT,
                name: {"type": "string", "pattern": f"^[0-9a-f]{{{digits[name]}}}$"},
            },
            "required": ["bytes", name],
            "additionalProperties": False,
        }
        for name in hashes
    ]
    return {"type": "object", "additionalProperties": {"oneOf": kinds}}


RECORDS["checkpoint"]["$defs"] = {"files": _files("xxh3_128", "sha256")}
RECORDS["export"]["$defs"] = {"files": _files("sha256")}


def all_schemas(catalog: Catalog) -> dict[str, Schema]:
    """Every schema by its path below `schemas/`; broken plugins are left out."""
    result: dict[str, Schema] = {f"run/{name}.json": schema for name, schema in RECORDS.items()}
    configs: dict[Any, type[Any]] = {}
    for offer in catalog.offers():
        try:
            info = catalog.load(offer.kind, offer.name).info
            config = info.config
            own, inner = config_schema(config, offer.key)
        except PluginError:
            continue
        configs[offer.kind, offer.name] = config
        title = {"$schema": DIALECT, "title": offer.key}
        result[f"{offer.kind}/{offer.name}.json"] = {**title, **own, "$defs": inner}
        for name, record in info.records.items():
            result[f"{offer.kind}/{offer.name}.{name}.json"] = dict(record)
    names = {kind: catalog.names(kind) for kind, _ in configs}
    result["pipeline.schema.json"] = file_schema(pipeline_schema(names, configs))
    for entry in entry_points(group=GROUP):
        for name, record in entry.load().items():
            result[f"{entry.name}/{name}.json"] = dict(record)
    return result


def file_schema(pipeline: Schema) -> Schema:
    """The schema of a pipeline as it stands in a file, which may hold a part of it.

    The kernel checks the file together with what it `extends`. An editor sees the file alone: with
    `extends` nothing is required, and a plugin's `use` may stand in the file below.

    Args:
        pipeline: the schema of a whole pipeline.
    """
    definitions, properties = dict(pipeline["$defs"]), dict(pipeline["properties"])
    layers: Schema = {}
    for kind in (kind for kind in Kind if not takes_many(kind)):
        use = definitions[f"use.{kind}"]
        definitions[f"layer.{kind}"] = {
            key: value for key, value in use.items() if key != "required"
        }
        layers[kind.value] = {"$ref": f"#/$defs/layer.{kind}"}
        properties[kind.value] = {"description": use["description"]}
    whole = {name: pipeline["properties"][name] for name in layers}
    shared = {key: value for key, value in pipeline.items() if key != "required"}
    return {
        **shared,
        "properties": properties,
        "if": {"required": ["extends"]},
        "then": {"properties": layers},
        "else": {"properties": whole, "required": pipeline["required"]},
        "$defs": definitions,
    }


def schema_text(schema: Schema) -> str:
    """The schema as it lies in a file."""
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
