"""Einsum as a matrix product with a constant.

Every letter of the equation is of one of four kinds: rows (in the activation and the result), groups (in all
three terms), inputs (in the activation and the weight) or outputs (in the weight and the result). The chain
is two Einsum. The first replaces the inputs by the rank, the second replaces the rank by the outputs.

An ellipsis stands for row axes, whose number only a value tells. Here it is the letter ".".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from types import EllipsisType
from typing import Any, Self

from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Lowering
from onnx_lowrank.graph.walk import attribute_of
from onnx_lowrank.operators.family import Operands, Operator, Sample, Shape, Site, Timed, known
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.operators.geometry import parts, row_dtype

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ELLIPSIS = "."

_Axes = tuple[int | EllipsisType, ...]
"""Axes of a value; an ellipsis stands for all axes that no number names, and axes behind it are negative."""


@dataclass(frozen=True, slots=True)
class Equation:
    """An equation, read as a product with a weight; no term has a letter twice.

    Attributes:
        activation: The letters of the activation.
        weight: The letters of the weight.
        result: The letters of the result.
    """

    activation: str
    weight: str
    result: str

    @property
    def groups(self) -> str:
        """The letters of all three terms, in the weight's order."""
        return "".join(n for n in self.weight if n in self.activation and n in self.result)

    @property
    def inputs(self) -> str:
        """The letters of the sum, in the weight's order."""
        return "".join(n for n in self.weight if n in self.activation and n not in self.result)

    @property
    def outputs(self) -> str:
        """The letters of the weight and the result alone, in the weight's order."""
        return "".join(n for n in self.weight if n not in self.activation)

    @property
    def rows(self) -> str:
        """The letters of the activation that are not in the weight, in the activation's order."""
        return "".join(n for n in self.activation if n not in self.weight)

    @property
    def rank(self) -> str:
        """A letter for the rank, which no term has."""
        taken = {*self.activation, *self.weight, *self.result}
        return next(letter for letter in _LETTERS if letter not in taken)

    def roles(self) -> str:
        """The kind of each axis of the weight, one letter each; equal roles mean the same matrix."""
        return "".join("g" if n in self.groups else "c" if n in self.inputs else "f" for n in self.weight)


