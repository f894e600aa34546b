"""CPU time of commands that train nothing, as a share of `import torch`, in one interleaved run."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "forge --help": ["-m", "forge_kernel", "--help"],
    "forge plugins": ["-m", "forge_kernel", "plugins"],
    "forge check bitnet_grokfast": ["-m", "forge_kernel", "check", "bitnet_grokfast"],
    "forge plan bitnet_grokfast": ["-m", "forge_kernel", "plan", "bitnet_grokfast"],
}
GOALS = {"forge --help": 12, "forge plugins": 8, "forge check bitnet_grokfast": 6, "forge plan bitnet_grokfast": 6}  # fmt: skip


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of a fresh Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # As users have it: each side from its compiled files, which this setting would not write.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for arguments in [["-c", "import torch"], *COMMANDS.values()]:
        cpu_seconds(arguments)  # fill the disk's cache
    for _ in range(options.rounds):
        torch = cpu_seconds(["-c", "import torch"])
        for name, arguments in COMMANDS.items():
            ratios[name].append(torch / cpu_seconds(arguments))
    results = {name: statistics.median(values) for name, values in ratios.items()}
    print("import torch takes so many times the CPU time of (median; goal):\n")
    for name, value in results.items():
        print(f"  {name:<30} {value:5.1f} x   (at least {GOALS[name]})")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
