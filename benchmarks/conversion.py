"""JSON of 128 numbers a record to float32 columns on disk, beside what parsing alone costs.

The measure for an array is a scan for the ends of its records and orjson for each block; for lines,
orjson for each line; both bring the numbers to float32 and check and write nothing. CPU time,
interleaved rounds, medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import orjson

from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.format import Reading
from forge_plugins.formats.readers.json import read_json
from forge_plugins.formats.readers.json_text import JsonText, cut

RECORDS, WIDTH = 20_000, 128


def columns_of(values: list[dict[str, list[float]]]) -> None:
    np.array([value["input"] for value in values], np.float32)
    np.array([value["target"] for value in values])


def scanned(path: Path) -> None:
    with path.open("rb") as stream:
        text = JsonText(path, stream)
        text.expect(b"[", "an array")
        closed = False
        while not closed:
            place, closed = cut(text.held)
            columns_of(orjson.loads(b"[%b]" % text.held[:place]))
            text.drop(place + 1)
            text.more()


def by_line(path: Path) -> None:
    with path.open("rb") as stream:
        while lines := stream.readlines(2**20):
            columns_of([orjson.loads(line) for line in lines])


def converted(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        columns = ColumnFolder(path, Path(folder))
        read_json(path, columns, Reading(), Reading().names)
        columns.close()


def whole(path: Path) -> None:
    columns_of(orjson.loads(path.read_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    numbers = np.random.default_rng(0).random((RECORDS, WIDTH)).round(7).tolist()
    rows = [{"input": row, "target": at % 10} for at, row in enumerate(numbers)]
    with tempfile.TemporaryDirectory() as scratch:
        array, lines = Path(scratch) / "x.json", Path(scratch) / "x.jsonl"
        array.write_text(json.dumps(rows))
        lines.write_text("\n".join(map(json.dumps, rows)))
        subjects: dict[str, Callable[[], None]] = {
            "scan": lambda: scanned(array),
            "array": lambda: converted(array),
            "whole file, orjson": lambda: whole(array),
            "orjson by line": lambda: by_line(lines),
            "lines": lambda: converted(lines),
        }
        seconds: dict[str, list[float]] = {name: [] for name in subjects}
        for number in range(options.rounds + 1):
            for name, subject in subjects.items():
                begin = time.process_time()
                subject()
                if number:
                    seconds[name].append(time.process_time() - begin)
        size = array.stat().st_size
    ratios = {
        "array": ("scan", "array"),
        "array beside the whole file at once": ("whole file, orjson", "array"),
        "lines": ("orjson by line", "lines"),
    }
    results = {
        "rounds": options.rounds,
        "megabytes": round(size / 1e6, 1),
        "share_of_parsing": {
            name: statistics.median(
                a / b for a, b in zip(seconds[limit], seconds[own], strict=True)
            )
            for name, (limit, own) in ratios.items()
        },
        "megabytes_per_second": {
            name: size / 1e6 / statistics.median(own) for name, own in seconds.items()
        },
    }
    print(json.dumps(results, indent=1))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
