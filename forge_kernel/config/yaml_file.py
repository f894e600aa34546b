"""Strict YAML: 1.2 core scalars, one meaning for each file, a place for each key and value.

PyYAML's own loader is wrong for settings (`1e-3` is a string, `no` is false, a duplicate key
wins silently, deep nesting kills the process), so only its parser of events is used.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, ClassVar, Final

import yaml

from forge_kernel.config.document import Document, Path, show_path, show_word
from forge_kernel.errors import ConfigError, Fault, Mark

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 64
MAX_NODES: Final = 10_000

_NULL: Final = re.compile(r"~|null|Null|NULL|")
_TRUE: Final = re.compile(r"true|True|TRUE")
_FALSE: Final = re.compile(r"false|False|FALSE")
_INTEGER: Final = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_MAX_DIGITS: Final = 40  # beyond 64 bits in any notation
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE: Final = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_LINE_END: Final = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what YAML takes for one
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def resolve(text: str) -> Any:
    """Read a plain scalar by the YAML 1.2 core schema.

    Raises:
        ValueError: a number that is not finite, does not fit 64 bits or would be rounded to 0.
    """
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return text[0] in "tT"
    if _INTEGER.fullmatch(text):
        return _integer(text)
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    if _FLOAT.fullmatch(text):
        return _float(text)
    return text


def _integer(text: str) -> int:
    if len(text) <= _MAX_DIGITS:
        number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if -(2**63) <= number < 2**63:
            return number
    raise ValueError(f"{show_word(text)} does not fit 64 bits")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{show_word(text)} is too large for a number")
    if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
        raise ValueError(f"{show_word(text)} is too small for a number: it would be 0")
    return value


def _visible(line: str) -> str:
    """A line as a message may show it: one sign for each code point, no trailing blanks."""
    line = line.rstrip()
    if line.isprintable():
        return line
    return "".join(sign if sign.isprintable() or sign == "\t" else "\ufffd" for sign in line)


def _mark_at(text: str, position: int, source: str) -> Mark:
    """The mark of one code point of a text."""
    before = _LINE_END.split(text[:position])
    line = before[-1] + _LINE_END.split(text[position:], maxsplit=1)[0]
    return Mark(source, len(before), len(before[-1]) + 1, 1, _visible(line))


@dataclass
class _Open:
    """A mapping or list that is being read."""

    path: Path
    value: dict[str, Any] | list[Any]
    mark: Mark  # where it begins
    key: str = ""  # the key whose value comes next
    keeps: bool = True  # whether that value is kept (not that of a key refused)
    wants_key: bool = True
    seen: dict[str, Mark] = field(default_factory=dict)


class _Reader:
    """Builds a document from parser events, collecting faults; no recursion."""

    def __init__(self, text: str, source: str) -> None:
        self.document = Document(source)
        self.faults: list[Fault] = []
        self._lines = [_visible(line) for line in _LINE_END.split(text)]
        self._stack: list[_Open] = []
        self._anchors: dict[str, list[Any]] = {}  # with one scalar, or empty: more could expand
        self._nodes = 0
        self._documents = 0

    def mark(self, start: Any, end: Any = None) -> Mark:
        """Turn a parser's mark into ours."""
        text = self._lines[start.line]
        length = 1
        if end is not None:
            length = (end.column if end.line == start.line else len(text)) - start.column
        return Mark(self.document.source, start.line + 1, start.column + 1, max(1, length), text)

    def innermost(self) -> Mark | None:
        """Where the part that is being read begins."""
        return self._stack[-1].mark if self._stack else None

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
            second = ("a second document starts here", "a pipeline is one document")
            return second if self._documents > 1 else None
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
            self._put(self._alias(str(event.anchor), mark), mark)
            return
        if event.anchor is not None:
            self._anchors[event.anchor] = []
        if event.tag is not None:
            self.fault(
                mark, f"tags are not allowed ({show_word(event.tag)})", "write the plain value",
                path=self._path(),
            )  # fmt: skip
        if not isinstance(event, yaml.ScalarEvent):
            self._open({} if isinstance(event, yaml.MappingStartEvent) else [], mark)
        elif self._stack and isinstance(self._stack[-1].value, dict) and self._stack[-1].wants_key:
            if event.anchor is not None:
                self._anchors[event.anchor] = [event.value]
            self._key(self._stack[-1], event.value, mark)
        else:
            self._scalar(event, mark)

    def _alias(self, name: str, mark: Mark) -> Any:
        """The scalar that an alias stands for."""
        if name not in self._anchors:
            self.fault(mark, f"there is no anchor &{name} above this alias", path=self._path())
        elif not self._anchors[name]:
            self.fault(
                mark,
                f"the alias *{name} is not allowed: it repeats a mapping or list",
                "write the part out, or share it between files with `extends`",
                path=self._path(),
            )
        else:
            return self._anchors[name][0]
        return None

    def _check_text(self, text: str, mark: Mark) -> None:
        result = _SURROGATE.search(text)
        if result is not None:
            self.fault(
                mark, f"U+{ord(result[0]):04X} is half of a character",
                "write the character itself",
                path=self._path(),
            )  # fmt: skip

    def _scalar(self, event: Any, mark: Mark) -> None:
        value: Any = event.value
        self._check_text(value, mark)
        if event.implicit[0]:
            try:
                value = resolve(event.value)
            except ValueError as error:
                self.fault(mark, str(error), path=self._path())
        if event.anchor is not None:
            self._anchors[event.anchor] = [value]
        self._put(value, mark)

    def _key(self, parent: _Open, key: str, mark: Mark) -> None:
        parent.wants_key = False
        parent.key = key
        parent.keeps = False
        self._check_text(key, mark)
        if key == "<<":
            self.fault(
                mark, "merge keys (<<) are not allowed", "use `extends: other.yaml`",
                path=parent.path,
            )  # fmt: skip
        elif key in parent.seen:
            first = parent.seen[key].line
            self.fault(
                mark,
                f"the key '{show_word(key)}' stands here twice (first in line {first})",
                "keep one of the two",
                path=self._path(),
            )
        else:
            parent.keeps = True
            parent.seen[key] = mark
            self.document.keys[self._path()] = mark

    def _path(self) -> Path:
        """The path of the value that comes next."""
        if not self._stack:
            return ()
        parent = self._stack[-1]
        if isinstance(parent.value, list):
            return (*parent.path, len(parent.value))
        return (*parent.path, parent.key)

    def _open(self, value: dict[str, Any] | list[Any], mark: Mark) -> None:
        path = self._path()
        self._place(value, path, mark)
        self._stack.append(_Open(path, value, mark))

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
        elif parent.keeps:
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
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        position = len(raw[: error.start].decode("utf-8"))
        mark = _mark_at(raw.decode("utf-8", errors="replace"), position, source)
        message = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise ConfigError([Fault(message, mark=mark, hints=("save the file as UTF-8",))]) from error


