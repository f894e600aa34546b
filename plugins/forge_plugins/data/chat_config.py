"""What `data.chat` is told."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import Annotated, Literal

from msgspec import Meta

from forge_plugins.data.settings import (
    OnChange,
    SequenceBatchSize,
    SequenceValidationBatchSize,
    TokenCacheDir,
)


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Which conversations, how they become tokens, and how they are dealt out."""

    path: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="a file, a folder or a glob pattern: JSON Lines, JSON or Parquet, plain or "
            ".gz; a row has messages (role, content), or prompt and completion; it must be given",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    field: Annotated[
        str, Meta(min_length=1, description="the messages' field in a row")
    ] = "messages"  # fmt: skip
    tokenizer: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="a tokenizer.json, or a model's folder with one; it must be given",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    template: Annotated[
        str | None,
        Meta(
            description="a chat template in Jinja's language; null: the tokenizer's own "
            "(chat_template.jinja, or chat_template in tokenizer_config.json)",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    today: Annotated[
        Annotated[str, Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None,
        Meta(
            description="the day, as in 2026-01-31, that templates are told which ask for it "
            "(strftime_now); null: the day on which the run starts",
        ),
    ] = None
    end_token: Annotated[
        str | None,
        Meta(description="the token that ends a text; null: the tokenizer's eos_token"),
    ] = None
    answers: Annotated[
        Literal["all", "last"],
        Meta(description="the answers (messages of the role assistant) that are learned; nothing "
             "else is"),
    ] = "all"  # fmt: skip
    sequence_length: Annotated[
        int, Meta(ge=1, le=1048576, description="tokens in a sequence")
    ] = 1024  # fmt: skip
    packing: Annotated[
        bool,
        Meta(description="put several conversations into a sequence, none of which sees another; "
             "the model has to take it; else each is a sequence, padded to its batch's longest"),
    ] = True  # fmt: skip
    too_long: Annotated[
        Literal["refuse", "cut", "leave_out"],
        Meta(description="conversations of more than sequence_length tokens: the first is an "
             "error, their ends are cut off, or they are counted"),
    ] = "refuse"  # fmt: skip
    unreadable: Annotated[
        Literal["refuse", "leave_out"],
        Meta(description="rows that are no conversation, or have no answer to learn: the first is "
             "an error, or they are counted"),
    ] = "refuse"  # fmt: skip
    batch_size: SequenceBatchSize = 8
    validation_split: Annotated[
        float,
        Meta(ge=0, lt=1, description="fraction of the conversations, drawn from the run's seed, "
             "that is kept for validation"),
    ] = 0.05  # fmt: skip
    validation_batch_size: SequenceValidationBatchSize = 8
    cache_dir: TokenCacheDir = None
    on_change: OnChange = "refuse"

    def __post_init__(self) -> None:
        if self.today is not None:
            try:
                date.fromisoformat(self.today)
            except ValueError as error:
                raise ValueError(f"today: {self.today} is no day: {error}") from error
