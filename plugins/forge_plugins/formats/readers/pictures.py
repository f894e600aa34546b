"""Pictures, through Pillow, as numbers of one shape."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from forge_plugins.formats.errors import DataError

SUFFIXES: Final = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Of the files that are taken for pictures."""
MAX_PIXELS: Final = 2**27
"""Of a picture; more is taken for a bomb."""
_ORIENTATION: Final = 0x0112  # of Exif
_SIDEWAYS: Final = (5, 6, 7, 8)
_GREY: Final = ("1", "L", "LA", "I", "F")


def pillow_library(file: Path) -> Any:
    """The library.

    Raises:
        DataError: it is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        message = "pictures are read by Pillow, which is not installed"
        raise DataError(file, message, hint="pip install 'forge-kernel[images]'") from error
    return PIL


def is_grey(pillow: Any, file: Path) -> bool:
    """Whether a picture has no colours, by its head.

    Raises:
        DataError: it is no picture.
    """
    with _opened(pillow, file) as picture:
        mode = str(picture.mode)
        if mode == "P":
            palette = np.asarray(picture.convert("RGB")).reshape(-1, 3)
            return bool((palette == palette[:, :1]).all())
        return mode in _GREY or mode.startswith("I;")


def picture_size(pillow: Any, file: Path) -> tuple[int, int]:
    """Height and width as a picture is looked at, by its head.

    Raises:
        DataError: it is no picture.
    """
    with _opened(pillow, file) as picture:
        turned = picture.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
        width, height = picture.size
    return (width, height) if turned else (height, width)


def _opened(pillow: Any, file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.Image.DecompressionBombWarning)
            picture = pillow.Image.open(file)
    except FileNotFoundError as error:
        raise DataError(file, "there is no such file", hint="a link may lead nowhere") from error
    except pillow.UnidentifiedImageError as error:
        message = "is no picture, or a damaged one"
        raise DataError(file, message, hint="take it away, or write it anew") from error
    except (OSError, ValueError, pillow.Image.DecompressionBombError) as error:
        raise _broken(file, error) from error
    if picture.width * picture.height > MAX_PIXELS:
        picture.close()
        message = f"has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS}"
        raise DataError(file, message, hint="make it smaller")
    return picture


def _broken(file: Path, error: Exception) -> DataError:
    return DataError(
        file, f"cannot be read: {str(error)[:120]}", hint="take it away, or write it anew"
    )


def read_picture(
    pillow: Any, file: Path, size: tuple[int, int] | None, channels: int
) -> NDArray[np.uint8]:
    """A picture as it is looked at: turned as its camera says, on white where it is not opaque.

    Args:
        pillow: the library.
        file: the picture.
        size: height and width; another one is scaled (bilinear) until it covers them and cut at
            the middle; None: as it is.
        channels: 1 for grey, 3 for red, green and blue.

    Returns:
        Shape (channels, height, width).

    Raises:
        DataError: it is no picture, or a damaged one.
    """
    try:
        with _opened(pillow, file) as opened:
            turned = opened.getexif().get(_ORIENTATION, 1) != 1
            picture = pillow.ImageOps.exif_transpose(opened) if turned else opened
            picture = _eight_bits(pillow, picture)
            if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
                clear = picture.convert("RGBA")
                picture = pillow.Image.new("RGBA", clear.size, (255, 255, 255, 255))
                picture.alpha_composite(clear)
            wanted = "L" if channels == 1 else "RGB"
            if picture.mode != wanted:
                picture = picture.convert("RGB").convert(wanted)
            if size is not None and picture.size != size[::-1]:
                bilinear = pillow.Image.Resampling.BILINEAR
                picture = pillow.ImageOps.fit(picture, size[::-1], bilinear)
            pixels: NDArray[np.uint8] = np.asarray(picture, np.uint8)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise _broken(file, error) from error
    return pixels[np.newaxis] if channels == 1 else pixels.transpose(2, 0, 1)


def _eight_bits(pillow: Any, picture: Any) -> Any:
    """A picture of 16 or 32 bits a pixel in 256 steps; others as they are."""
    if picture.mode not in ("I", "F") and not picture.mode.startswith("I;"):
        return picture
    values = np.asarray(picture).astype(np.float64)
    top = 65535.0 if picture.mode != "F" else max(1.0, float(np.nanmax(values)))
    if picture.mode == "I" and values.max() <= 255:
        top = 255.0
    steps = np.clip(np.nan_to_num(values) / top, 0.0, 1.0) * 255.0
    return pillow.Image.fromarray(np.rint(steps).astype(np.uint8))
