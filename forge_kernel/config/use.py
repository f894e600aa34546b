"""`{use: name, with: {...}}`: a plugin named in a pipeline or nested in another's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from forge_kernel.plugin import Kind

Part = TypeVar("Part")


@dataclass(frozen=True)
class Use(Generic[Part]):
    """A plugin by name with its settings, as raw data or as its own configuration object.

    A composite plugin nests others by fields whose type is one of the subclasses below
    (`UseSchedule`, `tuple[UseSchedule, ...]`); `Part` is what it is handed instead.
    """

    kind: ClassVar[Kind]

    name: str
    config: Any = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """The mapping that a pipeline file would hold."""
        values = dict(self.config) if isinstance(self.config, Mapping) else plain(self.config)
        return {"use": self.name, "with": values} if values else {"use": self.name}


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


class UsePenalty(Use[Part]):
    """A penalty."""

    kind = Kind.PENALTIES


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


class UsePolicy(Use[Part]):
    """A policy."""

    kind = Kind.POLICIES


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
    """A configuration object as the data that a file would hold (lists, not tuples)."""
    import msgspec

    return msgspec.json.decode(msgspec.json.encode(config, enc_hook=_encode_use))


def _encode_use(value: Any) -> Any:
    """Hook for msgspec: a nested plugin as plain data."""
    if isinstance(value, Use):
        return value.to_data()
    raise NotImplementedError(f"a setting of type {type(value).__name__} has no plain form")
