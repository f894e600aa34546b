"""Plugins by name and settings as objects, for a session that a program drives step by step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from forge_kernel.api import Use
from forge_kernel.embedding import Catalog


def live_plugins(uses: Iterable[Use[Any]]) -> list[Any]:
    """The plugins that `uses` name, of the installed ones.

    Raises:
        PluginError: a name is not known; msgspec.ValidationError: a setting is wrong.
    """
    catalog = Catalog.installed()
    result = []
    for use in uses:
        plugin = catalog.load(use.kind, use.name)
        result.append(plugin(msgspec.convert(use.config, plugin.info.config)))
    return result
