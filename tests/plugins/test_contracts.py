"""Every first-party plugin through the battery that third parties run."""

from __future__ import annotations

from typing import Any

import pytest

from forge_kernel.testing.contracts import *  # noqa: F403  pytest collects what is imported

CHOSEN: dict[str, dict[str, Any]] = {
    "validators.bleu": {"prompt": 1, "tokens": 2},  # windows of the trial are short
    "model.python_class": {
        "factory": "torch.nn:Linear",
        "arguments": {"in_features": 8, "out_features": 5},
    },
    "loss.language_model": {"head": "4"},  # the last layer of the trial's model
}


@pytest.fixture
def forge_config(forge_plugin: str, forge_config: dict[str, Any]) -> dict[str, Any]:
    """Settings where the defaults cannot train."""
    return CHOSEN.get(forge_plugin, forge_config)
