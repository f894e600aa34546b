"""`make mutation`: faults planted one at a time, and whether the tests notice.

    tests/mutation.py [--sample N] [--seed S] [--only PART ...] [--guard SOURCE=TEST[,TEST]]
    tests/mutation.py --parts [NAME ...] [--sample N] [--seed S] [--at-least PERCENT] [--docs]

`mutation_guards.tsv` says which tests guard a source. All works in a copy of the tree: first each
test once, to see which lines it reaches, then N mutants of each source (see `mutants.py`) against
the tests that reach the changed statement, the quickest first, then the others of their files, up
to the first that fails.

With `--parts` the sample is drawn of each of `PARTS` as a whole, and each has a score of its own: exit
1 if one is below `--at-least`. `--docs` writes those of the named parts to docs/results/mutation.json
and docs/reliability.md.

A line for each mutant goes to stderr, a summary as JSON to stdout. Verdicts: `killed`; `survived`;
`timeout` (it counts as killed: a loop without end is noticed); `unreached` (it counts as survived):
no test runs the statement in its own process. What only processes that tests start run is not seen.

A test's process is a fork of this one, which has imported torch and none of the tree.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest
import torch  # once, before the forks: most of the time of a short test
from mutants import Mutant, mutants

ROOT: Final = Path(__file__).resolve().parent.parent
GUARDS: Final = ROOT / "tests" / "mutation_guards.tsv"
PARTS: Final = {
    "checkpoint": (
        "forge_kernel/storage/checkpoint_store.py", "forge_kernel/storage/manifest.py",
        "forge_kernel/storage/state_tree.py", "forge_kernel/storage/tensor_file.py",
    ),
    "storage": (
        "forge_kernel/storage/atomic_files.py", "forge_kernel/storage/hashes.py",
        "forge_kernel/storage/random_state.py", "forge_kernel/storage/seal.py",
    ),
    "bus": ("forge_kernel/training/bus.py",),
    "order": ("forge_kernel/planning/order.py",),
    "config": ("forge_kernel/config/",),
    "snapshot": ("forge_kernel/training/snapshot.py",),
}  # fmt: skip
"""What a run cannot do without, by the beginning of its sources' names."""
LEAST_LIMIT: Final = 120.0
"""Seconds before a mutant counts as hung; more where its tests take long."""


@dataclass(slots=True)
class Reach:
    """What the guarding tests run, unchanged.

    Attributes:
        seconds: of each test that passes, by its node id.
        lines: of each source, the lines that each test reaches.
        loaded: of each source, the lines that importing it runs; any test may notice those.
        failed: the tests that do not pass; they guard nothing.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, set[int]]] = field(default_factory=dict)
    loaded: dict[str, set[int]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def tests(self, source: str, mutant: Mutant, guards: tuple[str, ...]) -> list[str]:
        """The guarding tests that reach the mutated statement, the quickest first.

        After them the others of their files: what one test makes, fixtures and caches hand on.
        """
        span = range(mutant.line, mutant.end_line + 1)
        by_import = any(line in self.loaded.get(source, ()) for line in span)
        reached = self.lines.get(source, {})
        found = [
            test
            for test in self.seconds
            if test.startswith(guards)
            and (by_import or not reached.get(test, set()).isdisjoint(span))
        ]
        files = tuple({f"{test.partition('::')[0]}::" for test in found})
        others = set(filter(lambda test: test.startswith(files), self.seconds)) - set(found)
        quickest = self.seconds.__getitem__
        return [*sorted(found, key=quickest), *sorted(others, key=quickest)]


class Tracer:
    """A pytest plugin that notes which lines of the sources each test reaches."""

    def __init__(self, tree: Path, sources: list[str]) -> None:
        self._sources = {str(tree / source): source for source in sources}
        self._test = ""
        self.reach = Reach()

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        del event, argument
        source = self._sources.get(frame.f_code.co_filename)
        if source is None:
            return None
        # of a module or a class, which are no functions; or outside of any test, as in collecting
        if not frame.f_code.co_flags & inspect.CO_OPTIMIZED or not self._test:
            lines = self.reach.loaded.setdefault(source, set())
        else:
            lines = self.reach.lines.setdefault(source, {}).setdefault(self._test, set())
        lines.add(frame.f_lineno)

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            del event, argument
            lines.add(frame.f_lineno)
            return line

        return line

    def begin(self) -> None:
        """Trace all that runs from here on: before pytest, which imports the suite's `conftest`."""
        sys.settrace(self._call)
        threading.settrace(self._call)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Know whose fixtures and calls the lines are."""
        self._test, start = item.nodeid, time.perf_counter()
        try:
            return (yield)
        finally:
            self.reach.seconds[item.nodeid] = time.perf_counter() - start
            self._test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test that does not pass as it is."""
        if not report.passed:
            self.reach.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Leave the tests that guard nothing out."""
        sys.settrace(None)
        threading.settrace(None)
        for test in self.reach.failed:
            self.reach.seconds.pop(test, None)


class _Chosen:
    """A pytest plugin that runs these tests alone, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self._place = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep and order."""
        kept = [item for item in items if item.nodeid in self._place]
        items[:] = sorted(kept, key=lambda item: self._place[item.nodeid])


class Tree:
    """A copy of the checkout that mutants are written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # the listing that git has: neither environments nor caches nor what runs have written
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout.split("\0")
        for name in filter(None, listed):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(ROOT / name):
                shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
        self._writes = 0

    def text(self, source: str) -> str:
        """A source as it stands here."""
        return (self.folder / source).read_text(encoding="utf-8")

    def write(self, source: str, text: str) -> None:
        """Write a source so that no bytecode of another text of its size is taken for its own."""
        self._writes += 1
        file = self.folder / source
        file.write_text(text, encoding="utf-8")
        os.utime(file, (self._writes, self._writes))

    def forked(self, work: Callable[[], int], log: Path, limit: float) -> int | None:
        """The exit status of `work` in a process of its own in this tree; None: it hung."""
        process = os.fork()
        if process == 0:
            self._become(work, log)
        end = time.monotonic() + limit
        while time.monotonic() < end:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                _kill_group(process)  # what it started and left
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        _kill_group(process)
        os.waitpid(process, 0)
        return None

    def _become(self, work: Callable[[], int], log: Path) -> None:
        code = 70
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.chdir(self.folder)
            ours = [str(self.folder), str(self.folder / "plugins")]
            sys.path[:] = [*ours, *(one for one in sys.path if one != str(ROOT / "tests"))]
            sys.modules.pop("mutants", None)
            os.environ.update(PYTHONPATH=os.pathsep.join(ours), OMP_NUM_THREADS="1")
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)


