"""The command line, imported once: children are forked with it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import torch

from forge_kernel.cli import main as forge_main

__all__ = ["forge_main", "warm"]


def warm() -> None:
    """Let this process import what a run and its reader import, so that children need not."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    kept = sys.argv
    commands = (
        ["check", "smoke"], ["plan", "smoke"],
        ["run", "smoke", "-q", "--output-dir", "r", "--set", "run.max_steps=2"],
        ["status", "r"], ["report", "r"], ["export", "r", "--use", "state_dict"],
        ["resume", "r", "-q", "--set", "run.max_steps=3"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(Path(folder)):
        for command in commands:
            sys.argv = ["forge", *command]
            quiet = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
            with (
                contextlib.suppress(SystemExit),
                contextlib.redirect_stdout(quiet[0]),
                contextlib.redirect_stderr(quiet[1]),
            ):
                forge_main()
    sys.argv = kept
