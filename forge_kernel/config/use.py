"""`{use: name, with: {...}}`: a plugin named in a pipeline or nested in another's settings."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Generic, TypeVar

from forge_kernel.config.document import show_path, walk
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import ConfigError

Part = TypeVar("Part")


class Use(Generic[Part]):
    """A plugin by name with its settings, as raw data or as its own configuration object.

    A composite plugin nests others by fields whose type is one of the subclasses below
    (`UseSchedule`, `tuple[UseSchedule, ...]`, `dict[str, UseSchedule]`); `Part` is what it is
    handed instead. A default is written `field(default_factory=lambda: UseSchedule("constant"))`.

    Immutable, but no dataclass: msgspec would read and write its fields by their own names
    instead of asking for the form `{use: name, with: {...}}`.
    """

    kind: ClassVar[Kind]

    def __init__(self, name: str, config: Any = None) -> None:
        self._name = name
        self._config = {} if config is None else config

    @property
    def name(self) -> str:
        """The plugin's name within its kind."""
        return self._name

    @property
    def config(self) -> Any:
        """Its settings."""
        return self._config

    def to_data(self) -> dict[str, Any]:
        """The mapping that a pipeline file would hold.

        Raises:
            ConfigError: a setting that no file could hold.
        """
        try:
            values = plain(self._config)
        except ConfigError as error:
            raise ConfigError(f"{self.kind}.{self._name}: {error}") from error
        return {"use": self._name, "with": values} if values else {"use": self._name}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return (self._name, self._config) == (other._name, other._config)

    def __hash__(self) -> int:
        return hash((type(self), self._name))  # the settings may be a dict

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r}, {self._config!r})"


class UseData(Use[Part]):
    """A data source."""

    kind = Kind.DATA


class UseModel(Use[Part]):
    """A network."""

    kind = Kind.MODEL


class UseQuantizer(Use[Part]):
    """A quantizer."""

    kind = Kind.QUANTIZER


class UseWrapper(Use[Part]):
    """A model wrapper."""

    kind = Kind.WRAPPERS


class UseStrategy(Use[Part]):
    """A strategy of distribution."""

    kind = Kind.STRATEGY


class UseOptimizer(Use[Part]):
    """An optimizer."""

    kind = Kind.OPTIMIZER


class UseLoss(Use[Part]):
    """A loss."""

    kind = Kind.LOSS


class UseRegularizer(Use[Part]):
    """A regularizer."""

    kind = Kind.REGULARIZERS


class UseGradients(Use[Part]):
    """A gradient filter."""

    kind = Kind.GRADIENTS


class UsePhases(Use[Part]):
    """A phase clock."""

    kind = Kind.PHASES


class UseSchedule(Use[Part]):
    """A schedule."""

    kind = Kind.SCHEDULE


class UseValidator(Use[Part]):
    """A validator."""

    kind = Kind.VALIDATORS


class UseCallback(Use[Part]):
    """A policy."""

    kind = Kind.CALLBACKS


class UseExporter(Use[Part]):
    """An exporter."""

    kind = Kind.EXPORTERS


class UseObserver(Use[Part]):
    """An observer."""

    kind = Kind.OBSERVERS


USE_OF_KIND: dict[Kind, type[Use[Any]]] = {
    subclass.kind: subclass for subclass in Use.__subclasses__()
}


def plain(config: Any) -> Any:
    """A configuration object as the data that a file would hold (lists, not tuples).

    Raises:
        ConfigError: a setting that no file could hold: of a foreign type, or not finite.
    """
    import msgspec

    for path, value in walk(msgspec.to_builtins(config, enc_hook=_encode_use)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{show_path(path)}: {value} is not a finite number")
    return msgspec.json.decode(msgspec.json.encode(config, enc_hook=_encode_use))


def _encode_use(value: Any) -> Any:
    """Hook for msgspec: a nested plugin as plain data."""
    if isinstance(value, Use):
        return value.to_data()
    raise ConfigError(f"a setting of type {type(value).__name__} has no place in a file")