def _events(text: str) -> Iterator[Any]:
    """The parser's events; what its scanner lets through of Python's errors becomes its own."""
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_event():
            yield loader.get_event()  # type: ignore[no-untyped-call]
    except (ValueError, OverflowError) as error:
        problem = "an escape or a version number is out of range"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=loader.get_mark()) from error
    finally:
        loader.dispose()


def _syntax_fault(reader: _Reader, error: yaml.MarkedYAMLError, end: int) -> Fault:
    """Where something is never closed, the place is its beginning, not the end of the text."""
    place, begin = error.problem_mark, error.context_mark
    assert place is not None, "the parser always knows where it stands"
    context = f" {error.context}" if error.context else ""
    hints: tuple[str, ...] = ("indent with spaces",) if "'\\t'" in str(error.problem) else ()
    mark = reader.mark(place)
    if begin is not None and begin.index < end:
        if place.index >= end or "simple key" in context:
            mark = reader.mark(begin)
        elif begin.line != place.line:
            hints += (f"it begins in line {begin.line + 1}, column {begin.column + 1}",)
    elif place.index >= end:
        mark = reader.innermost() or mark
    return Fault(f"not valid YAML{context}: {error.problem}", mark=mark, hints=hints)


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
        reader.read(_events(text))
    except yaml.reader.ReaderError as error:
        mark = _mark_at(text, error.position, source)
        reader.fault(mark, f"the character U+{int(error.character):04X} is not allowed in YAML")
    except yaml.MarkedYAMLError as error:
        reader.faults.append(_syntax_fault(reader, error, len(text.rstrip())))
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


def _write_string(dumper: Any, value: str) -> yaml.ScalarNode:
    try:
        plain = isinstance(resolve(value), str)
    except ValueError:
        plain = False
    style = (None if plain else "'") if value.isprintable() else '"'  # line ends as escapes
    result: yaml.ScalarNode = dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)
    return result


class _Plain:
    """Writes what `resolve` reads back as the same value."""

    yaml_representers: ClassVar[dict[Any, Any]] = {
        **yaml.SafeDumper.yaml_representers,
        str: _write_string,
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Write a part that stands in two places twice: the reader takes no aliases."""
        del data
        return True


class _Dumper(_Plain, yaml.SafeDumper):
    """In Python: any text."""


# by libyaml, where PyYAML was built with it, a tenth of the time
class _QuickDumper(_Plain, getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # where it was
    """In C: any text that UTF-8 holds."""


def write_yaml(data: dict[str, Any]) -> str:
    """Write plain data as YAML that `parse_yaml` reads back equal."""
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 100}
    try:
        return str(yaml.dump(data, Dumper=_QuickDumper, **options))
    except UnicodeEncodeError:  # a path with bytes that are no text
        return str(yaml.dump(data, Dumper=_Dumper, **options))
