"""Settings that hold a password or a token: kept as the name of an environment variable.

A setting is secret when its schema says so (`Meta(extra_json_schema={"writeOnly": True})`), and so
is any address with a password in it. A run folder has `env:FORGE_SECRET_...` in its place, which a
file may have too: the plugin gets what the variable holds. Other variables are out of reach, since
a file could otherwise send any of them to where it likes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

from forge_kernel.config.document import Path, show_path
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.schema import config_schema
from forge_kernel.config.use import Use
from forge_kernel.contract.plugin import PluginInfo
from forge_kernel.planning.pipeline_file import nested_uses

REFERENCE: Final = re.compile(r"env:(FORGE_SECRET_[A-Z0-9_]+)")
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/@\s]*:[^/@\s]+@")


def variable(path: Path) -> str:
    """The environment variable of a setting: `FORGE_SECRET_OBSERVERS_0_TRACKING_URI`."""
    words = [str(part) for part in path if part != "with"]
    return "FORGE_SECRET_" + re.sub(r"[^A-Z0-9]+", "_", "_".join(words).upper())


def secrets_of(key: str, config: Any) -> Iterator[tuple[str, str]]:
    """The secret settings of a plugin, by name: with what they hold, or a reference.

    Args:
        key: of the plugin.
        config: its bound settings.
    """
    if not is_dataclass(config) or isinstance(config, type):
        return
    properties = config_schema(type(config), key)[0].get("properties", {})
    for field in fields(config):
        value, schema = getattr(config, field.name), properties.get(field.name, {})
        if (
            isinstance(value, str)
            and value
            and (_is_declared(schema) or _ADDRESS.match(value) or REFERENCE.fullmatch(value))
        ):
            yield field.name, value


def _is_declared(schema: Mapping[str, Any]) -> bool:
    return any(part.get("writeOnly") is True for part in (schema, *schema.get("anyOf", ())))


def words_of(value: str) -> set[str]:
    """What of a secret must not be shown: all of it, and the password inside an address."""
    result = {value}
    if _ADDRESS.match(value):
        password = urlsplit(value).password
        result |= {password} if password else set()
    return result


def resolved(info: PluginInfo, config: Any) -> Any:
    """The settings with what the variables hold; one that is not set was refused by the plan."""
    changes = {
        name: os.environ[match[1]]
        for name, value in secrets_of(info.key, config)
        if (match := REFERENCE.fullmatch(value)) is not None and match[1] in os.environ
    }
    return replace(config, **changes) if changes else config


def hide_secrets(data: dict[str, Any], pipeline: PipelineConfig) -> dict[str, Any]:
    """A pipeline's data, its secrets replaced by the names of variables, in place."""
    todo: list[tuple[Path, Use[Any]]] = [(path, use) for path, _, use in pipeline.entries()]
    while todo:
        path, use = todo.pop()
        for name, value in secrets_of(f"{use.kind}.{use.name}", use.config):
            target: Any = data
            for part in (*path, "with"):
                target = target[part]
            if not REFERENCE.fullmatch(value):
                target[name] = f"env:{variable((*path, name))}"
        if not isinstance(use.config, Mapping):
            todo += [((*path, "with", *inner), part) for inner, part in nested_uses(use.config)]
    return data


def asked_for(path: Path, name: str, value: str) -> str | None:
    """What to say of a reference to a variable that is not set; None: it is, or it is none."""
    match = REFERENCE.fullmatch(value)
    if match is None or os.environ.get(match[1]):
        return None
    where = show_path((*path, "with", name))
    return f"{where} is a secret that no run folder keeps: set the environment variable {match[1]}"
