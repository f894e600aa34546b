"""JSON objects that carry the hash of their own text, so that damage is seen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

from forge_kernel.storage.atomic_files import json_text

SEAL: Final = "sha256"


def _content(facts: Mapping[str, Any]) -> bytes:
    return json_text(facts).encode("utf-8", "backslashreplace")


def _hash(facts: Mapping[str, Any]) -> str:
    body = {name: value for name, value in facts.items() if name != SEAL}
    return hashlib.sha256(_content(body)).hexdigest()


def sealed(facts: Mapping[str, Any]) -> bytes:
    """The text of an object with the SHA-256 of the rest of it as its last entry.

    Raises:
        ValueError: NaN or an infinity in it.
    """
    body = {name: value for name, value in facts.items() if name != SEAL}
    return _content({**body, SEAL: _hash(body)})


def is_as_written(content: bytes, facts: Mapping[str, Any]) -> bool:
    """Whether a text is one that `sealed` gave.

    The text itself is compared too: what JSON reads the same (a blank, a doubled key) is altered.

    Args:
        content: the text.
        facts: the object that it was read as.
    """
    try:
        return facts.get(SEAL) == _hash(facts) and content == _content(facts)
    except (ValueError, RecursionError):  # NaN, which was never written
        return False
