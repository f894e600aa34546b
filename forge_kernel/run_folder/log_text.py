"""Lines of `forge.log` and the latest metrics as sentences for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from forge_kernel.contract.metric_info import MetricInfos
from forge_kernel.renamed import record_today

_OWN: Final = frozenset({"event", "level", "timestamp", "step", "message", "facts"})


def metrics_text(metrics: Any, infos: MetricInfos | None = None) -> str:
    """Metrics in one line: `loss 0.31  accuracy 0.8`; one not measured is left out."""
    if not isinstance(metrics, Mapping):
        return ""
    infos = infos or MetricInfos()
    return "  ".join(
        f"{name} {infos.of(name).number(value, grouped=False)}"
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )


def metrics_lines(metrics: Any, infos: MetricInfos, width: int) -> list[str]:
    """Metrics as a table: those that matter a line each, the others side by side.

    Args:
        metrics: by name; those not measured are left out.
        infos: what they are.
        width: columns of a line.
    """
    numbers = metrics if isinstance(metrics, Mapping) else {}
    known = {
        name: infos.of(name).number(value, grouped=False)
        for name, value in numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    first = infos.that_matter(known)
    room = max(map(len, first), default=0)
    result = [f"{name:<{room}}  {known[name]}" for name in first]
    line = ""
    for name, text in known.items():
        if name in first:
            continue
        part = f"{name} {text}"
        if line and len(line) + 2 + len(part) > width:
            result.append(line)
            line = ""
        line = f"{line}  {part}" if line else part
    return [*result, line] if line else result


def place_text(status: Mapping[str, Any]) -> str:
    """Where a run is: `step 120 of 4000, epoch 3, phase warmup`."""
    total = status.get("total_steps")
    parts = [f"step {status.get('step', 0)}" + (f" of {total}" if total is not None else "")]
    parts.append(f"epoch {status.get('epoch', 0)}")
    if status.get("phase") is not None:
        parts.append(f"phase {status['phase']}")
    return ", ".join(parts)


def notice_text(line: Mapping[str, Any]) -> str:
    """A line of `forge.log` as a sentence."""
    what = str(line.get("event"))
    step = f"step {line['step']}: " if "step" in line else ""
    if line.get("message"):
        return f"{step}{line['message']}"
    if what == "phase":
        return f"{step}phase {line.get('before') or 'none'} -> {line.get('after') or 'none'}"
    if what == "validation":
        return f"{step}validation {metrics_text(record_today(line).get('metrics'))}"
    rest = ", ".join(f"{key} {value}" for key, value in line.items() if key not in _OWN and value)
    return f"{step}{what.replace('_', ' ')}" + (f" ({rest})" if rest else "")
