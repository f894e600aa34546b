"""Fixtures that many tests use."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import forked
import pytest
from hypothesis import HealthCheck, settings

from forge_kernel.planning import catalog, pipeline_file
from forge_kernel.run_folder import record

ROOT = Path(__file__).resolve().parents[1]

TORCH = find_spec("torch") is not None
if TORCH:  # `make py313` runs what needs none where there is none
    import torch

    torch.set_num_threads(1)

# what a newcomer runs is the same each time; `make deep` searches for new examples
# how long an example takes to draw depends on the machine's load: no test fails of that
PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, database=None, **PATIENT)
settings.register_profile("search", print_blob=True, **PATIENT)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--order", type=int, help="seed of another order: of files, and within each")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--order", None)
    if seed is None:  # what forks this process comes while little is imported: a fork is cheap then
        items.sort(key=lambda item: "formats" not in item.path.parts)
    else:
        drawn = random.Random(seed)  # the same in each worker
        files = sorted({item.path for item in items})
        places = dict(zip(files, drawn.sample(range(len(files)), len(files)), strict=True))
        keys = {item: (places[item.path], drawn.random()) for item in items}
        items.sort(key=keys.__getitem__)


def pytest_collection_finish() -> None:
    """What is imported and collected stays to the end: the collector need not walk it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def disk_without_waiting() -> Iterator[None]:
    """No machine crashes between two tests: what they write need not reach the disk.

    That everything is synced before it is renamed, and what happens when it cannot be, is tested
    in `kernel/test_checkpoint.py`; programs of their own, the installed ones too, really wait.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", forked.without_waiting)
        yield


@pytest.fixture(scope="session", autouse=True)
def surroundings_read_once() -> Iterator[None]:
    """What is installed, and the checkout's revision: a third of a short run was to ask for them.

    It is asked anew when the import path or one of its folders has changed, and elsewhere than in
    the checkout. What asks is tested in `kernel/test_third_party.py` and `kernel/test_run_status.py`.
    """

    remembered: dict[Any, Any] = {}

    def once(ask: Callable[..., Any], *place: Any, **asked: Any) -> Any:
        key = (ask, place, tuple(asked.items()))
        if key not in remembered:
            remembered[key] = ask(**asked)
        return remembered[key]

    def import_path() -> tuple[Any, ...]:
        folders = [entry for entry in sys.path if os.path.isdir(entry)]
        return (*sys.path, *(os.stat(folder).st_mtime_ns for folder in folders))

    entries, version, revision = catalog.entry_points, record.version, record._git_revision
    with pytest.MonkeyPatch.context() as patch:
        for module in (catalog, pipeline_file):
            patch.setattr(
                module, "entry_points", lambda group: once(entries, import_path(), group=group)
            )
        patch.setattr(
            record,
            "version",
            lambda package: once(version, import_path(), distribution_name=package),
        )
        patch.setattr(
            record, "_git_revision",
            lambda: once(revision) if Path.cwd() == ROOT else revision(),
        )  # fmt: skip
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests convert does not fill the user's cache; pip's own stays where it is."""
    pip = os.environ.get("PIP_CACHE_DIR") or str(Path.home() / ".cache" / "pip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CACHE_DIR", pip)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def programs_without_waiting() -> Iterator[None]:
    """Clients and trials are processes of their own as ever, which need not import torch first."""
    with pytest.MonkeyPatch.context() as patch:
        if TORCH:
            from forge_plugins.batch_sizes import watched
            from forge_plugins.clients import verification

            patch.setattr(verification, "subprocess", forked)
            patch.setattr(watched, "subprocess", forked)
        yield


@pytest.fixture
def linear() -> torch.nn.Module:
    """A small model, the same in each test."""
    torch.manual_seed(3)
    return torch.nn.Linear(4, 3)
