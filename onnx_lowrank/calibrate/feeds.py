"""Calibration data in feeds, which go to the model unchanged: files, or the items of an iterable."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate import checks
from onnx_lowrank.calibrate.shares import HOLD_EVERY, Batch, counted, held_out, spaced
from onnx_lowrank.calibrate.spool import Spool
from onnx_lowrank.engines.batches import samples
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.inputs import Spec
from onnx_lowrank.errors import InputError
from onnx_lowrank.files import arrays


@dataclass(frozen=True, slots=True)
class _Piece:
    """A feed, or the samples `rows` of it; None for the whole feed."""

    feed: int
    rows: NDArray[np.intp] | None
    held: bool


@dataclass(frozen=True, slots=True)
class Feeds:
    """Feeds that have been checked against the model.

    Attributes:
        load: Gives a feed by its number, in the model's dtypes.
        pieces: The parts of the feeds that are used.
        held: For each sample used, whether it is held out; a feed that cannot be split is one sample.
        extent: The number of feeds and samples, in words.
        warnings: Warnings about the data, sentences.
    """

    load: Callable[[int], Feed]
    pieces: tuple[_Piece, ...]
    held: NDArray[np.bool_]
    extent: str
    warnings: tuple[str, ...]

    def batches(self, size: int) -> Iterator[Batch]:
        """One pass over the feeds; a feed that can be split gives batches of at most `size` samples."""
        for piece in self.pieces:
            feed = self.load(piece.feed)
            if piece.rows is None:
                yield Batch(feed, piece.held)
                continue
            for first in range(0, len(piece.rows), size):
                rows = piece.rows[first : first + size]
                yield Batch({name: a[rows] if a.ndim else a for name, a in feed.items()}, piece.held)

    def feed(self) -> Feed:
        """The first feed, whole."""
        return self.load(self.pieces[0].feed)


class _Inspection:
    """Collects facts about feeds while they are read for the first time."""

    def __init__(self, wanted: tuple[Spec, ...]) -> None:
        self.wanted = wanted
        self.sizes: list[int | None] = []
        self._narrowed: dict[str, None] = {}
        self._variation = checks.Variation()

    @property
    def samples(self) -> int:
        """Number of samples seen."""
        return sum(size or 1 for size in self.sizes)

    def see(self, given: Mapping[str, NDArray[Any]], where: str, most: int | None = None) -> Feed:
        """Check a feed and cast it to the model's dtypes; cut it to `most` samples if it can be split."""
        feed: Feed = checks.fitted(given, self.wanted, where)
        size = samples(feed, self.wanted)
        if size is not None and most is not None and most < size:
            feed = {name: array[:most] if array.ndim else array for name, array in feed.items()}
            size = most
        for spec in self.wanted:
            array = feed[spec.name]
            self._variation.see(spec.name, array[None] if size is None or not array.ndim else array)
            warning = checks.narrowed(spec, given[spec.name].dtype)
            if warning is not None:
                self._narrowed[warning] = None
        self.sizes.append(size)
        return feed

    def feeds(self, load: Callable[[int], Feed], most: int | None) -> Feeds:
        """The inspected feeds, with at most `most` samples."""
        pieces = tuple(_pieces(self.sizes, most))
        held = [(piece.held, 1 if piece.rows is None else len(piece.rows)) for piece in pieces]
        number = len({piece.feed for piece in pieces})
        shares = np.repeat(np.array([h for h, _ in held], bool), [n for _, n in held])
        total = "" if len(shares) == number else f" with {counted(len(shares), 'sample')}"
        return Feeds(
            load=load,
            pieces=pieces,
            held=shares,
            extent=counted(number, "feed") + total,
            warnings=(*self._narrowed, *self._variation.warnings(self.samples)),
        )


def folder(path: Path, wanted: tuple[Spec, ...], most: int | None) -> Feeds:
    """The feeds in a folder: ONNX test data sets, or .npz files, in the natural order of their names.

    Args:
        path: The folder; it may also be a single test data set.
        wanted: The model's inputs.
        most: The most samples to use, evenly spaced over the files; None for all.

    Raises:
        InputError: The folder has no feeds, or one does not fit the model.
    """
    sets = [p for p in _listed(path) if p.is_dir() and re.fullmatch(r"test_data_set_\d+", p.name)]
    archives = [p for p in _listed(path) if p.is_file() and p.suffix == ".npz"]
    if not sets and not archives and any(path.glob("input_*.pb")):
        sets = [path]
    if bool(sets) == bool(archives):
        what = "both" if sets else "neither"
        raise InputError(
            f"{path} holds {what} test_data_set_*/input_*.pb {'and' if sets else 'nor'} .npz files: "
            "give a folder of one of them."
        )
    found = sets or archives
    used = [found[number] for number in spaced(len(found), most)]
    read = _read_test_set if sets else _read_archive

    def load(number: int) -> Feed:
        return checks.fitted(read(used[number], wanted), wanted, str(used[number]))

    inspection = _Inspection(wanted)
    for source in used:
        inspection.see(read(source, wanted), str(source))
    return inspection.feeds(load, most)


