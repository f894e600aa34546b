"""A fact that a plugin requires and no other brings, in words for people: what to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Final

from forge_kernel.config.spelling import did_you_mean

GROUP: Final = "forge_kernel.facts"
"""Entry points of distributions: mappings of facts to (what is missing, what to change)."""


def missing(name: str, fact: str, brought: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """What is told of a fact that a plugin requires.

    Args:
        name: of the plugin.
        fact: such as `metric:accuracy`.
        brought: all facts of the run.

    Returns:
        Message and hints.
    """
    topic, _, word = fact.partition(":")
    known = sorted(other.partition(":")[2] for other in brought if other.startswith(f"{topic}:"))
    near = did_you_mean(word, known)
    if topic == "metric":  # the kernel's own words
        there = (f"this run computes: {', '.join(known)}",)
        return f"{name} needs the metric '{word}', which nothing here computes", near or there
    told = _told().get(fact)
    if told is not None:
        lacking, mend = told
        return f"{name} needs {lacking}", (*near, mend)
    there = (f"this run has: {', '.join(known) or 'nothing of the sort'}",)
    return f"{name} needs the {topic} '{word}', which no part of this run brings", near or there


def _told() -> Mapping[str, tuple[str, str]]:
    result: dict[str, tuple[str, str]] = {}
    for entry in entry_points(group=GROUP):
        result.update(entry.load())
    return result
