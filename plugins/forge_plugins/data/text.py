"""Texts as sequences of tokens, for language models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import (
    Data,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    hookimpl,
)
from forge_plugins.data.fingerprint import Identity, RemembersContent
from forge_plugins.data.text_config import TextConfig

if TYPE_CHECKING:
    import numpy as np

    from forge_plugins.data import text_batches
    from forge_plugins.formats import errors, source_files
    from forge_plugins.formats.columns import cache, metadata_cache, source_file
    from forge_plugins.formats.columns.column_writer import ColumnFolder
    from forge_plugins.formats.readers import documents
    from forge_plugins.mathematics.text import chunks, tokenizer_library, tokenizers
else:
    np = LazyModule("numpy")
    text_batches = LazyModule("forge_plugins.data.text_batches")
    cache = LazyModule("forge_plugins.formats.columns.cache")
    documents = LazyModule("forge_plugins.formats.readers.documents")
    errors = LazyModule("forge_plugins.formats.errors")
    metadata_cache = LazyModule("forge_plugins.formats.columns.metadata_cache")
    source_files = LazyModule("forge_plugins.formats.source_files")
    source_file = LazyModule("forge_plugins.formats.columns.source_file")
    chunks = LazyModule("forge_plugins.mathematics.text.chunks")
    tokenizer_library = LazyModule("forge_plugins.mathematics.text.tokenizer_library")
    tokenizers = LazyModule("forge_plugins.mathematics.text.tokenizers")

_VERSION: Final = "1"
"""Of what texts become: a change needs another one."""
_TOGETHER: Final = 2**18  # characters that are encoded at a time
_SHIPPED: Final = "the shipped text"


@dataclass(frozen=True)
class Row:
    """A text as one row of tokens.

    Args:
        tokens: shape (n,), each document followed by the end token.
        tokenizer: of the tokens.
        content: hash of what they were read from.
        left_out: documents that are not in it, by reason.
    """

    tokens: Any
    tokenizer: tokenizers.Tokenizer
    content: str
    left_out: dict[str, int]


def _shipped(config: TextConfig) -> Row:
    """The text that Python carries, in memory."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    tokenizer = _library(config) or (
        tokenizers.ByteTokenizer()
        if config.tokenizer == "bytes"
        else tokenizers.CharacterTokenizer.of("".join(texts))
    )
    row = chunks.encode_documents(map(tokenizer.encode, texts), tokenizer.end)
    content = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return Row(row.numpy(), tokenizer, content, {})


def _library(config: TextConfig) -> tokenizers.Tokenizer | None:
    """The tokenizer of a file, if one is asked for.

    Raises:
        PluginError: it cannot be read, or its library is not installed.
    """
    if config.tokenizer_file is None:
        return None
    file = Path(config.tokenizer_file)
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        content = file.read_text(encoding="utf-8")
        return tokenizer_library.LibraryTokenizer(content, config.end_token)
    except ImportError as error:
        message = "tokenizer.json is read by tokenizers, which is not installed"
        raise PluginError(f"text: {message}; pip install 'forge-kernel[tokenizers]'") from error
    except (OSError, ValueError) as error:
        raise PluginError(f"text: {file}: {error}") from error


