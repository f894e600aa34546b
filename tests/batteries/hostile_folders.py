"""Run folders that somebody hostile has prepared: read, resumed, exported and reported."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from battery import Battery, Trial
from commands import changed, forge, tree
from forged import warm
from plugin_run import scratch

DEEP: Final = "[" * 100_000
TAG: Final = "<script>document.title='ran'</script><img src=x onerror=ran()>\x1b]0;ran\x07"


class Bad:
    """A pickle of it leaves the mark."""

    def __reduce__(self) -> Any:
        return (os.system, ('touch "$MARK"',))


def newest(run: Path) -> Path:
    return max(path for path in (run / "checkpoints").iterdir() if path.is_dir())


def signed(folder: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Write the manifest anew, in the form that has no seal, so that it fits what lies there."""
    known = json.loads((folder / "manifest.json").read_text())
    manifest = {name: known[name] for name in ("step", "about", "aliases", "files")}
    manifest |= {"format": min(known["format"], 2), "finite": True}
    for name in manifest["files"]:
        raw = (folder / name).read_bytes() if (folder / name).is_file() else b""
        digest = hashlib.sha256(raw).hexdigest()
        manifest["files"][name] = {"bytes": len(raw), "sha256": digest}
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def configured(old: str, new: str) -> Callable[[Path, Path], None]:
    def prepare(run: Path, outside: Path) -> None:
        del outside
        text = (run / "config.yaml").read_text()
        assert old in text
        (run / "config.yaml").write_text(text.replace(old, new))

    return prepare


def model_section(run: Path) -> str:
    text = (run / "config.yaml").read_text()
    begin = text.index("\nmodel:")
    return text[begin : text.index("\nquantizer:")]


def code_in_the_configuration(run: Path, outside: Path) -> None:
    inner = "{factory: 'os:system', arguments: {command: 'touch $MARK'}}"
    new = f"\nmodel: {{use: python_class, with: {inner}}}"
    configured(model_section(run), new)(run, outside)


def grant_in_the_configuration(run: Path, outside: Path) -> None:
    code_in_the_configuration(run, outside)
    with (run / "config.yaml").open("a") as stream:
        stream.write("\nx-allow-code: true\nx-allow_code: true\n")


def pickle_as_weights(run: Path, outside: Path) -> None:
    folder = newest(run)
    for file in folder.glob("*.safetensors"):
        torch.save(Bad(), file)
    signed(folder)


def pickles_beside(run: Path, outside: Path) -> None:
    for name in ("model.pt", "model.bin", "x.metadata", "state.pkl"):
        torch.save(Bad(), newest(run) / name)


