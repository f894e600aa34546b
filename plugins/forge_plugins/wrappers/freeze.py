"""Parameters that are not trained, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, Order, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """Which parameters stay as they are, and which of them do not."""

    parameters: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="names of parameters that are not trained; glob pattern"),
    ] = ()
    but: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(description="names of those among them that are trained all the same"),
    ] = ()

    def __post_init__(self) -> None:
        if self.but and not self.parameters:
            raise ValueError("but is of parameters that are frozen, and none are: set parameters")


class Freeze:
    """Parameters that are not trained, by name.

    They get no gradient, no decay and no memory of the optimizer. What the model shares (a head
    that is tied to an embedding) is one parameter, which any of its names freezes.
    """

    info = PluginInfo(
        name="freeze", kind=Kind.WRAPPERS, config=FreezeConfig, order=Order(before=("compile",))
    )

    def __init__(self, config: FreezeConfig) -> None:
        self.config = config
        self._counts = (0, 0)

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Freeze, in place.

        Raises:
            PluginError: a pattern names nothing, or nothing is left to train.
        """
        if not self.config.parameters:
            return model
        named = list(model.named_parameters(remove_duplicate=False))
        chosen = _named_by(self.config.parameters, [name for name, _ in named], "parameters")
        spared = _named_by(self.config.but, sorted(chosen), "but")
        ids = {id(p) for name, p in named if name in spared}
        frozen = {id(p): p for name, p in named if name in chosen and id(p) not in ids}
        for parameter in frozen.values():
            parameter.requires_grad_(False)
        trained = {id(p): p for _, p in named if p.requires_grad}
        others = any(p.requires_grad for part in run.modules.values() for p in part.parameters())
        if not trained and not others:
            raise PluginError(
                f"freeze: nothing is left to train: wrappers.freeze.parameters "
                f"{list(self.config.parameters)} name all of {type(model).__name__}; name what is "
                "trained in but"
            )
        self._counts = _numbers(frozen.values()), _numbers(trained.values())
        return model

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Say how much of the model is frozen; a resumed run's record has it."""
        frozen, trained = self._counts
        if frozen and not run.progress.step:
            run.emit_event(
                "frozen",
                f"{frozen:,} parameters are frozen, {trained:,} are trained.",
                frozen=frozen,
                trained=trained,
            )


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _named_by(patterns: tuple[str, ...], names: list[str], setting: str) -> set[str]:
    """The names that match.

    Raises:
        PluginError: each pattern that matches none.
    """
    hits = {
        pattern: {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        for pattern in patterns
    }
    empty = [f"'{pattern}'" for pattern, found in hits.items() if not found]
    if empty:
        raise PluginError(
            f"freeze: no parameter is named by {', '.join(empty)} ({setting}); names are such as "
            f"{', '.join(names[:4])}"
        )
    return set().union(*hits.values())
