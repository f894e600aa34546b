"""The pipeline as the kernel knows it: the loop's own settings and the plugins named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from forge_kernel.config.document import Path
from forge_kernel.config.use import USE_OF_KIND, Use
from forge_kernel.contract.plugin import RULES, Kind
from forge_kernel.contract.plugin_rules import PluginRules
from forge_kernel.contract.run_config import RunConfig

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A whole pipeline; a kind that is None or empty is absent or handed in live."""

    run: RunConfig
    plugins: PluginRules = field(default_factory=PluginRules)
    data: Use[Any] | None = None
    model: Use[Any] | None = None
    quantizer: Use[Any] | None = None
    wrappers: tuple[Use[Any], ...] = ()
    strategy: Use[Any] | None = None
    optimizer: Use[Any] | None = None
    loss: Use[Any] | None = None
    regularizers: tuple[Use[Any], ...] = ()
    gradients: tuple[Use[Any], ...] = ()
    phases: Use[Any] | None = None
    schedule: Use[Any] | None = None
    validators: tuple[Use[Any], ...] = ()
    callbacks: tuple[Use[Any], ...] = ()
    exporters: tuple[Use[Any], ...] = ()
    observers: tuple[Use[Any], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)  # the user's own `x-...` keys

    def entries(self) -> Iterator[tuple[Path, Kind, Use[Any]]]:
        """The plugins named, in canonical order of kinds and in file order within a kind."""
        for kind in Kind:
            named = getattr(self, kind.value)
            if isinstance(named, Use):
                yield (kind.value,), kind, named
            elif named:
                for index, use in enumerate(named):
                    yield (kind.value, index), kind, use

    def to_data(self) -> dict[str, Any]:
        """The mapping that a pipeline file would hold, every default of the run written out."""
        import msgspec

        data: dict[str, Any] = {"forge": FORMAT, "run": msgspec.to_builtins(self.run)}
        if self.plugins != PluginRules():
            data["plugins"] = msgspec.to_builtins(self.plugins)
        for kind in Kind:
            named = getattr(self, kind.value)
            if isinstance(named, Use):
                data[kind.value] = named.to_data()
            elif named:
                data[kind.value] = [use.to_data() for use in named]
        return {**data, **self.notes}


def takes_many(kind: Kind) -> bool:
    """Whether a pipeline file holds a list for the kind."""
    return RULES[kind].at_most is None


def uses_in(data: Mapping[str, Any]) -> Iterator[tuple[Path, Kind, Use[Any]]]:
    """The plugins that a file's data name, in canonical order; what has another form is left out.

    Args:
        data: a pipeline's mapping, checked or not.
    """
    for kind in Kind:
        given = data.get(kind.value)
        items: list[tuple[Path, Any]] = [((kind.value,), given)]
        if takes_many(kind):
            listed = given if isinstance(given, list) else []
            items = [((kind.value, index), item) for index, item in enumerate(listed)]
        for path, item in items:
            if isinstance(item, Mapping) and isinstance(item.get("use"), str):
                yield path, kind, USE_OF_KIND[kind](item["use"], item.get("with") or {})


def notes_in(data: Mapping[str, Any]) -> dict[str, Any]:
    """The user's own keys."""
    return {key: value for key, value in data.items() if key.startswith("x-")}


assert {kind.value for kind in Kind} <= {item.name for item in fields(PipelineConfig)}
