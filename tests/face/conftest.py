"""Small data and models for the Phase 5 face."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import agent_forge.phases.phase5_training  # noqa: F401  the layers of phase 4 files are allowed


def samples(count: int, seed: int, width: int = 128) -> list[dict[str, Any]]:
    """Rows whose class is how many of the first nine numbers are above zero."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        row = [round(draw.gauss(0, 1), 3) for _ in range(width)]
        rows.append({"input": row, "target": sum(value > 0 for value in row[:9])})
    return rows


def write_samples(file: Path, count: int, seed: int, width: int = 128) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(samples(count, seed, width)))
    return file


def network(width: int = 128, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, classes))


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
