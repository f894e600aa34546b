"""What must not be shown or written: passwords and tokens that settings hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final

_SHORTEST: Final = 4  # characters; shorter ones would blot out words
_SECRETS: Final[ContextVar[frozenset[str]]] = ContextVar("secrets", default=frozenset())


def keep_secret(values: Iterable[str]) -> None:
    """From now on these are left out of what is shown and written."""
    texts = {text for value in values for text in (value, json.dumps(value)[1:-1])}
    _SECRETS.set(_SECRETS.get() | {text for text in texts if len(text) >= _SHORTEST})


def without_secrets(text: str) -> str:
    """A text as it may be shown."""
    for secret in sorted(_SECRETS.get(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
