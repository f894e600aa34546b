"""Several pretended ranks: each in a thread of its own, adding tensors up as processes do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PATIENCE = 30.0  # seconds that a rank waits for the others before the test fails


class Ranks:
    """Sums tensors over threads. A rank that does not join leaves the others waiting, which fails.

    Args:
        count: of ranks.
    """

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count)
        self._given: list[Any] = [None] * count

    def adder(self, rank: int) -> Callable[[Tensor], Tensor]:
        """`add` of a rank."""

        def add(value: Tensor) -> Tensor:
            self._given[rank] = value
            self._barrier.wait(PATIENCE)
            given = list(self._given)
            self._barrier.wait(PATIENCE)
            shapes = {(tuple(one.shape), one.dtype) for one in given}
            assert len(shapes) == 1, f"ranks add up different things: {shapes}"
            return torch.stack(given).sum(0)

        return add

    def run(self, calls: Sequence[Callable[[Callable[[Tensor], Tensor]], Any]]) -> list[Any]:
        """What each call answers, given the `add` of its rank."""
        answers: list[Any] = [None] * len(calls)
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                answers[rank] = calls[rank](self.adder(rank))
            except BaseException as error:  # noqa: BLE001  raised again below
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (told or errors)[0]
        return answers


def computed(metrics: Sequence[Any]) -> Mapping[str, float]:
    """The metrics of several ranks' metrics, which must be the same on each."""
    answers = Ranks(len(metrics)).run([metric.compute for metric in metrics])
    assert all(answer == answers[0] for answer in answers), answers
    return answers[0]  # type: ignore[no-any-return]
