"""The nearest known name to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable


def edit_distance(left: str, right: str) -> int:
    """Fewest single-letter insertions, deletions, replacements and swaps of neighbours.

    Optimal string alignment (Damerau 1964, restricted).
    """
    before_last: list[int] = []
    last = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                best = min(best, before_last[j - 2] + 1)
            row.append(best)
        before_last, last = last, row
    return last[-1]


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names within reach of a typing mistake, nearest first."""
    wanted = name.lower()
    reach = max(2, len(wanted) // 3)
    result = []
    for candidate in known:
        if abs(len(candidate) - len(wanted)) > reach:
            continue
        distance = edit_distance(wanted, candidate.lower())
        if distance <= reach and distance < max(len(wanted), 2):
            result.append((distance, candidate))
    return [candidate for _, candidate in sorted(result)][:limit]


def did_you_mean(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """A hint with the nearest names, or none."""
    names = nearest(name, known)
    return (f"did you mean {' or '.join(repr(result) for result in names)}?",) if names else ()
