"""Conversations as tokens, and which of these are of answers; read once, kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from forge_plugins.formats.columns import cache
from forge_plugins.formats.columns.column_writer import ColumnFolder
from forge_plugins.formats.columns.gather import Column
from forge_plugins.formats.columns.metadata_cache import Memos
from forge_plugins.formats.columns.source_file import Source
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.readers import conversations
from forge_plugins.formats.source_files import source_files
from forge_plugins.mathematics.text.chat_template import Span, answer_spans

if TYPE_CHECKING:
    from forge_plugins.data.chat_config import ChatConfig
    from forge_plugins.interchange.chat_tokenizer import ChatTokenizer
    from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer

_VERSION: Final = "1"
"""Of what conversations become: a change needs another one."""
_TOGETHER: Final = 2**18  # characters that are encoded at a time
_MARKS: Final = "set data.with.answers: last, or mark the answers by {% generation %} in a template"


@dataclass(frozen=True)
class ChatRows:
    """Conversations as one row of tokens.

    Args:
        files: that they are from.
        tokens: of all, shape (n,).
        answers: whether each is of an answer that is learned, shape (n,), 0 or 1.
        ends: where each conversation ends, shape (conversations,).
        places: the number of its file and of its row there, shape (conversations, 2).
        content: hash of what they were read from, and of what they became.
        left_out: rows that are not in it.
    """

    files: list[Path]
    tokens: Column
    answers: Column
    ends: Column
    places: Column
    content: str
    left_out: int

    def lengths(self) -> Column:
        """Inputs in each conversation: its last token is a target alone."""
        return np.diff(np.asarray(self.ends), prepend=0) - 1

    def where(self, number: int) -> tuple[Path, int]:
        """The file and the row of a conversation."""
        file, record = np.asarray(self.places[number]).tolist()
        return self.files[file], record


@dataclass(frozen=True)
class _Text:
    """A conversation's text, and where it is from."""

    text: str
    spans: Sequence[Span]
    file: int
    said: conversations.Conversation


