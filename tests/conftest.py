"""Fixtures that many tests use."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from forge_plugins.batch_sizes import watched
from forge_plugins.clients import verification

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
    if seed is not None:
        drawn = random.Random(seed)  # the same in each worker
        files = sorted({item.path for item in items})
        places = dict(zip(files, drawn.sample(range(len(files)), len(files)), strict=True))
        keys = {item: (places[item.path], drawn.random()) for item in items}
        items.sort(key=keys.__getitem__)


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
        patch.setattr(verification, "subprocess", forked)
        patch.setattr(watched, "subprocess", forked)
        yield


@pytest.fixture
def linear() -> nn.Module:
    """A small model, the same in each test."""
    torch.manual_seed(3)
    return nn.Linear(4, 3)
