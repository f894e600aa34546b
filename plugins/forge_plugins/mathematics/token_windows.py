"""A long row of tokens as training windows of one length."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def encode_documents(documents: Iterator[Tensor], end: int) -> Tensor:
    """All documents in one row, each followed by the end token; int32, shape (n,)."""
    mark = torch.tensor([end], dtype=torch.int32)
    parts = [part for tokens in documents for part in (tokens.int(), mark)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)


def split_row(tokens: Tensor, validation_share: float) -> tuple[Tensor, Tensor]:
    """The row cut once: training tokens before, validation tokens behind; none is in both."""
    cut = len(tokens) - round(len(tokens) * validation_share)
    return tokens[:cut], tokens[cut:]


def window_starts(count: int, length: int, offset: int = 0) -> Tensor:
    """Where windows of `length` inputs and their `length` targets begin.

    Neighbouring windows share one token: the last target of one is the first input of the next,
    so that each token but the first is a target once.

    Args:
        count: tokens in the row.
        length: inputs in a window.
        offset: of the first window.
    """
    return torch.arange(offset, count - length, length)


def cut_windows(tokens: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (the inputs one place on) of the windows that begin at `starts`.

    Args:
        tokens: the row.
        starts: shape (windows,).
        length: of a window.

    Returns:
        Two int64 tensors of shape (windows, length).
    """
    found = tokens[starts[:, None] + torch.arange(length + 1)].long()
    return found[:, :-1], found[:, 1:]
