"""What several test files build once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scratch_venv import ROOT, ScratchVenv, build_wheels, copy_source, once


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session, the same for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"


@pytest.fixture(scope="session")
def project_wheel(shared: Path) -> Path:
    """The wheel of this project, built from a copy of the checkout."""

    def make(folder: Path) -> None:
        build_wheels(folder, copy_source(ROOT, folder / "source"))

    (wheel,) = once(shared / "project_wheel", make).glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def installed(shared: Path, project_wheel: Path) -> ScratchVenv:
    """An environment with this project's wheel in it, and no trace of the checkout."""
    folder = once(shared / "installed", lambda folder: ScratchVenv.make(folder, [project_wheel]))
    return ScratchVenv(folder)
