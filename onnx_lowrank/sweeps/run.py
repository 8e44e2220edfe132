"""A sweep: the same model at several ratios, in a folder with a file that remembers the points."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from itertools import product
from pathlib import Path
from time import monotonic
from types import NoneType
from typing import Any, Unpack

import msgspec
import numpy as np

from onnx_lowrank import request as arguments
from onnx_lowrank.api import Result, compress
from onnx_lowrank.core.outcome import largest_error
from onnx_lowrank.destinations import write
from onnx_lowrank.documents import sweeps
from onnx_lowrank.documents.sweeps import Point, Sweep
from onnx_lowrank.errors import BudgetError, InputError, ValidationError
from onnx_lowrank.files.atomic import is_taken, replacing
from onnx_lowrank.files.load import load
from onnx_lowrank.options import Options, completed
from onnx_lowrank.progress import Labelled, Silent, over
from onnx_lowrank.request import DEFAULT_BUDGET
from onnx_lowrank.sweeps import replay
from onnx_lowrank.sweeps.evaluator import Evaluator, Score, evaluator
from onnx_lowrank.sweeps.replay import is_default

_log = logging.getLogger(__name__)

FILE = "sweep.json"
"""The name of the file that remembers the points."""

_CACHE, _LOCK = ".cache", ".lock"

_UNUSUAL = re.compile(r"[^A-Za-z0-9.+_-]")

_NOT_COMPARED = ("progress", "cache", "workers", "scheduler", "budget", "recipe")
"""Options that change no point, or that belong to a point."""

_CIRCUMSTANCES = {
    "version": "another version of this program",
    "sha256": "another input model",
    "model": "an input model of another name",
    "options": "other options or data",
}
"""What all points of a sweep share, each with its words in an error."""

_DATA = ("calibration", "inputs", "check")

_OWN = ("plan", "target_error", "target_agreement", "dry_run")
"""Options of `compress` that make no sense for several ratios."""


def sweep(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    ratios: Iterable[float],
    *,
    budgets: Sequence[str] = (DEFAULT_BUDGET,),
    recipes: Sequence[str | None] = (None,),
    evaluate: str | Score | None = None,
    **options: Unpack[Options],
) -> Sweep:
    """Compress a model at several ratios, and judge all results on the same inputs.

    Spectra, statistics of activations, errors and times are computed once: a cache in the folder keeps them.
    Every point has a model, a plan and a report in the folder; `sweep.json` remembers the points. A sweep
    into the same folder goes on where the last one stopped.

    Args:
        model: The path of the input model.
        folder: The folder of the points; it is made if there is none.
        ratios: The ratios, each above 0 and at most 1.
        budgets: The budgets; every ratio is tried under each of them.
        recipes: The recipes, by name or path; None is the default one.
        evaluate: The user's score of a model, a function of its path, or `module:function`.
        options: The options of `compress`, except those that choose a single model.

    Returns:
        The points, from the largest ratio to the smallest.

    Raises:
        InputError: An argument, the model or the folder is wrong, or the evaluator fails. The points that
            are done stay.
    """
    given = completed(options)
    wanted = _wanted(given, ratios, budgets, recipes)
    scorer = None if evaluate is None else evaluator(evaluate)
    # An evaluator may change the current folder.
    source, place = Path(model).absolute(), Path(folder).absolute()
    _check_places(source, place, wanted)
    with _held(place):
        state = _State(place)
        state.open(source, given, scorer)
        begun = monotonic()
        if given["cache"] is True:
            given["cache"] = place / _CACHE
        for number, point in enumerate(wanted, 1):
            if (known := state.known(point)) is None:
                label = f"{point.name}, {number}/{len(wanted)}"
                above = over(given["progress"] or Silent(), "points", number - 1, len(wanted), begun)
                progress = Labelled(above, label)
                own = Options(budget=point.budget, recipe=point.wanted, progress=progress)
                known = _made(source, place, point, {**given, **own})
                command = replay.command(model, point.model, Path(folder) / point.plan, given)
                known = msgspec.structs.replace(known, command=command if known.is_made else "")
                state.keep(known)
            if scorer is not None:
                state.score(known, scorer)
        if scorer is not None:  # Those of earlier sweeps, too, so that one function scores all.
            for point in state.sweep.points:
                if state.known(point) is not None:
                    state.score(point, scorer)
        return state.sweep


def _wanted(
    given: Options, ratios: Iterable[float], budgets: Sequence[str], recipes: Sequence[str | None]
) -> tuple[Point, ...]:
    """The points, with all arguments checked: a wrong one would waste the points before it.

    Raises:
        InputError: An argument is wrong.
    """
    for name in _OWN:
        if given.get(name):
            raise InputError(f"{name} chooses a single model: leave it out of a sweep.")
    for name, plural in (("recipe", "recipes"), ("budget", "budgets")):
        if given.get(name) is not None:
            raise InputError(f"{name} is {given.get(name)!r}: give a sweep {plural}=[...].")
    for name in _DATA:
        if not isinstance(given.get(name), str | os.PathLike | Mapping | NoneType):
            raise InputError(f"{name} can be read only once: give a sweep a path, or arrays by input name.")
    wanted = tuple(_points(ratios, budgets, recipes))
    for point in wanted:
        own = Options(budget=point.budget, recipe=point.wanted)
        arguments.request(point.asked, {**given, **own})
    return wanted


def _check_places(source: Path, folder: Path, wanted: Sequence[Point]) -> None:
    """Check that no point has the place of the input model.

    Raises:
        InputError: One has.
    """
    for point in wanted:
        target = folder / point.model
        if target.exists() and source.exists() and target.samefile(source):
            raise InputError(f"The point {point.name} would replace the model {source}: name another folder.")


def spread(first: float, last: float, number: int) -> tuple[float, ...]:
    """Ratios at equal steps from one to another.

    Raises:
        InputError: There is no such number of ratios.
    """
    if not 2 <= number <= _MOST:
        raise InputError(f"{number} points were asked for: give 2 to {_MOST}.")
    return tuple(round(first + (last - first) * n / (number - 1), 4) for n in range(number))


_MOST = 1000  # points of a sweep


def _points(
    ratios: Iterable[float], budgets: Sequence[str], recipes: Sequence[str | None]
) -> Iterator[Point]:
    """The points without results, from the largest ratio to the smallest.

    Raises:
        InputError: There is no ratio, or too many, or one that is out of range.
    """
    for name, values in (("ratios", ratios), ("budgets", budgets), ("recipes", recipes)):
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InputError(f"{name} is {values!r}: give a list.")
    chosen = sorted({float(ratio) for ratio in ratios}, reverse=True)
    if not chosen or not all(0 < ratio <= 1 for ratio in chosen):
        raise InputError(f"The ratios are {chosen}: give some above 0 and at most 1, such as 0.9,0.7,0.5.")
    if len(chosen) * len(budgets) * len(recipes) > _MOST:
        raise InputError(f"The sweep has more than {_MOST} points: give fewer ratios, budgets or recipes.")
    names: dict[str, Point] = {}
    for budget, recipe, ratio in product(dict.fromkeys(budgets), dict.fromkeys(recipes), chosen):
        label = "" if recipe is None else f"-{_UNUSUAL.sub('_', Path(recipe).stem)}"
        point = Point(
            name=f"{budget}{label}-{ratio:.6g}",
            budget=budget,
            asked=ratio,
            wanted=None if recipe is None else str(recipe),
            stamp="" if recipe is None else _stamp(Path(recipe)),
        )
        if point.name in names:
            raise InputError(
                f"Two points would be called {point.name}: name their recipes differently, or choose ratios "
                "that differ more."
            )
        names[point.name] = point
        yield point


def _made(model: Path, folder: Path, point: Point, options: Options) -> Point:
    """Make the model of a point, and its files."""
    try:
        with compress(model, point.asked, **options) as result:
            write(result, folder / point.model, folder / point.plan, (folder / point.report,))
            return _with_results(point, result, _digest(folder / point.model))
    except (BudgetError, ValidationError) as error:
        _log.debug("point %s has no model: %s", point.name, error)
        return msgspec.structs.replace(point, note=str(error))


def _with_results(point: Point, result: Result, digest: str) -> Point:
    report, validation = result.report, result.report.validation
    trial = next((trial for trial in report.trials if trial.chosen), None)
    caches = frozenset() if trial is None else trial.caches
    outputs = [] if validation is None else [o for o in validation.outputs if o.name not in caches]
    error = largest_error(outputs)
    return msgspec.structs.replace(
        point,
        recipe=report.recipe,
        reached=float(report.reached),
        error=None if error is None or error == float("inf") else float(error),
        agreement=min((float(o.kept) for o in outputs if o.kept is not None), default=None),
        inputs="" if validation is None else validation.inputs,
        params=report.totals.amount("params").ratio,
        macs=report.totals.amount("macs").ratio,
        bytes=report.totals.amount("bytes").ratio,
        time=None if report.timing is None else report.timing.ratio,
        digest=digest,
    )


class _State:
    """The folder of a sweep, and the file that remembers its points."""

    sweep: Sweep

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, model: Path, options: Options, scorer: Evaluator | None) -> None:
        """Read the file, or begin a new one.

        Raises:
            InputError: It belongs to another sweep.
        """
        with ExitStack() as stack:
            loaded = load(model, stack)
            name, digest = Path(loaded.name).stem, loaded.sha256
        path = self.folder / FILE
        self.sweep = Sweep(version=version("onnx-lowrank"), model=name, sha256=digest, options=_text(options))
        if path.exists():
            begun = sweeps.read(path)
            for key, word in _CIRCUMSTANCES.items():
                if getattr(begun, key) != getattr(self.sweep, key):
                    raise InputError(f"{path} belongs to a sweep with {word}: name another folder.")
            self.sweep = begun
        if scorer is not None:
            self._score(model, scorer)
        self._write()

    def known(self, point: Point) -> Point | None:
        """The point of an earlier sweep with its files, if there is one."""
        found = next((p for p in self.sweep.points if p.name == point.name), None)
        if found is None or (found.asked, found.stamp) != (point.asked, point.stamp):
            return None
        if not found.is_made:
            return found
        texts = (self.folder / found.plan, self.folder / found.report)
        is_whole = all(path.is_file() for path in texts)
        return found if is_whole and _digest(self.folder / found.model) == found.digest else None

    def keep(self, point: Point) -> None:
        """Remember a point."""
        others = (p for p in self.sweep.points if p.name != point.name)
        points = sorted((*others, point), key=lambda p: (p.budget, p.wanted or "", -p.asked))
        self.sweep = msgspec.structs.replace(self.sweep, points=tuple(points))
        self._write()

    def score(self, point: Point, scorer: Evaluator) -> None:
        """Score the model of a point that has no score yet."""
        if point.is_made and point.score is None:
            self.keep(msgspec.structs.replace(point, score=scorer(self.folder / point.model)))

    def _score(self, model: Path, scorer: Evaluator) -> None:
        """Score the input model first: an evaluator that fails ends the sweep before the work begins."""
        if scorer.is_named and self.sweep.evaluator == scorer.name and self.sweep.score is not None:
            return
        points = tuple(msgspec.structs.replace(p, score=None) for p in self.sweep.points)
        self.sweep = msgspec.structs.replace(
            self.sweep, evaluator=scorer.name, score=scorer(model), points=points
        )

    def _write(self) -> None:
        with replacing(self.folder / FILE) as (file,):
            file.write(sweeps.to_json(self.sweep).encode())


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder, made if there is none, for this sweep alone.

    Raises:
        InputError: It cannot be made or written, or another sweep runs in it.
    """
    if folder.is_file():
        raise InputError(f"{folder} is a file: name a folder for the points.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("ab")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"The folder {folder} cannot be used ({reason}): name another one.") from error
    with file:
        if is_taken(file.fileno()):
            raise InputError(f"Another sweep runs in {folder}: wait for it, or use another folder.")
        yield


def _text(options: Options) -> str:
    """The options that all points share, as text; equal options give equal texts."""
    shared = {n: v for n, v in sorted(options.items()) if n not in _NOT_COMPARED and not is_default(n, v)}
    return "; ".join(f"{name}={_described(value)}" for name, value in shared.items())


def _described(value: Any) -> str:
    """A value as text; a file with its stamp, so that another one under its name is noticed."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_described(item)}" for name, item in value.items())
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_described, value))
    is_path = isinstance(value, str | os.PathLike)
    return f"{value} {_stamp(Path(value))}".rstrip() if is_path else repr(value)


def _stamp(path: Path) -> str:
    """The sizes and times of a file, or of all files in a folder; "" if there is none."""
    if path.is_dir():
        parts = (
            f"{file.relative_to(path)} {_stamp(file)}" for file in sorted(path.rglob("*")) if file.is_file()
        )
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()
    with suppress(OSError, ValueError):
        status = path.stat()
        return f"({status.st_size} bytes, {status.st_mtime_ns})"
    return ""


def _digest(path: Path) -> str:
    """The SHA-256 of a model file, whose bytes name the digest of its data file; "" if there is none."""
    with suppress(OSError), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return ""
