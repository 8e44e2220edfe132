"""One image from a file, as bytes in RGB or grey levels, cut and resized to a size."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.sources.source import library
from onnx_lowrank.errors import InputError
from onnx_lowrank.logs import without_warnings

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM", "TIFF")  # None that starts another program.
_BYTE_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_FILE_BYTES = 2**28
_MOST_FILES = 1_000_000


def listed(path: Path) -> Iterator[Path]:
    """The image files in a folder and in the folders below it, sorted by name; or the file itself.

    Names that start with a dot are left out, and links to folders are not followed.

    Raises:
        InputError: The folder holds more than a million files and folders.
    """
    if path.is_file():
        yield path
        return
    seen = 0
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        seen += len(names) + len(below)
        if seen > _MOST_FILES:
            raise InputError(f"{path} holds more than {_MOST_FILES:,} files and folders: pass a smaller one.")
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


def load(path: Path, height: int, width: int, *, grey: bool) -> tuple[NDArray[np.uint8], bool]:
    """Read an image: its shorter side is resized to the wanted size, and the centre is cut out.

    A photograph is turned as its camera says, and transparency is left out.

    Args:
        path: The file.
        height: The wanted height in pixels.
        width: The wanted width.
        grey: Whether one channel of grey levels is wanted in place of RGB.

    Returns:
        The image, shape (height, width, channels), and whether it was enlarged.

    Raises:
        InputError: The file is no image, is damaged, is too large, or has no channels of 8 bits.
    """
    pillow = library("PIL.Image", "Pillow", "images", path)
    turned = library("PIL.ImageOps", "Pillow", "images", path).exif_transpose
    with _readable(path, pillow), path.open("rb") as file, pillow.open(file, formats=_FORMATS) as opened:
        if path.stat().st_size > _FILE_BYTES:
            raise InputError(f"{path} has more than {_FILE_BYTES // 2**20} MiB: pass a smaller image.")
        if opened.mode not in _BYTE_MODES:
            raise InputError(f"{path} has no channels of 8 bits (mode {opened.mode}): save it as 8-bit RGB.")
        # A JPEG is decoded at a fraction of its size if that is still large enough.
        opened.draft(None, (2 * max(height, width),) * 2)
        image = turned(opened).convert("L" if grey else "RGB")
    enlarged = image.width < width or image.height < height
    return _cut(image, height, width, pillow), enlarged


@contextmanager
def _readable(path: Path, pillow: Any) -> Iterator[None]:
    """Turn the errors of reading an image into an InputError; Pillow's warning of too many pixels, too."""
    bombs = (pillow.DecompressionBombWarning, pillow.DecompressionBombError)
    try:
        with without_warnings():
            warnings.simplefilter("error", bombs[0])
            yield
    except InputError:
        raise
    except bombs as error:
        raise InputError(
            f"{path} has more pixels than {pillow.MAX_IMAGE_PIXELS:,}: pass a smaller image."
        ) from error
    except pillow.UnidentifiedImageError as error:
        raise InputError(
            f"{path} is no image that can be read: remove it, or save it as PNG or JPEG."
        ) from error
    except Exception as error:  # The decoders raise many kinds for damaged files.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path} is a damaged image ({reason}): remove it or replace it.") from error


def _cut(image: Any, height: int, width: int, pillow: Any) -> NDArray[np.uint8]:
    """The centre with the wanted proportions, resized: the same as to resize first, in bounded memory."""
    scale = min(image.width / width, image.height / height)
    across, down = scale * width, scale * height
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, left + across, top + down)
    resized = image.resize((width, height), pillow.Resampling.BILINEAR, box=box)
    return np.asarray(resized, np.uint8).reshape(height, width, -1)
