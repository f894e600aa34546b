"""Pictures of a folder whose sub-folders are the classes, or of a table of paths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import Data, Fault, Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl
from forge_plugins.data.columns import kept_preparation
from forge_plugins.data.columns.preparation import InputColumn, Preparation, TargetColumn, shown
from forge_plugins.data.file_batches import make_sampler
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.fingerprint import Identity
from forge_plugins.data.image_folder_config import ImageFolderConfig

if TYPE_CHECKING:
    import numpy as np

    from forge_plugins.data import image_batches
    from forge_plugins.formats import errors, picture_folder
    from forge_plugins.formats.columns import table as tables
    from forge_plugins.formats.inspection import quality_scan
else:
    np = LazyModule("numpy")
    errors = LazyModule("forge_plugins.formats.errors")
    image_batches = LazyModule("forge_plugins.data.image_batches")
    picture_folder = LazyModule("forge_plugins.formats.picture_folder")
    quality_scan = LazyModule("forge_plugins.formats.inspection.quality_scan")
    tables = LazyModule("forge_plugins.formats.columns.table")

_BLOCK: Final = 512
"""Pictures whose bytes are counted at a time."""


def picture_settings(config: ImageFolderConfig) -> FileConfig:
    """How the pictures are dealt out."""
    return FileConfig(
        path=config.path, batch_size=config.batch_size, shuffle=config.shuffle,
        validation_batch_size=config.validation_batch_size, drop_last=config.drop_last,
        validation_split=config.validation_split, split_seed=config.split_seed, stratified=True,
        cache_dir=config.cache_dir, verify=config.verify,
    )  # fmt: skip


def required(config: ImageFolderConfig) -> tuple[str, ...]:
    """Nothing of the other plugins.

    Raises:
        PluginError: the path is not given.
    """
    if config.path is None:
        hint = "path: a folder with a folder of pictures for each class, or a CSV of paths"
        raise PluginError([Fault("it needs the path of the pictures", "path", hints=(hint,))])
    return ()


def opened(
    config: ImageFolderConfig, listing: picture_folder.PictureList, kept: Preparation | None
) -> picture_folder.Pictures:
    """The pictures of a list, of the form that a run has kept or that the settings say.

    Raises:
        DataError: a picture cannot be read, or is of another size.
    """
    size, channels = config.shape, int(config.channels or 0) or None
    if kept is not None:
        channels = kept.inputs[0].shape[0]
    return picture_folder.open_pictures(
        listing, size=size, channels=channels, lenient=config.unreadable == "leave_out",
        cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
        verify=config.verify,
    )  # fmt: skip


def picture_data(
    config: ImageFolderConfig,
    seed: int,
    kept: Preparation | None,
    *,
    labels: bool = True,
    rank: int = 0,
    world: int = 1,
) -> tuple[image_batches.PictureData, picture_folder.PictureList, picture_folder.Pictures]:
    """Pictures ready to be dealt out, which of them there are, and what was read of them.

    Args:
        config: the settings.
        seed: of the run.
        kept: what the run has fitted before; None: it is fitted now, on the training share.
        labels: whether the pictures have classes.
        rank: of this process.
        world: processes that train together.

    Raises:
        DataError: they cannot be read as asked.
    """  # fmt: skip
    listing = picture_folder.listed(
        str(config.path), config.file_column, config.label_column, labels=labels
    )
    pictures = opened(config, listing, kept)
    columns: dict[str, Any] = {"input": pictures.column}
    names: tuple[str, ...] = ()
    if labels:
        names = tuple(sorted(set(listing.labels)))
        if kept is not None:
            names = _known(listing, kept)
        places = {name: at for at, name in enumerate(names)}
        columns["target"] = np.array([places[listing.labels[at]] for at in pictures.kept], np.int64)
    table = tables.Table(listing.place, "pictures", columns, None, pictures.content)
    settings = picture_settings(config)
    if len(table) < (2 if settings.validation_split else 1):
        hint = "add pictures, or set validation_split: 0"
        raise errors.DataError(listing.place, f"has {len(table)} picture", hint=hint)
    scan = quality_scan.ScanResult(0.0, len(table), None, {}, None, None, None)
    preparation = kept
    if preparation is None:
        trained = make_sampler(table, scan, settings, seed).all_training()
        preparation = Preparation(
            (_fitted(pictures.column, trained),), TargetColumn(config.label_column, names)
        )
    wanted = preparation.inputs[0].shape
    if table.columns["input"].shape[1:] != wanted:
        _, height, width = table.columns["input"].shape[1:]
        message = (
            f"has pictures of {width} x {height} pixels, and the run {wanted[2]} x {wanted[1]}"
        )
        raise errors.DataError(listing.place, message, hint="bring them to that size")
    data = image_batches.PictureData(
        table, scan, settings, seed, rank=rank, world=world, preparation=preparation,
        form=image_batches.PictureForm(preparation.inputs[0]),
    )  # fmt: skip
    data.flip, data.shift = config.flip, config.shift
    return data, listing, pictures


def _known(listing: picture_folder.PictureList, kept: Preparation) -> tuple[str, ...]:
    """The classes of a run, of which a folder's are some.

    Raises:
        DataError: it has another one.
    """
    known = kept.labels or ()
    for file, label in zip(listing.files, listing.labels, strict=True):
        if label not in known:
            message = f"is of the class '{label}', and the run knows {shown(known)}"
            raise errors.DataError(file, message, hint="leave it out, or train with it")
    return known


def _fitted(column: Any, rows: Any) -> InputColumn:
    """Mean and deviation of each channel's bytes, exactly: they are counted."""
    channels = column.shape[1]
    counts = np.zeros((channels, 256), np.int64)
    for begin in range(0, len(rows), _BLOCK):
        block = column[rows[begin : begin + _BLOCK]]
        for at in range(channels):
            counts[at] += np.bincount(block[:, at].reshape(-1), minlength=256)
    values = np.arange(256, dtype=np.float64)
    totals = counts.sum(axis=1)
    mean = counts @ values / totals
    spread = np.sqrt(np.maximum(counts @ values**2 / totals - mean**2, 0.0))
    spread[spread < 1e-6] = 1.0
    scale = tuple(spread.tolist())
    return InputColumn("picture", (), tuple(column.shape[1:]), tuple(mean.tolist()), scale)


