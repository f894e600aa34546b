"""A long row of tokens as training sequences of one length."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def encode_documents(documents: Iterator[Tensor], end: int) -> Tensor:
    """All documents in one row, each followed by the end token; int32, shape (n,)."""
    mark = torch.tensor([end], dtype=torch.int32)
    parts = [part for tokens in documents for part in (tokens.int(), mark)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)


def cut(count: int, validation_split: float) -> int:
    """Where a row of tokens is cut once: training tokens before, validation tokens behind."""
    return count - round(count * validation_split)


def sequence_count(tokens: int, length: int) -> int:
    """Sequences of `length` inputs and their `length` targets in a row, without an offset.

    Neighbouring sequences share one token: the last target of one is the first input of the next,
    so that each token but the first is a target once.
    """
    return max(0, tokens - 1) // length
