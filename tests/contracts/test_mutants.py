"""The faults that `make mutation` plants: small, one at a time, and such that Python reads them."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mutants import mutants
from mutation import Reach, Tracer

ROOT = Path(__file__).resolve().parents[2]


def lines_after(source: str, kind: str) -> set[str]:
    """What mutants of a kind have in place of a line."""
    return {
        line[1:].strip()
        for mutant in mutants(source)
        if mutant.kind == kind
        for line in mutant.diff.splitlines()
        if line.startswith("+")
    }


@pytest.mark.parametrize(
    ("source", "kind", "expected"),
    [
        ("x = a < b", "comparison", {"x = (a <= b)", "x = (a >= b)"}),
        ("x = a is None", "comparison", {"x = (a is not None)"}),
        ("x = a - b", "arithmetic", {"x = (a + b)"}),
        ("a *= b", "arithmetic", {"a /= b"}),
        ("x = 3", "constant", {"x = 4", "x = (2)"}),
        ("x = f(strict=True)", "constant", {"x = f(strict=False)"}),
        ("if a and b:\n    pass", "and, or", {"if (a or b):"}),
        ("while a():\n    pass", "negated condition", {"while not (a()):"}),
        ("f(a, b)", "swapped arguments", {"f(b, a)"}),
        ("f(a)", "removed statement", {"pass"}),
        ("a.b = c", "removed statement", {"pass"}),
        ("for a in b:\n    break", "break", {"continue"}),
        ("for a in b:\n    continue", "continue", {"break"}),
        ("for a in b:\n    pass", "first of several", {"for a in list(b)[:1]:"}),
        ("x = [a for a in b]", "first of several", {"x = [a for a in list(b)[:1]]"}),
        ("def f():\n    return a", "return of a default", {"return None"}),
        ("x = all(a)", "opposite", {"x = any(a)"}),
    ],
)
def test_each_kind_of_fault_is_planted(source: str, kind: str, expected: set[str]) -> None:
    assert lines_after(source, kind) == expected


@pytest.mark.parametrize(
    "source",
    [
        "from a import b",
        "def f(a: Literal[1]) -> Literal[2]: ...",
        "@f(1)\nclass C: ...",
        "raise ValueError(f(1, 2))",
        "assert a > 1",
        "__all__ = [*a, *b]",
        'f"{1 + 1}"',
        "if TYPE_CHECKING:\n    f(1)",
        "min(a)",
    ],
)
def test_wording_annotations_and_imports_are_left_alone(source: str) -> None:
    assert [
        one for one in mutants(source) if one.kind not in ("removed statement", "opposite")
    ] == []


def test_all_but_the_fault_is_kept_byte_by_byte_also_behind_letters_of_several_bytes() -> None:
    source = "x = 'äöü', a <  b  # größer\ny = 1\n"
    found = {one.text for one in mutants(source) if one.kind == "comparison"}
    assert found == {source.replace("a <  b", "(a <= b)"), source.replace("a <  b", "(a >= b)")}


@pytest.mark.parametrize("name", ["forge_kernel/contract/counting.py", "tests/mutants.py"])
def test_every_mutant_of_a_real_source_is_another_program(name: str) -> None:
    source = (ROOT / name).read_text(encoding="utf-8")
    plain, found = ast.dump(ast.parse(source)), mutants(source)
    assert len({one.text for one in found}) == len(found) > 50
    for one in found:
        assert ast.dump(ast.parse(one.text)) != plain
        assert 1 <= one.line <= one.end_line <= len(source.splitlines())


def test_what_importing_runs_may_be_noticed_by_any_test_and_not_by_the_first_alone(
    tmp_path: Path,
) -> None:
    """Red when the settings of a class count as reached by the test that loads it first."""
    lines = [
        "class Config:",
        "    size = 3",
        "    def twice(self):",
        "        return 2 * self.size",
    ]
    (tmp_path / "source.py").write_text("\n".join([*lines, "made = Config()"]))
    tracer = Tracer(tmp_path, ["source.py"])
    running = tracer.pytest_runtest_protocol(SimpleNamespace(nodeid="first"))  # type: ignore[arg-type]
    next(running)
    before = sys.gettrace()
    tracer.begin()
    try:
        runpy.run_path(str(tmp_path / "source.py"))["made"].twice()
    finally:
        tracer.pytest_sessionfinish()
        sys.settrace(before)
    running.close()
    assert tracer.reach.loaded["source.py"] >= {1, 2, 3, 5}
    assert tracer.reach.lines["source.py"]["first"] == {3, 4}


def test_tests_that_reach_a_statement_come_first_and_then_those_that_share_their_files() -> None:
    """Red when a test that looks at what an earlier one has made and cached is left out."""
    seconds = {"a.py::slow": 2.0, "a.py::quick": 1.0, "a.py::shares": 0.5, "b.py::other": 0.1}
    reached = {"source.py": {"a.py::slow": {3}, "a.py::quick": {2, 3}, "b.py::other": {9}}}
    (mutant,) = (one for one in mutants("\n\nx = a - b") if one.kind == "arithmetic")
    found = Reach(seconds, reached).tests("source.py", mutant, ("a.py", "b.py"))
    assert found == ["a.py::quick", "a.py::slow", "a.py::shares"]


def test_each_guarded_source_and_each_guard_is_there() -> None:
    for row in (ROOT / "tests" / "mutation_guards.tsv").read_text(encoding="utf-8").splitlines():
        pattern, tests = row.split("\t")
        assert list(ROOT.glob(pattern)), pattern
        for test in tests.split():
            assert (ROOT / test).exists(), test
