"""The JSON files that a Phase 5 pipeline writes beside its run, as schemas; imports no torch."""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_NUMBER: Final[Schema] = {"type": ["number", "null"]}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_PASSED: Final[Schema] = {"type": "number", "minimum": 0}
_METRICS: Final[Schema] = {"type": "object", "additionalProperties": _NUMBER}


def _closed(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }


_LATEST: Final[Schema] = {
    "type": "object",
    "additionalProperties": _closed({"latest": _NUMBER, "count": _COUNT}),
}
_READING: Final[Schema] = {
    **_METRICS,
    "required": ["cpu_percent", "device_memory_bytes", "device_percent", "memory_bytes", "time"],
}

SCHEMAS: Final[dict[str, Schema]] = {
    "metrics": {
        "$schema": _DIALECT,
        "description": "<name>_metrics.json: how a pipeline ended, and the metrics it has seen",
        **_closed(
            {
                "result": {"$ref": "../run/result.json"},
                "metrics_summary": _closed(
                    {
                        "total_time": _PASSED,
                        "phase_durations": {"type": "object", "additionalProperties": _PASSED},
                        "total_events": _COUNT,
                        "training_summary": _LATEST,
                        "validation_summary": _LATEST,
                    }
                ),
            }
        ),
    },
    "validation": {
        "$schema": _DIALECT,
        "description": "<name>_validation.json, and what export_results writes",
        **_closed(
            {
                "config": {"type": "object"},
                "validation_results": {
                    "type": "array",
                    "items": _closed(
                        {"step": _COUNT, "time": {"type": "number"}, "metrics": _METRICS}
                    ),
                },
                "metrics_history": {
                    "type": "object",
                    "additionalProperties": {"type": "array", "items": _NUMBER},
                },
                "performance_history": {"type": "array", "items": _READING},
                "summary": _closed(
                    {
                        "step_count": _COUNT,
                        "best_metric_value": _NUMBER,
                        "no_improvement_count": _COUNT,
                        "should_stop_early": {"type": "boolean"},
                        "total_validations": _COUNT,
                        "latest_metrics": {"type": ["object", "null"],
                                           "additionalProperties": _NUMBER},
                        "latest_timestamp": _NUMBER,
                        "system_performance": _READING,
                    }
                ),
            }
        ),
    },
}  # fmt: skip
