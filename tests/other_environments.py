"""The project where not all is as it is here: another Python without torch, and the lowest versions.

    python tests/other_environments.py without-torch 3.13
    python tests/other_environments.py lowest

Both make an environment below `.venv`, once for each `pyproject.toml`. torch is large and is never
installed: another Python has none, so it runs what needs none (FILES); the lowest versions of all
else stand before the torch that is here. A file that runs no test is a fault, and so is a skip: what
is to be shown cannot shrink to nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from scratch_venv import environment

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv" / "others"
NAME = re.compile(r"^[A-Za-z0-9_.-]+")

FILES = (
    "tests/kernel/test_broken_pipelines.py", "tests/kernel/test_catalog.py",
    "tests/kernel/test_foreign_faults.py", "tests/kernel/test_layers.py",
    "tests/kernel/test_order.py", "tests/kernel/test_planner.py",
    "tests/kernel/test_published_schema.py", "tests/kernel/test_renamed.py",
    "tests/kernel/test_schema.py", "tests/kernel/test_spelling.py",
    "tests/kernel/test_yaml_file.py", "tests/contracts/test_house.py",
    "tests/contracts/test_results.py", "tests/contracts/test_spec.py",
    "tests/plugins/commands/test_data.py", "tests/plugins/test_pot10.py",
    "tests/plugins/test_report.py", "tests/plugins/test_live_page.py",
    "tests/plugins/reports/test_seeds.py", "tests/plugins/formats/test_block_cache.py",
    "tests/plugins/formats/test_cache.py", "tests/plugins/formats/test_json_blocks.py",
    "tests/plugins/formats/test_json_values.py", "tests/plugins/formats/test_odd_files.py",
    "tests/plugins/formats/test_profile.py", "tests/plugins/formats/test_sandbox.py",
)  # fmt: skip
"""Tests that import no torch: configuration, planning, the command line, readers, reports."""

COMMANDS = (
    ("check", "bitnet_grokfast"), ("plan", "bitnet_grokfast"), ("plugins",),
    ("plugins", "grokfast"), ("schema", "--check"), ("explain", "smoke", "run.seed"),
)  # fmt: skip

LOWEST = (
    "tests/kernel", "tests/contracts/test_house.py", "tests/contracts/test_laws.py",
    "tests/plugins/test_contracts.py", "tests/plugins/formats", "tests/plugins/data",
    "tests/plugins/observers", "tests/plugins/validators", "tests/plugins/optimizers",
    "tests/plugins/test_loggers.py",
)  # fmt: skip
"""What touches the packages whose floors are stated."""
EXTRAS = ("parquet", "metrics", "sinks", "tokenizers")


def project() -> dict[str, object]:
    """The table of `pyproject.toml`."""
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def requirements(*extras: str) -> list[str]:
    """What the package needs, without torch."""
    table = project()
    optional: dict[str, list[str]] = table["optional-dependencies"]  # type: ignore[assignment]
    needed: list[str] = [*table["dependencies"]]  # type: ignore[misc]
    for extra in extras:
        needed += optional[extra]
    return [line for line in needed if NAME.match(line)[0] != "torch"]  # type: ignore[index]


def floors(lines: Sequence[str]) -> Iterator[str]:
    """`name==floor` of each requirement, which must state one."""
    for line in lines:
        (floor,) = re.findall(r">=([0-9.]+)", line)
        yield f"{NAME.match(line)[0]}=={floor}"  # type: ignore[index]


def call(*command: str | Path) -> None:
    """Run a command that is to end well."""
    told = [str(part) for part in command]
    print("+", *told, flush=True)
    done = subprocess.run(told, cwd=ROOT, env=environment(), check=False)
    if done.returncode:
        sys.exit(f"{told[0]} ended with {done.returncode}")


def made(python: str, name: str, packages: Sequence[str]) -> Path:
    """An environment with some packages and this checkout; its interpreter."""
    folder = HOME / name
    mark = folder / ".made"
    key = hashlib.sha256("\n".join([python, *packages]).encode()).hexdigest()
    interpreter = folder / "bin" / "python"
    if not mark.exists() or mark.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        call(python, "-m", "venv", folder)
        pip = (interpreter, "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
        call(*pip, "-c", "constraints.txt", *packages)
        call(*pip, "--no-deps", "--no-build-isolation", "-e", ".")
        mark.write_text(key)
    return interpreter


def run_tests(python: Path, files: Sequence[str], *options: str) -> None:
    """Run test files; each must pass at least one test, and without options none may be skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        call(
            python, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not deep",
            "-o", "junit_family=xunit1", f"--junitxml={report}", *options, *files,
        )  # fmt: skip
        cases = list(ElementTree.parse(report).iter("testcase"))
    passed = Counter(case.get("classname") for case in cases if case.find("skipped") is None)
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    modules = {place: place.removesuffix(".py").replace("/", ".") for place in files}
    empty = [
        place for place, module in modules.items()
        if not any(f"{name}.".startswith(f"{module}.") for name in passed)
    ]  # fmt: skip
    if empty or (skipped and not options):
        sys.exit(f"no test of {empty} was run; skipped: {skipped}")
    print(f"{sum(passed.values())} tests passed, {len(skipped)} skipped")


def without_torch(version: str) -> None:
    """The half that needs no torch, on another Python."""
    python = f"python{version}"
    check = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        told = subprocess.run(
            [python, "-c", check], capture_output=True, text=True, check=False
        ).stdout.strip()
    except OSError:
        told = ""
    if told != version:
        print(f"{python} is not on the PATH (or does not start): skipped")
        return
    tools = ("pytest>=8.2", "hypothesis>=6.100", "setuptools>=77")
    inner = made(python, f"python{version}", [*requirements(), *tools])
    call(inner, "-c", "import importlib.util as u; assert u.find_spec('torch') is None")
    for command in COMMANDS:
        call(inner.with_name("forge"), *command)
    run_tests(inner, FILES)
    call(sys.executable, "-m", "mypy", "--python-version", version)


def lowest() -> None:
    """The lowest stated versions before the torch and the tools that are here."""
    packages = [*floors(requirements(*EXTRAS))]
    python = made(sys.executable, "lowest", [*packages, "setuptools>=77"])
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    below = [entry for entry in sys.path if Path(entry).name == "site-packages"]
    (site / "zz_below.pth").write_text("".join(f"{entry}\n" for entry in below))
    check = "import sys; from importlib.metadata import version as v; " + "; ".join(
        f"assert (v({name!r}) + '.').startswith({floor!r} + '.'), {name!r}"
        for name, _, floor in (line.partition("==") for line in packages)
    )
    call(python, "-c", check)
    run_tests(python, LOWEST, "-n", "2")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["without-torch", "lowest"])
    parser.add_argument("version", nargs="?", default="3.13")
    chosen = parser.parse_args()
    if chosen.which == "lowest":
        lowest()
    else:
        without_torch(chosen.version)
