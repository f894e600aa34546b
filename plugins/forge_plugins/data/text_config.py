"""What `data.text` is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from forge_plugins.data.settings import (
    OnChange,
    SequenceBatchSize,
    SequenceValidationBatchSize,
    TokenCacheDir,
)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text, and how it is cut."""

    renamed: ClassVar[Mapping[str, str]] = {
        "length": "sequence_length",
        "validation_share": "validation_split",
        "shortest": "min_chars",
        "repeats": "deduplicate",
    }
    renamed_values: ClassVar[Mapping[str, Mapping[str, bool]]] = {
        "repeats": {"keep": False, "leave_out": True}
    }

    path: Annotated[
        str | None,
        Meta(
            description="a UTF-8 text, or JSON Lines or an array of objects with a text each "
            "(.json, .jsonl, .ndjson), plain or .gz, or Parquet (extra: parquet); or a folder of "
            "such files (.txt and .md are texts), or a glob pattern; null: the help texts about "
            "the language that every Python carries (pydoc_data.topics, English, half a megabyte)",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    field: Annotated[
        str, Meta(min_length=1, description="the text's field in an object, or its column")
    ] = "text"
    tokenizer: Annotated[
        Literal["bytes", "characters", "library"],
        Meta(
            description="one token for each byte of UTF-8, for each character of the text, or as "
            "tokenizer_file says"
        ),
    ] = "bytes"
    tokenizer_file: Annotated[
        str | None,
        Meta(
            description="a tokenizer.json of tokenizers or transformers, or the folder of a model "
            "that has one (extra: tokenizers)",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    end_token: Annotated[
        str | None,
        Meta(
            description="the token of tokenizer_file that stands after each document; null: the "
            "usual one, such as <|endoftext|> or </s>"
        ),
    ] = None
    sequence_length: Annotated[int, Meta(ge=1, le=65536, description="tokens in a sequence")] = 128
    document_mask: Annotated[
        bool,
        Meta(
            description="documents that share a sequence do not see each other, and each begins at "
            "position 0; the end token stands before each"
        ),
    ] = False
    batch_size: SequenceBatchSize = 16
    validation_split: Annotated[
        float,
        Meta(
            gt=0, lt=1, description="fraction of the text, at its end, that is kept for validation"
        ),
    ] = 0.05
    validation_batch_size: SequenceValidationBatchSize = 64
    min_chars: Annotated[
        int,
        Meta(ge=1, description="characters of a document; shorter ones are left out and counted"),
    ] = 1
    deduplicate: Annotated[
        bool,
        Meta(description="leave out and count documents that are an earlier one again; 16 bytes "
             "are held of each"),
    ] = False  # fmt: skip
    unreadable: Annotated[
        Literal["refuse", "leave_out"],
        Meta(description="objects without a text: the first is an error, or they are counted"),
    ] = "refuse"
    cache_dir: TokenCacheDir = None
    on_change: OnChange = "refuse"

    def __post_init__(self) -> None:
        if (self.tokenizer == "library") != (self.tokenizer_file is not None):
            raise ValueError("tokenizer: library and tokenizer_file go together")
        if self.end_token is not None and self.tokenizer_file is None:
            raise ValueError("end_token is one of tokenizer_file, which is not given")
