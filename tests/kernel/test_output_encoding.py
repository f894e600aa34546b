"""Names that the terminal's encoding lacks are escaped; every command does its work and exits 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

PIPELINE = """
forge: 1
run: {name: encoded, seed: 0, device: cpu, max_steps: 2}
data: {use: modular_arithmetic, with: {modulus: 11}}
model: {use: mlp, with: {hidden: [8, 8]}}
optimizer: {use: adamw}
loss: {use: cross_entropy}
validators: [{use: classification}]
observers: [{use: progress_bar}]
x-note: → нет
"""
NAME = "Läufe-дом"


def forge(
    folder: Path, encoding: str, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "90", **variables}
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *arguments], cwd=folder, env=environment,
        capture_output=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ein-дом")
    (folder / f"{NAME}.yaml").write_text(PIPELINE, encoding="utf-8")
    done = forge(folder, "utf-8", "run", f"{NAME}.yaml", "-q", "--output-dir", f"{NAME}-1")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "ascii:strict"])
def test_a_run_is_told_as_well_as_it_can_be(place: Path, encoding: str) -> None:
    """Planted fault: the stream's own way with what it lacks."""
    out = f"{NAME}-{encoding.replace(':', '-')}"
    mode = {"PYTHONUTF8": "0"} if encoding == "ascii" else {}  # a process of its own
    done = forge(place, encoding, "run", f"{NAME}.yaml", "--output-dir", out, **mode)
    assert done.returncode == 0, done.stderr
    assert b"\\u0434\\u043e\\u043c" in done.stdout
    umlaut = b"L\xe4ufe" if encoding == "cp1252" else b"L\\xe4ufe"
    assert umlaut in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", f"{NAME}.yaml"], ["plan", f"{NAME}.yaml"], ["explain", f"{NAME}.yaml"],
        ["explain", f"{NAME}.yaml", "run.name"], ["status", f"{NAME}-1"],
        ["resume", f"{NAME}-1", "--set", "run.max_steps=3"], ["plugins"], ["doctor"],
        ["report", f"{NAME}-1"], ["new", "pipeline", f"{NAME}-neu.yaml", "--force"], ["--help"],
    ],
    ids=lambda arguments: "-".join(arguments[:1] + arguments[2:3]),
)  # fmt: skip
def test_a_command_does_its_work(place: Path, encoding: str, arguments: list[str]) -> None:
    done = forge(place, encoding, *arguments)
    same = forge(place, "utf-8", *arguments)
    assert done.returncode == same.returncode, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"UnicodeEncodeError" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", ["check", "plan"])
def test_json_stays_json(place: Path, encoding: str, command: str) -> None:
    done = forge(place, encoding, command, f"{NAME}.yaml", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout.decode("ascii"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_fault_is_told(place: Path, encoding: str) -> None:
    done = forge(place, encoding, "check", f"{NAME}.yaml", "--set", "run.дом=3")
    missing = forge(place, encoding, "run", "нет.yaml")
    for found in (done, missing):
        assert found.returncode == 2
        assert b"Traceback" not in found.stderr
    assert b"\\u043d\\u0435\\u0442" in missing.stderr
