"""Work items that choose how a layer gets narrower, and that compute the errors of all widths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Moments
from onnx_lowrank.core.layer import Between, Rows
from onnx_lowrank.linalg import narrowing, selection
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.linalg.narrowing import Channels, PackedScores, Scores, Way
from onnx_lowrank.linalg.quadratic import Quadratic, matrices_of, of_weight, shrinkage
from onnx_lowrank.work.moments import MomentsRef
from onnx_lowrank.work.weights import WeightRef

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Keys:
    """The keys that meet the queries of a layer.

    Attributes:
        weight: The weight of the layer that computes them.
        moments: The moments of its inputs.
        added: Its bias, shape (f,); None without one.
        about_mean: Whether only their deviations from the mean count.
        rows: Their features, if their matrix is packed.
    """

    weight: WeightRef
    moments: MomentsRef
    added: Floats | None
    about_mean: bool
    rows: Rows | None = None


@dataclass(frozen=True, slots=True, eq=False)
class WidthItem:
    """Asks for the way to make a layer narrower, and for the errors of its widths.

    Attributes:
        weight: Its weight; one operator group.
        moments: The moments of its inputs.
        centred: Whether a bias absorbs the change of the mean.
        between: The numbers that get fewer.
        heads: The number of heads of the partner, if the numbers have heads.
        shared: The number of heads of the layer that meet one of the partner's.
        added: Its bias, shape (f,); only for scores.
        keys: The keys that meet its queries; only for scores.
        rows: The features that are its queries, if its matrix is packed; it computes the keys, too.
    """

    weight: WeightRef
    moments: MomentsRef
    centred: bool
    between: Between = Between.CHANNELS
    heads: int = 1
    shared: int = 1
    added: Floats | None = None
    keys: Keys | None = None
    rows: Rows | None = None

    @property
    def nbytes(self) -> int:
        """Approximate bytes that the computation takes: the moments, their inverse, and copies of both."""
        _, f, *rest = self.weight.shape
        p = prod(rest)
        own = self.weight.nbytes + self.moments.nbytes + 8 * (6 * p**2 + 5 * f * p)
        return own + (0 if self.keys is None else self.keys.weight.nbytes + 2 * self.keys.moments.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class WidthErrors:
    """The errors of a layer at smaller widths.

    Attributes:
        way: The way to make it narrower.
        relative: The relative errors at the widths 0 … full width.
    """

    way: Way
    relative: Floats


def width_errors(item: WidthItem, backend: Backend) -> WidthErrors:
    """Compute the errors of all widths, as `work.fitting` makes the factors.

    Raises:
        InputError: The moments are not finite.
    """
    if item.between is Between.SCORES:
        made, (queries, keys) = _scores(item)
        return WidthErrors(made, made.errors(queries, keys))
    fitted, held = _problems(item)
    if item.between is Between.VALUES:
        found = narrowing.values(fitted, item.heads, item.shared)
        return WidthErrors(found, found.errors(fitted, held))
    order = selection.order(fitted, item.weight.shape[2])
    return WidthErrors(Channels(order), selection.errors(fitted, order, held))


def way_of(item: WidthItem) -> Way:
    """The way to make a layer narrower.

    Raises:
        InputError: The moments are not finite.
    """
    if item.between is Between.SCORES:
        return _scores(item)[0]
    fitted, _ = _problems(item)
    if item.between is Between.VALUES:
        return narrowing.values(fitted, item.heads, item.shared)
    return Channels(selection.order(fitted, item.weight.shape[2]))


def _inputs(reference: MomentsRef) -> tuple[Moments, Moments | None]:
    """The moments of inputs to fit to, and the held-out ones."""
    moments = reference.read()
    if moments.inputs is None:
        raise RuntimeError(f"the moments {reference.number} are not those of inputs")
    return moments.inputs, moments.held


def _problems(item: WidthItem) -> tuple[Quadratic, Quadratic | None]:
    """The error of the layer's weight on the inputs to fit to, and on the held-out ones."""
    weight, (inputs, held) = item.weight.read(), _inputs(item.moments)
    ridge = shrinkage(inputs, selection.RIDGE)
    problem = of_weight(weight, inputs, centred=item.centred, ridge=ridge)
    return problem, None if held is None else of_weight(weight, held, centred=item.centred, ridge=0.0)


def _scores(item: WidthItem) -> tuple[Scores | PackedScores, tuple[Floats, Floats]]:
    """The way for queries and keys, and the moments of both on which it is judged."""
    if item.keys is None:
        raise RuntimeError("queries are narrowed with their keys alone")
    (queries, held_queries), (keys, held_keys) = _inputs(item.moments), _inputs(item.keys.moments)
    fitted = _heads(item, item.keys, _ridged(queries), _ridged(keys))
    found: Scores | PackedScores = narrowing.scores(*fitted, item.added)
    if item.rows is not None and item.keys.rows is not None:
        found = PackedScores(narrowing.scores(*fitted), (item.rows, item.keys.rows), item.added)
    if held_queries is None or held_keys is None:
        return found, fitted
    return found, _heads(item, item.keys, held_queries, held_keys)


def _heads(item: WidthItem, keys: Keys, inputs: Moments, others: Moments) -> tuple[Floats, Floats]:
    """The moments of the queries and of the keys, for every head."""
    own, other = matrices_of(item.weight.read())[0], matrices_of(keys.weight.read())[0]
    mean = own @ inputs.mean[0] + (0.0 if item.added is None else item.added)
    about = None if keys.about_mean else other @ others.mean[0] + (0.0 if keys.added is None else keys.added)
    own, mean = (values[_slice(item.rows)] for values in (own, mean))
    other, about = other[_slice(keys.rows)], None if about is None else about[_slice(keys.rows)]
    return (
        narrowing.head_moments(own, inputs.second[0], item.heads * item.shared, mean),
        narrowing.head_moments(other, others.second[0], item.heads, about),
    )


def _slice(rows: Rows | None) -> slice:
    return slice(None) if rows is None else slice(rows.start, rows.start + rows.size)


def _ridged(inputs: Moments) -> Moments:
    """The moments with the ridge of a fit."""
    size = inputs.second.shape[-1]
    level = shrinkage(inputs, selection.RIDGE) * np.trace(inputs.second[0]) / size
    return replace(inputs, second=inputs.second + level * np.eye(size))
