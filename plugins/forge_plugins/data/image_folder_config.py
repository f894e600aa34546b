"""What `data.image_folder` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from forge_plugins.data.settings import OnChange

Side = Annotated[int, Meta(ge=1, le=4096)]


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig:
    """Which pictures, of which size, and how they are dealt out."""

    path: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="a folder with a folder of pictures for each class, or a CSV or TSV of "
            "paths and labels; relative to where the command runs; it must be given",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    size: Annotated[
        # not tuple[Side, Side]: msgspec 0.22 crashes when the collector looks at a fixed tuple
        Side | Annotated[tuple[Side, ...], Meta(min_length=2, max_length=2)] | None,
        Meta(
            description="height and width, or one number for both: pictures of another size are "
            "scaled (bilinear) until they cover it and cut at the middle; null: all have one size"
        ),
    ] = None
    channels: Annotated[
        Literal[1, 3] | None,
        Meta(description="1: grey, 3: colours; null: 1 where every picture is grey"),
    ] = None
    file_column: Annotated[
        str, Meta(min_length=1, description="of a table: paths, seen from where it lies")
    ] = "file"
    label_column: Annotated[
        str, Meta(min_length=1, description="of a table: the names of the classes")
    ] = "label"
    flip: Annotated[
        bool,
        Meta(description="mirror half of the training pictures, left to right, anew each epoch"),
    ] = False
    shift: Annotated[
        int,
        Meta(
            ge=0,
            le=512,
            description="move training pictures by up to so many pixels in each direction, anew "
            "each epoch; what comes in is of the mean colour",
        ),
    ] = 0
    unreadable: Annotated[
        Literal["refuse", "leave_out"],
        Meta(description="a damaged picture is an error, or is left out and counted"),
    ] = "refuse"
    batch_size: Annotated[int, Meta(ge=1, description="pictures in a training batch")] = 64
    validation_batch_size: Annotated[
        int, Meta(ge=1, description="pictures in a validation batch")
    ] = 256
    shuffle: Annotated[
        bool, Meta(description="another order in each epoch; false: the order of the names")
    ] = True
    drop_last: Annotated[
        bool, Meta(description="leave out an epoch's last batch when it is smaller")
    ] = False
    validation_split: Annotated[
        float,
        Meta(
            ge=0,
            lt=1,
            description="fraction of the pictures of each class, drawn at random, that is kept for "
            "validation",
        ),
    ] = 0.1
    split_seed: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="seed of the split; null: the run's seed"),
    ] = None
    cache_dir: Annotated[
        str | None,
        Meta(
            description="where the pictures' numbers are kept; null: forge-kernel/data below the "
            "user's cache folder",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    verify: Annotated[
        bool, Meta(description="compare the hashes of what is kept at each start")
    ] = False
    on_change: OnChange = "refuse"

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width."""
        if isinstance(self.size, int):
            return self.size, self.size
        return None if self.size is None else (self.size[0], self.size[1])
