"""Fixtures that many tests use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


@pytest.fixture
def linear() -> nn.Module:
    """A small model, the same in each test."""
    torch.manual_seed(3)
    return nn.Linear(4, 3)
