"""Targets and a teacher's answers over a large vocabulary, without all logits of either at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

PIECE: Final = 384
"""Rows of logits that are there at a time, of student and teacher each, at most.

With all that is in between, no more than 2 x 512 rows of a large vocabulary (8192 or more).
"""
_FEW: Final = 8
_NUMBERS: Final = 2**16
"""Rows that are compared at a time: so few, or so many numbers, that they stay in the cache."""


class TopAnswers(NamedTuple):
    """The likeliest classes of each row; what is left of the probability is of all others.

    Args:
        log_probabilities: at the temperature they are compared at, fp32, shape (rows, k).
        classes: which classes they are of, int64, shape (rows, k).
    """

    log_probabilities: Tensor
    classes: Tensor


Answers = Tensor | TopAnswers
"""A teacher's logits, shape (rows, classes), or what is kept of them."""


@dataclass(frozen=True, kw_only=True)
class LossFactors:
    """What the loss of a row is: `target * CE + teacher * T^2 KL(teacher || student)`.

    Args:
        target: factor of the cross-entropy.
        teacher: factor of the divergence.
        temperature: T, above 0.
        label_smoothing: share of the target that is spread over all classes.
        ignored: the target whose cross-entropy is 0.
    """

    target: float
    teacher: float
    temperature: float
    label_smoothing: float = 0.0
    ignored: int = -100


class Means(NamedTuple):
    """0-d each, over what counts: the loss with its gradient, and its parts without."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def top_answers(logits: Tensor, count: int, temperature: float) -> TopAnswers:
    """The likeliest classes of some rows.

    Args:
        logits: shape (rows, classes).
        count: k, at most the classes.
        temperature: at which they will be compared.
    """
    logs = functional.log_softmax(logits.float() / temperature, -1)
    values, classes = logs.topk(count, -1)
    return TopAnswers(values, classes)


def top_divergences(student: Tensor, answers: TopAnswers, temperature: float) -> Tensor:
    """`T^2 KL` of each row between the classes that were kept and, as one class, all others.

    A lower bound of the whole divergence, and equal to it where all classes were kept.

    Args:
        student: logits, shape (rows, classes).
        answers: of the teacher.
        temperature: T; that of the answers.

    Returns:
        Shape (rows,).
    """
    logs = functional.log_softmax(student.float() / temperature, -1)
    kept, probabilities = logs.gather(-1, answers.classes), answers.log_probabilities.exp()
    each = (probabilities * (answers.log_probabilities - kept)).sum(-1)
    rest = (1.0 - probabilities.sum(-1)).clamp_min(0.0)
    if answers.classes.shape[-1] < student.shape[-1]:
        others = logs.scatter(-1, answers.classes, -torch.inf).logsumexp(-1)
        told = rest > 0
        safe = torch.where(told, rest, 1.0)
        each = each + torch.where(told, rest * (safe.log() - others), 0.0)
    return each * temperature**2


def chunked_distillation(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    answers: Callable[[slice], Answers],
    factors: LossFactors,
    *,
    piece: int = PIECE,
    weights: Tensor | None = None,
) -> Means:
    """The mean loss of `head(hidden)` towards targets and teacher.

    A piece's gradient is written over its logits, so that no more than a piece of the student's
    logits and one of the teacher's are there at a time, in either direction.

    Args:
        hidden: shape (n, width).
        targets: shape (n,), integers.
        head: gives logits (m, classes) of (m, width); its parameters get their gradients.
        answers: the teacher's to some of the rows.
        factors: what a row's loss is.
        piece: rows of logits at a time; at most `PIECE` are taken.
        weights: what each row counts, shape (n,), without gradient; None: each 1.
    """
    if not len(hidden):
        nothing = hidden.sum() * 0.0
        return Means(nothing, nothing.detach(), nothing.detach())
    total: float | Tensor = float(len(targets)) if weights is None else weights.sum()
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    call = _Call(targets, weights, head, answers, factors, min(piece, PIECE))
    apply: Any = _Sum.apply
    sums: tuple[Tensor, Tensor, Tensor] = apply(hidden, call, *parameters)
    divisor = torch.where(total > 0, total, 1.0) if isinstance(total, Tensor) else total
    return Means(*(each / divisor for each in sums))


class _Call(NamedTuple):
    targets: Tensor
    weights: Tensor | None
    head: nn.Module
    answers: Callable[[slice], Answers]
    factors: LossFactors
    piece: int


class _Sum(torch.autograd.Function):
    """Sums over all rows; gradients of a piece are taken in the forward pass.

    hidden (n, width) --piece by piece--> head --> S (piece, classes)
                                   teacher --> T (piece, classes)
    S <- dloss/dS, few rows at a time;  dhidden = dS W,  dW += dS^T hidden
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: _Call, *parameters: nn.Parameter) -> Any:
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        result = _Gradients(call.head, hidden, parameters) if any(ctx.needs_input_grad) else None
        for begin in range(0, len(hidden), call.piece):
            rows = slice(begin, begin + call.piece)
            with torch.set_grad_enabled(result is not None):
                part = hidden[rows].detach().requires_grad_(result is not None)
                logits = part_logits(call.head, part, result)
            with torch.no_grad():
                values = logits.detach()
                if result is not None and not result.overwrites:
                    values = values.clone()
                sums += _compare(values, call.answers(rows), call, rows)
            if result is not None:
                result.take(rows, part, logits, values)
        ctx.found = result
        ctx.mark_non_differentiable(sums[1], sums[2])
        return tuple(each.clone() for each in sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        result, factor = ctx.found, gradients[0]
        assert result is not None, "backward without a gradient to give"
        ctx.found = None  # the buffers are handed on, not copied
        return (
            result.hidden.mul_(factor.to(result.hidden.dtype)), None,
            *(each.mul_(factor.to(each.dtype)) for each in result.parameters),
        )  # fmt: skip


def part_logits(head: nn.Module, part: Tensor, result: _Gradients | None) -> Tensor:
    """What a head gives for some rows; a plain one's gradient is multiplied by hand."""
    if result is not None and result.plain:
        with torch.no_grad():
            return head(part)  # type: ignore[no-any-return]
    return head(part)  # type: ignore[no-any-return]


class _Gradients:
    """What backward will hand on."""

    def __init__(self, head: nn.Module, hidden: Tensor, of: tuple[nn.Parameter, ...]) -> None:
        self._of, self._head = of, head
        linear = type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)
        autocast = hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type)
        self.plain = linear and not autocast
        self.overwrites = linear  # a linear layer's outputs are not read on the way back
        self.hidden = torch.empty_like(hidden)
        self.parameters = [torch.zeros_like(parameter) for parameter in of]

    def take(self, rows: slice, part: Tensor, logits: Tensor, gradient: Tensor) -> None:
        """The gradients of a piece: of the hidden rows, shape (piece, width), and of the head."""
        if not self.plain:
            first, *others = torch.autograd.grad(logits, (part, *self._of), gradient)
            self.hidden[rows] = first
            for kept, own in zip(self.parameters, others, strict=True):
                kept.add_(own)
            return
        head = self._head
        assert isinstance(head, nn.Linear)
        torch.mm(gradient, head.weight.detach(), out=self.hidden[rows])
        for kept, parameter in zip(self.parameters, self._of, strict=True):
            if parameter is head.weight:
                kept.addmm_(gradient.t(), part.detach())
            else:
                kept.add_(gradient.sum(0))


