"""Run folders as runs leave them, for tests of the report; and a page read back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"


def logged(step: int, **metrics: float | None) -> dict[str, Any]:
    return {"step": step, "time": 1.0 + step, "kind": "log", "epoch": 0, **metrics}


def validated(step: int, **metrics: float | None) -> dict[str, Any]:
    return {"step": step, "time": 1.0 + step, "kind": "validation", "epoch": 0, **metrics}


def folder_of(
    place: Path, records: Iterable[dict[str, Any]], *, name: str = "made", seed: int = 0,
    lr: float = 0.001, state: str = "completed", **result: Any,
) -> Path:  # fmt: skip
    """A run folder with these lines in its metrics file."""
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(
        f"forge: 1\nrun: {{name: {name}, seed: {seed}}}\n"
        f"optimizer: {{use: adamw, with: {{lr: {lr}}}}}\n"
    )
    (place / "environment.json").write_text('{"python": "3.11.9", "device": "cpu"}')
    (place / "status.json").write_text(json.dumps({"state": state, "step": 1, "total_steps": 9}))
    about = {
        "outcome": state, "steps": 100, "epochs": 3, "seconds": 10.0, "stop_reason": "told to",
        "final": {}, "best": {}, "exports": {}, "error": None, **result,
    }  # fmt: skip
    (place / "result.json").write_text(json.dumps(about))
    text = "".join(json.dumps(one) + "\n" for one in records)
    (place / "metrics.jsonl").write_text(text)
    return place


def charts(text: str) -> dict[str, list[Any]]:
    """The drawings of a page by title; those in both scales as a list of two."""
    found: dict[str, list[Any]] = {}
    for source in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        svg = ElementTree.fromstring(source)
        found.setdefault(svg.find(f"{SVG}title").text or "", []).append(svg)  # type: ignore[union-attr]
    return found


def of_class(svg: Any, tag: str, *classes: str) -> list[Any]:
    """The elements of a drawing that have all of some classes."""
    return [
        part
        for part in svg.iter(f"{SVG}{tag}")
        if set(classes) <= set(part.get("class", "").split())
    ]


def points(path: str) -> list[tuple[float, float]]:
    """The corners of a path."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
