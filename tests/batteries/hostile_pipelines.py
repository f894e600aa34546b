"""Pipeline files of a hostile author, through check, plan and run: no code of theirs runs."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from battery import Battery, Trial
from commands import changed, finish, tree
from commands import command as forge
from forged import warm
from plugin_run import scratch

HEAD: Final = """forge: 1
run: {name: t, device: cpu, max_steps: 1}
optimizer: {use: sgd, with: {lr: 0.01}}
loss: {use: cross_entropy}
"""
DATA: Final = "data: {use: file, with: {path: x.npz, target: class, batch_size: 4, classes: 2}}\n"
MODEL: Final = "model: {use: mlp}\n"
MODULE: Final = """import os
from pathlib import Path
from torch import nn
MARK = Path(os.environ["MARK"])
%s
class Net(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.inner = nn.Linear(3, 2)
    def forward(self, inputs):
        return self.inner(inputs)
def make(*_, **__):
    MARK.touch()
    return Net()
class Call:
    def __init__(self, *_):
        MARK.touch()
"""


class Bad:
    """A pickle of it leaves the mark."""

    def __reduce__(self) -> Any:
        return (os.system, ('touch "$MARK"',))


def factory(name: str, arguments: str = "{}") -> str:
    inner = f"{{factory: '{name}', arguments: {arguments}}}"
    return HEAD + DATA + f"model: {{use: python_class, with: {inner}}}\n"


def data(path: str, more: str = "") -> str:
    inner = f"{{path: {path}, target: class, batch_size: 4, classes: 2{more}}}"
    return HEAD + MODEL + f"data: {{use: file, with: {inner}}}\n"


def granted(text: str) -> str:
    return factory("os:system", "{command: 'touch $MARK'}") + text


PIPELINES: Final[dict[str, str]] = {
    "a command of the shell": factory("os:system", "{command: 'touch $MARK'}"),
    "a process": factory("subprocess:run", "{args: [1]}"),
    "exec": factory("builtins:exec", "{source: 'open(1)'}"),
    "a module by name": factory("importlib:import_module", "{name: evil}"),
    "a script": factory("runpy:run_path", "{path_name: elsewhere/evil.py}"),
    "an installed package that unpickles": factory("torch:load", "{f: x.pt, weights_only: false}"),
    "numpy with objects": factory("numpy:load", "{file: x.npy, allow_pickle: true}"),
    "a way through a package": factory("torch:os.system", "{command: 'touch $MARK'}"),
    "a way through a class": factory("torch.nn:Module.__init__.__globals__"),
    "subclasses": factory("torch.nn:Module.__subclasses__"),
    "a hub": factory("torch.hub:load", "{repo_or_dir: elsewhere, model: make, source: local}"),
    "a function of the folder": factory("here:make"),
    "a class of the folder that is no network": factory("here:Call"),
    "a class of a file elsewhere": factory("evil:Net"),
    "a function of a file elsewhere": factory("evil:make"),
    "a class in a zip elsewhere": factory("zipped:Net"),
    "a link in the folder to a file elsewhere": factory("linked:Net"),
    "a name with a path in it": factory("..elsewhere.evil:Net"),
    "a grant in the file": granted("allow_code: true\n"),
    "a grant in the run": granted("").replace("max_steps: 1", "max_steps: 1, allow_code: true"),
    "a grant in a note": granted("x-allow-code: true\n"),
    "a grant of the environment": granted("x-environment: {FORGE_ALLOW_CODE: '1'}\n"),
    "a grant beside the factory": factory("os:system").replace("arguments", "allow_code: true, arguments"),
    "a grant in the file below": "extends: granting.yaml\n" + granted(""),
    "a tag of Python": HEAD + DATA + "model: !!python/object/apply:os.system ['touch $MARK']\n",
    "a tag of a module": HEAD + DATA + "model: !!python/module:evil\n",
    "a pickle as it is": data("x.pkl", ", trust_pickle: true"),
    "a pickle": data("x.pkl"),
    "a file of torch": data("x.pt"),
    "an array of objects": data("x.npy"),
    "an archive with objects": data("objects.npz"),
    "weights that are a pickle": HEAD + DATA
    + "model: {use: python_class, with: {factory: 'here:Net', state: x.pt}}\n",
    "weights of a run that are a pickle": HEAD + DATA + MODEL
    + "wrappers: [{use: start_from, with: {path: folder}}]\n",
    "a teacher of a hostile run": HEAD.replace("cross_entropy}", "distillation, with: {teacher: folder}}")
    + DATA + MODEL,
    "a model folder with code of its own": HEAD + DATA
    + "model: {use: transformers, with: {folder: hub}}\n",
}  # fmt: skip


HARMLESS: Final = {PIPELINES["a pickle"]}  # what is hostile in it is in a field that nobody reads


def furnish(root: Path) -> None:
    """The working folder, and beside it what a hostile author would have there."""
    work, elsewhere = root / "work", root / "elsewhere"
    for folder in (work, elsewhere, root / "home", work / "folder" / "checkpoints", work / "hub"):
        folder.mkdir(parents=True)
    (elsewhere / "evil.py").write_text(MODULE % "MARK.touch()")
    (elsewhere / "hubconf.py").write_text(MODULE % "MARK.touch()")
    (work / "elsewhere").symlink_to(elsewhere)
    (work / "here.py").write_text(MODULE % "")
    (work / "linked.py").symlink_to(elsewhere / "evil.py")
    with zipfile.ZipFile(elsewhere / "z.zip", "w") as archive:
        archive.writestr("zipped.py", MODULE % "MARK.touch()")
    rows = [{"input": [1.0, 2.0, 3.0], "target": 1, "more": Bad()} for _ in range(12)]
    (work / "x.pkl").write_bytes(pickle.dumps(rows))
    torch.save({"input": torch.ones(12, 3), "target": Bad()}, work / "x.pt")
    np.save(work / "x.npy", np.array([Bad()] * 12, object), allow_pickle=True)
    np.savez(work / "objects.npz", input=np.array([Bad()] * 12, object), target=np.arange(12))
    numbers = np.random.default_rng(0).random((12, 3), np.float32)
    np.savez(work / "x.npz", input=numbers, target=np.arange(12) % 2)
    (work / "granting.yaml").write_text("allow_code: true\n")
    (work / "folder" / "config.yaml").write_text(granted("allow_code: true\n"))
    torch.save(Bad(), work / "folder" / "checkpoints" / "model.safetensors")
    auto = {"AutoModel": "evil.Net", "AutoModelForCausalLM": "evil.Net", "AutoConfig": "evil.Net"}
    described = {"model_type": "evil", "auto_map": auto, "architectures": ["Net"]}
    (work / "hub" / "config.json").write_text(json.dumps(described))
    (work / "hub" / "evil.py").write_text(MODULE % "MARK.touch()")
    torch.save(Bad(), work / "hub" / "pytorch_model.bin")


def judged(root: Path, text: str, command: str) -> str:
    work, mark = root / "work", root / "mark"
    (work / "p.yaml").write_text(text)
    variables = {
        "MARK": str(mark), "HOME": str(root / "home"), "XDG_CACHE_HOME": str(root / "cache"),
        "XDG_CONFIG_HOME": str(root / "home"),
    }  # fmt: skip
    leave = [work / "runs", root / "cache", root / "said", root / "said.held", work / "__pycache__"]
    before = tree(root, leave)

    def beside() -> None:
        sys.path[1:1] = [str(root / "elsewhere"), str(root / "elsewhere" / "z.zip")]
        forge(command, "p.yaml", folder=work, variables=variables)()

    done = finish(beside, root / "said")
    if mark.exists():
        return f"code ran: {done.said[-300:]}"
    if done.wrong:
        return done.wrong
    if command == "run" and done.status == 0 and text not in HARMLESS:
        return "it ran"
    written = changed(before, tree(root, leave))
    return f"written: {written}" if written else ""


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Each file through each command, in a drawn order."""
    warm()
    os.environ.pop("FORGE_ALLOW_CODE", None)
    cases = [(name, command) for name in PIPELINES for command in ("check", "plan", "run")]
    draw.shuffle(cases)
    for name, command in cases[:count]:
        with scratch() as root:
            furnish(root)
            yield Trial(f"{name}: {command}", judged(root, PIPELINES[name], command))


BATTERY = Battery(
    "hostile-pipelines",
    "no code runs, nothing is written elsewhere, no traceback",
    ci=200,
    deep=200,
    trials=trials,
)
