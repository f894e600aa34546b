"""Counts of classes found and missed, and the shares that follow from them.

Counts are whole numbers on the device, so that those of batches and of processes add up exactly;
what is a mean over a set is taken from its sums, never from the means of its batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

ByClass = Literal[
    "f1", "precision", "recall", "f1_micro", "precision_micro", "recall_micro", "f1_weighted"
]
BY_CLASS: Final[tuple[ByClass, ...]] = (
    "f1", "precision", "recall", "f1_micro", "precision_micro", "recall_micro", "f1_weighted",
)  # fmt: skip


def hit_counts(
    logits: Tensor, targets: Tensor, ranks: Sequence[int] = (1,), ignored: int | None = None
) -> Tensor:
    """How many targets are among the likeliest classes, and how many targets there are.

    Args:
        logits: shape (n, classes).
        targets: shape (n,), integers.
        ranks: for each k, targets among the k likeliest classes are counted; 1 is the first of the
            largest logits.
        ignored: a target that counts as nothing.

    Returns:
        int64, shape (len(ranks) + 1,); the number of targets stands last.
    """
    counted = torch.ones_like(targets, dtype=torch.bool) if ignored is None else targets != ignored
    found = []
    for k in ranks:
        if k == 1:
            hits = logits.argmax(-1) == targets
        else:
            likely = logits.topk(min(k, logits.shape[-1])).indices
            hits = (likely == targets.unsqueeze(1)).any(1)
        found.append((hits & counted).sum())
    return torch.stack([*found, counted.sum()])


def class_counts(logits: Tensor, targets: Tensor, ignored: int | None = None) -> Tensor:
    """Hits, answers and targets of each class.

    Args:
        logits: shape (n, classes).
        targets: shape (n,), integers in 0 .. classes - 1 or `ignored`.
        ignored: a target that counts as nothing, and so does its answer.

    Returns:
        int64, shape (3, classes).

    Raises:
        ValueError: a target is none of the classes.
    """
    classes = logits.shape[-1]
    # place 0 takes what counts as nothing; what is below 0 has no place, which bincount refuses
    answers, wanted = logits.argmax(-1) + 1, torch.where(targets < 0, -1, targets + 1)
    if ignored is not None:
        counted = targets != ignored
        answers, wanted = answers * counted, wanted * counted
    hits = torch.where(answers == wanted, wanted, 0)
    try:
        counts = [torch.bincount(one, minlength=classes + 1) for one in (hits, answers, wanted)]
    except RuntimeError as error:
        raise ValueError(
            "a target is below 0, which is no class: name the one that counts as nothing (ignore)"
        ) from error
    if len(counts[2]) > classes + 1:
        raise ValueError(
            f"a target is {len(counts[2]) - 2}, and the classes are 0 to {classes - 1}"
        )
    return torch.stack(counts)[:, 1:]


def class_figures(counts: Tensor, names: Sequence[ByClass] = BY_CLASS) -> dict[str, float]:
    """Means over classes (macro; `weighted` by their targets) and over all answers (micro).

    Precision and recall of a class without an answer or a target are 0, and a macro mean is over
    the classes that occur in targets or answers, as in scikit-learn.

    Args:
        counts: from `class_counts`, added up over the whole set.
        names: which figures.

    Returns:
        Shares in [0, 1]; empty when no target was seen.
    """
    hits, answers, targets = counts.double().cpu()
    if not float(targets.sum()):
        return {}
    occurs = (answers + targets) > 0
    f1 = 2 * hits / (answers + targets).clamp_min(1)
    found = {
        "f1": f1[occurs].mean(),
        "precision": (hits / answers.clamp_min(1))[occurs].mean(),
        "recall": (hits / targets.clamp_min(1))[occurs].mean(),
        "f1_micro": 2 * hits.sum() / (answers + targets).sum(),
        "precision_micro": hits.sum() / answers.sum(),
        "recall_micro": hits.sum() / targets.sum(),
        "f1_weighted": (f1 * targets).sum() / targets.sum(),
    }
    return {name: float(found[name]) for name in names}
