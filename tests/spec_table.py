"""`make spec`: which test claims which row of the specification, as a table.

A test claims rows by `Spec: B4, B5` in its docstring (or its module's), or by the marker
`spec("B4")`; a benchmark by its module's docstring. `--write` writes `docs/spec.md`.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "tests" / "spec_rows.tsv"
TABLE = ROOT / "docs" / "spec.md"
SECTIONS = {
    "A": "Names, modules, imports",
    "B": "Data loading",
    "C": "Training loop",
    "D": "BitNet",
    "E": "Grokfast",
    "F": "Losses",
    "G": "Schedulers",
    "H": "Validation and monitoring",
    "I": "Pipeline",
    "J": "Phases and integration",
    "K": "Targets, practices, requirements",
}
_CLAIM = re.compile(r"\bSpec: ([A-K]\d+(?:,? [A-K]\d+)*)")


def rows() -> dict[str, str]:
    """The rows by their number, in order."""
    lines = ROWS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t", 1) for line in lines)  # type: ignore[misc]


def _claimed(text: str | None) -> Iterator[str]:
    for match in _CLAIM.finditer(text or ""):
        yield from re.findall(r"[A-K]\d+", match.group(1))


def _marked(function: ast.FunctionDef) -> Iterator[str]:
    for mark in function.decorator_list:
        call = mark.func if isinstance(mark, ast.Call) else None
        if isinstance(call, ast.Attribute) and call.attr == "spec":
            yield from (str(one.value) for one in mark.args if isinstance(one, ast.Constant))  # type: ignore[union-attr]


def claims() -> dict[str, list[str]]:
    """Tests and benchmarks by the row that they claim, as `path::test` below the repository."""
    found: dict[str, list[str]] = {}
    for file in sorted([*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("benchmarks/*.py")]):
        tree, name = ast.parse(file.read_text(encoding="utf-8")), file.relative_to(ROOT).as_posix()
        for row in _claimed(ast.get_docstring(tree)):
            found.setdefault(row, []).append(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                told = {*_claimed(ast.get_docstring(node)), *_marked(node)}
                for row in sorted(told):
                    found.setdefault(row, []).append(f"{name}::{node.name}")
    return found


def open_rows() -> list[str]:
    """Rows that nothing claims."""
    known = claims()
    return [row for row in rows() if row not in known]


def table() -> str:
    """The whole table as Markdown."""
    known, all_rows = claims(), rows()
    done = [row for row in all_rows if row in known]
    lines = [
        "# The specification, row by row",
        "",
        "Written by `make spec` from the claims in the tests. A row is done when a test (a",
        "benchmark, where it speaks of time) claims it; the test says how it was seen to fail.",
        "",
        f"{len(done)} of {len(all_rows)} rows are done; open: "
        f"{', '.join(row for row in all_rows if row not in known) or 'none'}.",
    ]
    for letter, title in SECTIONS.items():
        lines += ["", f"## {letter}. {title}", "", "| row | what | claimed by |", "|---|---|---|"]
        for row, what in all_rows.items():
            if row.startswith(letter):
                where = known.get(row, [])
                more = f" and {len(where) - 1} more" if len(where) > 1 else ""
                told = f"`{where[0].removeprefix('tests/')}`{more}" if where else "**open**"
                lines.append(f"| {row} | {what} | {told} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/spec.md")
    if parser.parse_args().write:
        TABLE.write_text(table(), encoding="utf-8")
    print(table(), end="")


if __name__ == "__main__":
    main()
