"""What a language model writes when it is given the beginning of a text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def greedy_continuation(
    answer: Callable[[Tensor], Tensor], prompts: Tensor, count: int, context: int | None = None
) -> Tensor:
    """The likeliest next token, again and again.

    Args:
        answer: logits of shape (batch, length, vocabulary) for tokens of shape (batch, length).
        prompts: tokens, shape (batch, length).
        count: tokens to write.
        context: most tokens that the model reads; older ones are forgotten. None: any number.

    Returns:
        The tokens written, shape (batch, count).
    """
    tokens = prompts
    with torch.no_grad():
        for _ in range(count):
            read = tokens if context is None else tokens[:, -context:]
            following = answer(read)[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], 1)
    return tokens[:, prompts.shape[1] :]
