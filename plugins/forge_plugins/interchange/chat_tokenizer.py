"""A tokenizer and its chat template, from a model's folder or beside a `tokenizer.json`."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any, Final, NamedTuple

from forge_plugins.mathematics.text.chat_template import ChatTemplate
from forge_plugins.mathematics.text.tokenizer_library import LibraryTokenizer

_NAMED: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
"""Tokens that a tokenizer has names for, which templates write."""


class ChatTokenizer(NamedTuple):
    """What turns a conversation into tokens."""

    tokenizer: LibraryTokenizer
    template: ChatTemplate
    specials: dict[str, str]


def read_chat_tokenizer(
    path: Path, template: Path | None, end: str | None, day: date | None
) -> ChatTokenizer:
    """A tokenizer with its template.

    Args:
        path: of `tokenizer.json`, or of the folder that holds it.
        template: a file in Jinja's language; None: the tokenizer's own.
        end: the token that ends a text; None: the tokenizer's `eos_token`, or the usual one.
        day: what templates are told of the time; None: now.

    Raises:
        ValueError: a file is missing or broken, or there is no template; the message begins with
            the file.
        ImportError: the library tokenizers is not installed.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{file}: there is no such file: name a tokenizer.json or its folder")
    content = _text(file)
    about = _object(file.parent / "tokenizer_config.json")
    specials = _specials(about, _object(file.parent / "special_tokens_map.json"))
    source, where = _template(file.parent, about, template)
    try:
        tokenizer = LibraryTokenizer(content, end or specials.get("eos_token"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    tokenizer.settings = {**specials, "chat_template": source}
    try:
        return ChatTokenizer(tokenizer, ChatTemplate(source, specials, day), specials)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        result = json.loads(_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{file}: holds no object: copy it anew from the model")  # noqa: TRY004
    return result


def _specials(about: dict[str, Any], older: dict[str, Any]) -> dict[str, str]:
    """Names of tokens and what they are written as; older folders keep them in a file apart."""
    result = {}
    for name in _NAMED:
        token = about.get(name, older.get(name))
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            result[name] = text
    return result


def _template(folder: Path, about: dict[str, Any], given: Path | None) -> tuple[str, Path]:
    """The template that is taken, and the file it is from.

    Raises:
        ValueError: there is none.
    """
    if given is not None:
        return _text(given), given
    own = folder / "chat_template.jinja"
    if own.is_file():
        return _text(own), own
    file = folder / "tokenizer_config.json"
    result = about.get("chat_template")
    if isinstance(result, list):  # several, each with a name
        named = {
            item.get("name"): item.get("template") for item in result if isinstance(item, dict)
        }
        result = named.get("default")
    if not isinstance(result, str):
        raise ValueError(  # noqa: TRY004  a folder of the user's
            f"{file}: the tokenizer has no chat template (chat_template, or a file "
            "chat_template.jinja): give one with data.with.template, or take the tokenizer of a "
            "chat model"
        )
    return result, file
