"""All validations of a run as one JSON file for analysis."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from forge_kernel.api import Kind, PluginError, PluginInfo, Run, hookimpl

FILE: Final = "validations.json"
_ABOUT: Final = frozenset({"step", "time", "kind", "epoch"})
_NUMBER: Final[dict[str, Any]] = {"type": ["number", "null"]}
RECORD: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "description": "validations.json: every validation of a run; null is no finite number",
    "type": "object",
    "properties": {
        "run": {"type": "string", "description": "name of the run"},
        "steps": {"type": "integer", "minimum": 0, "description": "finished optimizer steps"},
        "best": {
            "type": "object",
            "description": "of each metric the best validation, the first of equal ones",
            "additionalProperties": {
                "type": "object",
                "properties": {
                    "value": {"type": "number"},
                    "step": {"type": "integer", "minimum": 0},
                    "goal": {"enum": ["max", "min"]},
                },
                "required": ["goal", "step", "value"],
                "additionalProperties": False,
            },
        },
        "validations": {
            "type": "array",
            "description": "in order of the steps",
            "items": {
                "type": "object",
                "properties": {
                    "step": {"type": "integer", "minimum": 0},
                    "epoch": {"type": "integer", "minimum": 0},
                    "time": {"type": "number", "description": "seconds since 1970"},
                    "metrics": {"type": "object", "additionalProperties": _NUMBER},
                },
                "required": ["epoch", "metrics", "step", "time"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["best", "run", "steps", "validations"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True)
class ValidationsConfig:
    """No settings: the file is `validations.json`."""


def best_of(
    history: list[dict[str, Any]], goal_of: Callable[[str], str | None]
) -> dict[str, dict[str, Any]]:
    """The best value of each metric and its step; a metric that never was a number has none."""
    result: dict[str, dict[str, Any]] = {}
    for item in history:
        for name, value in item["metrics"].items():
            goal = goal_of(name) or "min"
            known = result.get(name)
            sign = 1.0 if goal == "max" else -1.0
            if value is None or (known is not None and sign * (value - known["value"]) <= 0):
                continue
            result[name] = {"value": value, "step": item["step"], "goal": goal}
    return result


def validations_in(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The validations of a `metrics.jsonl`, without those from before the run went back.

    Raises:
        ValueError: a line is no JSON.
    """
    result: list[dict[str, Any]] = []
    for line in lines:
        data = json.loads(line)
        while result and data["step"] < result[-1]["step"]:
            result.pop()
        if data["kind"] != "validation":
            continue
        if result and result[-1]["step"] == data["step"]:  # once more, of restored weights
            result.pop()
        metrics = {name: value for name, value in data.items() if name not in _ABOUT}
        result.append(
            {name: data[name] for name in ("step", "epoch", "time")} | {"metrics": metrics}
        )
    return result


class Validations:
    """All validations of a run as one JSON file for analysis.

    Writes them in strict JSON, from the `metrics.jsonl` of the run folder.
    """

    info = PluginInfo(
        name="validations",
        kind=Kind.EXPORTERS,
        config=ValidationsConfig,
        requires=("file:metrics.jsonl",),
        records={"validations": RECORD},
    )

    def __init__(self, config: ValidationsConfig) -> None:
        self.config = config

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write the file.

        Raises:
            PluginError: `metrics.jsonl` cannot be read.
        """
        assert run.folder is not None, "exporters are asked in a run with a folder"
        source = run.folder / "metrics.jsonl"
        try:
            history = validations_in(source.read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError, KeyError) as error:
            raise PluginError(f"validations: cannot read {source}: {error}") from error
        data = {
            "run": run.settings.name,
            "steps": run.progress.step,
            "best": best_of(history, run.metrics.goal),
            "validations": history,
        }
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")
        return {"format": "JSON", "validations": len(history), "step": run.progress.step}
