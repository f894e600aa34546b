"""What the named columns of a file hold, one after the other, and which of them is the target."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import numpy as np

from forge_plugins.formats.frame import Frame

_TARGETS: Final = (
    "target", "label", "labels", "class", "y", "outcome", "species", "category", "diagnosis",
    "survived", "churn", "quality", "price", "cultivar",
)  # fmt: skip
_CLASSES: Final = 20
"""Different integers up to which a target is taken for classes."""
_SHOWN: Final = 6


def guessed_target(frame: Frame) -> str:
    """The column that is most likely to be predicted: by its name, else the last that can be."""
    named = {name.lower(): name for name in frame.columns}
    known = [named[word] for word in _TARGETS if word in named]
    usable = [name for name in frame.columns if _is_target(frame, name)]
    for name in (*known, *reversed(usable)):
        if name in usable:
            return name
    return list(frame.columns)[-1]


def _is_target(frame: Frame, name: str) -> bool:
    about = frame.about[name]
    if about["kind"] in ("empty", "other", "date") or frame.columns[name].ndim > 1:
        return False
    distinct = int(about.get("distinct", 0))
    if about["kind"] == "text":
        return 1 < distinct <= max(_CLASSES, len(frame) // 10)
    return distinct > 1


def target_kind(frame: Frame, name: str) -> str:
    """Whether a target is a class or a number."""
    about = frame.about[name]
    if about["kind"] in ("text", "boolean"):
        return "class"
    few = int(about.get("distinct", 0)) <= min(_CLASSES, max(2, len(frame) // 4))
    return "class" if about["kind"] == "integer" and few else "number"


def label_counts(frame: Frame, name: str) -> dict[str, int]:
    """How often each value of a column is there, the commonest first."""
    about, column = frame.about[name], np.asarray(frame.columns[name][:])
    column = column[column >= 0] if about["kind"] == "text" else column[~np.isnan(column)]
    values = about.get("values")
    counts = Counter(column.tolist())
    if values is None:
        return {f"{value:g}": count for value, count in counts.most_common()}
    return {
        str(values[int(code)]): count for code, count in counts.most_common() if code < len(values)
    }


def column_facts(frame: Frame, name: str) -> dict[str, Any]:
    """What a column is, for people and for JSON."""
    about = frame.about[name]
    result: dict[str, Any] = {
        "kind": about["kind"], "missing": int(about["missing"]),
        "different": int(about.get("distinct", 0)),
    }  # fmt: skip
    if about["kind"] in ("text", "boolean"):
        counts = label_counts(frame, name)
        result["values"] = dict(list(counts.items())[:_SHOWN])
    elif about["kind"] in ("number", "integer", "date"):
        column = np.asarray(frame.columns[name][:], dtype=np.float64)
        there = column[np.isfinite(column)]
        if len(there):
            result["smallest"], result["largest"] = float(there.min()), float(there.max())
            result["mean"] = float(there.mean())
    return result


def facts_line(name: str, facts: dict[str, Any], width: int) -> str:
    """One line of a table of columns."""
    if "values" in facts:
        words = ", ".join(f"{word[:16]} {count}" for word, count in facts["values"].items())
        more = facts["different"] - len(facts["values"])
        words += f" and {more} more" if more > 0 else ""
    elif facts["kind"] == "date" and "smallest" in facts:
        days = np.array([facts["smallest"], facts["largest"]]).astype("datetime64[s]")
        words = " to ".join(str(day)[:10] for day in days)
    elif "smallest" in facts:
        words = f"{facts['smallest']:.6g} to {facts['largest']:.6g}, mean {facts['mean']:.6g}"
    else:
        words = ""
    start = f"  {name[:width]:<{width}}  {facts['kind']:<8} {facts['missing']:>8} "
    return f"{start}{facts['different']:>10}  {words}".rstrip()
