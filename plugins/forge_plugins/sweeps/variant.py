"""One configuration of a sweep and its runs, one for each seed."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from forge_plugins.sweeps.axis import Axis

_LONGEST: Final = 60  # of the 80 signs that a run's name may have


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration.

    Args:
        number: from 0 on, in the order in which they are begun.
        values: of the axes that vary, by key.
        fixed: settings that all runs have, as `key=value`.
    """

    number: int
    values: tuple[tuple[str, str], ...]
    fixed: tuple[str, ...]

    @property
    def settings(self) -> list[str]:
        """Overrides of the pipeline."""
        return [*self.fixed, *(f"{key}={value}" for key, value in self.values)]

    @property
    def label(self) -> str:
        """What differs, for people: `lr=1e-3 hidden=[64]`."""
        names = short_names([key for key, _ in self.values])
        return " ".join(f"{names[key]}={value}" for key, value in self.values) or "as in the file"

    @property
    def name(self) -> str:
        """The same as the name of a run may be."""
        text = re.sub(r"[^A-Za-z0-9._-]+", "-", self.label).strip("-.")
        return (text or "run")[:_LONGEST]


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep: a configuration and a seed; None: the file's."""

    variant: Variant
    seed: int | None

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        seed = "" if self.seed is None else f"-seed-{self.seed}"
        return f"{self.variant.number:03d}-{self.variant.name}{seed}"

    @property
    def settings(self) -> list[str]:
        """Overrides of the pipeline."""
        seed = [] if self.seed is None else [f"run.seed={self.seed}"]
        return [*self.variant.settings, *seed, f"run.name={self.variant.name}"]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last word of each key; the whole key where two end alike."""
    last = {key: key.rpartition(".")[2] for key in keys}
    counts = Counter(last.values())
    return {key: word if counts[word] == 1 else key for key, word in last.items()}


def grid(axes: Sequence[Axis]) -> Iterator[Variant]:
    """Each value of each axis with each of the others."""
    varied = [axis for axis in axes if axis.varies]
    for number, values in enumerate(itertools.product(*(axis.values for axis in varied))):
        chosen = tuple((axis.key, value) for axis, value in zip(varied, values, strict=True))
        yield Variant(number, chosen, fixed(axes))


def drawn(axes: Sequence[Axis], count: int, seed: int) -> Iterator[Variant]:
    """So many configurations, each axis drawn by itself (Bergstra and Bengio, JMLR 13, 2012)."""
    for number in range(count):
        draws = random.Random(f"{seed} {number}")  # noqa: S311  a search, no secret
        chosen = tuple((axis.key, axis.drawn(draws)) for axis in axes if axis.varies)
        yield Variant(number, chosen, fixed(axes))


def fixed(axes: Sequence[Axis]) -> tuple[str, ...]:
    """The settings that all runs have."""
    return tuple(f"{axis.key}={axis.values[0]}" for axis in axes if not axis.varies)
