"""What a few steps at one batch size showed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Outcome = Literal["measured", "memory", "data"]
GAIN: Final = 1.05
"""A size is faster when it brings so many times the samples per second."""


@dataclass(frozen=True)
class Measurement:
    """Metrics of one batch size; those that were not measured are None.

    Args:
        batch_size: samples in a batch.
        outcome: `measured`; `memory`: there was not enough; `data`: there are not so many samples.
        samples_per_second: over the median step.
        step_seconds: the median step.
        peak_bytes: of the process (on a GPU: of the device), at its largest.
    """

    batch_size: int
    outcome: Outcome
    samples_per_second: float | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None


def search(
    measure: Callable[[int], Measurement], smallest: int, largest: int | None = None
) -> Iterator[Measurement]:
    """Double the batch size until memory or data end, or two doublings in a row bring nothing.

    Args:
        measure: tries a size.
        smallest: where to begin.
        largest: where to end; None: nowhere.
    """
    assert smallest >= 1, "a batch has samples"
    best, idle, size = 0.0, 0, smallest
    while largest is None or size <= largest:
        result = measure(size)
        yield result
        if result.samples_per_second is None:
            return
        idle = 0 if result.samples_per_second > best * GAIN else idle + 1
        best = max(best, result.samples_per_second)
        if idle == 2:
            return
        size *= 2


def recommended(measurements: Sequence[Measurement]) -> Measurement | None:
    """The smallest size that is not slower than the fastest by more than the gain that counts."""
    known = [each for each in measurements if each.samples_per_second is not None]
    fastest = max((each.samples_per_second or 0.0 for each in known), default=0.0)
    good = [each for each in known if (each.samples_per_second or 0.0) * GAIN >= fastest]
    return min(good, key=lambda each: each.batch_size, default=None)
