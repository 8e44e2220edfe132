"""A sweep: the same model at several ratios, in a folder with a file that remembers the points."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import NoneType
from typing import Any, Unpack

import msgspec
import numpy as np

from onnx_lowrank.api import Result, compress
from onnx_lowrank.core.outcome import largest_error
from onnx_lowrank.destinations import write
from onnx_lowrank.documents import sweeps
from onnx_lowrank.documents.sweeps import Point, Sweep
from onnx_lowrank.errors import BudgetError, InputError, ValidationError
from onnx_lowrank.files.atomic import locked, replacing
from onnx_lowrank.files.load import load
from onnx_lowrank.options import Options, completed
from onnx_lowrank.progress import Labelled, Silent
from onnx_lowrank.request import AUTO_RECIPE, DEFAULT_BUDGET
from onnx_lowrank.sweeps import replay
from onnx_lowrank.sweeps.evaluator import Evaluator, Score, evaluator

_log = logging.getLogger(__name__)

FILE = "sweep.json"
"""The name of the file that remembers the points."""

_CACHE, _LOCK = ".cache", ".lock"

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
    for name in _OWN:
        if options.get(name):
            raise InputError(f"{name} chooses a single model: leave it out of a sweep.")
    for name in _DATA:
        if not isinstance(given.get(name), str | os.PathLike | Mapping | NoneType):
            raise InputError(f"{name} can be read only once: give a sweep a path, or arrays by input name.")
    wanted = list(_points(ratios, budgets, recipes))
    scorer = None if evaluate is None else evaluator(evaluate)
    with ExitStack() as stack:
        state = _State(Path(folder), stack.enter_context(_held(Path(folder))))
        state.open(Path(model), options, scorer)
        if given["cache"] is True:
            options["cache"] = state.folder / _CACHE
        for number, point in enumerate(wanted, 1):
            if (known := state.known(point)) is None:
                progress = Labelled(given["progress"] or Silent(), f"{point.name}, {number}/{len(wanted)}")
                known = _made(Path(model), state.folder, point, {**options, "progress": progress})
            if scorer is not None and known.is_made and known.score is None:
                known = msgspec.structs.replace(known, score=scorer(state.folder / known.model))
            state.keep(known)
        return state.sweep


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
    chosen = sorted({float(ratio) for ratio in ratios}, reverse=True)
    if not chosen or not all(0 < ratio <= 1 for ratio in chosen):
        raise InputError(f"The ratios are {chosen}: give some above 0 and at most 1, such as 0.9,0.7,0.5.")
    if len(chosen) * len(budgets) * len(recipes) > _MOST:
        raise InputError(f"The sweep has more than {_MOST} points: give fewer ratios, budgets or recipes.")
    for budget, recipe, ratio in product(dict.fromkeys(budgets), dict.fromkeys(recipes), chosen):
        label = "" if len(recipes) == 1 else f"-{Path(recipe or AUTO_RECIPE).stem}"
        yield Point(name=f"{budget}{label}-{ratio:.6g}", budget=budget, asked=ratio, wanted=recipe)


def _made(model: Path, folder: Path, point: Point, options: Options) -> Point:
    """Make the model of a point, and its files."""
    plan = folder / point.plan
    options |= {"budget": point.budget, "recipe": point.wanted}
    try:
        with compress(model, point.asked, **options) as result:
            write(result, folder / point.model, plan, folder / point.report)
            command = replay.command(model, point.model, plan, options)
            return _with_results(point, result, command)
    except (BudgetError, ValidationError) as error:
        _log.debug("point %s has no model: %s", point.name, error)
        return msgspec.structs.replace(point, note=str(error))


def _with_results(point: Point, result: Result, command: str) -> Point:
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
        command=command,
    )


class _State:
    """The folder of a sweep, and the file that remembers its points."""

    sweep: Sweep

    def __init__(self, folder: Path, lock: object) -> None:
        self.folder = folder
        self._lock = lock

    def open(self, model: Path, options: Options, scorer: Evaluator | None) -> None:
        """Read the file, or begin a new one.

        Raises:
            InputError: It belongs to another sweep.
        """
        with ExitStack() as stack:
            loaded = load(model, stack)
            name, digest = loaded.name, loaded.sha256
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
        if found is None or found.asked != point.asked or found.wanted != point.wanted:
            return None
        files = (found.model, found.plan, found.report) if found.is_made else ()
        return found if all((self.folder / file).is_file() for file in files) else None

    def keep(self, point: Point) -> None:
        """Remember a point."""
        others = (p for p in self.sweep.points if p.name != point.name)
        points = sorted((*others, point), key=lambda p: (p.budget, p.wanted or "", -p.asked))
        self.sweep = msgspec.structs.replace(self.sweep, points=tuple(points))
        self._write()

    def _score(self, model: Path, scorer: Evaluator) -> None:
        """Score the input model first: an evaluator that fails ends the sweep before the work begins."""
        if self.sweep.evaluator == scorer.name and self.sweep.score is not None:
            return
        points = tuple(msgspec.structs.replace(p, score=None) for p in self.sweep.points)
        self.sweep = msgspec.structs.replace(
            self.sweep, evaluator=scorer.name, score=scorer(model), points=points
        )

    def _write(self) -> None:
        with replacing(self.folder / FILE) as (file,):
            file.write(sweeps.to_json(self.sweep).encode())


@contextmanager
def _held(folder: Path) -> Iterator[object]:
    """The folder, made if there is none, for this sweep alone.

    Raises:
        InputError: It cannot be made or written, or another sweep runs in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("ab") as file:
            if os.name == "posix" and not locked(file.fileno()):
                raise InputError(f"Another sweep runs in {folder}: wait for it, or name another folder.")
            yield file
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"The folder {folder} cannot be used ({reason}): name another one.") from error


def _text(options: Options) -> str:
    """The options that all points share, as text; equal options give equal texts."""
    shared: dict[str, Any] = {n: v for n, v in sorted(options.items()) if n not in _NOT_COMPARED}
    return "; ".join(f"{name}={_stamped(value)}" for name, value in shared.items())


def _stamped(value: Any) -> str:
    """A value as text; a file with its size and time, so that another one under its name is noticed."""
    if isinstance(value, str | os.PathLike) and Path(value).exists():
        status = Path(value).stat()
        return f"{value} ({status.st_size} bytes, {status.st_mtime_ns})"
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_stamped(item)}" for name, item in value.items())
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)
