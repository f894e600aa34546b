"""Texts in a file: one plain text, or a field of each object or row; in bounded memory."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.readers.field_values import type_name
from forge_plugins.formats.readers.json_objects import objects
from forge_plugins.formats.readers.json_text import JsonText
from forge_plugins.formats.readers.parquet_rows import PARQUET, parquet_rows
from forge_plugins.formats.source_files import suffix_of

PART: Final = 2**18
"""Bytes of a plain text that are given at a time, cut at an end of a line."""
REASONS: Final = ("missing field", "wrong type", "length", "duplicate")
"""Why a document is left out, in the order in which one that has several is counted."""
_JSON: Final = {".json", ".jsonl", ".ndjson"}
SUFFIXES: Final = (".txt", ".md", *sorted(_JSON), *PARQUET)
"""Of the files of a folder that are read; of a file that is named, any is."""
_EXAMPLES: Final = 20


@dataclass
class Account:
    """What was found in the documents of a file.

    Args:
        documents: that were given.
        characters: of them.
        left_out: those that were not given, by reason.
        examples: numbers of the first of them, by reason.
        seen: hashes of documents, where repeated ones are left out: also those of other files.
    """

    documents: int = 0
    characters: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)
    seen: set[bytes] = field(default_factory=set, repr=False, compare=False)

    def leave_out(self, reason: str, record: int) -> None:
        """Count a document that is not given."""
        assert reason in REASONS
        self.left_out[reason] = self.left_out.get(reason, 0) + 1
        first = self.examples.setdefault(reason, [])
        if len(first) < _EXAMPLES:
            first.append(record)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """The texts of a file, read anew by each iteration.

    Args:
        file: plain UTF-8, which is one document; or, by its suffix (`.json`, `.jsonl`, `.ndjson`),
            objects with a text each, either may be compressed with gzip; or Parquet.
        key: the text's field in an object, or its column.
        least: characters that a document must have; shorter ones are left out and counted.
        once: leave out documents that repeat an earlier one, character by character; 16 bytes are
            held of each.
        lenient: leave out objects without a text and count them; else the first is an error.
    """

    file: Path
    key: str = "text"
    least: int = 1
    once: bool = False
    lenient: bool = False

    def parts(self, account: Account, room: Path | None = None) -> Iterator[tuple[str, bool]]:
        """Texts that follow each other, and whether each ends a document.

        Args:
            account: what is found is noted here.
            room: a folder where rows of Parquet are written down; None: one for temporary files.

        Raises:
            DataError: the file is broken, or a text is none.
        """
        suffix = suffix_of(self.file)
        if suffix in PARQUET:
            hint = "name the column of the texts (field)"
            with (
                TemporaryDirectory(dir=room) as place,
                closing(parquet_rows(self.file, [self.key], Path(place), hint)) as rows,
            ):
                yield from self._texts(((*row, None) for row in rows), account)
            return
        with self.file.open("rb") as stream:
            text = JsonText(self.file, stream)
            if suffix in _JSON:
                yield from self._texts(objects(text), account)
            else:
                yield from self._plain(text, account)

    def _texts(
        self, values: Iterable[tuple[int, Any, str | None]], account: Account
    ) -> Iterator[tuple[str, bool]]:
        for record, value, place in values:
            result = self._text(record, value, place, account)
            if result is None:
                continue
            if self.once:
                digest = hashlib.blake2b(result.encode("utf-8", "surrogatepass"), digest_size=16)
                if digest.digest() in account.seen:
                    account.leave_out("duplicate", record)
                    continue
                account.seen.add(digest.digest())
            account.documents += 1
            account.characters += len(result)
            yield result, True

    def _text(self, record: int, value: Any, place: str | None, account: Account) -> str | None:
        """The text of an object; None when it is left out."""
        reason = None
        if not isinstance(value, dict):
            reason, message = "wrong type", f"the record is a {type_name(value)}, not an object"
        elif self.key not in value:
            reason, message = "missing field", f"is missing; there are {sorted(value)[:8]}"
        elif not isinstance(value[self.key], str):
            reason, message = "wrong type", f"holds a {type_name(value[self.key])}, not a text"
        if reason is None:
            result: str = value[self.key]
            if len(result) >= self.least:
                return result
            reason = "length"
        elif not self.lenient:
            hint = "name the field of the texts, or leave such objects out"
            raise DataError(
                self.file, message, record=record, field=self.key, place=place, hint=hint
            )
        account.leave_out(reason, record)
        return None

    def _plain(self, text: JsonText, account: Account) -> Iterator[tuple[str, bool]]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        held, place, before = "", text.begin, account.characters
        while text.held or text.more():
            raw = text.held
            try:
                held += decoder.decode(raw)
            except UnicodeDecodeError as error:
                at = place - len(error.object) + len(raw) + error.start
                raise DataError(
                    self.file, f"is no UTF-8: {error.reason}", place=f"byte {at}",
                    hint="save it as UTF-8",
                ) from error  # fmt: skip
            place += len(raw)
            text.drop(len(raw))
            if len(held) >= PART:
                cut = held.rfind("\n") + 1 or len(held)
                account.characters += cut
                yield held[:cut], False
                held = held[cut:]
        try:
            held += decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise DataError(
                self.file, "ends within a character", place=f"byte {place}", hint="save it anew"
            ) from error
        if account.characters - before + len(held) < self.least:
            account.leave_out("length", 0)
            return
        account.characters += len(held)
        account.documents += 1
        yield held, True
