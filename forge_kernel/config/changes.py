"""What of a filled configuration is otherwise than it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from forge_kernel.config.document import Path, show_path, walk
from forge_kernel.config.yaml_file import parse_yaml

_LONGEST: Final = 60  # characters of a value that are shown


def config_digest(text: str) -> str:
    """SHA-256 of a filled configuration, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def changed_settings(before: str, after: str) -> list[str]:
    """Each setting that differs as `path: old -> new`, in the order of the later text.

    Args:
        before: a filled configuration as YAML.
        after: another one.
    """
    old, new = _settings(before), _settings(after)
    paths = [*new, *(path for path in old if path not in new)]
    return [
        f"{show_path(path)}: {_shown(old, path)} -> {_shown(new, path)}"
        for path in paths
        if _shown(old, path, whole=True) != _shown(new, path, whole=True)
    ]


def _settings(text: str) -> dict[Path, Any]:
    """The values that hold no others, by their paths."""
    data = parse_yaml(text, "configuration").data
    return {path: value for path, value in walk(data) if not _holds_others(value)}


def _holds_others(value: Any) -> bool:
    return isinstance(value, Mapping | list) and bool(value)


def _shown(settings: Mapping[Path, Any], path: Path, *, whole: bool = False) -> str:
    """A value as JSON, in which 1 and 1.0 differ."""
    if path not in settings:
        return "(absent)"
    text = json.dumps(settings[path], ensure_ascii=False)
    return text if whole or len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
