"""Conversations from JSON and Parquet: rows of messages, or of a prompt and its answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.readers.field_values import type_name
from forge_plugins.formats.readers.json_objects import objects
from forge_plugins.formats.readers.json_text import JsonText
from forge_plugins.formats.readers.parquet_rows import PARQUET, parquet_rows
from forge_plugins.formats.source_files import suffix_of

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
SUFFIXES: Final = (".json", ".jsonl", ".ndjson", *PARQUET)
PROMPT, COMPLETION, TOOLS = "prompt", "completion", "tools"


@dataclass(frozen=True)
class Conversation:
    """What was said, and where it stands.

    Args:
        messages: each with `role` and `content`.
        answers: places of the answers among them that are learned.
        tools: JSON Schemas of functions, or None.
        record: number of the row in its file.
        place: of the row, such as `line 3`, where there are lines.
    """

    messages: list[dict[str, Any]]
    answers: list[int]
    tools: list[Any] | None
    record: int
    place: str | None


class RowError(ValueError):
    """A row that is no conversation.

    Args:
        message: what is wrong.
        field: where.
        hint: how to mend it.
    """

    def __init__(self, message: str, field: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.field, self.hint = message, field, hint


def rows(file: Path, field: str, room: Path) -> Iterator[tuple[int, Any, str | None]]:
    """Number, value and place of each row of a file.

    Args:
        file: JSON Lines, or an array of objects, plain or compressed with gzip; or Parquet.
        field: of the messages.
        room: a folder where rows of Parquet are written down.

    Raises:
        DataError: the file is broken, or its suffix is none of `SUFFIXES`.
    """
    suffix = suffix_of(file)
    if suffix not in SUFFIXES:
        hint = f"give files of {', '.join(SUFFIXES)}"
        raise DataError(
            file, f"the suffix {suffix or '(none)'} is not one of conversations", hint=hint
        )
    if suffix not in PARQUET:
        with file.open("rb") as stream:
            yield from objects(JsonText(file, stream))
        return
    hint = "name it with data.with.field, or give prompt and completion"
    for record, value in parquet_rows(file, (field, PROMPT, COMPLETION, TOOLS), room, hint):
        yield record, value, None  # it has no lines


def conversation(record: int, value: Any, place: str | None, field: str) -> Conversation:
    """A row's conversation.

    Args:
        record: number of the row.
        value: of the row.
        place: of the row.
        field: of the messages.

    Raises:
        RowError: it is none, or there is nothing in it to learn.
    """
    if not isinstance(value, Mapping):
        raise RowError(f"the row is a {type_name(value)}, not an object", field, "see its form")
    tools = value.get(TOOLS)
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"holds a {type_name(tools)}", TOOLS, "give a list of JSON Schemas")
    if value.get(field) is not None:
        messages, begin = _messages(value[field], field), 0
    elif value.get(PROMPT) is not None and value.get(COMPLETION) is not None:
        asked = _side(value[PROMPT], PROMPT, "user")
        messages = [*asked, *_side(value[COMPLETION], COMPLETION, "assistant")]
        begin = len(asked)
    else:
        raise RowError(
            f"is missing; there are {sorted(value)[:8]}", field,
            "give messages, or prompt and completion; data.with.field names the messages",
        )  # fmt: skip
    places = [at for at, item in enumerate(messages) if at >= begin and item["role"] == "assistant"]
    if not places:
        raise RowError("there is no answer (a message of the role assistant) to learn", field,
                       "add it, or leave the row out")  # fmt: skip
    return Conversation(messages, places, tools or None, record, place)


def _side(value: Any, field: str, role: str) -> list[dict[str, Any]]:
    """One side of a pair, as messages."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    return _messages(value, field)


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else f"a {type_name(value)}"
        raise RowError(f"holds {what}", field, "give a list of messages (role, content)")
    for at, item in enumerate(value):
        where = f"{field}[{at}]"
        if not isinstance(item, dict):
            raise RowError(f"is a {type_name(item)}", where, "a message is an object")
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            hint = f"roles are {', '.join(ROLES)}"
            raise RowError(f"the role {str(role)[:40]!r} is not known", where, hint)
        calls = role == "assistant" and bool(item.get("tool_calls"))
        if not isinstance(content, str) and not (content is None and calls):
            raise RowError(f"its content is a {type_name(content)}", where, "give a text")
        if role == "assistant" and not calls and not str(content).strip():
            raise RowError("the answer is empty", where, "write it, or leave the row out")
    return value
