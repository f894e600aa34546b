"""A user's loader, drawing from random streams of its own that a run keeps and puts back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch

from forge_kernel.contract.seeds import stream_seed
from forge_kernel.errors import RunError
from forge_kernel.storage.random_state import StreamState, ambient_seed, drawn_from
from forge_kernel.training.loaders.loader_state import LoaderGenerators, set_epoch

_END: Final = object()


class LoaderStream:
    """One epoch of a loader after the other.

    What the loader, its samplers and its data draw from the ambient streams of python, numpy and
    torch they draw from streams of this object, whatever the model draws in between.

    Args:
        loader: an iterable, begun anew for each epoch.
        seed: of the run; None: the streams start where torch's ambient one stands.
        tell: makes something known: a word for programs, a sentence for people.
    """

    def __init__(
        self, loader: Iterable[Any], seed: int | None, tell: Callable[[str, str], None]
    ) -> None:
        self._loader = loader
        self._tell = tell
        self._workers = int(getattr(loader, "num_workers", 0))
        own = ambient_seed() if seed is None else stream_seed(seed, "loader")
        self._workers_then = self._workers
        self._plain = type(loader) in (list, tuple)  # such a one draws nothing
        self._stream = StreamState.seeded(own)
        self._generators = LoaderGenerators(() if self._plain else loader)
        self._first: dict[str, Any] | None = None  # None between epochs
        self._digest: str | None = None  # of the first batch of the epoch in progress

    def epoch(self, epoch: int, *, replay: bool, exact: bool) -> Iterator[Any]:
        """What the loader yields in an epoch, from its beginning.

        Args:
            epoch: is told to everything in the loader that has `set_epoch`.
            replay: an epoch that was begun before, from the streams that it began with.
            exact: compare the first batch of a replay with what it was.

        Raises:
            RunError: it is another batch.
        """
        set_epoch(self._loader, epoch)
        replay = replay and self._first is not None
        if replay:
            assert self._first is not None
            self._stream = StreamState.from_tree(self._first["streams"])
            self._generators.write(self._first["generators"])
        else:
            self._first, self._digest = self._now(), None
        for number, value in enumerate(self._drawn()):
            if number == 0 and not self._plain:
                self._compare(value, replay=replay and exact)
            yield value
        self._first = self._digest = None

    def _drawn(self) -> Iterator[Any]:
        """The loader's values; its streams are in use only while it is at work."""
        if self._plain:
            yield from self._loader
            return
        with drawn_from(self._stream):
            iterator = iter(self._loader)

        def following() -> Any:
            with drawn_from(self._stream):
                return next(iterator, _END)

        yield from iter(following, _END)

    def _compare(self, value: Any, *, replay: bool) -> None:
        digest = _digest(value)
        if replay and self._workers_then != self._workers:
            self._tell(
                "workers_changed",
                f"The training data has {self._workers} workers, and had {self._workers_then} when "
                "the epoch began: what they draw (augmentation) may differ.",
            )
        elif replay and self._digest not in (None, digest):
            raise RunError(
                f"the training data ({type(self._loader).__name__}) begins the epoch with another "
                "batch than it did: its order or its draws are not repeatable, or the data has "
                "changed. Seed its generators and keep them as attributes of the loader, sampler "
                "or dataset, or hand in LoaderData(..., exact=False) to go on all the same"
            )
        self._digest = digest

    def _now(self) -> dict[str, Any]:
        return {"streams": self._stream.to_tree(), "generators": self._generators.read()}

    def state_dict(self) -> dict[str, Any]:
        """The states that the epoch in progress began with; between epochs, those of now."""
        within = self._first is not None
        return {
            **(self._first or self._now()),
            "within": within,
            "digest": self._digest,
            "workers": self._workers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up states; those of an epoch in progress are used when it is begun.

        Raises:
            RunError: the loader holds other generators.
        """
        kept = {name: state[name] for name in ("streams", "generators")}
        self._digest = state["digest"]
        self._workers_then = int(state["workers"])
        self._first = kept if state["within"] else None
        self._stream = StreamState.from_tree(kept["streams"])
        self._generators.write(kept["generators"])


def _digest(value: Any) -> str:
    """A short digest of the tensors in what a loader yields."""
    result = hashlib.blake2b(digest_size=8)
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            plain = item.detach().cpu().contiguous()
            result.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            result.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, Mapping):
            todo.extend(item.values())
        elif isinstance(item, list | tuple):
            todo.extend(item)
        elif hasattr(item, "inputs") and hasattr(item, "targets"):
            todo.extend((item.inputs, item.targets))
    return result.hexdigest()
