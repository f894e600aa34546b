"""Names and paths that lead out of where they belong: nothing is written there, nothing hangs."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from battery import Battery, Trial
from commands import changed, command, finish, tree
from forged import warm
from plugin_run import scratch

ESCAPES: Final = (
    "../outside/x", "../../outside", "{root}/outside/x", "~/x", "~root/x", "a/../../outside/x",
    "..", ".", "/", "/dev/null", "/dev/zero", "/dev/stdin", "fifo", "link", "link/x", "link-to-itself",
    "-rf", "C:\\x", "\\\\host\\x", "con", "a\tb", "a\nb", "é" * 200, "x" * 300, "$HOME/x", "%00",
    "file:///etc/passwd", "http://127.0.0.1:9/x", "/proc/self/mem", "/proc/self/fd/0", "..\u2215x",
    "\u202e/x", "shipped:../../outside", "/etc/passwd",
)  # fmt: skip
PLACES: Final[dict[str, list[str]]] = {
    "a run's name": ["run", "smoke", "-q", "--set", "run.name=%s"],
    "a data file": ["run", "smoke", "-q", "--set", "data={use: file, with: {path: %j, target: class}}"],
    "a text": ["run", "smoke", "-q", "--set", "data={use: text, with: {path: %j}}"],
    "weights": [
        "run", "smoke", "-q", "--set",
        "model={use: python_class, with: {factory: 'torch.nn:Identity', state: %j}}",
    ],
    "a run to start from": [
        "run", "smoke", "-q", "--set", "wrappers=[{use: start_from, with: {path: %j}}]",
    ],
    "a teacher": ["run", "smoke", "-q", "--set", "loss={use: distillation, with: {teacher: %j}}"],
    "a store": [
        "run", "smoke", "-q", "--set", "observers=[{use: csv, with: {file: %j}}]",
    ],
    "a tag": ["run", "smoke", "-q", "--set", "callbacks=[{use: best_checkpoint, with: {tag: %j}}]"],
    "a layer": ["check", "layered.yaml"],
    "a pipeline": ["check", "%s"],
    "a run folder to read": ["status", "%s"],
    "a run folder to resume": ["resume", "%s"],
    "a run folder to export": ["export", "%s", "--use", "state_dict"],
    "an exporter": ["export", "run", "--use", "%s"],
    "a run folder to report": ["report", "%s"],
    "a plugin": ["plugins", "%s"],
}  # fmt: skip
HANGS_BY_RIGHT: Final = {"fifo", "/dev/stdin", "/proc/self/fd/0"}
"""As a pipeline: whoever names a pipe waits for its writer."""


def furnish(root: Path) -> None:
    work, outside = root / "work", root / "outside"
    for folder in (work, outside, root / "home"):
        folder.mkdir(parents=True)
    (outside / "kept").write_text("kept")
    (work / "link").symlink_to(outside)
    (work / "link-to-itself").symlink_to(work / "link-to-itself")
    os.mkfifo(work / "fifo")


def filled(arguments: list[str], escape: str) -> list[str]:
    return [part.replace("%j", json.dumps(escape)).replace("%s", escape) for part in arguments]


def judged(root: Path, place: str, escape: str) -> str:
    work = root / "work"
    escape = escape.replace("{root}", str(root))
    (work / "layered.yaml").write_text(f"extends: {json.dumps(escape)}\nrun: {{max_steps: 1}}\n")
    arguments = filled(PLACES[place], escape)
    if arguments[0] == "run":
        arguments += ["--set", "run.max_steps=1"]
    variables = {
        "HOME": str(root / "home"), "XDG_CACHE_HOME": str(root / "cache"),
        "XDG_CONFIG_HOME": str(root / "home"),
    }  # fmt: skip
    leave = [work / "runs", root / "cache", root / "said", root / "said.held"]
    before = tree(root, leave)
    done = finish(command(*arguments, folder=work, variables=variables), root / "said", limit=20.0)
    written = changed(before, tree(root, leave))
    if written:
        return f"written: {written}"
    return done.wrong


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Each place with each escape, in a drawn order."""
    warm()
    cases = [
        (place, escape)
        for place in PLACES
        for escape in ESCAPES
        if place != "a pipeline" or escape not in HANGS_BY_RIGHT
    ]
    draw.shuffle(cases)
    for place, escape in itertools.islice(cases, count):
        with scratch() as root:
            furnish(root)
            yield Trial(f"{place}: {escape[:40]!r}", judged(root, place, escape))


BATTERY = Battery(
    "paths",
    "nothing is written outside, no traceback, no hang",
    ci=200,
    deep=600,
    trials=trials,
)
