"""Starts from the weights of another run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, PluginError, PluginInfo, Run, hookimpl, trained_model

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class StartFromConfig:
    """Which run."""

    run: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="folder of the run whose weights are taken over; null: the model keeps its "
            "own",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    partial: Annotated[
        bool,
        Meta(description="leave what has another shape, or is not there, as it was drawn; the run "
             "says what"),
    ] = False  # fmt: skip


class StartFrom:
    """Starts from the weights of another run.

    Copies the trained weights into the model, by name; a resumed run has its own already.
    """

    info = PluginInfo(name="start_from", kind=Kind.WRAPPERS, config=StartFromConfig)

    def __init__(self, config: StartFromConfig) -> None:
        self.config = config

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Take the weights over, in place.

        Raises:
            PluginError: a weight is missing or has another shape, and `partial` is off.
            ConfigError, CheckpointError: the run folder cannot be read.
        """
        if self.config.run is None or _resumes(run):
            return model
        given = trained_model(self.config.run).state_dict()
        own = model.state_dict()
        fitting = {
            name: value for name, value in given.items()
            if name in own and own[name].shape == value.shape
        }  # fmt: skip
        left = sorted(own.keys() - fitting.keys())
        if left and not self.config.partial:
            shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise PluginError(
                f"start_from: {self.config.run} has no weight of the same shape for {shown}; set "
                "partial to begin with those that fit"
            )
        model.load_state_dict(fitting, strict=False)
        if left:
            run.emit_event(
                "started_from",
                f"{len(fitting)} tensors are those of {self.config.run}; {len(left)} are new.",
                taken=len(fitting),
                new=len(left),
            )
        return model


def _resumes(run: Run) -> bool:
    """Whether weights are restored after the set-up."""
    return run.folder is not None and any((run.folder / "checkpoints").glob("step-*"))
