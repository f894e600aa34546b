"""Which plugins a pipeline may use at all, and in which state."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Final

from msgspec import Meta

OURS: Final = "forge-kernel"


@dataclass(frozen=True, kw_only=True)
class PluginRules:
    """Which installed packages a pipeline may take plugins from, and which state of them."""

    allow: Annotated[
        tuple[str, ...] | None,
        Meta(description="packages whose plugins and formats may be used, beside forge-kernel's "
             "own (`acme-forge`, `acme-*`); others are not imported; null: all that are installed"),
    ] = None  # fmt: skip
    lock: Annotated[
        str | None,
        Meta(
            extra_json_schema={"format": "path"},
            description="file of `forge lock`: a plugin whose version or source differs from it is "
            "refused",
        ),
    ] = None

    def allows(self, package: str) -> bool:
        """Whether a package's plugins may be imported."""
        if self.allow is None or _plain(package) == OURS:
            return True
        return any(fnmatchcase(_plain(package), _plain(pattern)) for pattern in self.allow)


def _plain(package: str) -> str:
    """A package's name as the index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


_RULES: Final[ContextVar[PluginRules | None]] = ContextVar("plugin_rules", default=None)


@contextmanager
def under_rules(rules: PluginRules) -> Iterator[None]:
    """For the time of a run: what it looks up by entry points of its own keeps to its rules."""
    token = _RULES.set(rules)
    try:
        yield
    finally:
        _RULES.reset(token)


def may_be_imported(package: str) -> bool:
    """Whether the run at work may import an installed package's entry points."""
    rules = _RULES.get()
    return rules is None or rules.allows(package)
