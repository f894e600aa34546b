"""What a client makes of targets: how likely it finds each, and what it would have answered.

A request is texts, or samples, in groups of one shape: `inputs.N` beside `targets.N` and, where
fewer places than all have targets, `positions.N`. The answer is `logprob.N` and `top.N`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from forge_plugins.mathematics.metrics.label_positions import answer_pieces


@dataclass(frozen=True, slots=True)
class Question:
    """Some samples of one shape, and what is asked about them.

    Args:
        inputs: shape (samples, ...).
        targets: integers, shape (samples,) or (samples, places).
        positions: index of the sequence that the targets are of; None: all, or one by sample.
    """

    inputs: Tensor
    targets: Tensor
    positions: Tensor | None = None


def target_answers(question: Question, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the class of the largest logit.

    Args:
        question: whose targets are meant; one outside the classes has the log-probability of the
            first, for it counts for nothing.
        logits: shape (samples, [positions,] classes).

    Returns:
        fp64 and int64, shape (targets,), in their order.

    Raises:
        ValueError: there are not as many rows of logits as targets.
    """
    logprobs, tops = [], []
    for rows, targets, _ in answer_pieces(logits, question.targets, question.positions):
        meant = torch.where((targets >= 0) & (targets < rows.shape[-1]), targets, 0)
        scores = rows.double().log_softmax(-1)
        logprobs.append(scores.gather(-1, meant[:, None])[:, 0])
        tops.append(rows.argmax(-1))
    return torch.cat(logprobs), torch.cat(tops)


def as_request(questions: Iterable[Question]) -> dict[str, Tensor]:
    """Questions as tensors by name."""
    result: dict[str, Tensor] = {}
    for number, question in enumerate(questions):
        result[f"inputs.{number}"] = question.inputs
        result[f"targets.{number}"] = question.targets
        if question.positions is not None:
            result[f"positions.{number}"] = question.positions
    return result


def questions_of(request: Mapping[str, Tensor]) -> Iterator[Question]:
    """The questions of a request, in their order."""
    for number in range(len(request)):
        inputs = request.get(f"inputs.{number}")
        if inputs is None:
            return
        yield Question(inputs, request[f"targets.{number}"], request.get(f"positions.{number}"))


def answers_by_logits(
    request: Mapping[str, Tensor], logits: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The answer to a request by a program that gives logits.

    Args:
        request: of `as_request`, or `inputs` alone, to which the logits are the answer.
        logits: gives them for inputs, shape (samples, [positions,] classes).
    """
    alone = request.get("inputs")
    if alone is not None:
        return {"logits": logits(alone).float().contiguous()}
    result: dict[str, Tensor] = {}
    for number, question in enumerate(questions_of(request)):
        answer = target_answers(question, logits(question.inputs))
        result[f"logprob.{number}"], result[f"top.{number}"] = answer
    return result
