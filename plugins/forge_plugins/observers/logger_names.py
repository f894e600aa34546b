"""Names of metrics and events as a sink takes them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Final

from forge_kernel.api import Run

_UNPRINTED: Final = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """A name without what ends a line, rules a terminal or cannot be encoded."""
    return _UNPRINTED.sub("_", text)


def encodable(text: str) -> str:
    """A message for a sink that stores UTF-8: halves of characters are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class LoggerNames:
    """Maps names to those that a sink takes, distinct ones to distinct ones, and says so once.

    Args:
        sink: what the user calls it.
        mapping: from any name to one that the sink takes; a name that it takes stays as it is.
    """

    def __init__(self, sink: str, mapping: Callable[[str], str] = one_line) -> None:
        self._sink = sink
        self._mapping = mapping
        self._known: dict[str, str] = {}
        self._taken: dict[str, str] = {}

    def of(self, run: Run, name: str) -> str:
        """The sink's name; that another one had to be chosen is told the first time."""
        known = self._known.get(name)
        if known is not None:
            return known
        result = self._mapping(name)
        if self._taken.get(result, name) != name:  # by another name that was mapped to it
            mark = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:6]
            result = f"{result}_{mark}"
        self._known[name] = result
        self._taken[result] = name
        if result != name:
            run.emit_event(
                "renamed",
                f"{self._sink} does not take the name {name!a}: it stands there as '{result}'.",
                sink=self._sink,
                metric=ascii(name)[1:-1],
                stands_as=result,
            )
        return result
