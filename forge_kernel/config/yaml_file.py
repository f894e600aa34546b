"""Strict YAML: 1.2 core scalars, one meaning for each file, a place for each key and value.

PyYAML's own loader is wrong for settings (`1e-3` is a string, `no` is false, a duplicate key
wins silently, deep nesting kills the process), so only its parser of events is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Final

import yaml

from forge_kernel.config.document import Document, Path, show_path
from forge_kernel.errors import ConfigError, Fault, Mark

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 64
MAX_NODES: Final = 10_000

_NULL: Final = re.compile(r"~|null|Null|NULL|")
_TRUE: Final = re.compile(r"true|True|TRUE")
_FALSE: Final = re.compile(r"false|False|FALSE")
_INTEGER: Final = re.compile(r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def resolve(text: str) -> Any:
    """Read a plain scalar by the YAML 1.2 core schema.

    Raises:
        ValueError: a number that is not finite or does not fit 64 bits.
    """
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text[0] in "tT"
    if _INTEGER.fullmatch(text):
        number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"{text} does not fit 64 bits")
        return number
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    if _FLOAT.fullmatch(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is too large for a number")
        return value
    return text


@dataclass
class _Open:
    """A mapping or list that is being read."""

    path: Path
    value: dict[str, Any] | list[Any]
    key: str | None = None  # the key whose value comes next; None: the value is not kept
    wants_key: bool = True
    seen: dict[str, Mark] = field(default_factory=dict)


class _Reader:
    """Builds a document from parser events, collecting faults; no recursion."""

    def __init__(self, text: str, source: str) -> None:
        self.document = Document(source)
        self.faults: list[Fault] = []
        self._lines = text.splitlines() or [""]
        self._stack: list[_Open] = []
        self._anchors: dict[str, Any] = {}  # scalars only: an alias of more could expand
        self._nodes = 0
        self._documents = 0

    def mark(self, start: Any, end: Any = None) -> Mark:
        """Turn a parser's mark into ours."""
        text = self._lines[start.line] if start.line < len(self._lines) else ""
        length = 1
        if end is not None:
            length = (end.column if end.line == start.line else len(text)) - start.column
        return Mark(
            self.document.source, start.line + 1, start.column + 1, max(1, length), text.rstrip()
        )

    def fault(self, mark: Mark, message: str, *hints: str, path: Path = ()) -> None:
        self.faults.append(Fault(message, show_path(path), mark, hints))

    def read(self, events: Iterator[Any]) -> None:
        """Take in the events until the end or a fault after which nothing can be read."""
        for event in events:
            if isinstance(event, yaml.CollectionEndEvent):
                self._stack.pop()
                self._value_done()
            elif isinstance(event, yaml.DocumentStartEvent | yaml.NodeEvent):
                mark = self.mark(event.start_mark, event.end_mark)
                fatal = self._fatal(event, mark)
                if fatal is not None:
                    self.fault(mark, *fatal, path=self._path())
                    return
                if isinstance(event, yaml.NodeEvent):
                    self._node(event, mark)

    def _fatal(self, event: Any, mark: Mark) -> tuple[str, ...] | None:
        """What makes further reading senseless."""
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                return "a second document starts here", "a pipeline is one document"
            return None
        self._nodes += 1
        if self._nodes > MAX_NODES:
            return (f"more than {MAX_NODES} values in one file",)
        if isinstance(event, yaml.ScalarEvent):
            return None
        if self._stack and isinstance(self._stack[-1].value, dict) and self._stack[-1].wants_key:
            return "a key must be a plain word", "write `key: value`"
        if len(self._stack) >= MAX_DEPTH:
            return (f"nested deeper than {MAX_DEPTH} levels",)
        return None

    def _node(self, event: Any, mark: Mark) -> None:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                self.fault(
                    mark,
                    f"the alias *{event.anchor} is not allowed: it repeats a mapping or list",
                    "write the part out, or share it between files with `extends`",
                    path=self._path(),
                )
            self._put(self._anchors.get(event.anchor), mark)
            return
        if event.tag is not None:
            self.fault(
                mark, f"tags are not allowed ({event.tag})", "write the plain value",
                path=self._path(),
            )  # fmt: skip
        if not isinstance(event, yaml.ScalarEvent):
            self._open({} if isinstance(event, yaml.MappingStartEvent) else [], mark)
        elif self._stack and isinstance(self._stack[-1].value, dict) and self._stack[-1].wants_key:
            self._key(self._stack[-1], event.value, mark)
        else:
            self._scalar(event, mark)

    def _scalar(self, event: Any, mark: Mark) -> None:
        value: Any = event.value
        if event.implicit[0]:
            try:
                value = resolve(event.value)
            except ValueError as error:
                self.fault(mark, str(error), path=self._path())
        if event.anchor is not None:
            self._anchors[event.anchor] = value
        self._put(value, mark)

    def _key(self, parent: _Open, key: str, mark: Mark) -> None:
        parent.wants_key = False
        parent.key = None
        if key == "<<":
            self.fault(
                mark, "merge keys (<<) are not allowed", "use `extends: other.yaml`",
                path=parent.path,
            )  # fmt: skip
        elif key in parent.seen:
            self.fault(
                mark,
                f"the key '{key}' stands here twice (first in line {parent.seen[key].line})",
                "keep one of the two",
                path=(*parent.path, key),
            )
        else:
            parent.key = key
            parent.seen[key] = mark
            self.document.keys[(*parent.path, key)] = mark

    def _path(self) -> Path:
        """The path of the value that comes next."""
        if not self._stack:
            return ()
        parent = self._stack[-1]
        if isinstance(parent.value, list):
            return (*parent.path, len(parent.value))
        return parent.path if parent.key is None else (*parent.path, parent.key)

    def _open(self, value: dict[str, Any] | list[Any], mark: Mark) -> None:
        path = self._path()
        self._place(value, path, mark)
        self._stack.append(_Open(path, value))

    def _put(self, value: Any, mark: Mark) -> None:
        self._place(value, self._path(), mark)
        self._value_done()

    def _place(self, value: Any, path: Path, mark: Mark) -> None:
        """Store a value where it belongs, if it is kept."""
        if not self._stack:
            self.document.values[()] = mark
            if isinstance(value, dict):
                self.document.data = value
            elif value is not None:
                self.fault(mark, "a pipeline is a mapping (`key: value`), nothing else")
            return
        parent = self._stack[-1]
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is not None:
            parent.value[parent.key] = value
        else:
            return
        self.document.values[path] = mark

    def _value_done(self) -> None:
        if self._stack:
            self._stack[-1].wants_key = True


