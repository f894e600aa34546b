"""The formats that are installed: entry points of the group `forge_kernel.formats`."""

from __future__ import annotations

import functools
from collections.abc import Callable
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


@functools.cache
def origin(name: str) -> str:
    """Whose format it is; the distribution's metadata is parsed once, not for each file opened."""
    entry = _offers()[name][0]
    return entry.dist.name if entry.dist is not None else entry.value


def every(package: str) -> bool:
    """All packages may be imported."""
    del package
    return True


def load(name: str, allowed: Callable[[str], bool] = every) -> Format:
    """A format by its name.

    Args:
        name: one of `names()`.
        allowed: whether a package may be imported.

    Raises:
        FormatError: it is offered twice, cannot be imported, is no format of this name, or the
            pipeline does not allow whose it is.
    """
    if not allowed(origin(name)):
        raise FormatError(f"the format {name} of {origin(name)} is not allowed by plugins.allow")
    return _loaded(name)


@functools.cache
def _loaded(name: str) -> Format:
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


def known(allowed: Callable[[str], bool] = every) -> tuple[list[Format], list[str]]:
    """All formats that can be used, and what is wrong with the others."""
    formats, wrong = [], []
    for name in names():
        try:
            formats.append(load(name, allowed))
        except FormatError as error:
            wrong.append(str(error))
    return formats, wrong
