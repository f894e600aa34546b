"""Sinks are tested where their packages are; `pip install .[dev]` brings them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDS = {"observers.tensorboard": "tensorboard", "observers.prometheus": "prometheus_client"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        chosen = getattr(item, "callspec", None)
        for value in chosen.params.values() if chosen is not None else ():
            package = NEEDS.get(value) if isinstance(value, str) else None
            if package is not None and find_spec(package) is None:
                item.add_marker(pytest.mark.skip(reason=f"{package} is not installed"))
