"""Images in a folder: layout, size and number of channels come from the model's input."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.feeds import holds_feeds
from onnx_lowrank.calibrate.shares import counted, spaced
from onnx_lowrank.calibrate.sources.pictures import SUFFIXES, listed, load
from onnx_lowrank.calibrate.sources.source import Claim, Kind, Need, Options, library
from onnx_lowrank.calibrate.table import Table, table
from onnx_lowrank.engines.inputs import Spec, shape_text
from onnx_lowrank.engines.made import check_shapes
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.arrays import Take, bounded
from onnx_lowrank.files.scratch import temporary_folder, unnamed

USUAL_SAMPLES = 2000
"""The most images if the user gives no number."""

_CHANNELS = (1, 3)
_SPARE_BYTES = 2**26


def _claim(path: Path) -> Claim:
    if path.is_file():
        return Claim.SURE if path.suffix.lower() in SUFFIXES else Claim.NONE
    if not path.is_dir() or holds_feeds(path) or next(listed(path), None) is None:
        return Claim.NONE
    return Claim.SURE


def _check(path: Path, options: Options) -> None:
    library("PIL.Image", "Pillow", "images", path)


def _read(path: Path, need: Need, files: ExitStack) -> Table:
    check_shapes(need.specs, need.shapes)
    spec = _image_input(path, need.specs)
    layout = _layout(spec, need.shapes.get(spec.name), path)
    levels = _levels(spec, layout, need.options)
    found = list(listed(path))
    used = [found[number] for number in spaced(len(found), need.most or USUAL_SAMPLES)]
    bounded(prod(layout.shape) * levels.itemsize, f"{path}: one image for the model")
    spool, enlarged = _spooled(used, layout, files)
    made = table({spec.name: _Images(spool, len(used), layout, levels)}, need.specs, None, str(path))
    notes = []
    if enlarged:
        size = f"{layout.width}×{layout.height}"
        notes.append(f"{enlarged} of {len(used)} images are smaller than {size} pixels and were enlarged.")
    if spec.dtype != np.uint8 and not need.options.given:
        notes.append(
            "The values of the images are 0 to 1: pass the --mean and --std that the model was trained with."
        )
    share = f"{len(used)} of " * (len(used) < len(found))
    return replace(made, extent=f"{share}{len(found)} images", warnings=(*notes, *made.warnings))


@dataclass(frozen=True, slots=True)
class _Layout:
    """The images that an input takes.

    Attributes:
        shape: The shape of one image, without the axis of the batch.
        axis: The axis of the channels in it, the first or the last.
    """

    shape: tuple[int, ...]
    axis: int

    @property
    def channels(self) -> int:
        """Number of channels: 3 are RGB, 1 is grey."""
        return self.shape[self.axis]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.shape[1 if self.axis == 0 else 0]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.shape[2 if self.axis == 0 else 1]


def _image_input(path: Path, specs: tuple[Spec, ...]) -> Spec:
    """The only input of the model, if images can go to it."""
    if len(specs) > 1:
        names = ", ".join(repr(spec.name) for spec in specs)
        raise InputError(
            f"{path} holds images, which fill one input, but the model has the inputs {names}: "
            "give arrays in an .npz file."
        )
    (spec,) = specs
    dtype = np.dtype(spec.dtype)
    if dtype.kind != "f" and dtype.name not in ("bfloat16", "uint8"):
        raise InputError(
            f"{path} holds images, but the input {spec.name!r} is {dtype.name}, neither a float nor uint8: "
            "give arrays in an .npz file."
        )
    return spec


def _layout(spec: Spec, given: tuple[int, ...] | None, path: Path) -> _Layout:
    """The layout of the images from the shape of the input and the user's shape.

    Raises:
        InputError: The input takes no images of 1 or 3 channels, or the size of the images is not known.
    """
    shape = spec.shape if given is None else given
    text = shape_text(shape or ())
    example = f"--input-shape {spec.name}=1,3,224,224"
    if shape is None:
        raise InputError(f"{path}: the input {spec.name!r} has no shape in the model: pass {example}.")
    tail = shape[1:] if len(shape) == 4 else shape
    axis = next((axis for axis in (0, 2) if len(tail) == 3 and tail[axis] in _CHANNELS), None)
    if axis is None:
        raise InputError(
            f"{path} holds images, but the input {spec.name!r} of the shape {text} has no axis of 1 or 3 "
            f"channels: pass {example}, or arrays in an .npz file."
        )
    sizes = tuple(size for size in tail if isinstance(size, int) and size > 0)
    if len(sizes) < 3:
        raise InputError(
            f"{path}: the size of the images is open, or 0, in the shape {text} of the input {spec.name!r}: "
            f"pass one, such as {example if axis == 0 else f'--input-shape {spec.name}=1,224,224,3'}."
        )
    return _Layout(sizes, axis)


def _levels(spec: Spec, layout: _Layout, options: Options) -> NDArray[Any]:
    """The input's value for each channel and byte, shape (channels, 256): (byte / 255 - mean) / std."""
    dtype, bytes_ = np.dtype(spec.dtype), np.arange(256)
    if dtype == np.uint8:
        if options.mean is not None or options.std is not None:
            raise InputError(f"The input {spec.name!r} takes bytes as they are: leave --mean and --std out.")
        return np.tile(bytes_.astype(np.uint8), (layout.channels, 1))
    parts = []
    for name, values, default in (("mean", options.mean, 0.0), ("std", options.std, 1.0)):
        chosen = (default,) * layout.channels if values is None else values
        if len(chosen) != layout.channels:
            raise InputError(
                f"--{name} has {counted(len(chosen), 'value')}, but the images have "
                f"{counted(layout.channels, 'channel')}: give one value for each."
            )
        parts.append(np.array(chosen)[:, None])
    with np.errstate(over="ignore"):  # The table checks that all values are finite.
        return np.asarray((bytes_ / 255 - parts[0]) / parts[1], dtype)


