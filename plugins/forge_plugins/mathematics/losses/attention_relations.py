"""Learning from how a teacher's queries, keys and values relate to each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def relation_divergences(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    heads: int,
    segments: Tensor | None = None,
) -> Tensor:
    """`KL( R_teacher || R_student )` of each row, a mean over what is related and over heads.

    `R = softmax(A A^T / sqrt(width of a head))` for A the queries, the keys and the values (Wang et
    al. 2021, "MiniLMv2", arXiv 2012.15828, equations 1 to 3; BitDistill, arXiv 2510.13998, section
    3.3, which scales rows to length 1 first: here they keep theirs). A row is related to those
    before it in its segment and to itself, so that what comes after a sequence's end changes
    nothing. Both models may have any number of heads of their own, and other widths.

    Args:
        student: queries, keys and values, each of shape (samples, length, own width).
        teacher: the same of the teacher's, without gradient.
        heads: relation heads: each width is cut into so many parts.
        segments: which of several packed sequences a row is of, integers, shape (samples, length);
            None: one for each sample.

    Returns:
        Shape (samples, length).

    Raises:
        ValueError: a width is no multiple of the heads, or the shapes do not go together.
    """
    length = student[0].shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=student[0].device).tril()
    if segments is not None:
        seen = seen & (segments.unsqueeze(2) == segments.unsqueeze(1))
        seen = seen.unsqueeze(1)  # the same for each head
    total: Tensor | None = None
    for own, other in zip(student, teacher, strict=True):
        if own.shape[:2] != other.shape[:2]:
            raise ValueError(
                f"{own.shape[0]} x {own.shape[1]} rows, and {other.shape[0]} x {other.shape[1]} in "
                "the teacher"
            )
        logs, theirs = _log_relations(own, heads, seen), _log_relations(other, heads, seen)
        # what is not seen has the logarithm -inf in both
        apart = torch.where(seen, theirs.exp() * (theirs - logs), 0.0).sum(-1).mean(1)
        total = apart if total is None else total + apart
    assert total is not None, "nothing to relate"
    return total / len(student)


def _log_relations(rows: Tensor, heads: int, seen: Tensor) -> Tensor:
    """Shape (samples, heads, length, length)."""
    samples, length, width = rows.shape
    if width % heads:
        raise ValueError(f"a width of {width} cannot be cut into {heads} relation heads")
    parts = rows.float().view(samples, length, heads, width // heads).transpose(1, 2)
    with torch.autocast(rows.device.type, enabled=False):  # the products, too, in fp32
        relations = parts @ parts.transpose(2, 3) / (width // heads) ** 0.5
    large = torch.finfo(relations.dtype).min
    return functional.log_softmax(relations.masked_fill(~seen, large), -1)


def segments_of(positions: Tensor) -> Tensor:
    """Which sequence each place of a pack is of: positions begin anew with each.

    Args:
        positions: integers, shape (samples, length).
    """
    begins = positions[:, 1:] <= positions[:, :-1]
    return functional.pad(begins.long().cumsum(1), (1, 0))
