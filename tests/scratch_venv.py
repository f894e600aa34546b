"""Wheels and scratch environments: what an installation is, seen from outside the checkout."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SITES = ("site-packages", "dist-packages")
MYPY_CACHE = Path(__file__).resolve().parents[1] / ".mypy_cache" / "packages"
"""What mypy knows of torch and of us, kept from one session to the next."""
_PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
_NOT_SOURCE = ("build", "dist", "runs", "*.egg-info", "__pycache__", ".*")


def environment() -> dict[str, str]:
    """Variables for a subprocess, without those of the pytest that runs these tests.

    One thread for torch: the models are tiny, and threads of several workers hinder each other.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "PYTHONPATH"))
    }
    return {**kept, "OMP_NUM_THREADS": "1"}


def call(
    command: Sequence[str | Path], cwd: Path, *, status: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command, which is to end with `status`."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, cwd=cwd, env=environment(), check=False, timeout=300,
    )  # fmt: skip
    told = f"{command}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == status, f"exit {done.returncode}, not {status}: {told}"
    return done


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Alone among the workers of pytest-xdist."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that the first worker makes and the others find."""
    done = folder.with_name(f"{folder.name}.done")
    with locked(folder):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            done.touch()
    return folder


def copy_source(source: Path, folder: Path) -> Path:
    """A copy to build in: a build leaves files beside its sources and reads those of earlier ones.

    Links stay links, as in a clone.
    """
    ignore = shutil.ignore_patterns(*_NOT_SOURCE)
    return Path(shutil.copytree(source, folder, symlinks=True, ignore=ignore))


def build_wheels(folder: Path, *sources: Path) -> list[Path]:
    """Build distributions into `folder`."""
    call(
        [*_PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, *sources],
        cwd=folder,
    )
    return sorted(folder.glob("*.whl"))


def write_distribution(
    folder: Path, name: str, module: str, entries: Sequence[str], *, version: str = "1.0"
) -> Path:
    """The source of a distribution of one module.

    Args:
        folder: where its folder is made.
        name: of the distribution; its module has the same name with underscores.
        module: the module's text.
        entries: names of entry points (`"loss.mine"`), all of which lead to the module's `Plugin`.
        version: of the distribution.
    """
    source = folder / name
    source.mkdir()
    package = name.replace("-", "_")
    (source / f"{package}.py").write_text(module)
    points = "".join(f'"{entry}" = "{package}:Plugin"\n' for entry in entries)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=77"]\n'
        'build-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "{name}"\nversion = "{version}"\n'
        f'[project.entry-points."forge_kernel.plugins"]\n{points}'
        f'[tool.setuptools]\npy-modules = ["{package}"]\n'
    )
    return source


@dataclass(frozen=True)
class ScratchVenv:
    """An environment with a few wheels really installed, and below them what the tests run on."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, wheels: Sequence[Path]) -> ScratchVenv:
        """Install wheels without their dependencies, which come from this Python's own folders."""
        venv.create(folder, with_pip=False, symlinks=True)
        found = cls(folder)
        call(
            [*_PIP, "--python", found.python, "install", "--no-deps", "--no-index", "--no-compile",
             *wheels],
            cwd=folder,
        )  # fmt: skip
        (site,) = folder.glob("lib/python*/site-packages")
        below = [entry for entry in sys.path if Path(entry).name in _SITES]
        (site / "zz_below.pth").write_text("".join(f"{entry}\n" for entry in below))
        return found

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(
        self, *arguments: str | Path, cwd: Path, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run Python, which is to end with `status`."""
        return call([self.python, *arguments], cwd, status=status)

    def forge(
        self, *arguments: str | Path, cwd: Path, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run the installed command `forge`, which is to end with `status`."""
        return call([self.folder / "bin" / "forge", *arguments], cwd, status=status)

    def pytest(self, *arguments: str | Path, cwd: Path) -> str:
        """Run a suite, which is to pass; give what it prints."""
        fixed = ("-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist")
        own = ("--basetemp", cwd / ".basetemp")
        return self.run(*fixed, *own, *arguments, cwd=cwd).stdout

    def mypy(self, *arguments: str | Path, cwd: Path, cache: Path) -> str:
        """Check types, which are to be right; the cache holds what mypy knows of torch."""
        with locked(cache):
            return self.run("-m", "mypy", "--cache-dir", cache, *arguments, cwd=cwd).stdout