def _kill_group(process: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


_QUIET: Final = ["-q", "-p", "no:cacheprovider", "-m", "not deep"]


def reach(tree: Tree, sources: list[str], guards: list[str], folder: Path) -> Reach:
    """Run the guarding tests once, traced.

    Raises:
        SystemExit: pytest could not run them, or they reach none of a source.
    """
    kept = folder / "reach.json"

    def work() -> int:
        tracer = Tracer(tree.folder, sources)
        tracer.begin()
        code = int(pytest.main([*_QUIET, *guards], plugins=[tracer]))
        found = tracer.reach
        lines = {
            source: {test: sorted(lines) for test, lines in tests.items()}
            for source, tests in found.lines.items()
        }
        loaded = {source: sorted(lines) for source, lines in found.loaded.items()}
        kept.write_text(json.dumps([found.seconds, lines, loaded, found.failed]))
        return code

    log = folder / "reach.txt"
    code = tree.forked(work, log, limit=86400.0)
    if code not in (0, 1):
        raise SystemExit(f"the guarding tests do not run (status {code}):\n{log.read_text()}")
    seconds, lines, loaded, failed = json.loads(kept.read_text())
    found = Reach(
        seconds,
        {source: {test: set(of) for test, of in tests.items()} for source, tests in lines.items()},
        {source: set(of) for source, of in loaded.items()},
        failed,
    )
    missed = [one for one in sources if one not in found.lines and one not in found.loaded]
    if missed:
        raise SystemExit(f"no guarding test reaches {missed}: mend {GUARDS.name}")
    return found


def verdict(tree: Tree, source: str, mutant: Mutant, tests: list[str], limit: float) -> str:
    """What the tests say of a mutant: `killed`, `survived` or `timeout`."""
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    original = tree.text(source)
    tree.write(source, mutant.text)
    try:
        code = tree.forked(
            lambda: int(pytest.main(["-x", *_QUIET, *files], plugins=[_Chosen(tests)])),
            tree.folder.parent / "mutant.txt",
            limit,
        )
    finally:
        tree.write(source, original)
    return "timeout" if code is None else "survived" if code == 0 else "killed"


def guarded(patterns: dict[str, tuple[str, ...]], only: list[str]) -> dict[str, tuple[str, ...]]:
    """The guarding tests of each source, in the order of the table."""
    found: dict[str, tuple[str, ...]] = {}
    for pattern, tests in patterns.items():
        for file in sorted(ROOT.glob(pattern)):
            name = file.relative_to(ROOT).as_posix()
            if name.endswith("/__init__.py") or (only and not any(one in name for one in only)):
                continue
            found[name] = tests
    return found


def _table() -> dict[str, tuple[str, ...]]:
    rows = (row.split("\t") for row in GUARDS.read_text(encoding="utf-8").splitlines())
    return {pattern: tuple(tests.split()) for pattern, tests in rows}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, default=10, help="mutants of each source, or part")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the sources' names")
    parser.add_argument(
        "--guard", action="append", default=[], metavar="SOURCE=TEST[,TEST]",
        help="in place of the table",
    )  # fmt: skip
    parser.add_argument("--parts", nargs="*", choices=[*PARTS, []], help="a score of each")
    parser.add_argument("--at-least", type=float, default=0.0, help="percent, of each part")
    parser.add_argument("--docs", action="store_true", help="publish the scores of these parts")
    arguments = parser.parse_args()
    if (arguments.docs or arguments.at_least) and arguments.parts is None:
        parser.error("--docs and --at-least are of --parts")
    return arguments