def _compare(values: Tensor, answers: Answers, call: _Call, rows: slice) -> Tensor:
    """Sums of loss, cross-entropy and divergence; the student's logits become their gradient."""
    targets = call.targets[rows]
    weights = None if call.weights is None else call.weights[rows]
    sums = torch.zeros(3, dtype=torch.float32, device=values.device)
    count = max(_FEW, _NUMBERS // values.shape[-1])
    for begin in range(0, len(values), count):
        some = slice(begin, begin + count)
        if isinstance(answers, Tensor):
            of_teacher: Answers = answers[some]
        else:
            of_teacher = TopAnswers(*(part[some] for part in answers))
        own = None if weights is None else weights[some]
        sums += _compare_few(values[some], targets[some], of_teacher, own, call.factors)
    return sums


def _compare_few(
    values: Tensor, targets: Tensor, answers: Answers, weights: Tensor | None, factors: LossFactors
) -> Tensor:
    logits = values.float()
    count = logits.shape[-1]
    logs = functional.log_softmax(logits, -1)
    counts = (targets != factors.ignored).float()
    safe = torch.where(targets != factors.ignored, targets, 0).unsqueeze(1)
    smooth = factors.label_smoothing
    entropy = -logs.gather(1, safe).squeeze(1) * (1.0 - smooth)
    if smooth:
        entropy = entropy - smooth * logs.mean(-1)
    entropy = entropy * counts
    own = counts if weights is None else counts * weights
    gradient = logs.exp()
    if smooth:
        gradient -= smooth / count
    gradient.scatter_add_(1, safe, torch.full_like(safe, smooth - 1.0, dtype=gradient.dtype))
    gradient *= (own * factors.target).unsqueeze(1)
    divergence, of_teacher = _towards_teacher(logits, answers, factors.temperature)
    factor = torch.full_like(divergence, factors.teacher) if weights is None else (
        weights * factors.teacher
    )  # fmt: skip
    gradient.addcmul_(of_teacher, factor.unsqueeze(1))
    values.copy_(gradient)
    each = torch.stack(
        [factors.target * entropy + factors.teacher * divergence, entropy, divergence]
    )
    return (each if weights is None else each * weights).sum(1)


def _towards_teacher(logits: Tensor, answers: Answers, temperature: float) -> tuple[Tensor, Tensor]:
    """`T^2 KL` of each row, and its gradient `T (softmax(s / T) - t)`.

    Of answers that were kept in part, `t` is their probability where there is one, and elsewhere
    the student's own, scaled to what is left.
    """
    logs = functional.log_softmax(logits / temperature, -1)
    if isinstance(answers, Tensor):
        theirs = functional.log_softmax(answers.float() / temperature, -1)
        divergence = functional.kl_div(logs, theirs, reduction="none", log_target=True).sum(-1)
        return divergence * temperature**2, (logs.exp() - theirs.exp()) * temperature
    divergence = top_divergences(logits, answers, temperature)
    own, probabilities = logs.exp(), answers.log_probabilities.exp()
    rest = (1.0 - probabilities.sum(-1)).clamp_min(0.0)
    others = own.scatter(-1, answers.classes, 0.0)
    sums = others.sum(-1)
    scale = torch.where(sums > 0, rest / torch.where(sums > 0, sums, 1.0), 0.0)
    wanted = others.mul_(scale.unsqueeze(1)).scatter_(-1, answers.classes, probabilities)
    return divergence, (own - wanted) * temperature