def _decode(raw: bytes, source: str) -> str:
    if len(raw) > MAX_BYTES:
        raise ConfigError([Fault(f"larger than {MAX_BYTES} bytes", mark=Mark(source))])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8-sig", errors="replace")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        text = raw.splitlines()[line - 1].decode("utf-8", errors="replace")
        mark = Mark(source, line, column, 1, text)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise ConfigError(
            [Fault(message, mark=mark, hints=("save the file as UTF-8",))]
        ) from error


def parse_yaml(text: str, source: str) -> Document:
    """Read a configuration text.

    Args:
        text: the YAML text; an empty one is an empty mapping.
        source: what to call it in messages.

    Raises:
        ConfigError: with every fault of structure found, each with line and column.
    """
    reader = _Reader(text, source)
    try:
        reader.read(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        mark = Mark(source, line, column, 1, "")
        reader.fault(mark, f"the character U+{int(error.character):04X} is not allowed in YAML")
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        mark = reader.mark(place) if place is not None else Mark(source)
        context = f" {error.context}" if error.context else ""
        hints = ("indent with spaces",) if "'\\t'" in str(error.problem) else ()
        reader.fault(
            Mark(mark.source, mark.line, mark.column, 1, mark.text),
            f"not valid YAML{context}: {error.problem}",
            *hints,
        )
    if reader.faults:
        raise ConfigError(reader.faults)
    return reader.document


def read_yaml(file: FilePath, source: str | None = None) -> Document:
    """Read a configuration file.

    Args:
        file: its path.
        source: what to call it in messages; the path as given otherwise.

    Raises:
        ConfigError: the file is missing, unreadable or not strict YAML.
    """
    name = source or str(file)
    try:
        if file.is_dir():
            raise ConfigError([Fault("is a folder, not a file", mark=Mark(name))])
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError([Fault("there is no such file", mark=Mark(name))]) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError([Fault(f"cannot be read: {reason}", mark=Mark(name))]) from error
    return parse_yaml(_decode(raw, name), name)


class _Dumper(yaml.SafeDumper):
    """Writes what `resolve` reads back as the same value."""


def _write_string(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    try:
        plain = isinstance(resolve(value), str)
    except ValueError:
        plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else "'")


_Dumper.add_representer(str, _write_string)


def write_yaml(data: dict[str, Any]) -> str:
    """Write plain data as YAML that `parse_yaml` reads back equal."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return str(text)