def main() -> int:
    """Plant, run, tell."""
    arguments = _arguments()
    torch.set_num_threads(1)
    given = (one.partition("=") for one in arguments.guard)
    patterns = {source: tuple(tests.split(",")) for source, _, tests in given} or _table()
    by_part = arguments.parts is not None
    wanted = {name: PARTS[name] for name in arguments.parts or PARTS} if by_part else {}
    only = [one for names in wanted.values() for one in names] if by_part else arguments.only
    guards = guarded(patterns, only)
    groups = grouped(list(guards), wanted) if by_part else {one: [one] for one in guards}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        tree = Tree(folder / "tree")
        every = sorted({test for tests in guards.values() for test in tests})
        reached = reach(tree, list(guards), every, folder)
        for test in reached.failed:
            _tell(f"does not pass unchanged, guards nothing: {test}")
        results = {
            name: [
                _result(tree, reached, source, guards[source], mutant)
                for source, mutant in _sample(tree, sources, name, arguments)
            ]
            for name, sources in groups.items()
        }
    json.dump(summary([one for some in results.values() for one in some]), sys.stdout, indent=2)
    sys.stdout.write("\n")
    if not by_part:
        return 0
    rows = [{**row, "seed": arguments.seed} for row in scores(groups, results)]
    for row in rows:
        _tell(f"{row['part']}: {row['killed']} of {row['total']}, {row['percent']:.1f} %")
    if arguments.docs:
        publish(rows)
    return int(any(row["percent"] < arguments.at_least for row in rows))


def grouped(sources: list[str], parts: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """The sources of each part.

    Raises:
        SystemExit: the table of guards has none of a part.
    """
    found = {
        name: [source for source in sources if source.startswith(beginnings)]
        for name, beginnings in parts.items()
    }
    for name, some in found.items():
        if not some:
            raise SystemExit(f"no source of the part {name} has guards: mend {GUARDS.name}")
    return found


def scores(
    groups: dict[str, list[str]], results: dict[str, list[dict[str, str]]]
) -> list[dict[str, Any]]:
    """Of each part, how many of its mutants were noticed."""
    rows = []
    for name, sources in groups.items():
        total = len(results[name])
        killed = sum(one["verdict"] in ("killed", "timeout") for one in results[name])
        percent = round(100 * killed / total, 1) if total else 0.0
        rows.append(
            {"part": name, "sources": sources, "killed": killed, "survived": total - killed,
             "total": total, "percent": percent}
        )  # fmt: skip
    return rows


def publish(rows: list[dict[str, Any]]) -> None:
    """Write the scores beside the other results, in the place of those of before, and the page."""
    from batteries.reliability_page import write_page

    docs = ROOT / "docs"
    file = docs / "results" / "mutation.json"
    before = json.loads(file.read_text(encoding="utf-8"))["parts"] if file.is_file() else []
    by_name = {row["part"]: row for row in [*before, *rows]}
    parts = [by_name[name] for name in PARTS if name in by_name]
    file.write_text(json.dumps({"parts": parts}, indent=1) + "\n", encoding="utf-8")
    write_page(docs)


def _sample(
    tree: Tree, sources: list[str], name: str, arguments: argparse.Namespace
) -> list[tuple[str, Mutant]]:
    """Some mutants of these sources, in the order of the text."""
    every = [(source, mutant) for source in sources for mutant in mutants(tree.text(source))]
    count = min(arguments.sample, len(every))
    chosen = random.Random(f"{arguments.seed} {name}").sample(range(len(every)), count)
    return [every[index] for index in sorted(chosen)]


def _result(
    tree: Tree, reached: Reach, source: str, guards: tuple[str, ...], mutant: Mutant
) -> dict[str, str]:
    tests = reached.tests(source, mutant, guards)
    limit = max(LEAST_LIMIT, 5 * sum(reached.seconds[test] for test in tests))
    found = verdict(tree, source, mutant, tests, limit) if tests else "unreached"
    place = f"{source}:{mutant.line}"
    first, _, second = mutant.diff.partition("\n+")
    _tell(f"{found:9} {place}  {first[1:].strip()}  =>  {second.strip()}")
    return {"verdict": found, "place": place, "kind": mutant.kind, "diff": mutant.diff}


def summary(results: list[dict[str, str]]) -> dict[str, Any]:
    """Counts, score (the share noticed, of all) and those that nothing noticed."""
    counts = {
        name: sum(one["verdict"] == name for one in results)
        for name in ("killed", "timeout", "survived", "unreached")
    }
    noticed = counts["killed"] + counts["timeout"]
    return {
        "mutants": len(results),
        **counts,
        "score": round(noticed / len(results), 3) if results else None,
        "survivors": [one for one in results if one["verdict"] in ("survived", "unreached")],
    }


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
