"""CPU time and memory of `forge report` for metrics files of 100 MB, with few and many metrics.

Each page is drawn in a process of its own; its CPU time and peak memory are the system's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path


def write(file: Path, metrics: int, size: int) -> int:
    """A metrics file of about so many bytes; its lines."""
    lines = written = 0
    with file.open("w", encoding="utf-8") as stream:
        while written < size:
            lines += 1
            values = {f"metric_{n}": round(math.sin(lines / 999 + n), 5) for n in range(metrics)}
            line = {"step": lines, "time": 1.7e9 + lines, "kind": "log", "epoch": 0, **values}
            written += stream.write(json.dumps(line) + "\n")
            if lines % 1000 == 0:
                line = {"step": lines, "time": 1.7e9, "kind": "validation", "epoch": 0, "loss": 0.5}
                written += stream.write(json.dumps(line) + "\n")
    return lines


def drawn(folder: Path) -> tuple[float, float]:
    """CPU seconds and megabytes of `forge report`."""
    pid = os.fork()
    if not pid:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        command = [sys.executable, "-m", "forge_kernel", "report", str(folder)]
        os.execv(sys.executable, command)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"forge report ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    arguments = parser.parse_args()
    for metrics in (1, 4, 16, 100):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            (folder / "config.yaml").write_text("forge: 1\n", encoding="utf-8")
            lines = write(folder / "metrics.jsonl", metrics, arguments.megabytes * 10**6)
            seconds, megabytes = drawn(folder)
            page = (folder / "report.html").stat().st_size / 2**20
        print(
            f"{metrics:4} metrics, {lines:9,} lines: {seconds:5.2f} CPU s, {megabytes:5.0f} MB, "
            f"page {page:.1f} MB"
        )


if __name__ == "__main__":
    main()
