"""A configuration text as plain data with the place of every key and value beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from forge_kernel.errors import Mark

Path = tuple[str | int, ...]


def show_word(word: str) -> str:
    """A word of the user's in a message: shortened, and nothing in it that a terminal obeys."""
    shown = word if word.isprintable() else word.encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= 60 else shown[:57] + "..."


def show_path(path: Path) -> str:
    """Write a path as users do: `gradients[0].with.alpha`."""
    text = ""
    for part in path:
        word = f"[{part}]" if isinstance(part, int) else show_word(part)
        text += word if isinstance(part, int) or not text else f".{word}"
    return text


def walk(data: Any) -> Iterator[tuple[Path, Any]]:
    """Every path below `data` with its value, parents first (iterative: depth is the user's)."""
    stack: list[tuple[Path, Any]] = [((), data)]
    while stack:
        path, value = stack.pop()
        yield path, value
        if isinstance(value, Mapping):
            stack.extend(((*path, key), value[key]) for key in reversed(list(value)))
        elif isinstance(value, list | tuple):
            stack.extend(((*path, index), value[index]) for index in reversed(range(len(value))))


def look_up(data: Any, path: Path) -> Any:
    """The value at `path`.

    Raises:
        KeyError: there is nothing at the path.
    """
    value = data
    for part in path:
        if isinstance(part, int):
            if not isinstance(value, list | tuple) or part not in range(len(value)):
                raise KeyError(path)
        elif not isinstance(value, Mapping) or part not in value:
            raise KeyError(path)
        value = value[part]
    return value


@dataclass
class Document:
    """Data of one file, or of several layers merged, and where each part of it stands."""

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    values: dict[Path, Mark] = field(default_factory=dict)
    keys: dict[Path, Mark] = field(default_factory=dict)

    def mark(self, path: Path) -> Mark:
        """Where the value at `path` stands, or its nearest parent that has a place."""
        for end in range(len(path), -1, -1):
            result = self.values.get(path[:end])
            if result is not None:
                return result
        return Mark(self.source)

    def key_mark(self, path: Path) -> Mark:
        """Where the key that ends `path` stands."""
        return self.keys.get(path) or self.mark(path)

    def put(self, path: Path, other: Document, origin: Path) -> None:
        """Put in what `other` has at `origin`, with its marks; what is at `path` goes.

        Raises:
            KeyError: there is nothing that could hold `path`.
        """
        self.remove(path)
        value = look_up(other.data, origin)
        look_up(self.data, path[:-1])[path[-1]] = value
        for inner, _ in walk(value):
            for mine, theirs in ((self.values, other.values), (self.keys, other.keys)):
                if (*origin, *inner) in theirs:
                    mine[(*path, *inner)] = theirs[(*origin, *inner)]

    def remove(self, path: Path) -> None:
        """Take out what is at `path`, if there is anything, with its marks."""
        parent = look_up(self.data, path[:-1])
        if isinstance(parent, Mapping) and path[-1] not in parent:
            return
        for inner, _ in walk(parent[path[-1]]):
            for table in (self.values, self.keys):
                table.pop((*path, *inner), None)
        if isinstance(parent, dict):
            del parent[path[-1]]
