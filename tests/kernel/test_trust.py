"""What a file names as code runs only when somebody outside of it says so."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest

from forge_kernel import resume, run
from forge_kernel.errors import PlanError, PluginError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import export
from forge_kernel.trained_model import trained_model
from forge_kernel.trust import VARIABLE, code_allowed, code_is_allowed

HEAD = """forge: 1
run: {name: t, device: cpu, max_steps: 2}
optimizer: {use: sgd, with: {lr: 0.01}}
loss: {use: cross_entropy}
"""
DATA = """data: {use: file, with: {path: x.npz, target: class, batch_size: 4, classes: 2}}
"""
NETWORK = """from pathlib import Path
from torch import nn
Path("imported").write_text("")
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
    def forward(self, inputs):
        return self.inner(inputs)
def make():
    Path("ran").write_text("")
    return Net()
"""


class Bad:
    def __reduce__(self) -> Any:
        return (Path("ran").write_text, ("",))


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    generator = np.random.default_rng(0)
    np.savez("x.npz", input=generator.random((12, 3), np.float32), target=np.arange(12) % 2)
    return tmp_path / "work"


def forge(*arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *arguments],
        capture_output=True, text=True, check=False, timeout=240, cwd=Path.cwd(),
    )  # fmt: skip


def pipeline(factory: str, data: str = DATA) -> Path:
    file = Path("p.yaml")
    model = f"model: {{use: python_class, with: {{factory: '{factory}'}}}}\n"
    file.write_text(HEAD + data + model)
    return file


@pytest.mark.parametrize("factory", ["os:system", "subprocess:run", "builtins:exec", "pdb:Pdb"])
@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_a_function_of_python_itself_does_not_run(command: str, factory: str) -> None:
    """Red when the name alone is believed."""
    done = forge(command, str(pipeline(factory)))
    assert done.returncode == 2, done.stdout
    assert "p.yaml:6:8" in done.stderr
    assert "--allow-code" in done.stderr
    assert not Path("runs").exists()


def test_a_file_elsewhere_is_not_even_imported(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/forms_elsewhere.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    file = pipeline("forms_elsewhere:Net")
    with pytest.raises(PlanError, match=r"elsewhere/forms_elsewhere\.py"):
        run(file, output_dir="r", quiet=True)
    assert not Path("imported").exists()
    assert run(file, output_dir="r", quiet=True, allow_code=True).outcome == "completed"
    assert Path("imported").exists()
    with pytest.raises(PlanError, match="--allow-code"):  # the folder does not remember it
        resume("r", ["run.max_steps=3"], quiet=True)
    with pytest.raises(PlanError, match="--allow-code"):
        export("r", "state_dict")
    with pytest.raises(PlanError, match="--allow-code"):
        trained_model("r")
    assert trained_model("r", allow_code=True)
    assert export("r", "state_dict", allow_code=True)
    assert resume("r", ["run.max_steps=3"], quiet=True, allow_code=True).steps == 3


def test_a_network_in_the_folder_of_the_command_is_the_users_own(
    workplace: Path, monkeypatch: Any
) -> None:
    (workplace / "forms_here.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(workplace)
    assert run(pipeline("forms_here:Net"), output_dir="r", quiet=True).outcome == "completed"
    with pytest.raises(PluginError, match=r"not the class of a network.*--allow-code"):
        run(pipeline("forms_here:make"), output_dir="s", quiet=True)
    assert not Path("ran").exists()
    done = run(pipeline("forms_here:make"), output_dir="u", quiet=True, allow_code=True)
    assert done.outcome == "completed"


def test_a_class_of_an_installed_package_needs_no_permission() -> None:
    assert forge("check", str(pipeline("torch.nn:Identity"))).returncode == 0


def pickled() -> str:
    rows = [{"input": [1.0, 2.0, 3.0], "target": 1, "more": Bad()} for _ in range(12)]
    Path("x.pkl").write_bytes(pickle.dumps(rows))
    return DATA.replace("x.npz", "x.pkl, trust_pickle: true")


@pytest.mark.parametrize("way", ["option", "variable", "settings"])
def test_a_file_cannot_grant_its_pickle_trust(way: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Red when `trust_pickle: true` in the file is enough."""
    Path("p.yaml").write_text(HEAD + pickled() + "model: {use: mlp}\n")
    for command in ("check", "plan", "run"):
        done = forge(command, "p.yaml")
        assert done.returncode == 2
        assert "the pickle x.pkl as it is" in done.stderr
    assert not Path("ran").exists()
    more = []
    if way == "option":
        more = ["--allow-code"]
    elif way == "variable":
        monkeypatch.setenv(VARIABLE, "1")
    else:
        (tmp_path / "home/forge-kernel").mkdir(parents=True)
        (tmp_path / "home/forge-kernel/settings.yaml").write_text("allow_code: true\n")
    listed = forge("check", "p.yaml", *more)
    assert listed.returncode == 0, listed.stderr
    assert "runs code: data file: the pickle x.pkl as it is" in listed.stdout


def test_what_is_allowed_outside_stays_so_and_ends(monkeypatch: Any) -> None:
    assert not code_is_allowed()
    with code_allowed(True):
        with code_allowed(False):
            assert code_is_allowed()
        assert code_is_allowed()
    assert not code_is_allowed()
    monkeypatch.setenv(VARIABLE, "0")
    assert not code_is_allowed()


def test_a_shipped_pipeline_asks_for_nothing() -> None:
    assert "runs code" not in forge("check", "smoke").stdout
    assert load_pipeline("smoke")
