"""Whether code that a file names may run: said from outside of it, never by the file itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Final

VARIABLE: Final = "FORGE_ALLOW_CODE"
HINT: Final = f"if you trust it, say so from outside the file: --allow-code, or {VARIABLE}=1"
_ALLOWED: Final[ContextVar[bool]] = ContextVar("code_allowed", default=False)


@contextmanager
def code_allowed(allowed: bool) -> Iterator[None]:
    """Allow for a while what a file names; what was allowed outside stays so.

    Args:
        allowed: False changes nothing.
    """
    token = _ALLOWED.set(allowed or _ALLOWED.get())
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def code_is_allowed() -> bool:
    """Whether the command, the environment or the user's own settings allow it."""
    return _ALLOWED.get() or os.environ.get(VARIABLE, "") in ("1", "true") or _by_the_user()


def _by_the_user() -> bool:
    """Whether the user's settings (`forge-kernel/settings.yaml`) hold `allow_code: true`."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    try:
        text = (Path(home) / "forge-kernel" / "settings.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return "allow_code: true" in (line.strip() for line in text.splitlines())
