"""Samples that a program holds, as data: arrays, tensors, a data frame, a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any

from forge_kernel.contract.data import Data, DataSpec
from forge_kernel.contract.seeds import stream_seed
from forge_kernel.contract.tensor_data import TensorData
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError, Fault
from forge_kernel.training.loaders.data_loaders import batch_from

if TYPE_CHECKING:
    from torch import Tensor


class SampleData:
    """A dataset whose samples are asked for by number, each `(input, target)`.

    Args:
        dataset: has `__len__` and `__getitem__`.
        training: numbers of the samples that are trained on.
        validation: numbers of those that are held out.
        batch_size: samples in a batch.
        seed: of the order of each epoch.
    """

    def __init__(
        self,
        dataset: Any,
        training: Sequence[int],
        validation: Sequence[int],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self._dataset, self._training, self._held_out = dataset, training, validation
        self._batch_size, self._seed = batch_size, seed
        self.spec = DataSpec(samples=len(training))
        self.batches_per_epoch: int | None = -(-len(training) // batch_size)

    def _batch(self, numbers: Sequence[int]) -> Batch:
        from torch.utils.data import default_collate

        return batch_from(default_collate([self._dataset[number] for number in numbers]))

    def _order(self, epoch: int) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(stream_seed(self._seed, "order", epoch))
        return torch.randperm(len(self._training), generator=generator)

    def take(self, epoch: int, places: range) -> Batch:
        """The samples at some places of an epoch's order."""
        order = self._order(epoch)[places.start : places.stop : places.step]
        return self._batch([self._training[place] for place in order.tolist()])

    def batches(self, epoch: int, place: int) -> Iterator[Batch]:
        """The epoch's batches from a place on; nothing before it is asked for."""
        order = self._order(epoch).tolist()
        for begin in range(place, len(order), self._batch_size):
            chosen = order[begin : begin + self._batch_size]
            yield self._batch([self._training[number] for number in chosen])

    @property
    def has_validation(self) -> bool:
        """Whether samples were held out."""
        return len(self._held_out) > 0

    def validation(self) -> Iterator[Batch]:
        """The held-out samples in their own order."""
        for begin in range(0, len(self._held_out), self._batch_size):
            yield self._batch(self._held_out[begin : begin + self._batch_size])


def as_data(
    data: Any,
    *,
    target: str | None = None,
    validation: Any = 0.2,
    batch_size: int = 64,
    seed: int = 0,
) -> Data:
    """Samples in memory as data of a run.

    Args:
        data: a pair (inputs, targets) of tensors or arrays, each with a row for each sample; a data
            frame, whose column `target` is the targets; or a dataset of pairs (`__len__` and
            `__getitem__`).
        target: the column of a data frame.
        validation: the share of the samples that is held out, drawn by the seed; or samples of
            their own, in the form of `data`; None or 0: none.
        batch_size: samples in a batch.
        seed: of the share, and of the order of each epoch.

    Returns:
        `Data`: an order by (seed, epoch), and any place of it taken up at once.

    Raises:
        ConfigError: it has none of these forms, or holds what no network reads.
    """
    if batch_size < 1:
        raise _fault(f"batch_size {batch_size} must be 1 or above")
    if _is_dataset(data):
        return _of_dataset(data, validation, batch_size, seed)
    inputs, targets = _pair(data, target)
    spec = _spec(inputs, targets)
    if validation is None or isinstance(validation, float | int):
        kept, held_out = _split(len(inputs), validation or 0.0, seed)
        pair = (inputs[held_out], targets[held_out]) if len(held_out) else None
        inputs, targets = inputs[kept], targets[kept]
    else:
        pair = _pair(validation, target)
    return TensorData(inputs, targets, batch_size=batch_size, seed=seed, spec=spec, validation=pair)


def _fault(message: str, *hints: str) -> ConfigError:
    return ConfigError([Fault(f"data: {message}", hints=hints)])


def _is_dataset(data: Any) -> bool:
    return (
        hasattr(data, "__getitem__")
        and isinstance(data, Sized)
        and not isinstance(data, tuple | list | dict | str)
        and not hasattr(data, "shape")
    )


