"""The file of a sweep: its points, to resume it and to draw them. It is written after every point."""

from __future__ import annotations

import json
import os
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from onnx_lowrank.documents.strict import Document
from onnx_lowrank.errors import InputError

VERSION = 1

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+_-]{0,199}$", description="a plain file name")]


class Point(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ratio under one budget with one recipe.

    Attributes:
        name: The name of its files, without suffix.
        budget: Name of the budget that the ratio bounds.
        asked: The ratio asked for.
        wanted: The recipe asked for; null for the default one.
        stamp: The size and time of the recipe's file; "" if it is no file.
        recipe: The recipe of its plan; null if there is no model.
        reached: The ratio of the model in the budget; null as for `recipe`, like all that follow.
        error: The largest error of an output, about the mean where it is known.
        agreement: The smallest agreement of an output, or share of kept neighbours.
        inputs: The inputs on which the error was measured, a short phrase.
        params: The share of the parameters that is left.
        macs: The share of the multiply-accumulates.
        bytes: The share of the bytes of the files.
        time: The share of the measured time.
        score: The user's score of the model.
        note: Why there is no model; "" if there is one.
        digest: SHA-256 of its model file.
        command: The command that makes the model again from its plan.
    """

    name: Name
    budget: str
    asked: float
    wanted: str | None = None
    stamp: str = ""
    recipe: str | None = None
    reached: float | None = None
    error: float | None = None
    agreement: float | None = None
    inputs: str = ""
    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    time: float | None = None
    score: float | None = None
    note: str = ""
    digest: str = ""
    command: str = ""

    @property
    def is_made(self) -> bool:
        """Whether it has a model."""
        return not self.note

    @property
    def plan(self) -> str:
        """The name of its plan file."""
        return f"{self.name}.plan.json"

    @property
    def report(self) -> str:
        """The name of its report."""
        return f"{self.name}.report.json"

    @property
    def model(self) -> str:
        """The name of its model file."""
        return f"{self.name}.onnx"


class Sweep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All points of a sweep, and the circumstances that they share.

    Attributes:
        sweep: The version of this form.
        version: The version of this program.
        model: Name of the input model's file without folder and suffix.
        sha256: Digest of the input model.
        options: The options of all points, as text: a sweep with others is another sweep.
        evaluator: Name of the user's function; null without one.
        score: Its score of the input model.
        points: The points.
    """

    sweep: int = VERSION
    version: str
    model: str
    sha256: str
    options: str
    evaluator: str | None = None
    score: float | None = None
    points: tuple[Point, ...] = ()

    def front(self) -> frozenset[str]:
        """The names of the points that no other point beats: none costs at most as much and errs less.

        The cost is the one that the point's budget bounds. Points without a known error are not on it.
        """
        return frozenset(p.name for p in self.points if _is_best(p, self.points))


_DOCUMENT = Document("sweep", Sweep, InputError, "remove it, or name another folder", ("sweep", VERSION))


def read(path: str | os.PathLike[str]) -> Sweep:
    """Read the file of a sweep.

    Raises:
        InputError: It cannot be read, is not JSON, or has a wrong key or value.
    """
    return _DOCUMENT.from_json(_DOCUMENT.text(path), path)


def to_json(sweep: Sweep) -> str:
    """A sweep as JSON text that ends with a newline."""
    return json.dumps(msgspec.to_builtins(sweep), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _is_best(point: Point, points: tuple[Point, ...]) -> bool:
    mine = _cost(point, point.budget), point.error
    if mine[0] is None or mine[1] is None:
        return False
    for other in points:
        cost, error = _cost(other, point.budget), other.error
        if cost is None or error is None or (cost, error) == mine:
            continue
        if cost <= mine[0] and error <= mine[1]:
            return False
    return True


def _cost(point: Point, budget: str) -> float | None:
    """The share of a budget's cost that a point's model takes."""
    if point.budget == budget:
        return point.reached
    known = {"params": point.params, "macs": point.macs, "bytes": point.bytes, "latency": point.time}
    return known.get(budget)
