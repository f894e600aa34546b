"""Files and folders that settings name, written so that they are found from anywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from forge_kernel.config.document import Path
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.schema import config_schema
from forge_kernel.config.use import Use
from forge_kernel.planning.pipeline_file import nested_uses
from forge_kernel.planning.secret_settings import hide_secrets


def path_settings(pipeline: PipelineConfig) -> Iterator[Path]:
    """Where a bound pipeline's data holds the path of a file or folder.

    A setting is one when its schema says so: `Meta(extra_json_schema={"format": "path"})`.
    """
    if pipeline.plugins.lock is not None:
        yield "plugins", "lock"
    todo: list[tuple[Path, Use[Any]]] = [(path, use) for path, _, use in pipeline.entries()]
    while todo:
        path, use = todo.pop()
        if isinstance(use.config, Mapping):
            continue
        own, _ = config_schema(type(use.config), f"{use.kind}.{use.name}")
        for name, schema in own.get("properties", {}).items():
            if any(part.get("format") == "path" for part in (schema, *schema.get("anyOf", ()))):
                yield (*path, "with", name)
        for inner, part in nested_uses(use.config):
            todo.append(((*path, "with", *inner), part))


def with_absolute_paths(data: dict[str, Any], pipeline: PipelineConfig) -> dict[str, Any]:
    """A pipeline's data as a run folder keeps it, in place: its paths absolute, no secrets in it.

    So that a run can be continued, exported or repeated from another folder than it was started
    in. Names that are no path of this machine (`shipped:digits`, addresses) stay as they are.

    Args:
        data: the filled pipeline.
        pipeline: what it was filled from.
    """
    for path in path_settings(pipeline):
        target: Any = data
        for part in path[:-1]:
            target = target.get(part, {}) if isinstance(target, Mapping) else target[part]
        value = target.get(path[-1])
        if isinstance(value, str) and ":" not in value:
            target[path[-1]] = os.path.abspath(value)
    return hide_secrets(data, pipeline)
