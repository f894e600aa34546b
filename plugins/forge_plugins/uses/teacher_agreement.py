"""How often a trained run and its teacher choose the same answer."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from forge_kernel.api import Batch, ConfigError, Fault, TrainedRun, call_model
from forge_plugins.mathematics.metrics.label_positions import answer_rows


def teacher_agreement(run: TrainedRun, teacher: TrainedRun, batches: Iterable[Batch]) -> float:
    """The share of targets that count for which both have the same largest logit.

    Args:
        run: what is looked at.
        teacher: a run, or a model's folder, with the same classes or tokens.
        batches: of the run's data.

    Raises:
        ConfigError: the teacher cannot read the batches, or has other classes.
    """
    device = next(run.model.parameters()).device
    same = count = 0.0
    for batch in batches:
        batch.ignore_index = run.ignore_index
        weights = batch.counted.weights
        moved = batch.to(device)
        try:
            with torch.no_grad():
                ours, theirs = (
                    answer_rows(call_model(each, moved), moved.targets, moved.positions)[0]
                    for each in (run.model, teacher.model)
                )
        except (RuntimeError, ValueError, IndexError) as error:
            message = f"{teacher.folder} cannot be compared with {run.folder}: {error}"
            raise ConfigError([Fault(message)]) from error
        if ours.shape != theirs.shape:
            raise ConfigError(
                [
                    Fault(
                        f"{teacher.folder} gives {theirs.shape[-1]} logits for each target, and "
                        f"{run.folder} {ours.shape[-1]}",
                        hints=("name a teacher with the same classes or tokens",),
                    )
                ]
            )
        agrees = (ours.argmax(-1) == theirs.argmax(-1)).double()
        own = torch.ones_like(agrees) if weights is None else weights.to(agrees)
        same, count = same + float(agrees @ own), count + float(own.sum())
    if not count:
        raise ConfigError([Fault(f"{run.folder}: no target counts, so nothing can be compared")])
    return same / count
