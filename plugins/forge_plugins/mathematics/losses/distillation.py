"""Learning from a teacher's outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The mean over rows of `divergences`, 0-d."""
    return divergences(student, teacher, temperature).mean()


def divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL( softmax(teacher / T) || softmax(student / T) )` of each row.

    Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2; the factor keeps the size of the
    gradient when T changes.

    Args:
        student: logits of shape (..., classes).
        teacher: logits of the same shape, without gradient.
        temperature: T, above 0.

    Returns:
        Shape (rows,).
    """
    log_student = functional.log_softmax(student.flatten(0, -2).float() / temperature, -1)
    log_teacher = functional.log_softmax(teacher.flatten(0, -2).float() / temperature, -1)
    each = functional.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return each.sum(-1) * temperature**2


def row_distances(student: Tensor, teacher: Tensor, targets: Any, positions: Any = None) -> Tensor:
    """`|s - t|^2 / |t|^2` of each target's row, or of each sample where rows have no targets.

    Args:
        student: what a layer gives, shape (samples, ..., width).
        teacher: the same of the teacher's, without gradient.
        targets: integers, shape (samples, ...), of the rows.
        positions: index of the sequence (second dimension) that the targets are of.

    Returns:
        Shape (rows,) where `student` has a row for each target, else (samples,).
    """
    shape = targets.shape if isinstance(targets, Tensor) else ()
    everywhere = student.ndim == 3 and len(shape) == 2 and student.shape[1] != shape[1]
    if everywhere and positions is not None:
        student, teacher = student[:, positions], teacher[:, positions]
    own, other = student.float(), teacher.float()
    if own.shape[:-1] == shape:
        own, other = own.flatten(0, -2), other.flatten(0, -2)
    else:
        own, other = own.flatten(1), other.flatten(1)
    apart = (own - other).square().sum(-1)
    return apart / other.square().sum(-1).clamp_min(1e-12)
