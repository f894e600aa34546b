"""The model of a finished run, for those that go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def trained_model(folder: str | Path, *, allow_code: bool = False) -> nn.Module:
    """What a run has learned: its model with the weights of its newest intact checkpoint.

    The model that the run validates with (an average of the weights, where it keeps one), on the
    CPU, in evaluation mode. The process's random state is left as it was.

    Args:
        folder: the run folder; the run was begun from a file, without live parts.
        allow_code: also run code that its configuration names; see `run`.

    Raises:
        ConfigError: it is no run folder, or the run was given live parts.
        PlanError: a plugin of the run is missing here.
        CheckpointError: there is no intact checkpoint.
    """
    from forge_kernel.runner import restored
    from forge_kernel.trust import code_allowed

    settings = ["observers=null", "exporters=null", "run.device=cpu"]
    with code_allowed(allow_code), restored(Path(folder), settings) as session:
        return session.evaluation_model().eval()