class ImageFolder(kept_preparation.KeepsPreparation):
    """Pictures: a folder with a folder for each class, or a table of paths and labels.

    They are read once, turned as the camera says, brought to one size and kept as bytes; batches
    are mapped from there, scaled by the training share's mean and deviation of each channel.
    """

    info = PluginInfo(
        name="image_folder", kind=Kind.DATA, config=ImageFolderConfig,
        provides=("data:features", "data:classes"), requires=required,
        packages={"PIL": "pip install 'forge-kernel[images]'"},
    )  # fmt: skip

    def __init__(self, config: ImageFolderConfig) -> None:
        self.config = config
        self._identity = Identity("image_folder", config.on_change)
        self.preparation = None

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The pictures.

        Raises:
            PluginError: they cannot be read as asked.
        """
        kept = self.preparation or kept_preparation.read(run.folder)
        try:
            data, listing, pictures = picture_data(
                self.config, run.seed, kept,
                rank=run.strategy.rank, world=run.strategy.world_size,
            )  # fmt: skip
        except errors.DataError as error:
            raise PluginError(f"image_folder: {error}") from error
        self.preparation = data.preparation
        if kept is None and data.preparation is not None:
            kept_preparation.write(run.folder, data.preparation)
        self._identity.set(str(self.config.path), pictures.content, len(pictures.kept))
        if pictures.broken:
            name, reason = next(iter(pictures.broken.items()))
            count = len(pictures.broken)
            message = f"{count} of {len(listing.files)} pictures are left out: {name} {reason}"
            run.emit_event("samples_left_out", f"data.image_folder: {message}", left_out=count)
        if listing.passed_over:
            message = f"{listing.passed_over} files of {self.config.path} are no pictures"
            run.emit_event("files_passed_over", f"data.image_folder: {message}")
        return data
