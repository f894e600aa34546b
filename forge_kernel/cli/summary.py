"""What a finished run says of itself on a screen: a dozen lines, what matters first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from forge_kernel.contract.metric_info import MetricInfos
    from forge_kernel.contract.result import RunResult

METRICS: Final = 6
"""Lines of metrics; all of them are in the run's files."""
COLOURS: Final = {"completed": "green", "stopped": "yellow", "failed": "red"}


def summary(result: RunResult, infos: MetricInfos) -> Iterator[str]:
    """The lines after the outcome.

    Args:
        result: of the run.
        infos: what its metrics are.
    """
    names = infos.that_matter(result.final)
    for name in names[:METRICS]:
        yield f"  {name}: {_values(name, result, infos)}"
    skipped = result.final.get("skipped_steps")
    if skipped:
        yield f"  skipped_steps: {infos.of('skipped_steps').number(skipped, grouped=False)}"
    left = len(result.final) - len(names[:METRICS]) - bool(skipped)
    folder = result.folder
    if folder is None:
        return
    if left > 0:
        yield f"  and {left} more: forge status {folder}"
    yield from _exports(result, folder)
    if (folder / "report.html").is_file():
        yield f"  report: {folder}/report.html"
    yield f"  next: forge evaluate {folder}   (all commands: forge --help)"


def _values(name: str, result: RunResult, infos: MetricInfos) -> str:
    """The last value and, of a validation's, the best one."""
    from forge_kernel.contract.metric_info import VALIDATION

    info, value = infos.of(name), result.final[name]
    shown = "not measured" if value is None else info.number(value, grouped=False)
    best = result.best.get(name.removeprefix(VALIDATION))
    if best is None or not name.startswith(VALIDATION):
        return shown
    return f"{shown}  (best {info.number(best, grouped=False)})"


def _exports(result: RunResult, folder: Path) -> Iterator[str]:
    from forge_kernel.contract.metric_info import MetricInfo

    size = MetricInfo("bytes", unit="bytes")
    for name, place in result.exports.items():
        about = _manifest(folder / place / "manifest.json")
        own, plain = about.get("bytes"), about.get("bytes_fp32")
        said = ""
        if isinstance(own, int) and own > 0:
            said = f"  ({size.number(own)}"
            if isinstance(plain, int) and plain > own:
                said += f", {size.number(plain)} in fp32: {plain / own:.1f} times smaller"
            said += ")"
        yield f"  export {name}: {folder}/{place}{said}"


def _manifest(file: Path) -> Mapping[str, Any]:
    """What the exporter said; nothing where that cannot be read."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, Mapping) else {}
