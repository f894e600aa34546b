"""Pictures in batches: scaled by what the training share holds, and moved anew in each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import Batch, LazyModule, stream_seed
from forge_plugins.data.file_batches import FileData

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_plugins.data.columns.preparation import InputColumn
    from forge_plugins.data.workers import Key
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")

_DRAWS: Final = 4
"""Numbers that a place of an epoch has: Philox gives four for each count."""


class PictureForm:
    """Makes a batch of rows of bytes and of labels: (byte - mean) / deviation of its channel.

    Args:
        column: with the channels' means and deviations.
    """

    def __init__(self, column: InputColumn) -> None:
        shape = (1, len(column.mean), 1, 1)
        self._factor = (1.0 / torch.tensor(column.scale, dtype=torch.float64)).float().view(shape)
        mean, scale = (
            torch.tensor(each, dtype=torch.float64) for each in (column.mean, column.scale)
        )
        self._offset = (-mean / scale).float().view(shape)

    def __call__(self, rows: Any, answers: Any) -> Batch:
        """Inputs float32 (pictures, channels, height, width), targets int64 (pictures,)."""
        inputs = torch.from_numpy(rows).to(torch.float32).mul_(self._factor).add_(self._offset)
        return Batch(inputs, None if answers is None else torch.from_numpy(answers))


class PictureData(FileData):
    """Pictures, of which those that are trained on are mirrored and moved.

    What happens to a picture is a function of (seed, epoch, place), so that a resumed run, another
    batch size or other processes see the same pictures.

    Args:
        flip: mirror half of them.
        shift: move them by up to so many pixels.
    """

    flip = False
    shift = 0

    def fetch(self, key: Key) -> Any:
        """The batch of a key, its pictures moved."""
        epoch, begin, end = key
        places = range(begin + self._rank, end, self._world) or range(begin, begin + 1)
        return self.moved(super().fetch(key), epoch, places)

    def take(self, epoch: int, places: range) -> Any:
        """The batch of some places, its pictures moved."""
        return self.moved(super().take(epoch, places), epoch, places)

    def moved(self, batch: Batch, epoch: int, places: range) -> Batch:
        """Mirror and move the pictures at some places of an epoch."""
        if not self.flip and not self.shift:
            return batch
        draws = _drawn(stream_seed(self.seed, "pictures", epoch), places)
        inputs = batch.inputs
        if self.flip:
            chosen = torch.from_numpy(draws[:, 0] % 2 == 1)
            inputs = torch.where(chosen.view(-1, 1, 1, 1), inputs.flip(-1), inputs)
        if self.shift:
            span, (height, width) = 2 * self.shift + 1, inputs.shape[-2:]
            tops, lefts = ((draws[:, at] % span).tolist() for at in (1, 2))
            wide = torch.nn.functional.pad(inputs, (self.shift,) * 4)
            inputs = torch.stack(
                [
                    picture[:, top : top + height, left : left + width]
                    for picture, top, left in zip(wide, tops, lefts, strict=True)
                ]
            )
        batch.inputs = inputs
        return batch


def _drawn(seed: int, places: range) -> Any:
    """Numbers of some places, uint64, shape (places, 4): the place is the generator's count."""
    first, last = places[0], places[-1]
    generator = np.random.Philox(key=seed, counter=first)
    raw = generator.random_raw(_DRAWS * (last - first + 1)).reshape(-1, _DRAWS)
    return raw[:: places.step]