class _Encoding:
    """Files on their way to one row of tokens, which is kept in the cache."""

    def __init__(self, config: TextConfig, path: str) -> None:
        files = source_files.source_files(path, documents.SUFFIXES)
        self._config, self._path = config, files[0]
        given = config.cache_dir
        self._folder = cache.default_folder(files[0]) if given is None else Path(given)
        self._sources = [source_file.Source(file) for file in files]
        memos = metadata_cache.Memos(self._folder)
        contents = [source.content(memos) for source in self._sources]
        several = hashlib.sha256("/".join(contents).encode()).hexdigest()
        self._content = contents[0] if len(contents) == 1 else several
        self._library = _library(config)
        self._texts = [
            documents.Documents(
                file=file, key=config.field, least=config.min_chars,
                once=config.deduplicate, lenient=config.unreadable == "leave_out",
            )
            for file in files
        ]  # fmt: skip

    def _parts(self, account: documents.Account, room: Path) -> Iterator[tuple[str, bool]]:
        """The texts of all files, one after the other."""
        for texts in self._texts:
            yield from texts.parts(account, room)

    def row(self) -> Row:
        """Mapped from the cache, written now if it is not there.

        Raises:
            DataError: the file is broken, or no document is left.
        """
        config, library = self._config, self._library
        named = hashlib.sha256(getattr(library, "content", config.tokenizer).encode()).hexdigest()
        settings = (
            "text", _VERSION, config.tokenizer, named, str(config.end_token), config.field,
            str(config.min_chars), str(config.deduplicate), config.unreadable,
        )  # fmt: skip
        key = cache.content_key(self._content, *settings)
        result = cache.cached(self._folder, key)
        if result is None:
            result = cache.keep(self._path, self._folder, key, self._fill, lambda kept: kept)
        columns = result.columns
        counts = dict(zip(documents.REASONS, columns["left_out"].tolist(), strict=True))
        left_out = {reason: count for reason, count in counts.items() if count}
        tokenizer = self._tokenizer(columns.get("alphabet"))
        return Row(columns["tokens"], tokenizer, self._content, left_out)

    def _tokenizer(self, alphabet: Any) -> tokenizers.Tokenizer:
        if self._library is not None:
            return self._library
        if alphabet is None:
            return tokenizers.ByteTokenizer()
        return tokenizers.CharacterTokenizer([chr(item) for item in alphabet.tolist()])

    def _fill(self, folder: Path) -> dict[str, Any]:
        from forge_plugins.formats.columns.column_writer import ColumnFolder

        columns = ColumnFolder(self._path, folder)
        try:
            self._write(columns, folder)
            written = columns.close()
        finally:
            columns.abandon()
        for source in self._sources:
            source.check_whole()
        return written

    def _write(self, columns: ColumnFolder, room: Path) -> None:
        tokenizer = self._tokenizer(self._alphabet(columns, room))
        kind = np.dtype(np.uint16 if tokenizer.vocabulary <= 2**16 else np.int32)
        account = documents.Account()
        for texts, ends in _together(self._parts(account, room)):
            for tokens, ended in zip(_encoded(tokenizer, texts), ends, strict=True):
                columns.append("tokens", np.asarray(tokens).astype(kind))
                if ended:
                    columns.append("tokens", np.array([tokenizer.end], kind))
        if not account.documents:
            message = f"no document is left: {account.left_out or 'there is none'}"
            raise errors.DataError(
                self._path, message, hint="look at it: forge data FILE --input text"
            )
        left_out = [account.left_out.get(reason, 0) for reason in documents.REASONS]
        columns.append("left_out", np.array(left_out, np.int64))

    def _alphabet(self, columns: ColumnFolder, room: Path) -> Any:
        """The characters of the text, for a tokenizer that counts them; None for others."""
        if self._config.tokenizer != "characters":
            return None
        seen: set[str] = set()
        for text, _ in self._parts(documents.Account(), room):
            seen.update(text)
        result = np.array([ord(item) for item in sorted(seen)], np.int64)
        if len(result):
            columns.append("alphabet", result)
        return result


def _encoded(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Iterator[Any]:
    if isinstance(tokenizer, tokenizer_library.LibraryTokenizer):
        yield from tokenizer.encode_all(texts)
        return
    for text in texts:
        yield tokenizer.encode(text).numpy()


def _together(parts: Iterator[tuple[str, bool]]) -> Iterator[tuple[list[str], list[bool]]]:
    """As many texts as are encoded at a time."""
    texts: list[str] = []
    ends: list[bool] = []
    held = 0
    for text, ended in parts:
        texts.append(text)
        ends.append(ended)
        held += len(text)
        if held >= _TOGETHER:
            yield texts, ends
            texts, ends, held = [], [], 0
    if texts:
        yield texts, ends


def read_row(config: TextConfig) -> Row:
    """The row of tokens that settings name.

    Raises:
        PluginError: the file or the tokenizer cannot be read.
    """
    if config.path is None:
        return _shipped(config)
    try:
        return _Encoding(config, config.path).row()
    except (errors.DataError, OSError) as error:
        raise PluginError(f"text: {error}") from error


def required(config: TextConfig) -> tuple[str, ...]:
    """What the model must be: one to which it can be said where a text begins."""
    return ("model:packed_sequences",) if config.document_mask else ()


class Text(RemembersContent):
    """Texts as sequences of tokens, for language models.

    Encodes a text once and cuts it into sequences.
    """

    info = PluginInfo(
        name="text",
        kind=Kind.DATA,
        config=TextConfig,
        provides=("data:tokens", "data:classes", "data:text"),
        requires=required,
        alternatives="or set data.with.document_mask: false: any language model takes that",
    )

    def __init__(self, config: TextConfig) -> None:
        self.config = config
        self._identity = Identity("text", config.on_change)

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The text's sequences; of a file, its tokens are mapped.

        Raises:
            PluginError: the file cannot be read, or is too short for the sequences.
        """
        config = self.config
        row = read_row(config)
        place = chunks.cut(len(row.tokens), config.validation_split)
        training, validation = row.tokens[:place], row.tokens[place:]
        if len(training) < 2 * config.sequence_length or len(validation) <= config.sequence_length:
            raise PluginError(
                f"text: {len(row.tokens)} tokens are too few for sequences of "
                f"{config.sequence_length}: {len(training)} are left to train on and "
                f"{len(validation)} to validate; lower data.with.sequence_length, change "
                "data.with.validation_split, or give a longer text"
            )
        if row.left_out:
            run.emit_event("documents_left_out", f"data.text: {json.dumps(row.left_out)}")
        self._identity.set(config.path or _SHIPPED, row.content, len(row.tokens))
        return text_batches.TokenSequences(
            training, validation, config, run.seed, row.tokenizer,
            rank=run.strategy.rank, world=run.strategy.world_size,
        )  # fmt: skip