def holds_feeds(path: Path) -> bool:
    """Whether a folder has an .npz or .npy file, a .pb file or an ONNX test data set."""
    return any(
        p.suffix in (".npz", ".npy") or re.fullmatch(r"input_.*\.pb|test_data_set_\d+", p.name)
        for p in _listed(path)
    )


def drawn(
    source: Iterable[Any], wanted: tuple[Spec, ...], most: int | None, spool: Spool, title: str
) -> Feeds:
    """Draw feeds and spool them.

    Args:
        source: Gives mappings of names to arrays; feeds beyond those that are used are not drawn.
        wanted: The model's inputs.
        most: The most samples to use, the first ones; None for all.
        spool: Stores the feeds.
        title: The source in messages, at the start of a sentence.

    Raises:
        InputError: There are no feeds, one does not fit the model, or the disk is full.
    """
    inspection = _Inspection(wanted)
    for number, given in enumerate(source):
        where = _label(number)
        if not isinstance(given, Mapping):
            raise InputError(
                f"{where} is of the type {type(given).__name__}: give a dict of arrays named like the inputs."
            )
        feed = {name: as_array(value, f"{where}: the input {name!r}") for name, value in given.items()}
        arrays.bounded(sum(array.nbytes for array in feed.values()), where)
        left = None if most is None else most - inspection.samples
        spool.append(inspection.see(feed, where, left), where)
        if inspection.samples == most:
            break
    if not inspection.sizes:
        raise InputError(f"{title} gives no feeds: pass a fresh generator that gives dicts of arrays.")
    return inspection.feeds(lambda n: checks.fitted(spool.read(n), wanted, _label(n)), most)


def as_array(value: Any, what: str) -> NDArray[Any]:
    """Convert an array-like value to an array.

    Raises:
        InputError: The value is not array-like.
    """
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} is no array ({error}): give one.") from error


def _label(number: int) -> str:
    return f"Feed {number} of the calibration data"


def _pieces(sizes: Sequence[int | None], most: int | None) -> Iterator[_Piece]:
    """The used parts of feeds of these sizes, each in one share.

    Every fifth feed is held out. With fewer than five feeds, every fifth sample is held out.
    """
    ends = np.cumsum([size or 1 for size in sizes])
    chosen = spaced(int(ends[-1]), most)
    owner = np.searchsorted(ends, chosen, side="right")
    used = np.unique(owner)
    by_sample = (
        held_out(len(chosen)) if len(used) < HOLD_EVERY else held_out(len(used))[np.searchsorted(used, owner)]
    )
    for feed in used:
        members = np.flatnonzero(owner == feed)
        size = sizes[feed]
        for share in (False, True):
            rows = chosen[members[by_sample[members] == share]] - (ends[feed] - (size or 1))
            if len(rows):
                yield _Piece(int(feed), None if size is None else rows, share)


def _listed(path: Path) -> list[Path]:
    """The content of a folder, in natural order: 2 before 10."""
    try:
        found = list(path.iterdir())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the folder.") from error
    return sorted(found, key=lambda p: _natural(p.name))


def _natural(name: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if place % 2 else (0, part) for place, part in enumerate(re.split(r"([0-9]+)", name))
    ]


def _read_test_set(path: Path, wanted: tuple[Spec, ...]) -> dict[str, NDArray[Any]]:
    """The tensors input_0.pb, input_1.pb, ... of a test data set: the model's inputs in their order."""
    found = {p.name for p in _listed(path) if re.fullmatch(r"input_[0-9]+\.pb", p.name)}
    needed = [f"input_{place}.pb" for place in range(len(wanted))]
    if found != set(needed):
        odd = sorted(found ^ set(needed), key=_natural)[0]
        raise InputError(
            f"{path} {'has' if odd in found else 'lacks'} {odd}, but the model has {len(wanted)} inputs: "
            "give one file input_N.pb for each, N from 0."
        )
    arrays.bounded(sum((path / name).stat().st_size for name in needed), str(path))
    return {spec.name: arrays.tensor(path / name) for spec, name in zip(wanted, needed, strict=True)}


def _read_archive(path: Path, wanted: tuple[Spec, ...]) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file."""
    found = arrays.archive(path)
    checks.check_names(found, wanted, str(path))
    arrays.bounded(sum(array.nbytes for array in found.values()), str(path))
    return {name: array.read() for name, array in found.items()}
