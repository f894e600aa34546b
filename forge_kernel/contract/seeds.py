"""A seed of its own for each random stream of a run."""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, *keys: str | int) -> int:
    """A seed of its own for each random stream of a run, so that no two streams share numbers.

    Args:
        seed: of the run.
        keys: what the stream is for (`"order", epoch`).
    """
    text = "/".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
