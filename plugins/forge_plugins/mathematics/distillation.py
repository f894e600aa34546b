"""Learning from a teacher's outputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL( softmax(teacher / T) || softmax(student / T) )`, the mean over rows.

    Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2; the factor keeps the size of the
    gradient when T changes.

    Args:
        student: logits of shape (..., classes).
        teacher: logits of the same shape, without gradient.
        temperature: T, above 0.
    """
    log_student = functional.log_softmax(student.flatten(0, -2).float() / temperature, -1)
    log_teacher = functional.log_softmax(teacher.flatten(0, -2).float() / temperature, -1)
    divergence = functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2
