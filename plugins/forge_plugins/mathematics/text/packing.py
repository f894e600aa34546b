"""Sequences of several lengths, put together so that little room is left."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.int64], room: int) -> list[list[int]]:
    """Which sequences go together: best fit, the longest first (Johnson 1973).

    Each goes where the least room is left behind it. At most 11/9 of the least possible number of
    packs, and in practice within a few percent of it. The answer is a function of the lengths.

    Args:
        lengths: of the sequences, each in 1 .. room.
        room: of a pack.

    Returns:
        Numbers of sequences, by pack; the packs in the order of the first sequence of each.
    """
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # by the room that is left
    rooms: list[int] = []  # those of them with a pack, ascending
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            pack, left = len(packs), room
            packs.append([])
        else:
            left = rooms[place]
            pack = open_packs[left].pop()
            if not open_packs[left]:
                rooms.pop(place)
        packs[pack].append(number)
        left -= length
        if left:
            held = open_packs.setdefault(left, [])
            if not held:
                insort(rooms, left)
            held.append(pack)
    return sorted(sorted(pack) for pack in packs)
