"""The lock file of a pipeline's plugins: versions, and a hash of the source they come from."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from forge_kernel.errors import ConfigError, Fault

FORMAT: Final = 1
_MAX_BYTES: Final = 1 << 24


class Source(Protocol):
    """Who offers a plugin: what the lock knows of an entry point."""

    @property
    def key(self) -> str:
        """`"<kind>.<name>"`."""

    @property
    def target(self) -> str:
        """`"<module>:<class>"`."""

    @property
    def distribution(self) -> str:
        """Its package, as it is installed."""

    @property
    def version(self) -> str:
        """Of the package."""


def locked_plugins(offers: Iterable[Source]) -> dict[str, Any]:
    """What a lock file holds of these plugins; nothing is imported.

    Returns:
        `{"forge-lock": 1, "plugins": {"<kind>.<name>": {"package", "version", "sha256"}}}`.
    """
    plugins = {
        offer.key: {
            "package": offer.distribution,
            "version": offer.version,
            "sha256": source_hash(offer.target.partition(":")[0].partition(".")[0]),
        }
        for offer in offers
    }
    return {"forge-lock": FORMAT, "plugins": dict(sorted(plugins.items()))}


@functools.cache
def source_hash(package: str) -> str:
    """SHA-256 over names and content of all files of an importable package but compiled Python.

    Args:
        package: a top-level name; it is found, not imported.

    Raises:
        ConfigError: it cannot be found.
    """
    digest = hashlib.sha256()
    for name, file in sorted(_files(package)):
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _files(package: str) -> Iterator[tuple[str, Path]]:
    spec: ModuleSpec | None = find_spec(package)
    if spec is None:
        raise ConfigError(f"the source of the plugins in {package} cannot be found")
    if not spec.submodule_search_locations:
        if spec.origin is None:
            raise ConfigError(f"the source of the plugins in {package} cannot be found")
        yield Path(spec.origin).name, Path(spec.origin)
        return
    for place in spec.submodule_search_locations:
        for file in Path(place).rglob("*"):
            if file.is_file() and file.suffix != ".pyc" and "__pycache__" not in file.parts:
                yield file.relative_to(place).as_posix(), file


def read_lock(file: Path) -> Mapping[str, Mapping[str, str]]:
    """The plugins of a lock file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    hint = "write it with: forge lock FILE"
    try:
        if not file.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        with file.open("rb") as stream:
            data = json.loads(stream.read(_MAX_BYTES))
        plugins = data["plugins"]
        assert data["forge-lock"] == FORMAT
        assert all(isinstance(about["sha256"], str) for about in plugins.values())
    except OSError as error:
        fault = Fault(
            f"the lock file {file} cannot be read: {error}", "plugins.lock", hints=(hint,)
        )
        raise ConfigError([fault]) from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        fault = Fault(f"{file} is no lock file of plugins", "plugins.lock", hints=(hint,))
        raise ConfigError([fault]) from error
    return plugins  # type: ignore[no-any-return]


def difference(lock: Mapping[str, Mapping[str, str]], offer: Source) -> str | None:
    """What of a plugin is otherwise than the lock says, or None."""
    known = lock.get(offer.key)
    if known is None:
        return f"'{offer.key}' of {offer.distribution} {offer.version} is not in the lock file"
    now = locked_plugins([offer])["plugins"][offer.key]
    for part in ("package", "version"):
        if now[part] != known.get(part):
            return f"the {part} of '{offer.key}' is {now[part]}, locked is {known.get(part)}"
    if now["sha256"] != known["sha256"]:
        source = f"{offer.distribution} {offer.version}"
        return f"the source of '{offer.key}' ({source}) is not the one that was locked"
    return None
