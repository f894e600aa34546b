"""What a language model writes when it is given the beginning of a text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from forge_plugins.mathematics.networks.llama import KeysAndValues, Llama


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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits.

    Args:
        temperature: divides the logits; 0: the likeliest token.
        top_k: only so many of the likeliest tokens; None: all.
        top_p: only the likeliest tokens that have this probability together (Holtzman et al. 2020,
            arXiv 1904.09751); 1: all.

    Raises:
        ValueError: a number is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"the temperature is {self.temperature}: it must be 0 or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be 1 or above")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each token to be chosen: shape (..., vocabulary) of logits of that shape, fp32.

        In the order of transformers: temperature, then `top_k`, then `top_p` of what is left. Of
        equal tokens at a border all stay with `top_k`, and with `top_p` those of lower number.
        """
        values = logits.float()
        if self.temperature == 0.0:
            return nn.functional.one_hot(values.argmax(-1), values.shape[-1]).float()
        values = values / self.temperature
        if self.top_k is not None and self.top_k < values.shape[-1]:
            border = values.topk(self.top_k).values[..., -1:]
            values = values.masked_fill(values < border, float("-inf"))
        result = values.softmax(-1)
        if self.top_p < 1.0:
            ranked, places = torch.sort(result, dim=-1, descending=True, stable=True)
            before = ranked.cumsum(-1) - ranked  # what the likelier ones have together
            ranked = ranked.masked_fill(before >= self.top_p, 0.0)
            result = torch.zeros_like(result).scatter(-1, places, ranked)
            result = result / result.sum(-1, keepdim=True)
        return result

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """A token for each row: shape (rows,) of logits (rows, vocabulary)."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        # on the CPU, so that a seed gives the same text on every device
        chances = self.probabilities(logits).cpu()
        return torch.multinomial(chances, 1, generator=generator).squeeze(-1).to(logits.device)


class Reader(Protocol):
    """A model that reads a sequence bit by bit."""

    def read(self, tokens: Tensor) -> Tensor:
        """Take in tokens, shape (batch, n), that follow those before.

        Returns:
            Logits of the next one, shape (batch, vocabulary).
        """


class WholeReader:
    """Any model: reads the whole sequence for each token.

    Args:
        model: logits (batch, length, vocabulary), or an object that has them as `logits`, of
            tokens (batch, length).
        context: most tokens that it reads; older ones are forgotten. None: any number.
    """

    def __init__(self, model: Callable[[Tensor], Any], context: int | None) -> None:
        self._model, self._context = model, context
        self._tokens: Tensor | None = None

    def read(self, tokens: Tensor) -> Tensor:
        """See `Reader`."""
        before = self._tokens
        self._tokens = tokens if before is None else torch.cat([before, tokens], 1)
        if self._context is not None:
            self._tokens = self._tokens[:, -self._context :]
        return last_logits(self._model(self._tokens))


class LlamaReader:
    """A `Llama` with its keys and values kept.

    Args:
        model: in evaluation mode.
        room: tokens of the whole sequence, at most.
    """

    def __init__(self, model: Llama, room: int) -> None:
        self._model, self._seen = model, KeysAndValues(room)

    def read(self, tokens: Tensor) -> Tensor:
        """See `Reader`."""
        return last_logits(self._model(tokens, slice(-1, None), self._seen))


class TransformersReader:
    """A model of the transformers library with the library's own cache.

    Args:
        model: in evaluation mode; its forward pass takes `use_cache`.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import DynamicCache

        self._model = model
        # newer versions of the library have another name for the argument
        named = inspect.signature(model.forward).parameters
        self._name = "cache" if "cache" in named else "past_key_values"
        # of a prompt the last place alone is asked for: its logits may be larger than the model
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
        config: Any = model.config
        self._cache = DynamicCache(config=config.get_text_config(decoder=True))

    def read(self, tokens: Tensor) -> Tensor:
        """See `Reader`."""
        kept = {self._name: self._cache}
        return last_logits(self._model(tokens, use_cache=True, **kept, **self._last))


def last_logits(outputs: Any) -> Tensor:
    """Those at the last position, shape (batch, vocabulary).

    Raises:
        ValueError: the model gives no logits for each position.
    """
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        shown = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"a language model gives logits (batch, length, vocabulary), not {shown}")
    return logits[:, -1]


def written(
    reader: Reader, prompt: Tensor, count: int, sampling: Sampling, *, seed: int = 0,
    ends: frozenset[int] = frozenset(),
) -> Iterator[int]:  # fmt: skip
    """The tokens that follow a prompt, one by one, as they are chosen.

    Args:
        reader: has read nothing yet.
        prompt: tokens, shape (length,), at least one.
        count: most tokens to write.
        sampling: how they are chosen.
        seed: of the choices.
        ends: tokens that end the text; they are not given.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt.unsqueeze(0)
    for _ in range(count):
        with torch.no_grad():
            following = sampling.choose(reader.read(tokens), generator)
        token = int(following)
        if token in ends:
            return
        yield token
        tokens = following.unsqueeze(0)