def _split(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the samples that are trained on and of those that are held out, in order."""
    import torch

    if not 0.0 <= share < 1.0:
        raise _fault(f"validation {share:g} must be a share from 0 to below 1")
    held_out = round(count * share)
    if held_out >= count:
        raise _fault(f"validation {share:g} of {count} samples leaves none to train on")
    generator = torch.Generator().manual_seed(stream_seed(seed, "split"))
    order = torch.randperm(count, generator=generator)
    return order[held_out:].sort().values, order[:held_out].sort().values


def _of_dataset(data: Any, validation: Any, batch_size: int, seed: int) -> Data:
    if not len(data):
        raise _fault("the dataset is empty")
    if validation is None or isinstance(validation, float | int):
        kept, held_out = _split(len(data), validation or 0.0, seed)
        return SampleData(data, kept.tolist(), held_out.tolist(), batch_size=batch_size, seed=seed)
    if not _is_dataset(validation):
        raise _fault("the validation samples of a dataset are a dataset too")
    both = _Joined(data, validation)
    first = len(data)
    return SampleData(both, range(first), range(first, len(both)), batch_size=batch_size, seed=seed)


class _Joined:
    """Two datasets, one behind the other."""

    def __init__(self, first: Any, second: Any) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, number: int) -> Any:
        size = len(self._first)
        return self._first[number] if number < size else self._second[number - size]


def _pair(data: Any, target: str | None) -> tuple[Tensor, Tensor]:
    """Inputs and targets as tensors of as many samples."""
    columns = getattr(data, "columns", None)
    if columns is not None and hasattr(data, "to_numpy"):
        if target is None or target not in list(columns):
            named = ", ".join(map(str, list(columns)[:12]))
            said = "give target=COLUMN" if target is None else f"there is no column {target!r}"
            raise _fault(f"of a data frame a column is the target: {said}", f"it has {named}")
        inputs, targets = data.drop(columns=[target]), data[target]
    elif isinstance(data, tuple | list) and len(data) == 2:
        inputs, targets = data
    else:
        what = type(data).__name__
        raise _fault(
            f"a {what} is no samples",
            "give (inputs, targets), a data frame with target=COLUMN, or a dataset",
        )
    one, other = _tensor(inputs, "inputs"), _tensor(targets, "targets")
    if not one.ndim or not other.ndim or len(one) != len(other) or not len(one):
        raise _fault(
            f"inputs of shape {tuple(one.shape)} and targets of shape {tuple(other.shape)} are "
            "not as many samples: the first dimension counts them"
        )
    return one, other


def _tensor(values: Any, what: str) -> Tensor:
    """As a tensor: whole numbers as int64, others as fp32; half precision stays."""
    import numpy as np
    import torch

    if isinstance(values, torch.Tensor):
        result = values.detach()
    else:
        kinds = getattr(values, "dtypes", None)
        texts = [
            str(name) for name, kind in getattr(kinds, "items", tuple)() if kind.kind not in "biuf"
        ]
        if texts:
            raise _fault(
                f"the columns {', '.join(texts[:8])} hold no numbers",
                "number them first, or train from a CSV file, where data.file does so",
            )
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise _fault(
                f"{what} are of the type {array.dtype}, not of numbers",
                "number the classes 0, 1, ... first: np.unique(labels, return_inverse=True)[1]",
            )
        result = torch.from_numpy(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("=")))
    if result.dtype == torch.float64:
        result = result.float()
    elif not result.is_floating_point() and not result.is_complex():
        result = result.long() if result.dtype != torch.bool else result.float()
    if result.is_floating_point() and not bool(torch.isfinite(result).all()):
        rows = (~torch.isfinite(result.reshape(len(result), -1))).any(1).nonzero()[:, 0]
        raise _fault(
            f"{len(rows)} of {len(result)} {what} hold no finite number, the first is sample "
            f"{int(rows[0])}",
            "fill or drop them first",
        )
    return result


def _spec(inputs: Tensor, targets: Tensor) -> DataSpec:
    """What is seen of the samples."""
    whole = not targets.is_floating_point()
    classes = int(targets.max()) + 1 if whole and targets.ndim == 1 else None
    vector = inputs.is_floating_point() and inputs.ndim == 2
    return DataSpec(
        features=inputs.shape[1] if vector else None,
        classes=classes,
        shape=tuple(inputs.shape[1:]) if inputs.ndim > 2 else None,
    )
