"""Calibration data in the usual formats, streamed: memory does not grow with the number of samples.

Data is either a table (arrays with samples on their first axis, from which batches of any size are cut)
or a list of feeds (the files of a folder, or the items of an iterable), which go to the model unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

from numpy.typing import ArrayLike, NDArray

from onnx_lowrank.calibrate.feeds import Feeds, as_array, drawn
from onnx_lowrank.calibrate.shares import Batch, counted
from onnx_lowrank.calibrate.sources import registry
from onnx_lowrank.calibrate.sources.source import Need
from onnx_lowrank.calibrate.spool import Spool
from onnx_lowrank.calibrate.table import Table, only, table
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.inputs import Spec, read
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.arrays import InMemory

COMPARED = 16
"""The most samples of a text or a folder of images on which models are compared."""

FEW = 32
"""With fewer samples than this, a warning says that estimates are weak."""


@runtime_checkable
class FeedReader(Protocol):
    """Gives one feed after the other, like ONNX Runtime's CalibrationDataReader."""

    def get_next(self) -> Mapping[str, ArrayLike] | None:
        """The next feed; None after the last one."""


Source = str | Path | Mapping[str, ArrayLike] | FeedReader | NDArray[Any] | Iterable[Mapping[str, ArrayLike]]
"""A file, a folder, arrays by name, one array for a model of one input, or feeds."""


class Samples:
    """Checked calibration data that can be read repeatedly; a context manager, or call `close`.

    Attributes:
        count: Number of samples used; a feed that cannot be split is one sample.
        held: Number of held-out samples: every fifth, so 0 of fewer than five.
        extent: Their origin and number, a short phrase.
        warnings: Warnings about them, sentences.
    """

    def __init__(self, data: Table | Feeds, name: str, files: ExitStack) -> None:
        """Take over the data.

        Args:
            data: The checked data.
            name: The name of its origin.
            files: Closed with the samples.
        """
        self._data = data
        self._files = files
        self.count = len(data.held)
        self.held = int(data.held.sum())
        self.extent = f"{name}: {data.extent}"
        self.warnings = (*data.warnings, *_few(self.count))

    @property
    def description(self) -> str:
        """Their origin and number with the held-out ones, a short phrase."""
        return f"{self.extent}, {self.held} held out"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def batches(self, size: int) -> Iterator[Batch]:
        """Read the data once; its batches are the same every time.

        Memory holds 5 · `size` samples of a table, or one feed.

        Args:
            size: The most samples in a batch, at least 1. A batch size that the model fixes overrides it, and
                a feed that cannot be split is given whole.

        Returns:
            Batches; each has samples of only one share, those to fit to or the held-out ones.

        Raises:
            InputError: A file can no longer be read.
        """
        return self._data.batches(size)

    def feed(self) -> Feed:
        """As many samples as the model takes at once, of both shares."""
        return self._data.feed()

    def close(self) -> None:
        """Delete the spooled feeds."""
        self._files.close()


def open_samples(source: Source, wanted: tuple[Spec, ...], samples: int | None = None) -> Samples:
    """Open calibration data, given only the inputs of a model; see `open_needed`."""
    return open_needed(source, Need(wanted, most=samples))


def open_needed(source: Source, need: Need) -> Samples:
    """Open calibration data, and check all samples that are used against the model.

    An array with the rank of its input has samples on its first axis. If it has one more axis, its samples go
    to the model one by one, without that axis (for models without a batch axis). An array goes to the model
    whole, with every sample, if it is a scalar, or if the model fixes the first axis of its input and other
    arrays have more samples.

    Args:
        source: A path that a module of `calibrate.sources` reads: an .npz file (arrays named like the inputs)
            or an .npy file (models of one input); a folder of ONNX's test_data_set_*/input_*.pb, or of .npz
            files with one feed each; a text; a folder of images. Or arrays by name, or one array; an iterable
            of feeds, or a reader with `get_next`, whose feeds are spooled to disk.
        need: What the model needs; `most` samples are evenly spaced over a path or an array, and the first
            ones of an iterable.

    Raises:
        InputError: The file does not exist, or the data does not fit the model.
    """
    if not need.specs:
        raise InputError(f"The model has no inputs: leave --{need.purpose} out.")
    for spec in need.specs:
        if spec.dtype is None:
            raise InputError(
                f"The input {spec.name!r} of the model is no tensor: leave --{need.purpose} out."
            )
    with ExitStack() as files:
        name, data = _opened(source, need, files)
        return Samples(data, name, files.pop_all())


def read_feed(source: str | Path | Mapping[str, Any], need: Need) -> Feed:
    """Read the inputs to compare models on: one feed, of a text or a folder of images at most `COMPARED`.

    Args:
        source: An .npz file, a text, a folder of images, or arrays by name.
        need: What the model needs.

    Raises:
        InputError: The source does not exist, or does not fit the model.
    """
    if isinstance(source, Mapping) or not registry.is_made(Path(source)):
        return read(source, need.specs)
    with open_needed(source, replace(need, most=COMPARED)) as samples:
        return samples.feed()


def _opened(source: Source, need: Need, files: ExitStack) -> tuple[str, Table | Feeds]:
    """The name of a source, and its data."""
    wanted, most, where = need.specs, need.most, need.title
    if isinstance(source, str | Path):
        path = Path(source)
        return path.resolve().name, registry.kind_of(path).read(path, need, files)
    if isinstance(source, Mapping):
        columns = {name: InMemory(as_array(a, f"{where} for {name!r}")) for name, a in source.items()}
        return "arrays", table(columns, wanted, most, where)
    if hasattr(source, "__array__"):
        return "array", table(only(InMemory(as_array(source, where)), wanted, where), wanted, most, where)
    if isinstance(source, FeedReader):
        given: Iterable[Any] = _each(source)
    elif isinstance(source, Iterable):
        given = source
    else:
        kind = type(source).__name__
        raise InputError(f"{where} is of the type {kind}: pass a path, arrays by name, or feeds.")
    spool = files.enter_context(Spool(spec.name for spec in wanted))
    return "feeds", drawn(given, wanted, most, spool, where)


def _each(reader: FeedReader) -> Iterator[Mapping[str, ArrayLike]]:
    while (feed := reader.get_next()) is not None:
        yield feed


def _few(number: int) -> tuple[str, ...]:
    if number >= FEW:
        return ()
    return (
        f"Estimates from {counted(number, 'sample')} are weak: give at least {FEW}, better a few hundred.",
    )
