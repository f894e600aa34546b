"""The formats that are installed: entry points of the group `forge_kernel.formats`."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from forge_plugins.formats.format import Format

GROUP: Final = "forge_kernel.formats"


class FormatError(Exception):
    """An installed format cannot be used; its text says whose it is and why."""


@functools.cache
def _offers() -> dict[str, tuple[EntryPoint, ...]]:
    result: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        result[entry.name] = (*result.get(entry.name, ()), entry)
    return result


def names() -> tuple[str, ...]:
    """The names of all formats; none of them is imported."""
    return tuple(sorted(_offers()))


def origin(name: str) -> str:
    """Whose format it is."""
    entry = _offers()[name][0]
    return entry.dist.name if entry.dist is not None else entry.value


@functools.cache
def load(name: str) -> Format:
    """A format by its name.

    Raises:
        FormatError: it is offered twice, cannot be imported, or is no format of this name.
    """
    from forge_plugins.formats.format import Format

    entry, *others = _offers()[name]
    if others:
        who = " and ".join(sorted(offer.value for offer in (entry, *others)))
        raise FormatError(f"the format {name} is offered twice, by {who}: uninstall one of them")
    try:
        result: Any = entry.load()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        raise FormatError(
            f"the format {name} of {origin(name)} cannot be loaded: {message}"
        ) from error
    if not isinstance(result, Format) or result.name != name:
        message = f"{entry.value} is no Format of the name {name}"
        raise FormatError(f"the format {name} of {origin(name)} cannot be used: {message}")
    return result


def known() -> tuple[list[Format], list[str]]:
    """All formats that can be used, and what is wrong with the others."""
    formats, wrong = [], []
    for name in names():
        try:
            formats.append(load(name))
        except FormatError as error:
            wrong.append(str(error))
    return formats, wrong
