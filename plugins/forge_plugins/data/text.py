"""Plain text as windows of tokens, for language models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Data,
    DataSpec,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    hookimpl,
    stream_seed,
)
from forge_plugins.data.identity import Identity, OnChange

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics import token_windows, tokenizers
else:
    torch = LazyModule("torch")
    token_windows = LazyModule("forge_plugins.mathematics.token_windows")
    tokenizers = LazyModule("forge_plugins.mathematics.tokenizers")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text, and how it is cut."""

    path: Annotated[
        str | None,
        Meta(
            description="a UTF-8 text file; null: the help texts about the language that every "
            "Python carries (pydoc_data.topics, English, half a megabyte)"
        ),
    ] = None
    tokenizer: Annotated[
        Literal["bytes", "characters"],
        Meta(description="one token for each byte of UTF-8, or for each character of the text"),
    ] = "bytes"
    length: Annotated[int, Meta(ge=1, le=65536, description="tokens in a window")] = 128
    batch_size: Annotated[int, Meta(ge=1, description="windows in a training batch")] = 16
    validation_share: Annotated[
        float, Meta(gt=0, lt=1, description="share of the text, at its end, that is not trained on")
    ] = 0.05
    validation_batch_size: Annotated[
        int, Meta(ge=1, description="windows in a validation batch")
    ] = 64
    on_change: OnChange = "refuse"


class WindowData:
    """Windows over one row of tokens; `tokenizer` tells what the tokens mean.

    Each epoch cuts the row at another offset and takes the windows in another order, both
    functions of (seed, epoch), so that any position can be taken up without drawing the earlier
    ones.

    Args:
        training: tokens, shape (n,).
        held_out: tokens for validation, cut from offset 0 and in their own order.
        config: sizes.
        seed: of offsets and orders.
        tokenizer: of the tokens.
    """

    def __init__(
        self,
        training: Tensor,
        held_out: Tensor,
        config: TextConfig,
        seed: int,
        tokenizer: tokenizers.Tokenizer,
    ) -> None:
        vocabulary = tokenizer.vocabulary
        self.tokenizer = tokenizer
        self._training, self._held_out = training, held_out
        self._config, self._seed = config, seed
        # whatever the offset is, an epoch has as many windows
        self._windows = (len(training) - config.length) // config.length
        self.spec = DataSpec(
            vocabulary=vocabulary,
            sequence=config.length,
            classes=vocabulary,
            samples=self._windows,
        )
        self.batches_per_epoch: int | None = -(-self._windows // config.batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The epoch's batches from `start` on."""
        length, size = self._config.length, self._config.batch_size
        generator = torch.Generator().manual_seed(stream_seed(self._seed, "windows", epoch))
        offset = int(torch.randint(length, (1,), generator=generator))
        order = torch.randperm(self._windows, generator=generator)
        starts = token_windows.window_starts(len(self._training), length, offset)[order]
        for begin in range(start * size, self._windows, size):
            chosen = starts[begin : begin + size]
            yield Batch(*token_windows.cut_windows(self._training, chosen, length))

    def validation(self) -> Iterator[Batch]:
        """The held-out text from its beginning."""
        length, size = self._config.length, self._config.validation_batch_size
        starts = token_windows.window_starts(len(self._held_out), length)
        for begin in range(0, len(starts), size):
            chosen = starts[begin : begin + size]
            yield Batch(*token_windows.cut_windows(self._held_out, chosen, length))


def _documents(path: str | None) -> list[str]:
    if path is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    try:
        return [Path(path).read_text(encoding="utf-8")]
    except (OSError, ValueError) as error:
        raise PluginError(f"text: cannot read {path}: {error}") from error


class Text:
    """Encodes a text once and cuts it into windows."""

    info = PluginInfo(
        name="text",
        kind=Kind.DATA,
        config=TextConfig,
        provides=("data:tokens", "data:classes", "data:text"),
    )

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self._identity = Identity("text", config.on_change)

    def state_dict(self) -> dict[str, Any]:
        """Which text the run has read."""
        return self._identity.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another text, unless `on_change` allows it."""
        self._identity.load_state_dict(state)

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The whole text in memory.

        Raises:
            PluginError: the file cannot be read, or is too short for the windows.
        """
        config = self.config
        documents = _documents(config.path)
        tokenizer: tokenizers.Tokenizer = (
            tokenizers.ByteTokenizer()
            if config.tokenizer == "bytes"
            else tokenizers.CharacterTokenizer.of("".join(documents))
        )
        row = token_windows.encode_documents(map(tokenizer.encode, documents), tokenizer.end)
        training, held_out = token_windows.split_row(row, config.validation_share)
        if len(training) < 2 * config.length or len(held_out) <= config.length:
            raise PluginError(
                f"text: {len(row)} tokens are too few for windows of {config.length}: "
                f"{len(training)} are left to train on and {len(held_out)} to validate; shorten "
                "data.with.length, change data.with.validation_share, or give a longer text"
            )
        content = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        self._identity.set(config.path or "the shipped text", content, len(row))
        return WindowData(training, held_out, config, run.seed, tokenizer)
