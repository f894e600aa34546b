"""Data files of others, opened in forked children: what it takes, and whether anything ran."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from commands import finish

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers import delimited
from forge_plugins.formats.readers.sandbox import MEMORY

MARK = Path("ran")


def opening(file: Path) -> str:
    """What is not as promised when a file is opened; empty for nothing.

    It is opened or refused by name, with at most twice its size (of a text in columns, as often as
    its reader says) and a fixed room of memory, the process that reads it for us included; no code
    of it runs, and nothing is written elsewhere.
    """
    folder = file.parent
    beside = {path.name for path in folder.iterdir()} | {"c", "said", "said.held", "took"}

    def work() -> None:
        os.chdir(folder)
        began = time.process_time()
        try:
            open_table(file, "auto", Reading(target=None), cache_dir=folder / "c")
        except DataError as refused:
            print(f"refused: {refused}")
        own, children = (
            resource.getrusage(who).ru_maxrss
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        (folder / "took").write_text(f"{max(own, children)} {time.process_time() - began}")

    done = finish(work, folder / "said")
    if (folder / MARK).exists():
        return "its code ran"
    if done.wrong or done.status:
        return done.wrong or f"exit status {done.status}: {done.said[-300:]}"
    held = int((folder / "said.held").read_text())
    more = {path.name for path in folder.iterdir()} - beside
    if more:
        return f"written: {sorted(more)}"
    most = int((folder / "took").read_text().split()[0]) * 1024 - held
    in_columns = {".csv", ".tsv"} & set(file.suffixes)
    factor = delimited.MEMORY_FACTOR if in_columns else 2
    room = factor * file.stat().st_size + MEMORY
    return f"{most} bytes of memory for a file of {file.stat().st_size}" if most > room else ""
