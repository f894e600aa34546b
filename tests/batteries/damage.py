"""Damage: one thing of a run folder is altered, and found before anything of it is used."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import small_run
from battery import Battery, Trial

from forge_kernel.errors import CheckpointError
from forge_kernel.run_folder.status import read_status
from forge_kernel.runner import resume, run
from forge_kernel.storage.checkpoint_store import CheckpointReader

FILES = ("manifest.json", "model.safetensors", "state.safetensors", "state.json", "config.yaml")
NEWEST, OLDER = small_run.STEPS, small_run.STEPS - 1


@dataclass
class Folders:
    """Two runs of the same pipeline with different seeds, and what is known of the first."""

    run: Path
    other: Path

    def __post_init__(self) -> None:
        self.reader = CheckpointReader(self.run / "checkpoints")
        self.newest, self.older = self.reader.path(NEWEST), self.reader.path(OLDER)
        self.weights = self.reader.load(self.older).model
        self.status = dict(read_status(self.run).data)


def made(place: Path) -> Folders:
    """Both runs."""
    for name, seed in (("run", 3), ("other", 4)):
        (place / name).mkdir()
        pipeline = small_run.write_pipeline(place)
        pipeline.write_text(pipeline.read_text().replace("seed: 3", f"seed: {seed}"))
        run(pipeline, output_dir=place / name, quiet=True)
    return Folders(place / "run", place / "other")


def flip(content: bytes, draw: random.Random) -> bytes:
    """One bit."""
    altered = bytearray(content)
    altered[draw.randrange(len(altered))] ^= 1 << draw.randrange(8)
    return bytes(altered)


def truncation(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def zeros(content: bytes, draw: random.Random) -> bytes:
    """A sector or a page that was never written."""
    size = draw.choice((64, 512, 4096))
    start = draw.randrange(len(content)) // size * size
    middle = bytes(len(content[start : start + size]))
    return content[:start] + middle + content[start + size :]


def more(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(draw.randrange(1, 64))


def doubled(content: bytes, draw: random.Random) -> bytes:
    """A block stands twice, the second time over what belongs there."""
    size = min(draw.choice((16, 512)), len(content) // 3)
    start = draw.randrange(len(content) - 2 * size)
    part = content[start : start + size]
    return content[: start + size] + part + content[start + 2 * size :]


ALTERATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip, "truncation": truncation, "zeros": zeros, "more": more, "doubled": doubled,
}  # fmt: skip


def found(folders: Folders) -> str:
    """What was not found of damage to the newest checkpoint; "" when all was."""
    try:
        folders.reader.load(folders.newest)
    except CheckpointError as error:
        if folders.newest.name not in str(error):
            return f"the folder is not named: {error}"
    except Exception as error:  # noqa: BLE001  what a user would see as a traceback
        return f"no CheckpointError but {error!r}"
    else:
        return "loaded as if whole"
    snapshot, folder, problems = folders.reader.newest()
    if folder != folders.older or not small_run.same_weights(snapshot.model, folders.weights):
        return f"{folder} was taken instead"
    return "" if len(problems) == 1 else f"told {len(problems)} times"


def altered(folders: Folders, draw: random.Random) -> Trial:
    """A file of the newest checkpoint with other bytes."""
    file = folders.newest / draw.choice(FILES)
    kind = draw.choice(("flip", "flip", *ALTERATIONS))
    content = file.read_bytes()
    for _ in range(100):
        changed = ALTERATIONS[kind](content, draw)
        if changed != content:
            break
    file.write_bytes(changed)
    trial = Trial(f"{kind} in {file.name}", found(folders))
    file.write_bytes(content)
    return trial


def exchanged(folders: Folders, draw: random.Random) -> Trial:
    """A file of another step, or of another run, in the place of one of the newest."""
    name = draw.choice(FILES)
    other = folders.other / "checkpoints"
    sources = [folders.older, other / f"step-{NEWEST}", other / f"step-{OLDER}"]
    source = draw.choice(sources) / draw.choice([name, *FILES])
    file = folders.newest / name
    content = file.read_bytes()
    same = source.read_bytes() == content  # the configuration of two steps
    file.write_bytes(source.read_bytes())
    wrong = "" if same else found(folders)
    file.write_bytes(content)
    return Trial(
        f"{source.parent.parent.parent.name}/{source.parent.name}/{source.name} as {name}", wrong
    )


def missing(folders: Folders, draw: random.Random) -> Trial:
    file = folders.newest / draw.choice(FILES)
    content = file.read_bytes()
    file.unlink()
    if draw.random() < 0.5:
        file.mkdir()
    trial = Trial(f"{file.name} is missing", found(folders))
    if file.is_dir():
        file.rmdir()
    file.write_bytes(content)
    return trial


def renamed(folders: Folders, draw: random.Random) -> Trial:
    """A whole checkpoint of an older step under the newest one's name."""
    aside = folders.newest.with_name("aside")
    folders.newest.rename(aside)
    run_folder = draw.choice((folders.run, folders.other))
    shutil.copytree(run_folder / "checkpoints" / f"step-{OLDER}", folders.newest)
    trial = Trial(f"step {OLDER} of {run_folder.name} as step {NEWEST}", found(folders))
    shutil.rmtree(folders.newest)
    aside.rename(folders.newest)
    return trial


