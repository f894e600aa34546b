"""What can be done with a run that is over: functions of installed packages, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, Final

from forge_kernel.errors import PluginError

GROUP: Final = "forge_kernel.uses"
"""Entry points: functions of a `TrainedRun` by the name of its method, `open_folder`, and those of
a run folder that `RunResult` shows (`run_history`, `run_charts`)."""


def use(name: str) -> Callable[..., Any]:
    """An installed function of this group.

    Raises:
        PluginError: nobody offers it, or it cannot be imported.
    """
    entries = entry_points(group=GROUP, name=name)
    if not entries:
        raise PluginError(f"no installed package offers '{name}' for trained runs ({GROUP})")
    entry = next(iter(entries))
    try:
        result: Callable[..., Any] = entry.load()
    except ImportError as error:
        raise PluginError(f"'{name}' ({entry.value}) cannot be loaded: {error}") from error
    return result