class _Encoding:
    """Files on their way to a row of tokens, which is kept in the cache."""

    def __init__(self, config: ChatConfig, chat: ChatTokenizer) -> None:
        assert config.path is not None, "the plan asks for it"
        self._config, self._chat = config, chat
        self._files = source_files(config.path, conversations.SUFFIXES)
        first = self._files[0]
        given = config.cache_dir
        self._folder = cache.default_folder(first) if given is None else Path(given)
        self._sources = [Source(file) for file in self._files]
        memos = Memos(self._folder)
        contents = [source.content(memos) for source in self._sources]
        self._content = hashlib.sha256("/".join(contents).encode()).hexdigest()
        self._left_out = 0

    def _key(self) -> str:
        config, (tokenizer, template, specials) = self._config, self._chat
        day = (config.today or str(date.today())) if template.tells_time else ""
        made_by = (tokenizer.content, template.source, repr(sorted(specials.items())))
        return cache.content_key(
            self._content, "chat", _VERSION, config.field, config.answers, config.unreadable, day,
            *(hashlib.sha256(text.encode()).hexdigest() for text in made_by),
        )  # fmt: skip

    def rows(self) -> ChatRows:
        """Mapped from the cache, written now if they are not there."""
        key, first = self._key(), self._files[0]
        result = cache.cached(self._folder, key)
        if result is None:
            result = cache.keep(first, self._folder, key, self._fill, lambda kept: kept)
        columns = result.columns
        digest = hashlib.sha256(self._content.encode())
        for name in ("tokens", "answers", "ends"):
            digest.update(np.ascontiguousarray(columns[name]).data)
        return ChatRows(
            self._files, columns["tokens"], columns["answers"], columns["ends"],
            columns["places"], digest.hexdigest(), int(columns["left_out"][0]),
        )  # fmt: skip

    def _fill(self, folder: Path) -> dict[str, Any]:
        columns = ColumnFolder(self._files[0], folder)
        self._left_out = 0
        try:
            self._write(columns, folder)
            written = columns.close()
        finally:
            columns.abandon()
        for source in self._sources:
            source.check_whole()
        return written

    def _write(self, columns: ColumnFolder, folder: Path) -> None:
        tokenizer = self._chat.tokenizer
        kind = np.dtype(np.uint16 if tokenizer.vocabulary <= 2**16 else np.int32)
        end = 0
        for texts in _together(self._texts(folder)):
            for item, tokens, answers in _encoded(tokenizer, texts):
                if not answers[1:].any():
                    self._refuse(item.file, item.said.record, item.said.place, self._no_answer())
                    continue
                end += len(tokens)
                columns.append("tokens", tokens.astype(kind))
                columns.append("answers", answers)
                columns.append("ends", np.array([end], np.int64))
                columns.append("places", np.array([[item.file, item.said.record]], np.int64))
        if not end:
            left_out = f": {self._left_out} rows are left out" if self._left_out else ""
            raise DataError(
                self._files[0], f"there is no conversation{left_out}",
                hint="set data.with.unreadable: refuse to see why",
            )  # fmt: skip
        columns.append("left_out", np.array([self._left_out], np.int64))

    def _no_answer(self) -> conversations.RowError:
        return conversations.RowError(
            "the template writes nothing of its answers: everything in it is masked",
            self._config.field, "look at the template, or leave the row out",
        )  # fmt: skip

    def _texts(self, folder: Path) -> Iterator[_Text]:
        for number, file in enumerate(self._files):
            for record, value, place in conversations.rows(file, self._config.field, folder):
                try:
                    yield self._text(number, record, value, place)
                except conversations.RowError as error:
                    self._refuse(number, record, place, error)

    def _text(self, number: int, record: int, value: Any, place: str | None) -> _Text:
        """The text of a row.

        Raises:
            RowError: it has none.
        """
        config = self._config
        said = conversations.conversation(record, value, place, config.field)
        chosen = said.answers if config.answers == "all" else said.answers[-1:]
        try:
            text, spans = answer_spans(self._chat.template, said.messages, said.tools, chosen)
        except ValueError as error:
            raise conversations.RowError(str(error), config.field, _MARKS) from error
        return _Text(text, spans, number, said)

    def _refuse(
        self, number: int, record: int, place: str | None, error: conversations.RowError
    ) -> None:
        """Count a row that is none.

        Raises:
            DataError: such rows are refused.
        """
        if self._config.unreadable == "refuse":
            raise DataError(
                self._files[number], error.message, record=record, place=place, field=error.field,
                hint=error.hint,
            ) from error  # fmt: skip
        self._left_out += 1


def _together(texts: Iterator[_Text]) -> Iterator[list[_Text]]:
    """As many texts as are encoded at a time."""
    result: list[_Text] = []
    held = 0
    for item in texts:
        result.append(item)
        held += len(item.text)
        if held >= _TOGETHER:
            yield result
            result, held = [], 0
    if result:
        yield result


def _encoded(
    tokenizer: LibraryTokenizer, texts: list[_Text]
) -> Iterator[tuple[_Text, Column, Column]]:
    """Tokens, and whether each is of an answer: whether it shares a character with one."""
    placed = tokenizer.encode_placed([item.text for item in texts])
    for item, (tokens, offsets) in zip(texts, placed, strict=True):
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        answers = np.zeros(len(tokens), np.uint8)
        for begin, end in item.spans:
            answers |= (begins < end) & (ends > begin)
        yield item, np.array(tokens, np.int64), answers


def read_chat(config: ChatConfig, chat: ChatTokenizer) -> ChatRows:
    """The conversations that settings name.

    Raises:
        DataError: a file cannot be read, or a row is refused.
        OSError: a file cannot be read.
    """
    return _Encoding(config, chat).rows()