def status(folders: Folders, draw: random.Random) -> Trial:
    """`status.json`: told as damaged, or it says what it said."""
    file = folders.run / "status.json"
    content = file.read_bytes()
    kind = draw.choice(list(ALTERATIONS))
    file.write_bytes(ALTERATIONS[kind](content, draw))
    wrong = ""
    try:
        seen = read_status(folders.run)
    except Exception as error:  # noqa: BLE001  as above
        wrong = f"{error!r}"
    else:
        said = {name: seen.data.get(name) for name in folders.status}
        if seen.condition != "unknown" and said != folders.status:
            wrong = f"it says {seen.said} as if whole"
    file.write_bytes(content)
    return Trial(f"{kind} in status.json", wrong)


EDITS = {
    "seed: 3": "seed: 5", "lr: 0.01": "lr: 0.02", "dropout: 0.1": "dropout: 0.2",
    "validate_every: 2": "validate_every: 3", "log_every: 1": "log_every: 2",
    "keep_checkpoints: 2": "keep_checkpoints: 3", "batch_size: 8": "batch_size: 4",
    "weight_decay: 0.01": "weight_decay: 0.1", "non_finite: stop": "non_finite: skip",
    "amsgrad: false": "amsgrad: true", "label_smoothing: 0.0": "label_smoothing: 0.1",
    "- 0.999": "- 0.99", "save_every: 1": "save_every: 2", "activation: relu": "activation: gelu",
    "modulus: 7": "modulus: 11", "use: cross_entropy": "use: nothing", "operation: add": "operation: sub",
}  # fmt: skip


def edited(folders: Folders, draw: random.Random) -> Trial:
    """`config.yaml` of the run changed by hand: told with both values, or refused."""
    with tempfile.TemporaryDirectory(dir=folders.run.parent) as place:
        folder = Path(place) / "run"
        shutil.copytree(folders.run, folder)
        config = folder / "config.yaml"
        text = config.read_text(encoding="utf-8")
        before = draw.choice([edit for edit in EDITS if edit in text])
        config.write_text(text.replace(before, EDITS[before], 1), encoding="utf-8")
        name = f"config.yaml edited: {EDITS[before]}"

        def work() -> int:
            try:
                resume(folder, quiet=True)
            except Exception as error:  # noqa: BLE001  refused: is it by us?
                return 0 if type(error).__module__.startswith("forge_kernel") else 98
            log = (folder / "forge.log").read_text(encoding="utf-8")
            old, new = (part.split(" ")[-1] for part in (before, EDITS[before]))
            told = "changed since the checkpoint of step" in log
            return 0 if told and old in log and f"-> {new}" in log.replace('\\"', "") else 97

        code = small_run.forked(work)
    reasons = {0: "", 97: "not told", 98: "an error that is not ours"}
    return Trial(name, reasons.get(code, f"ended with {code}"))


KINDS = {altered: 60, exchanged: 12, missing: 8, renamed: 2, status: 14, edited: 4}


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Each kind as often as its share of a hundred; all are undone."""
    small_run.loaded()
    with tempfile.TemporaryDirectory() as place:
        folders = made(Path(place))
        for _ in range(count):
            (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
            yield kind(folders, draw)
        snapshot, folder, problems = folders.reader.newest()
        whole = folder == folders.newest and not problems and snapshot.step == NEWEST
        yield Trial("all undone", "" if whole else f"{folder}: {problems}")


BATTERY = Battery(
    name="damage",
    promise="found before use, told, and the older checkpoint taken",
    ci=1_250,
    deep=20_000,
    trials=trials,
)
