"""Layers of a configuration: the file, what it extends, and `--set` on top."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Final

from forge_kernel.config.document import Document, Path, look_up, show_path
from forge_kernel.config.yaml_file import parse_yaml, read_yaml, resolve
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import ConfigError, Fault, Mark

MAX_LAYERS: Final = 8
_STEP: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_-]*)|\[([0-9]{1,4})\]")

_CLOSING: Final = {"[": "]", "{": "}"}
"""How a list and a mapping begin, and how they end."""
_QUOTED: Final = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
"""A text in quotes from end to end."""


def merge(base: Document, top: Document) -> Document:
    """Lay one document over another: mappings are merged, all else is replaced.

    Where the upper layer names another plugin (`use`), the lower layer's `with` goes with the
    plugin that it belonged to.
    """
    stack: list[Path] = [()]
    while stack:
        path = stack.pop()
        below, above = look_up(base.data, path), look_up(top.data, path)
        if "use" in above and above["use"] != below.get("use"):
            base.remove((*path, "with"))
        for key, value in above.items():
            inner = (*path, key)
            if isinstance(value, dict) and isinstance(below.get(key), dict):
                stack.append(inner)
                base.values[inner] = top.mark(inner)
                base.keys[inner] = top.key_mark(inner)
            else:
                base.put(inner, top, inner)
    base.values[()] = top.mark(())
    return base


def read_layers(file: FilePath) -> Document:
    """Read a file and, below it, what it `extends`.

    Raises:
        ConfigError: a file of the chain is missing, not strict YAML, or extends itself.
    """
    layers: list[Document] = []
    seen: list[FilePath] = []
    current: FilePath | None = file
    asked: Mark | None = None
    while current is not None:
        real = FilePath(os.path.realpath(current))  # resolve() fails on a link to itself
        if real in seen or len(layers) >= MAX_LAYERS:
            many = f"is one layer too many: at most {MAX_LAYERS} files"
            why = "extends itself" if real in seen else many
            raise ConfigError([Fault(f"{current} {why}", "extends", asked)])
        seen.append(real)
        if asked is not None and not os.path.isfile(current):  # is_file() may raise
            raise ConfigError([Fault(f"there is no file {current}", "extends", asked)])
        document = read_yaml(current)
        layers.append(document)
        name, asked = document.data.get("extends"), document.mark(("extends",))
        document.remove(("extends",))
        if name is None:
            break
        if not isinstance(name, str) or not name or "\0" in name:
            raise ConfigError([Fault("must be the name of a file", "extends", asked)])
        current = current.parent / name
    merged = layers.pop()
    while layers:
        merged = merge(merged, layers.pop())
    return merged


def parse_key(text: str) -> Path | None:
    """Read `a.b[0].c`; None when it has another form."""
    path: list[str | int] = []
    position = 0
    while position < len(text):
        if path and text[position] == ".":
            position += 1
        elif path and text[position] != "[":
            return None
        result = _STEP.match(text, position)
        if result is None:
            return None
        path.append(result[1] if result[1] is not None else int(result[2]))
        position = result.end()
    return tuple(path) or None


def _parse_setting(text: str) -> tuple[Path, Document]:
    """Split `a.b=value`; `a.b = value` is the same.

    The value is a scalar, list or mapping where the whole of it is one by the file's rules; all
    else is text, exactly as it was typed (in a file `#`, `: `, `*` and blanks at an end mean more).
    """
    source = f"--set {text}"
    key, equals, value = text.partition("=")
    path = parse_key(key.strip())
    if not equals or path is None:
        message = "an override has the form key.key[0].key=value"
        raise ConfigError([Fault(message, mark=Mark(source))])
    if key.endswith(" "):
        value = value.removeprefix(" ")
    if not value.strip():
        message = "there is no value after the equals sign (a variable of the shell that is unset?)"
        hints = ("write null for no value, '\"\"' for an empty text",)
        raise ConfigError([Fault(message, show_path(path), Mark(source), hints)])
    try:
        return path, _parse_value(value, source)
    except ConfigError as error:  # places in an argument are not worth telling
        raise ConfigError(
            [Fault(fault.message, show_path(path), Mark(source), fault.hints)
             for fault in error.faults]
        ) from error  # fmt: skip


def _parse_value(text: str, source: str) -> Document:
    """The value of an override as a document with the one key `value`.

    Raises:
        ConfigError: a list, a mapping or quoted text that is not strict YAML, a number that is
            none, or characters that no configuration may have.
    """
    trimmed = text.strip()
    closing = _CLOSING.get(trimmed[0])
    several = closing is not None and (trimmed[-1] == closing or closing not in trimmed)
    if several or _QUOTED.fullmatch(trimmed):
        document = parse_yaml(f"value: {trimmed}", source)
        if set(document.data) != {"value"}:
            raise ConfigError([Fault("the value is not one value")])
    else:
        unusable = next((sign for sign in text if sign == "\0" or "\ud800" <= sign < "\ue000"), "")
        if unusable:
            raise ConfigError([Fault(f"the character U+{ord(unusable):04X} is not allowed")])
        try:
            value = resolve(trimmed)
        except ValueError as error:
            raise ConfigError([Fault(str(error))]) from error
        document = parse_yaml("value:", source)
        document.data["value"] = text if isinstance(value, str) else value
    for table in (document.values, document.keys):
        for known in table:
            table[known] = Mark(source)
    return document


def apply_settings(document: Document, settings: Sequence[str]) -> Document:
    """Lay `--set` overrides over a document; a change of `use` goes first.

    Raises:
        ConfigError: an override that cannot be read or has no place.
    """
    parsed = [_parse_setting(text) for text in settings]
    parsed.sort(key=lambda item: item[0][-1] != "use")
    for path, value in parsed:
        _apply(document, path, value)
    return document


def _apply(document: Document, path: Path, setting: Document) -> None:
    mark = setting.mark(())
    if path[0] == "extends":
        message = "only a file can say what it extends"
        raise ConfigError([Fault(message, show_path(path), mark)])
    target: Any = document.data
    for depth, part in enumerate(path[:-1]):
        if isinstance(part, str) and isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
            document.values[path[: depth + 1]] = mark
            document.keys[path[: depth + 1]] = mark
        target = _step(target, part, path, mark)
    last = path[-1]
    if isinstance(last, int):
        _step(target, last, path, mark)
    elif not isinstance(target, dict):
        raise ConfigError([Fault("its parent is not a mapping", show_path(path), mark)])
    elif last == "use" and target.get("use") != setting.data["value"]:
        document.remove((*path[:-1], "with"))
    document.put(path, setting, ("value",))
    document.keys[path] = mark


def _step(target: Any, part: str | int, path: Path, mark: Mark) -> Any:
    if isinstance(part, int):
        if not isinstance(target, list) or part >= len(target):
            count = len(target) if isinstance(target, list) else "no"
            message = f"there is no entry [{part}] (the list has {count} entries)"
            raise ConfigError([Fault(message, show_path(path), mark)])
        return target[part]
    if not isinstance(target, Mapping):
        raise ConfigError([Fault("its parent is not a mapping", show_path(path), mark)])
    return target[part]


def without_nulls(document: Document) -> Document:
    """Take a plugin or section set to null as not being there (`--set quantizer=null`)."""
    for key in ("run", "plugins", *(kind.value for kind in Kind)):
        if key in document.data and document.data[key] is None:
            del document.data[key]
    return document
