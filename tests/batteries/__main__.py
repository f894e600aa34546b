"""The batteries: `python tests/batteries [NAME ...] [--seed N] [--count N] [--seconds S]`.

Each module beside this one that has a `BATTERY` is a battery. Without a name all run, some at a time
in processes of their own. One line each and a JSON file in `.batteries/`; exit 1 if a trial was wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(1, str(HERE.parent))

from battery import Battery, run_battery  # noqa: E402  the folder is on the path from here on

SECONDS = {"ci": 120.0, "deep": 3600.0}


def batteries() -> dict[str, str]:
    """Name of each battery and its module. The names are the modules': nothing is imported."""
    found = sorted(module.name for module in pkgutil.iter_modules([str(HERE)]))
    has_one = [
        name
        for name in found
        if "\nBATTERY = " in (HERE / f"{name}.py").read_text(encoding="utf-8")
    ]
    return {name.replace("_", "-"): name for name in has_one}


def one(name: str, arguments: argparse.Namespace) -> int:
    module = importlib.import_module(batteries()[name])
    battery: Battery = module.BATTERY
    count = arguments.count or (battery.deep if arguments.size == "deep" else battery.ci)
    seconds = arguments.seconds or SECONDS[arguments.size]
    outcome = run_battery(battery, seed=arguments.seed, count=count, seconds=seconds)
    outcome.write(arguments.out)
    print(outcome.line)
    for wrong in outcome.wrong[:10]:
        print(f"  {wrong['what']}: {wrong['wrong']}")
    return 1 if outcome.wrong or not outcome.tried else 0


def all_of_them(names: list[str], arguments: argparse.Namespace) -> int:
    """Each in a process of its own, as many at once as there are workers."""

    def start(name: str) -> int:
        command = [sys.executable, str(HERE), name, "--size", arguments.size]
        command += ["--seed", str(arguments.seed), "--out", str(arguments.out)]
        for option in ("count", "seconds"):
            if getattr(arguments, option):
                command += [f"--{option}", str(getattr(arguments, option))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stdout + (done.stderr if done.returncode else ""), end="", flush=True)
        return done.returncode

    with ThreadPoolExecutor(arguments.workers) as pool:
        return max(pool.map(start, names))


def write_docs(folder: Path) -> int:
    """The page and, beside the other results, the data that it was written from."""
    from reliability_page import read, write_page

    outcomes = read(folder)
    if not outcomes:
        print(f"there is no outcome in {folder}: run the batteries first")
        return 2
    about = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "when": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }
    docs = HERE.parent.parent / "docs"
    data = {"about": about, "outcomes": outcomes}
    (docs / "results" / "reliability.json").write_text(json.dumps(data, indent=1) + "\n")
    write_page(docs)
    return 0


def processor() -> str:
    """The processor's name where the system tells it."""
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        for line in cpus.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    known = batteries()
    parser = argparse.ArgumentParser(prog="batteries", description=__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[*known, []], metavar="NAME", help=", ".join(known)
    )
    parser.add_argument("--size", choices=["ci", "deep"], default="ci")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, help="trials (else as the size has it)")
    parser.add_argument("--seconds", type=float, help="time limit of each battery")
    parser.add_argument("--workers", type=int, default=int(os.environ.get("WORKERS", "2")))
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / ".batteries")
    parser.add_argument("--docs", action="store_true", help="write docs/reliability.md from --out")
    arguments = parser.parse_args()
    if arguments.docs:
        return write_docs(arguments.out)
    names = arguments.names or list(known)
    if len(names) == 1:
        return one(names[0], arguments)
    return all_of_them(names, arguments)


if __name__ == "__main__":
    sys.exit(main())
