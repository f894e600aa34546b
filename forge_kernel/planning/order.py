"""One stable order: predecessors are pulled forward, bystanders keep their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class CycleError(ValueError):
    """The constraints contradict each other; `cycle` names the ring."""

    def __init__(self, cycle: Sequence[str]) -> None:
        self.cycle = tuple(cycle)
        super().__init__(" -> ".join(cycle))


def stable_order(names: Sequence[str], after: Mapping[str, Sequence[str]]) -> list[str]:
    """Sort names so that each follows those it comes after, changing as little as possible.

    Depth first in the given order; iterative.

    Args:
        names: distinct names in their given order.
        after: for a name, those that must come before it; unknown ones are passed over.

    Raises:
        CycleError: the constraints form a ring.
    """
    known = set(names)
    assert len(known) == len(names), "names must be distinct"
    placed: dict[str, None] = {}
    for start in names:
        path: list[str] = []
        stack: list[tuple[str, bool]] = [(start, False)]
        while stack:
            name, leaving = stack.pop()
            if leaving:
                path.pop()
                placed[name] = None
                continue
            if name in placed:
                continue
            if name in path:
                raise CycleError([*path[path.index(name) :], name])
            path.append(name)
            stack.append((name, True))
            wanted = [other for other in after.get(name, ()) if other in known]
            wanted.sort(key=names.index, reverse=True)
            stack.extend((other, False) for other in wanted)
    return list(placed)
