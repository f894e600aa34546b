"""I/O errors: one call to the file system fails, once or from there on."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import small_run
import store_scenes as scenes
from battery import Battery, Trial
from file_layer import Layer, Listener, Operation

from forge_kernel.errors import ForgeError

SEEN = scenes.CHANGES | {"open"}
ERRORS = {
    "write": ("ENOSPC", "EDQUOT", "EIO"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "truncate": ("EIO", "EROFS"),
    "rename": ("EACCES", "EROFS", "EIO", "ENOSPC"),
    "open": ("EMFILE", "EACCES", "EROFS", "EIO", "ENOSPC"),
    "mkdir": ("ENOSPC", "EDQUOT", "EACCES", "EROFS"),
    "unlink": ("EACCES", "EROFS", "EIO"),
    "rmdir": ("EACCES", "EROFS", "EIO"),
}
COMMANDS = ("run", "resume", "export of a run")
EXIT_CODES = {0: "done", 2: "a fault of the configuration or the folder", 3: "a run that failed"}


class Failing(Listener):
    """Refuses an operation, and with `lasting` all that change something after it.

    Args:
        number: of the operation, from 0.
        error: the name of its error.
        lasting: the disk stays as it is then.
    """

    def __init__(self, number: int, error: str, *, lasting: bool) -> None:
        self._left, self._lasting = number, lasting
        self._code = getattr(errno, error)

    def before(self, operation: Operation) -> None:
        if operation.kind not in SEEN:
            return
        self._left -= 1
        changes = operation.kind != "open" or operation.writes
        if self._left == -1 or (self._left < 0 and self._lasting and changes):
            raise OSError(self._code, self.words, operation.path)

    @property
    def words(self) -> str:
        """What the system says of the error."""
        return os.strerror(self._code)


def refused(scene: str, stage: scenes.Stage, folder: Path, failing: Failing) -> int:
    """In a fork: 0, or 3 for an error of ours that names the system's; 98 for another."""
    try:
        with Layer(folder, failing):
            scenes.SCENES[scene](stage, folder)
    except ForgeError as error:
        text = str(error)  # as Python writes it, or in the system's words alone
        return 3 if "Error: [Errno" in text or failing.words in text else 97
    except OSError as error:
        print(repr(error))
        return 98
    return 0


def in_scene(stage: scenes.Stage, case: Case, place: Path) -> str:
    """What a failing call in a scene did that it must not."""
    scene, number, error, lasting = case
    folder = scenes.begun(stage, scene, place / "run")
    failing = Failing(number, error, lasting=lasting)
    code = small_run.forked(lambda: refused(scene, stage, folder, failing), place / "output")
    if code not in (0, 3):
        return f"code {code}: {(place / 'output').read_text(encoding='utf-8')[-300:]}"
    first = scene == "first save"
    wrong = scenes.unwanted(stage, folder, least=0 if first else scenes.STEPS)
    if wrong or (first and not (folder / "checkpoints" / f"step-{scenes.STEPS}").exists()):
        return wrong
    return scenes.leads_to_the_end(stage, folder, place / "output")


def command(name: str, stage: scenes.Stage, place: Path) -> list[object]:
    """A command of the command line, and the folder that it finds, made anew."""
    root = place / "root"
    small_run.emptied(root)
    folder = root / "run"
    if name == "run":
        return ["run", place / "small.yaml", "-q", "--output-dir", folder]
    shutil.copytree(stage.base, folder)
    if name == "resume":
        return ["resume", folder, "-q", "--set", f"run.max_steps={scenes.END}"]
    return ["export", folder, "--use", "state_dict"]


def in_command(stage: scenes.Stage, case: Case, place: Path) -> str:
    """What a failing call in a command did that it must not."""
    name, number, error, lasting = case
    arguments = command(name, stage, place)
    root, folder = place / "root", place / "root" / "run"

    def work() -> int:
        with Layer(root, Failing(number, error, lasting=lasting)):
            return small_run.forge(*arguments)

    code = small_run.forked(work, place / "output")
    output = (place / "output").read_text(encoding="utf-8")
    if code not in EXIT_CODES or "Traceback" in output:
        return f"exit code {code}: {output[-300:]}"
    if code and os.strerror(getattr(errno, error)) not in output:
        return f"exit code {code} without the reason: {output[-300:]}"
    least = 0 if name == "run" else scenes.STEPS
    wrong = scenes.unwanted(stage, folder, least=least) if folder.exists() else ""
    if wrong or not list((folder / "checkpoints").glob("step-*")):
        return wrong or ("" if code else "it ended well and saved nothing")
    return scenes.leads_to_the_end(stage, folder, place / "output")


Case = tuple[str, int, str, bool]


def cases(stage: scenes.Stage, place: Path) -> Iterator[tuple[str, str, int, str]]:
    """A scene or `run`, the operation's kind, its number, and its name."""
    for scene in scenes.SCENES:
        steps = scenes.operations(stage, scene, place / "dry", SEEN)
        for number, step in enumerate(steps):
            yield scene, step.kind, number, scenes.named(step)
    for name in COMMANDS:
        counter = scenes.Counter(SEEN)
        arguments = command(name, stage, place)
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output), Layer(place / "root", counter):
            small_run.forge(*arguments)
        for number, step in enumerate(counter.operations):
            yield name, step.kind, number, scenes.named(step)


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """First a call of each name, then any; each with an error of its kind."""
    small_run.loaded()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        stage = scenes.staged(place, every_step=True)
        known = list(cases(stage, place))
        draw.shuffle(known)
        names: set[tuple[str, str]] = set()
        first, later = [], []
        for case in known:
            is_new = (case[0], case[3]) not in names
            names.add((case[0], case[3]))
            (first if is_new else later).append(case)
        for scene, kind, number, said in [*first, *later][:count]:
            error, lasting = draw.choice(ERRORS[kind]), draw.random() < 0.5
            test = in_command if scene in COMMANDS else in_scene
            wrong = test(stage, (scene, number, error, lasting), place)
            how = "and all after it" if lasting else "once"
            yield Trial(f"{scene}: {error} of {said} {how} (call {number})", wrong)


BATTERY = Battery(
    name="io-errors",
    promise="the last good checkpoint intact, nothing partial, one error that says why",
    ci=180,
    deep=600,
    trials=trials,
)