def names_that_lead_out(run: Path, outside: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        first = next(iter(manifest["files"]))
        entry = manifest["files"].pop(first)
        manifest["files"]["../../../outside/kept"] = entry
        manifest["files"][str(outside / "kept")] = entry

    signed(newest(run), change)


def links_for_files(run: Path, outside: Path) -> None:
    for file in list(newest(run).iterdir()):
        if file.name != "manifest.json":
            shutil.copy(file, outside / file.name)
            file.unlink()
            file.symlink_to(outside / file.name)


def pins_that_lead_out(run: Path, outside: Path) -> None:
    for name in ("best", "latest", "initial"):
        (run / "checkpoints" / f"{name}.pin").write_text("../../outside\n")
    (run / "checkpoints" / "latest").write_text("../../outside\n")


def linked(name: str) -> Callable[[Path, Path], None]:
    """A file or folder of the run is a link to one outside."""

    def prepare(run: Path, outside: Path) -> None:
        target = outside / Path(name).name
        if (run / name).is_dir():
            shutil.copytree(run / name, target)
            shutil.rmtree(run / name)
        elif (run / name).is_file():
            shutil.copy(run / name, target)
            (run / name).unlink()
        else:
            target.write_text("")
        (run / name).symlink_to(target)

    return prepare


def deep_texts(run: Path, outside: Path) -> None:
    for name in ("status.json", "result.json", "environment.json"):
        (run / name).write_text(DEEP)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(f"{DEEP}\n")


def deep_state(run: Path, outside: Path) -> None:
    folder = newest(run)
    for file in folder.glob("*.json"):
        if file.name != "manifest.json":
            file.write_text(DEEP)
    signed(folder)


def names_with_markup(run: Path, outside: Path) -> None:
    line = {"step": 2, "time": 1.0, "kind": "log", "epoch": 0, TAG: 1.0, "loss": 0.5}
    event = {**line, "kind": "event", "event": TAG, "message": TAG, "facts": {TAG: TAG}}
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(f"{json.dumps(line)}\n{json.dumps(event)}\n")
    status = json.loads((run / "status.json").read_text())
    status["events"] = [{"step": 1, "time": 1.0, "event": TAG, "message": TAG}]
    (run / "status.json").write_text(json.dumps(status))
    result = json.loads((run / "result.json").read_text())
    result.update(stop_reason=TAG, exports={TAG: "../../outside"})
    (run / "result.json").write_text(json.dumps(result))


def other_types(run: Path, outside: Path) -> None:
    (run / "status.json").write_text(
        json.dumps({"state": 3, "events": 5, "metrics": [], "pid": []})
    )
    (run / "environment.json").write_text(json.dumps({"metrics": {"a": 1}, "plugins": 3}))
    (run / "result.json").write_text(json.dumps({"final": 3, "best": [], "exports": None}))


PREPARED: Final[dict[str, Callable[[Path, Path], None]]] = {
    "code in the configuration": code_in_the_configuration,
    "a grant in the configuration": grant_in_the_configuration,
    "a pickle as weights": pickle_as_weights,
    "pickles beside": pickles_beside,
    "names that lead out": names_that_lead_out,
    "links for files": links_for_files,
    "pins that lead out": pins_that_lead_out,
    "deep texts": deep_texts,
    "deep state": deep_state,
    "names with markup": names_with_markup,
    "other types": other_types,
    **{
        f"a link for {name}": linked(name)
        for name in (
            "checkpoints", "exports", "forge.log", "metrics.jsonl", "metrics.csv", "config.yaml",
            "status.json", "result.json", "report.html", "environment.json", "exports/state_dict",
            ".lock", "owner.lock",
        )
    },
}  # fmt: skip
START_FROM: Final = "wrappers=[{use: start_from, with: {path: %s}}]"


def commands(root: Path) -> dict[str, list[str]]:
    run = str(root / "r")
    return {
        "status": ["status", run],
        "report": ["report", run],
        "resume": ["resume", run, "-q", "--set", "run.max_steps=4"],
        "export": ["export", run, "--use", "state_dict"],
        "start_from": [
            "run", "smoke", "-q", "--output-dir", str(root / "new"), "--set", "run.max_steps=1",
            "--set", START_FROM % run,
        ],
    }  # fmt: skip


def judged(root: Path, name: str, command: str) -> str:
    mark, outside = root / "mark", root / "outside"
    PREPARED[name](root / "r", outside)
    leave = [root / "r", root / "new", root / "cache", root / "said", root / "said.held"]
    before = tree(root, leave)
    variables = {"MARK": str(mark), "XDG_CACHE_HOME": str(root / "cache"), "HOME": str(root)}
    done = forge(*commands(root)[command], folder=root, said=root / "said", variables=variables)
    if mark.exists():
        return f"code ran: {done.said[-300:]}"
    if done.wrong:
        return done.wrong
    written = changed(before, tree(root, leave))
    if written:
        return f"written outside: {written}"
    page = root / "r" / "report.html"
    if command == "report" and page.is_file() and "<script>document.title" in page.read_text():
        return "markup of the folder is in the page"
    return ""


def whole(folder: Path) -> None:
    """A run of three steps, to be prepared."""
    done = forge(
        "run", "smoke", "-q", "--output-dir", str(folder), "--set", "run.max_steps=3", "--set",
        "run.save_every=1", folder=folder.parent, said=folder.parent / "said",
    )  # fmt: skip
    assert done.status == 0, done.said


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Each folder through each command, in a drawn order."""
    warm()
    with scratch() as first:
        whole(first / "r")
        cases = [(name, command) for name in PREPARED for command in commands(first)]
        draw.shuffle(cases)
        for name, command in cases[:count]:
            with scratch() as root:
                shutil.copytree(first / "r", root / "r", symlinks=True)
                (root / "outside").mkdir()
                (root / "outside" / "kept").write_text("kept")
                yield Trial(f"{name}: {command}", judged(root, name, command))


BATTERY = Battery(
    "hostile-folders",
    "no code runs, nothing is written outside, no traceback",
    ci=130,
    deep=130,
    trials=trials,
)
