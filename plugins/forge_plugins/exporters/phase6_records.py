"""The JSON files of a Phase 6 folder as JSON Schemas; what was not measured is null."""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_NUMBER: Final[Schema] = {"type": ["number", "null"]}
_TEXT: Final[Schema] = {"type": ["string", "null"]}
_COUNT: Final[Schema] = {"type": ["integer", "null"], "minimum": 0}
_METRICS: Final[Schema] = {"type": ["object", "null"], "additionalProperties": _NUMBER}
_OPEN: Final[Schema] = {"type": "object"}


def _closed(about: str, properties: Schema) -> Schema:
    return {
        "$schema": DIALECT,
        "description": about,
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


_ARCHITECTURE: Final[Schema] = {
    "type": "object",
    "properties": {
        "class": {"type": "string", "description": "Python name of the model's class"},
        "parameters": {"type": "integer", "minimum": 0},
        "layers": {
            "type": "object",
            "description": "layers with parameters of their own, by name",
            "additionalProperties": {
                "type": "object",
                "properties": {
                    "kind": {"type": "string"},
                    "shape": {"type": ["array", "null"], "items": {"type": "integer"}},
                },
                "required": ["kind", "shape"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["class", "parameters", "layers"],
    "additionalProperties": False,
}

RECORDS: Final[dict[str, Schema]] = {
    "training_metadata": _closed(
        "training_metadata.json: how the model was trained",
        {
            "architecture": {"type": "string"},
            "epochs": _COUNT,
            "final_accuracy": _NUMBER,
            "validation_loss": _NUMBER,
            "optimizer_config": {"type": ["object", "null"]},
            "training_time": {**_NUMBER, "description": "seconds"},
            "dataset_size": {**_COUNT, "description": "training samples in an epoch"},
            "hyperparameters": _OPEN,
            "checkpoint_path": {**_TEXT, "description": "relative to the file's folder"},
        },
    ),
    "metadata": _closed(
        "metadata.json: what the model is and what it reached",
        {
            "model_architecture": _ARCHITECTURE,
            "training_metrics": _METRICS,
            "quantization_info": {"type": ["object", "null"]},
            "performance_stats": _closed(
                "sizes and times",
                {
                    "steps": _COUNT,
                    "seconds": _NUMBER,
                    "steps_per_second": _NUMBER,
                    "weight_bytes": _COUNT,
                },
            ),
            "validation_results": _METRICS,
        },
    ),
    "training_history": _closed(
        "training_history.json: the lines of metrics.jsonl, or null when the run wrote none",
        {"entries": {"type": ["array", "null"], "items": _OPEN}},
    ),
}
