"""`make sabotage`: guards taken away one at a time, and whether their batteries turn red.

    tests/sabotage.py [NAME ...] [--workers N]

Each fault of `FAULTS` is planted in a copy of the tree and its battery run there. A line for each;
exit 1 if a battery did not notice, or if a guard is no longer where the table says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sabotage_faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 1800  # however busy the machine is: the count decides
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "docs", "golden"
)


def tree(folder: Path, fault: Fault | None) -> Path:
    """A copy of the tree, with the fault.

    Raises:
        LookupError: the text that it replaces is not there once.
    """
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT, symlinks=True)
    if fault is not None:
        file = folder / fault.file
        text = file.read_text(encoding="utf-8")
        if text.count(fault.guard) != 1:
            times = text.count(fault.guard)
            raise LookupError(f"{fault.file} has the guard {times} times: mend sabotage_faults.py")
        file.write_text(text.replace(fault.guard, fault.instead), encoding="utf-8")
    return folder


def run(fault: Fault) -> tuple[bool, str]:
    """Whether the battery noticed, and a line that says so."""
    with tempfile.TemporaryDirectory() as place:
        try:
            copy = tree(Path(place) / "tree", fault)
        except LookupError as error:
            return False, f"{fault.name}: NOT PLANTED: {error}"
        out = Path(place) / "out"
        command = [sys.executable, str(copy / "tests" / "batteries"), fault.battery]
        command += ["--count", str(fault.count), "--out", str(out), "--seconds", str(SECONDS)]
        path = os.pathsep.join(str(copy / part) for part in ("", "plugins"))
        done = subprocess.run(
            command, cwd=copy, env={**os.environ, "PYTHONPATH": path},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        try:
            outcome = json.loads((out / f"{fault.battery}.json").read_text(encoding="utf-8"))
        except OSError:
            return False, f"{fault.name}: THE BATTERY BROKE: {done.stderr.strip()[-400:]}"
    wrong = outcome["wrong"]
    if not wrong:
        return False, f"{fault.name}: NOT NOTICED by {fault.battery} ({outcome['tried']} tried)"
    shown = f"{wrong[0]['what']}: {wrong[0]['wrong']}"[:160]
    return True, f"{fault.name}: {fault.battery} found {len(wrong)} of {outcome['tried']} ({shown})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="sabotage", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="some of the faults")
    parser.add_argument("--workers", type=int, default=int(os.environ.get("WORKERS", "2")))
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.names or fault.name in arguments.names]
    if not chosen:
        parser.error(f"no such fault; there are: {', '.join(fault.name for fault in FAULTS)}")
    noticed = 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        for good, line in pool.map(run, chosen):
            noticed += good
            print(line, flush=True)
    print(f"{noticed} of {len(chosen)} planted faults noticed")
    return 0 if noticed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
