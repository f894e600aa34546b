"""Tests that need a real client: skipped where it is missing, failed where it must be there."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def need(*packages: str) -> None:
    """Skip without these packages; with FORGE_CLIENTS=1 (`make test`) that is a failure."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing and os.environ.get("FORGE_CLIENTS") == "1":
        pytest.fail(f"{missing} must be installed: pip install -c constraints.txt -e '.[clients]'")
    if missing:
        pytest.skip(f"{missing} not installed")
