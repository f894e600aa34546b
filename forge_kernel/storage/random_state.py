"""The states of the process's random streams: read, set, seed; to and from a checkpoint."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

STREAMS_LOCK = threading.RLock()
"""Held by the thread that draws from the ambient streams on behalf of a run."""


@dataclass(slots=True)
class StreamState:
    """The states of python, numpy, torch and all its CUDA devices; quick to read and to set."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def read(cls) -> StreamState:
        """As the ambient streams stand."""
        cuda = list(torch.cuda.get_rng_state_all()) if _cuda_in_use() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def write(self) -> None:
        """Set the ambient streams."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self.cuda)

    @classmethod
    def seeded(cls, seed: int) -> StreamState:
        """All streams started from one number; the ambient ones are left alone."""
        key: Any = np.random.MT19937(seed % 2**32).state["state"]
        devices = range(torch.cuda.device_count() if _cuda_in_use() else 0)
        return cls(
            random.Random(seed).getstate(),  # noqa: S311  a stream of a training, not a secret
            ("MT19937", key["key"], int(key["pos"]), 0, 0.0),
            torch.Generator().manual_seed(seed).get_state(),
            [torch.Generator(f"cuda:{index}").manual_seed(seed).get_state() for index in devices],
        )

    def to_tree(self) -> dict[str, Any]:
        """As a checkpoint keeps them: plain data and tensors."""
        version, numbers, gauss = self.python
        name, keys, position, has_gauss, cached = self.numpy
        tree: dict[str, Any] = {
            "python": {"version": version, "numbers": list(numbers), "gauss": gauss},
            "numpy": {
                "name": str(name),
                "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
                "position": int(position),
                "has_gauss": int(has_gauss),
                "cached": float(cached),
            },
            "torch": self.torch,
        }
        return {**tree, "cuda": self.cuda} if self.cuda else tree

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> StreamState:
        """What `to_tree` gave."""
        python, numbers = tree["python"], tree["numpy"]
        return cls(
            (python["version"], tuple(python["numbers"]), python["gauss"]),
            (
                numbers["name"],
                numbers["keys"].numpy().astype(np.uint32),
                numbers["position"],
                numbers["has_gauss"],
                numbers["cached"],
            ),
            tree["torch"].cpu(),
            [item.cpu() for item in tree.get("cuda", ())],
        )


def read_random_state() -> dict[str, Any]:
    """The states of the ambient streams as a checkpoint keeps them."""
    return StreamState.read().to_tree()


def write_random_state(state: Mapping[str, Any]) -> None:
    """Set the ambient streams to a state that `read_random_state` gave."""
    StreamState.from_tree(state).write()


def seed_everything(seed: int) -> None:
    """Start all streams from one number."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def ambient_seed() -> int:
    """A seed that follows from where torch's ambient stream stands; nothing is drawn."""
    state = torch.get_rng_state().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "big")


@contextmanager
def drawn_from(state: StreamState) -> Iterator[None]:
    """What is drawn inside is drawn from these streams; outside, nothing has moved.

    Args:
        state: where the streams begin; where they end is written back into it.
    """
    with STREAMS_LOCK:
        outside = StreamState.read()
        state.write()
        try:
            yield
        finally:
            ended = StreamState.read()
            state.python, state.numpy = ended.python, ended.numpy
            state.torch, state.cuda = ended.torch, ended.cuda
            outside.write()


def _cuda_in_use() -> bool:
    """Whether a CUDA device was touched: asking it for its state would touch it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Leave random streams, grad mode, determinism and threads of torch as they were found."""
    kept = StreamState.read()
    with torch_settings_kept():
        try:
            yield
        finally:
            kept.write()


@contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Leave grad mode, determinism and threads of torch as they were found."""
    grad = torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
