"""Counts of classes found and missed, and the shares that follow from them.

Counts are doubles on the device: those of whole numbers, of batches and of processes, add up
exactly, and targets may count less or more than 1. What is a mean over a set is taken from its
sums, never from the means of its batches.
"""

from __future__ import annotations

import math
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
    logits: Tensor, targets: Tensor, ranks: Sequence[int] = (1,), weights: Tensor | None = None
) -> Tensor:
    """How many targets are among the likeliest classes, and how many targets there are.

    Args:
        logits: shape (n, classes).
        targets: shape (n,), integers.
        ranks: for each k, targets among the k likeliest classes are counted; 1 is the first of the
            largest logits.
        weights: what each target counts, shape (n,); None: each 1.

    Returns:
        float64, shape (len(ranks) + 1,); what all targets count stands last. NaN where a row that
        counts has an answer that is no number: nothing was answered.
    """
    exact = _exact(logits.device)
    counts = _counts(targets, weights, exact)
    result = []
    for k in ranks:
        if k == 1:
            hits = logits.argmax(-1) == targets
        else:
            likely = logits.topk(min(k, logits.shape[-1])).indices
            hits = (likely == targets.unsqueeze(1)).any(1)
        result.append((hits * counts).sum())
    return torch.stack([*result, counts.sum() + _no_number(logits, counts)])


def no_counts(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """The counts of a set without a target: zeros of that shape, float64 where there is such."""
    place = torch.device(device)
    return torch.zeros(shape, dtype=_exact(place), device=place)


def _exact(device: torch.device) -> torch.dtype:
    """Whole numbers up to 2^53 (2^24 on a device without doubles) are exact in it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _counts(targets: Tensor, weights: Tensor | None, exact: torch.dtype) -> Tensor:
    if weights is None:
        return torch.ones(len(targets), dtype=exact, device=targets.device)
    return weights.to(exact)


def _no_number(logits: Tensor, counts: Tensor) -> Tensor:
    """NaN when a row that counts holds NaN or has no finite largest logit; else 0."""
    wrong = ~torch.isfinite(logits.amax(-1)) & (counts > 0)
    return torch.where(wrong.any(), torch.nan, 0.0).to(counts)


def class_counts(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Hits, answers and targets of each class.

    Args:
        logits: shape (n, classes).
        targets: shape (n,), integers in 0 .. classes - 1 where they count.
        weights: what each target counts, shape (n,), and so does its answer; None: each 1.

    Returns:
        float64, shape (3, classes); NaN as in `hit_counts`.

    Raises:
        ValueError: a target that counts is none of the classes.
    """
    classes = logits.shape[-1]
    counts = _counts(targets, weights, _exact(logits.device))
    counted = counts > 0
    # place 0 takes what counts for nothing; what is below 0 has no place, which bincount refuses
    answers = (logits.argmax(-1) + 1) * counted
    wanted = torch.where(targets < 0, -1, targets + 1) * counted
    hits = torch.where(answers == wanted, wanted, 0)
    try:
        result = [
            torch.bincount(item, counts, minlength=classes + 1) for item in (hits, answers, wanted)
        ]
    except RuntimeError as error:
        raise ValueError(
            "a target is below 0, which is no class: the target that counts for nothing is named "
            "by run.ignore_index"
        ) from error
    if len(result[2]) > classes + 1:
        raise ValueError(
            f"a target is {len(result[2]) - 2}, and the classes are 0 to {classes - 1}"
        )
    return torch.stack(result)[:, 1:] + _no_number(logits, counts)


def confusion_counts(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """How often each class was answered where each was wanted.

    Args:
        logits: shape (n, classes).
        targets: shape (n,), integers; what is none of the classes counts nowhere.
        weights: what each target counts, shape (n,); None: each 1.

    Returns:
        float64, shape (classes, classes): [target, answer].
    """
    classes = logits.shape[-1]
    counts = _counts(targets, weights, _exact(logits.device))
    inside = (targets >= 0) & (targets < classes)
    places = torch.where(inside, targets, 0) * classes + logits.argmax(-1)
    result = torch.bincount(places, counts * inside, minlength=classes * classes)
    return result.view(classes, classes)


def class_metrics(counts: Tensor, names: Sequence[ByClass] = BY_CLASS) -> dict[str, float]:
    """Means over classes (macro; `weighted` by their targets) and over all answers (micro).

    Precision and recall of a class without an answer or a target are 0, and a macro mean is over
    the classes that occur in targets or answers, as in scikit-learn.

    Args:
        counts: shape (3, classes), from `class_counts`, added up over the whole set.
        names: which metrics.

    Returns:
        Shares in [0, 1]; empty when no target was seen.
    """
    hits, answers, targets = counts.double().cpu()
    if not float(targets.sum()):
        return {}
    if bool(targets.isnan().any()):
        return dict.fromkeys(names, math.nan)
    occurs = (answers + targets) > 0
    tiny = torch.finfo(torch.float64).tiny  # a class that does not occur: 0 / tiny is 0
    f1 = 2 * hits / (answers + targets).clamp_min(tiny)
    result = {
        "f1": f1[occurs].mean(),
        "precision": (hits / answers.clamp_min(tiny))[occurs].mean(),
        "recall": (hits / targets.clamp_min(tiny))[occurs].mean(),
        "f1_micro": 2 * hits.sum() / (answers + targets).sum(),
        "precision_micro": hits.sum() / answers.sum(),
        "recall_micro": hits.sum() / targets.sum(),
        "f1_weighted": (f1 * targets).sum() / targets.sum(),
    }
    return {name: float(result[name]) for name in names}
