"""Small data and models for the Phase 5 face."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from phase5_parts import network, write_samples

import agent_forge.phases.phase5_training  # noqa: F401  the layers of phase 4 files are allowed


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own as the working directory, with `data/train.json` and `data/val.json`."""
    monkeypatch.chdir(tmp_path)
    write_samples(tmp_path / "data" / "train.json", 120, 1)
    write_samples(tmp_path / "data" / "val.json", 41, 2)
    torch.manual_seed(11)
    return tmp_path


@pytest.fixture
def make_pipeline(workplace: Path) -> Callable[..., Any]:
    """A short pipeline over the small data."""
    from agent_forge.phases.phase5_training import create_training_pipeline

    def make(model: Any = None, **options: Any) -> Any:
        options.setdefault("output_dir", str(workplace / "out"))
        options.setdefault("training_config", {"epochs": 3})
        options.setdefault("val_data_path", "data/val.json")
        return create_training_pipeline(model or network(), "data/train.json", **options)

    return make