@dataclass(frozen=True, slots=True)
class Contraction:
    """The vectors of an Einsum.

    Attributes:
        reads: The axes of the activation: rows, then groups, then inputs.
        gives: The axes of the result: rows, then groups, then outputs.
        leading: The number of row axes; an ellipsis counts as one.
        groups: The number of group axes.
    """

    reads: _Axes
    gives: _Axes
    leading: int
    groups: int

    def _vectors(self, value: NDArray[Any], axes: _Axes) -> Iterator[NDArray[Any]]:
        """Chunks of shape (rows, g, n)."""
        every = _expanded(axes, value.ndim)
        leading = self.leading + len(every) - len(axes)
        view = value.transpose(every)
        if not leading:
            view = view[None]
        lead = max(1, leading)
        g = prod(view.shape[lead : lead + self.groups])
        n = prod(view.shape[lead + self.groups :])
        for part, _ in parts(view, lead):
            yield part.reshape(-1, g, n).astype(row_dtype(view), copy=False)

    def results(self, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The vectors of the node's result."""
        yield from self._vectors(value, self.gives)

    def rows(self, value: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The rows that meet the weight."""
        yield from self._vectors(value, self.reads)

    def thinned(self, needed: int) -> Self:
        """All vectors count."""
        return self


class Einsum(Operator):
    """Einsum of two operands, one of them a constant."""

    types = ("Einsum",)
    operands = (1, 0)

    def activation(self, operand: int) -> int:
        """The other of the two operands."""
        return 1 - operand

    def kind(self, node: NodeProto) -> str:
        """Uses can share a weight if its axes have the same roles."""
        found = [equation(node, operand) for operand in self.operands]
        return f"Einsum {' '.join(e if isinstance(e, str) else e.roles() for e in found)}"

    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """The axes of groups, outputs and inputs, each kind as one axis."""
        found = equation(node, operand)
        if isinstance(found, str):
            return found
        if weight.ndim != len(found.weight):
            return f"its weight of shape {weight.shape} does not fit its equation: repair the export"
        if not found.inputs or not found.outputs:
            return "it multiplies element by element, which leaves nothing to decompose"
        order = found.groups + found.outputs + found.inputs
        sizes = [prod(_size(found, weight.shape, n) for n in kind) for kind in _kinds(found)]
        return weight.transpose([found.weight.index(n) for n in order]).reshape(sizes)

    def laid_out(
        self, node: NodeProto, operand: int, canonical: NDArray[Any], shape: Sequence[int]
    ) -> NDArray[Any]:
        """The axes in the weight's order."""
        found = _known_equation(node, operand)
        order = found.groups + found.outputs + found.inputs
        split = canonical.reshape([_size(found, shape, n) for n in order])
        return split.transpose([order.index(n) for n in found.weight])

    def positions(
        self, node: NodeProto, operand: int, entering: Shape | None, leaving: Shape | None, features: int
    ) -> Positions | None:
        """The number of vectors, from the shape of the result."""
        sizes = known(leaving)
        return None if sizes is None else Positions(prod(sizes) // features)

    def dense_evaluations(self, node: NodeProto, positions: Positions) -> int:
        """Once per vector."""
        return positions.batch

    def factor_evaluations(
        self, node: NodeProto, positions: Positions, kernel: tuple[int, ...], fold: Fold, *, transposed: bool
    ) -> tuple[int, int]:
        """Once per vector."""
        return positions.batch, positions.batch

    def macs_undecomposed(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """The product of the sizes of all letters; 0 for sums over one operand alone."""
        found = equation(node, 1)
        if isinstance(found, str):
            return 0
        left, right = known(inputs[0]), known(inputs[1])
        if left is None or right is None:
            return None
        return prod(left) * prod(_size(found, right, n) for n in found.outputs)

    def layout(
        self, layer: Layer, nodes: Sequence[NodeProto], factors: Factors, lowering: Lowering
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The encoder as (groups, inputs, rank), the decoder as (groups, rank, outputs), axis by axis."""
        use = layer.uses[0]
        found = _known_equation(nodes[0], use.operand)
        groups, outputs, inputs = ([_size(found, use.laid_out, n) for n in kind] for kind in _kinds(found))
        encoder, decoder = factors.encoder[:, 0], factors.decoder[:, :, 0]
        j = encoder.shape[1]
        return (
            encoder.swapaxes(1, 2).reshape(*groups, *inputs, j),
            decoder.swapaxes(1, 2).reshape(*groups, j, *outputs),
        )

    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """Two Einsum."""
        found = _known_equation(site.node, site.use.operand)
        rank = found.rank
        between = "".join(n for n in found.activation if n not in found.inputs) + rank
        encode = _text(f"{found.activation},{found.groups}{found.inputs}{rank}->{between}")
        decode = _text(f"{between},{found.groups}{rank}{found.outputs}->{found.result}")
        hidden = fragment.add("encoder", "Einsum", [names.value, names.encoder], equation=encode)
        fragment.add("decoder", "Einsum", [hidden, names.decoder], equation=decode)

    def geometry(self, layer: Layer, use: Use, node: NodeProto) -> Contraction:
        """The vectors along the letters of the sum."""
        found = _known_equation(node, use.operand)
        reads = found.rows + found.groups + found.inputs
        gives = found.rows + found.groups + found.outputs
        return Contraction(
            tuple(_axis(found.activation, n) for n in reads),
            tuple(_axis(found.result, n) for n in gives),
            len(found.rows),
            len(found.groups),
        )

    def sample(self, layer: Layer, use: Use, node: NodeProto) -> Sample:
        """Two rows along each axis."""
        found = _known_equation(node, use.operand)
        return Sample(self.activation(use.operand), _activation_shape(found, use, [2] * len(found.rows)))

    def timed(self, layer: Layer, use: Use, node: NodeProto) -> Timed | None:
        """All rows along the first row axis."""
        if use.positions is None:
            return None
        found = _known_equation(node, use.operand)
        rows = [use.positions.batch, *[1] * len(found.rows)][: len(found.rows)]
        return Timed(_activation_shape(found, use, rows), use.laid_out, {})


def equation(node: NodeProto, operand: int) -> Equation | str:
    """Read a node's equation as a product with one of its operands, or return the reason why it is none."""
    text = "".join(attribute_of(node, "equation", "").split()).replace("...", _ELLIPSIS)
    terms, arrow, result = text.partition("->")
    named = terms.split(",")
    # Runtimes sort letters of both cases in different ways.
    is_known = bool(arrow) or terms.islower() or terms.isupper()
    is_spelled = set("".join(named) + result) <= set(_LETTERS + _ELLIPSIS)
    if len(named) != 2 or not is_known or not is_spelled:
        return "its equation is no plain product of two operands: export it as MatMul to have it decomposed"
    if _ELLIPSIS in named[operand]:
        return "its equation has an ellipsis in the weight: export it as MatMul to have it decomposed"
    if not arrow:
        result = _implicit("".join(named))
    found = Equation(named[1 - operand], named[operand], result)
    letters = [*named, result]
    is_plain = all(len(set(term)) == len(term) for term in letters)
    is_kept = set(found.rows) <= set(result) and set(found.outputs) <= set(result)
    if not is_plain or not is_kept or not set(result) <= set("".join(named)):
        return (
            "its equation sums or repeats more than a product does: export it as MatMul to have it decomposed"
        )
    return found


def _implicit(letters: str) -> str:
    """The result of an equation without one: the ellipsis, then all letters that it has once, sorted."""
    once = sorted(n for n in letters if n != _ELLIPSIS and letters.count(n) == 1)
    return _ELLIPSIS * (_ELLIPSIS in letters) + "".join(once)


def _text(terms: str) -> str:
    """An equation as ONNX writes it."""
    return terms.replace(_ELLIPSIS, "...")


def _axis(term: str, letter: str) -> int | EllipsisType:
    """The axis of a letter; it counts from the end behind an ellipsis."""
    if letter == _ELLIPSIS:
        return ...
    place = term.index(letter)
    return place - len(term) if _ELLIPSIS in term[:place] else place


def _expanded(axes: _Axes, rank: int) -> tuple[int, ...]:
    """The axes of a value of this rank, in which the ellipsis is the axes that are left."""
    named = {axis % rank for axis in axes if axis is not ...}
    left = [axis for axis in range(rank) if axis not in named]
    return tuple(n for axis in axes for n in (left if axis is ... else [axis % rank]))


def _known_equation(node: NodeProto, operand: int) -> Equation:
    found = equation(node, operand)
    if not isinstance(found, Equation):
        raise LookupError(found)  # noqa: TRY004 - the node is of the wrong kind, not the argument
    return found


def _kinds(found: Equation) -> tuple[str, str, str]:
    return found.groups, found.outputs, found.inputs


def _size(found: Equation, shape: Sequence[int], letter: str) -> int:
    """The size of a letter of the weight."""
    return shape[found.weight.index(letter)]


def _activation_shape(found: Equation, use: Use, rows: Sequence[int]) -> tuple[int, ...]:
    sizes = dict(zip(found.rows, rows, strict=True))
    return tuple(sizes[n] if n in sizes else _size(found, use.laid_out, n) for n in found.activation)
