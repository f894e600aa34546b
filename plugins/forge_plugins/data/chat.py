"""Conversations for language models, of which the answers are learned."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from forge_kernel.api import (
    Batch,
    Data,
    Fault,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    hookimpl,
    stream_seed,
)
from forge_plugins.data.chat_config import ChatConfig
from forge_plugins.data.fingerprint import Identity, RemembersContent

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_plugins.data import chat_batches, chat_rows
    from forge_plugins.formats import errors
    from forge_plugins.interchange import chat_tokenizer
    from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")
    chat_batches = LazyModule("forge_plugins.data.chat_batches")
    chat_rows = LazyModule("forge_plugins.data.chat_rows")
    errors = LazyModule("forge_plugins.formats.errors")
    chat_tokenizer = LazyModule("forge_plugins.interchange.chat_tokenizer")


def required(config: ChatConfig) -> tuple[str, ...]:
    """What the model must be.

    Raises:
        PluginError: a path is not given.
    """
    faults = []
    if config.path is None:
        faults.append(Fault("it needs the path of the conversations", "path"))
    if config.tokenizer is None:
        hint = "tokenizer: the folder of the model"
        faults.append(Fault("it needs a tokenizer", "tokenizer", hints=(hint,)))
    if faults:
        raise PluginError(faults)
    return ("model:packed_sequences",) if config.packing else ()


def _need_tokenizer(config: ChatConfig) -> chat_tokenizer.ChatTokenizer:
    """The tokenizer and template that settings name.

    Raises:
        PluginError: they cannot be read.
    """
    assert config.tokenizer is not None, "the plan asks for it"
    template = None if config.template is None else Path(config.template)
    day = None if config.today is None else date.fromisoformat(config.today)
    try:
        return chat_tokenizer.read_chat_tokenizer(
            Path(config.tokenizer), template, config.end_token, day
        )
    except ValueError as error:
        raise PluginError(f"chat: {error}") from error


class Conversations(NamedTuple):
    """What settings name: rows of tokens, the numbers of those that are used, and the others."""

    tokenizer: LibraryTokenizer
    rows: chat_rows.ChatRows
    numbers: Any
    too_long: int


def read_conversations(config: ChatConfig, ignore_index: int) -> Conversations:
    """The conversations that settings name, in the files' order.

    Raises:
        PluginError: a file or the tokenizer cannot be read, or a conversation is refused.
    """
    chat = _need_tokenizer(config)
    if 0 <= ignore_index < chat.tokenizer.vocabulary:
        raise PluginError(
            f"chat: run.ignore_index is {ignore_index}, which is a token: set it to -100"
        )
    try:
        rows = chat_rows.read_chat(config, chat)
    except (errors.DataError, OSError) as error:
        raise PluginError(f"chat: {error}") from error
    return Conversations(chat.tokenizer, rows, *_fitting(rows, config))


def evaluated(config: ChatConfig, ignore_index: int) -> Iterator[Batch]:
    """All conversations of the files, batch by batch, for evaluation alone.

    Raises:
        PluginError: see `read_conversations`; or none is left.
    """
    tokenizer, rows, numbers, too_long = read_conversations(config, ignore_index)
    if not len(numbers):
        raise PluginError(f"chat: {config.path}: no conversation is left ({too_long} are too long)")
    sequences = chat_batches.Sequences(rows, numbers, config, tokenizer.end, ignore_index)
    data = chat_batches.ChatSequences(sequences, sequences, config, 0, tokenizer)
    return data.validation()


def _fitting(rows: chat_rows.ChatRows, config: ChatConfig) -> tuple[Any, int]:
    """Numbers of the conversations that are used, and how many are too long for it.

    Raises:
        PluginError: one is too long, and such are refused.
    """
    length = config.sequence_length
    lengths = rows.lengths()
    long = np.flatnonzero(lengths > length)
    if len(long) and config.too_long == "refuse":
        file, record = rows.where(int(long[0]))
        raise PluginError(
            f"chat: {file}, record {record}: the conversation has {lengths[long[0]] + 1} tokens, "
            f"and a sequence room for {length + 1} ({len(long)} of {len(lengths)} are too long): "
            "raise data.with.sequence_length, or set too_long: cut or leave_out"
        )
    usable = np.ones(len(lengths), np.bool_)
    for number in long.tolist():
        begin = int(rows.ends[number]) - int(lengths[number])  # of the first target
        cut = np.asarray(rows.answers[begin : begin + length])
        usable[number] = config.too_long == "cut" and bool(cut.any())
    return np.flatnonzero(usable), int((~usable).sum())


def _split(numbers: Any, config: ChatConfig, seed: int) -> tuple[Any, Any]:
    """Conversations to train on and to validate with, each in the files' order."""
    count = len(numbers)
    kept = round(count * config.validation_split)
    kept = min(max(1, kept), count - 1) if config.validation_split and count else 0
    generator = torch.Generator().manual_seed(stream_seed(seed, "split"))
    drawn = torch.randperm(count, generator=generator).numpy()
    return numbers[np.sort(drawn[kept:])], numbers[np.sort(drawn[:kept])]


class Chat(RemembersContent):
    """Conversations for language models, of which the answers are learned.

    The tokenizer's own chat template makes a text of each; targets are the tokens of the answers,
    and all others count for nothing. Conversations are packed with each other, so that no
    room is left, and none sees another.
    """

    info = PluginInfo(
        name="chat",
        kind=Kind.DATA,
        config=ChatConfig,
        provides=("data:tokens", "data:classes"),
        requires=required,
        alternatives="or set data.with.packing: false, which pads: any language model takes that",
        packages={
            "tokenizers": "pip install 'forge-kernel[tokenizers]'",
            "jinja2": "pip install 'forge-kernel[tokenizers]'",
        },
    )

    def __init__(self, config: ChatConfig) -> None:
        self.config = config
        self._identity = Identity("chat", config.on_change)

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The conversations as sequences; their tokens are mapped.

        Raises:
            PluginError: a file or the tokenizer cannot be read, a conversation is refused, or too
                few are left.
        """
        config, ignored = self.config, run.settings.ignore_index
        tokenizer, rows, numbers, too_long = read_conversations(config, ignored)
        chosen = _split(numbers, config, run.seed)
        if not len(chosen[0]):
            raise PluginError(
                f"chat: {config.path}: no conversation is left to train on ({too_long} are too "
                "long): raise data.with.sequence_length, or give more of them"
            )
        training, validation = (
            chat_batches.Sequences(rows, part, config, tokenizer.end, ignored) for part in chosen
        )
        if rows.left_out or too_long:
            left_out = f"{rows.left_out} rows without a conversation, {too_long} too long"
            run.emit_event("conversations_left_out", f"data.chat: {left_out}")
        if config.packing:
            run.emit_event(
                "conversations_packed",
                f"data.chat: {training.conversations} conversations in {training.count} sequences, "
                f"{training.filled:.1%} full",
                filled=training.filled,
            )
        self._identity.set(str(config.path), rows.content, len(rows.ends))
        return chat_batches.ChatSequences(
            training, validation, config, run.seed, tokenizer,
            rank=run.strategy.rank, world=run.strategy.world_size,
        )  # fmt: skip