def _spooled(paths: list[Path], layout: _Layout, files: ExitStack) -> tuple[IO[bytes], int]:
    """Read all images once, into a temporary file of bytes; also counts those that were enlarged."""
    folder = temporary_folder()
    free, size = shutil.disk_usage(folder).free, len(paths) * prod(layout.shape)
    full = (
        f"{counted(len(paths), 'image')} of {size / 2**20:.0f} MiB do not fit into {folder}, where "
        f"{free / 2**20:.0f} MiB are free: pass fewer --calibration-samples, or set TMPDIR to a larger disk."
    )
    if free < size + _SPARE_BYTES:
        raise InputError(full)
    spool = files.enter_context(unnamed())
    enlarged = 0
    for path in paths:
        image, is_enlarged = load(path, layout.height, layout.width, grey=layout.channels == 1)
        enlarged += is_enlarged
        try:
            spool.write(np.moveaxis(image, 2, layout.axis).tobytes())
        except OSError as error:
            raise InputError(full) from error
    return spool, enlarged


@dataclass(frozen=True, slots=True)
class _Images:
    """The images of a temporary file as an array, scaled when they are read.

    Attributes:
        spool: The bytes of the images in the model's layout.
        count: Number of images.
        layout: Their layout.
        levels: The value for each channel and byte.
    """

    spool: IO[bytes]
    count: int
    layout: _Layout
    levels: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return (self.count, *self.layout.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype, that of the input."""
        return self.levels.dtype

    @contextmanager
    def reader(self) -> Iterator[Take]:
        """Gives a function that reads rows."""
        size, axis = prod(self.layout.shape), self.layout.axis
        channels = np.arange(self.layout.channels).reshape([-1 if n == axis else 1 for n in range(3)])

        def take(rows: NDArray[np.intp]) -> NDArray[Any]:
            out = np.empty((len(rows), *self.layout.shape), self.dtype)
            for place, row in enumerate(rows):
                self.spool.seek(int(row) * size)
                image = np.frombuffer(self.spool.read(size), np.uint8).reshape(self.layout.shape)
                out[place] = self.levels[channels, image]
            return out

        yield take

    def read(self) -> NDArray[Any]:
        """The whole array."""
        with self.reader() as take:
            return take(np.arange(self.count))


KIND = Kind("folders of images", _claim, _read, ("mean", "std"), _check, is_made=True)
