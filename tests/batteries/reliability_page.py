"""docs/reliability.md, written from the outcomes of the batteries and the scores of `mutation.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HEAD = """\
# Reliability, as tried

What the kernel promises about runs, files and plugins, and how often each promise was tried in the
last long run of the batteries (`make deep`; commit {commit}, {when}, {machine}). Each draws its
trials from a seed, so that `python tests/batteries NAME --seed SEED --count COUNT` repeats them.
SECURITY.md says what is not promised. This page is written by `python tests/batteries --docs`.
"N of M" had a limit of time.

What grows with a run: `forge.log` by a line (some 200 bytes) for each validation, checkpoint and event;
`metrics.jsonl` and `metrics.csv` by a line for each log and validation; `checkpoints/` not at all.
`status.json` keeps the newest events alone.

| battery | promise, in each trial | tried | wrong | seed | seconds |
|---|---|---:|---:|---:|---:|
"""

MUTANTS = """
## Faults that the tests notice

Small faults planted in the sources one at a time, drawn from all that `tests/mutants.py` makes of a
part, and how many of them a test of the plain suite notices. Those that change nothing that can be
seen from outside count as not noticed. `make deep` fails where a part has less than 85 %;
`tests/mutation.py --parts PART --seed SEED --sample PLANTED` repeats a row, as the sources then were.

| part | sources | planted | noticed | percent | seed |
|---|---|---:|---:|---:|---:|
"""


def page(
    outcomes: Iterable[Mapping[str, Any]], about: Mapping[str, str], scores: Mapping[str, Any]
) -> str:
    """The page.

    Args:
        outcomes: what `Outcome.write` wrote, by battery.
        about: `commit`, `when` and `machine` of the run.
        scores: `parts`, as `mutation.py --docs` wrote them.
    """
    ranked = sorted(outcomes, key=lambda outcome: outcome["battery"])
    rows = [_row(outcome) for outcome in ranked]
    figures = [
        f"- {outcome['battery']}, {name}: median {seen['median']:.4g}, largest {seen['max']:.4g}"
        for outcome in ranked
        for name, seen in sorted(outcome["figures"].items())
    ]
    text = HEAD.format(**about) + "\n".join(rows) + "\n"
    text += "\nFigures seen:\n\n" + "\n".join(figures) + "\n" if figures else ""
    parts = [_part(part) for part in scores["parts"]]
    return text + MUTANTS + "\n".join(parts) + "\n"


def _part(part: Mapping[str, Any]) -> str:
    names = ", ".join(f"`{source.removeprefix('forge_kernel/')}`" for source in part["sources"])
    counts = (part["total"], part["killed"], f"{part['percent']:.1f}", part["seed"])
    cells = (part["part"], names, *map(str, counts))
    return f"| {' | '.join(cells)} |"


def write_page(docs: Path) -> None:
    """Write the page from the results beside it."""
    known, scores = (
        json.loads((docs / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("reliability", "mutation")
    )
    text = page(known["outcomes"], known["about"], scores)
    (docs / "reliability.md").write_text(text, encoding="utf-8")


def _row(outcome: Mapping[str, Any]) -> str:
    tried = f"{outcome['tried']:,}"
    if outcome["cut_short"]:
        tried += f" of {outcome['asked']:,}"
    cells = (
        outcome["battery"], outcome["promise"], tried, f"{len(outcome['wrong']):,}",
        str(outcome["seed"]), f"{outcome['seconds']:,.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def read(folder: Path) -> list[dict[str, Any]]:
    """The outcomes in a folder."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
