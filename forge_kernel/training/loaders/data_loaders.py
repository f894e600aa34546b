"""A user's loaders as data, and batches from what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any

from forge_kernel.contract.data import INPUTS, TARGETS, WEIGHTS, DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.errors import RunError

if TYPE_CHECKING:
    from forge_kernel.contract.run import Run
    from forge_kernel.training.loaders.loader_stream import LoaderStream


def batch_from(value: Any) -> Batch:
    """Bring what a loader yields into a `Batch`.

    Args:
        value: a `Batch`; inputs alone; `(inputs, targets[, weights])`; a mapping with the key
            `input` (or `inputs`, `x`, `features`, `data`) and, as far as they are there, `target`
            (`targets`, `y`, `label`, `labels`) and `weight`; or a mapping of a model's arguments
            beside `labels`, as tokenizers make them.

    Raises:
        RunError: none of these, or a mapping that names one of them twice.
    """
    if isinstance(value, Batch):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(value)
    if isinstance(value, list | tuple):
        if not 1 <= len(value) <= 3:
            raise RunError(f"a batch is (inputs, targets[, weights]), not {len(value)} parts")
        return Batch(*value)
    return Batch(value)


def _from_mapping(value: Mapping[Any, Any]) -> Batch:
    result: dict[str, Any] = {}
    left = {str(key): item for key, item in value.items()}
    for what, names in (("input", INPUTS), ("target", TARGETS), ("weight", WEIGHTS)):
        present = [name for name in names if name in left]
        if len(present) > 1:
            raise RunError(f"a batch names its {what}s twice: {' and '.join(present)}")
        if present:
            result[what] = left.pop(present[0])
    if "input" in result:
        if left:
            raise RunError(
                f"a batch has the keys {sorted(left)} beside its inputs: hand several inputs over "
                "as (mapping of the model's arguments, targets)"
            )
        return Batch(result["input"], result.get("target"), result.get("weight"))
    if not left:
        raise RunError(
            f"a batch has no inputs, its keys are {sorted(map(str, value))}: name them 'inputs' "
            "and 'targets', or give pairs (inputs, targets)"
        )
    return Batch(left, result.get("target"), result.get("weight"))


class LoaderData:
    """Any iterable of batches (a DataLoader, a list) as `Data`.

    Its order is its own, so a resume replays: the epoch is begun with the random states that it
    began with, and the batches before the place are drawn and dropped. For that the loader has
    streams of its own (what it draws from python, numpy and torch is not what the model draws), and
    the generators that it holds are kept with the run.

    Args:
        training: an iterable of batches, begun anew for each epoch.
        validation: likewise, begun anew for each validation.
        spec: what is known of the data.
        exact: refuse to go on in the middle of an epoch whose batches come otherwise than they
            did; False: go on all the same.
        convert: brings what the loader yields into a `Batch`.

    Raises:
        RunError: the validation data can be read only once.
    """

    def __init__(
        self,
        training: Iterable[Any],
        validation: Iterable[Any] = (),
        spec: DataSpec | None = None,
        *,
        exact: bool = True,
        convert: Callable[[Any], Batch] = batch_from,
    ) -> None:
        self.spec = spec or DataSpec()
        self._training = training
        self._validation = validation
        self._exact = exact
        self._convert = convert
        self._loader: LoaderStream | None = None
        self._loaded: dict[str, Any] | None = None
        self._spent = False
        self._seed: int | None = None
        self._emit_event: Callable[[str, str], None] = _untold
        if validation is not None and _once(validation):
            raise RunError(
                f"the validation data is a {type(validation).__name__}, which can be read only "
                "once, and each validation reads it: hand in a list or a DataLoader"
            )
        try:
            self.batches_per_epoch: int | None = len(training)  # type: ignore[arg-type]
        except TypeError:
            self.batches_per_epoch = None

    @property
    def has_validation(self) -> bool:
        """Whether there is validation data at all."""
        result = self._validation
        return result is not None and (not isinstance(result, Sized) or len(result) > 0)

    def join(self, run: Run) -> None:
        """Belong to a run: its seed starts the loader's streams, and it is told what is found.

        Without one, and in a run without a seed, they start where torch's ambient stream stands.
        """
        self._seed = None if run.settings.seed is None else run.seed
        self._emit_event = run.emit_event

    def _stream(self) -> LoaderStream:
        """The loader's streams, made when they are first asked for."""
        if self._loader is None:
            from forge_kernel.training.loaders.loader_stream import LoaderStream

            self._loader = LoaderStream(self._training, self._seed, self._emit_event)
            if self._loaded is not None:
                self._loader.load_state_dict(self._loaded)
                self._loaded = None
        return self._loader

    def batches(self, epoch: int, place: int) -> Iterator[Batch]:
        """Iterate once over the training iterable, without the samples before a place.

        Raises:
            RunError: it can be read only once and was; or the epoch does not come again as it was.
        """
        if self._spent:
            raise RunError(
                f"the training data is a {type(self._training).__name__}, which can be read only "
                "once, and the run needs a second pass: hand in a list or a DataLoader, or set "
                "run.max_epochs to 1"
            )
        self._spent = _once(self._training)
        passed = 0
        for value in self._stream().epoch(epoch, replay=place > 0, exact=self._exact):
            batch = self._convert(value)
            if passed >= place:
                yield batch
                continue
            passed += batch.samples
            if passed > place:  # the loader cuts its samples otherwise than it did
                yield batch.rows(slice(place - passed, None))

    def place_after(self, epoch: int, batches: int) -> int:
        """The place in the epoch in progress after so many batches; see `contract.data`."""
        if not batches or self._spent:
            return 0
        drawn = self._stream().epoch(epoch, replay=True, exact=self._exact)
        return sum(self._convert(value).samples for value in islice(drawn, batches))

    def validation(self) -> Iterator[Batch]:
        """Iterate over the validation iterable."""
        for value in self._validation or ():
            yield self._convert(value)

    def state_dict(self) -> dict[str, Any]:
        """The random states of the loader: those that the epoch in progress began with."""
        return self._stream().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the states of the loader."""
        self._loaded, self._loader = dict(state), None


def _untold(name: str, message: str) -> None:
    """Nobody listens: the data belongs to no run."""


def _once(iterable: Any) -> bool:
    """Whether an iterable is its own iterator, and so spent after one pass."""
    return isinstance(iterable, Iterator)
