"""Training in one call, without a file: a model, samples, and what differs from the defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.contract.plugin import Kind

if TYPE_CHECKING:
    from torch import nn

    from forge_kernel.contract.result import RunResult

PIPELINE: Final = "fit"
"""The shipped pipeline whose sections hold where the call names no others."""


def fit(  # noqa: PLR0913  keyword-only, each a wish of its own
    model: nn.Module,
    data: Any,
    *,
    target: str | None = None,
    validation: Any = 0.2,
    batch_size: int = 64,
    steps: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    pipeline: str | Path = PIPELINE,
    settings: Sequence[str] = (),
    output_dir: str | Path | None = None,
    quiet: bool = False,
    **sections: Any,
) -> RunResult:
    """Train a model on samples.

    Args:
        model: the module; it is trained in place.
        data: samples as `as_data` takes them, or live data as `run` does (`Data`, loaders).
        target: see `as_data`.
        validation: see `as_data`; not read for live data.
        batch_size: see `as_data`; not read for live data.
        steps: optimizer steps; with neither these nor epochs as the pipeline says.
        epochs: passes over the training samples.
        seed: of the samples' share and order, and of the run.
        pipeline: whose sections hold where none are given here.
        settings: of the form `run.log_every=5`, as `forge run --set` takes them.
        output_dir: see `run`; a new folder below `runs/` otherwise, each time it is called.
        quiet: nothing on the screen.
        sections: of the pipeline: `loss="regression"`, `quantizer="bitnet"`,
            `optimizer={"use": "adamw", "with": {"lr": 3e-3}}`, `gradients=["grokfast"]`; None
            leaves one out. With another loss, validators are those that are named.

    Raises:
        ConfigError, PlanError, PluginError: nothing was run and nothing written.
        Exception: what a part of the run raised.
    """
    from forge_kernel.planning.pipeline_file import load_pipeline
    from forge_kernel.runner import run
    from forge_kernel.training.loaders.samples import as_data

    live = _is_live(data)
    if not live:
        data = as_data(data, target=target, validation=validation, batch_size=batch_size, seed=seed)
    chosen = [f"run.seed={seed}"]
    if steps is not None or epochs is not None:
        chosen += [f"run.max_steps={_or_null(steps)}", f"run.max_epochs={_or_null(epochs)}"]
    if "loss" in sections:
        sections = {"validators": None, **sections}
    chosen += [f"{name}={json.dumps(_section(name, value))}" for name, value in sections.items()]
    bound = load_pipeline(pipeline, [*chosen, *settings], live=(Kind.MODEL, Kind.DATA))
    return run(bound, model=model, data=data, output_dir=output_dir, quiet=quiet)


def _or_null(count: int | None) -> str:
    return "null" if count is None else str(count)


def _is_live(data: Any) -> bool:
    """Whether it gives batches by itself: `Data`, a loader, or a pair of loaders."""
    parts = data if isinstance(data, tuple) else (data,)
    return all(
        hasattr(part, "batches") or (hasattr(part, "__iter__") and hasattr(part, "batch_size"))
        for part in parts
    )


def _section(name: str, value: Any) -> Any:
    """A section as a file writes it: a plugin by its name is `{use: name}`, several are a list."""
    from forge_kernel.config.pipeline import takes_many

    several = name in {kind.value for kind in Kind} and takes_many(Kind(name))
    if several and isinstance(value, str | Mapping):
        value = [value]
    if isinstance(value, str):
        return {"use": value}
    if isinstance(value, Sequence):
        return [{"use": part} if isinstance(part, str) else part for part in value]
    return dict(value) if isinstance(value, Mapping) else value
