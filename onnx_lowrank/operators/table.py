"""Gather: a table with rows to look up, as in embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Lowering
from onnx_lowrank.graph.walk import attribute_of
from onnx_lowrank.operators.family import Operands, Sample, Shape, Site, Timed, known
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.operators.matrix import Product

_ROWS = 3
"""Number of rows that a sample looks up."""


class Table(Product):
    """Gather on axis 0 of a matrix (c, f), with c rows. Its chain looks up narrow rows."""

    types = ("Gather",)
    operands = (0,)
    reads_indices = True

    def on_right(self, operand: int) -> bool:
        """Looking a row up is a product of a one-hot vector with the table on the right."""
        return True

    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """One matrix with its outputs first."""
        if weight.ndim < 2:
            return "its weight is a vector, which has rank one already"
        if weight.ndim != 2 or attribute_of(node, "axis", 0) not in (0, -2):
            return "it does not look up rows of a two-dimensional table"
        return weight.T[None]

    def needs_rank(self, laid_out: Sequence[int]) -> bool:
        """A table has no batch."""
        return False

    def can_slice(self, use: Use, laid_out: Sequence[int], opset: int) -> bool:
        """A row is looked up as a whole."""
        return False

    def lowerings(
        self, use: Use, kernel: tuple[int, ...], groups: int, *, sliced: bool
    ) -> tuple[Lowering, ...]:
        """Only the native one."""
        return (Lowering.NATIVE,)

    def positions(
        self, node: NodeProto, operand: int, entering: Shape | None, leaving: Shape | None, features: int
    ) -> Positions | None:
        """The number of indices."""
        sizes = known(entering)
        return None if sizes is None else Positions(prod(sizes))

    def dense_evaluations(self, node: NodeProto, positions: Positions) -> int:
        """Looking a row up multiplies nothing."""
        return 0

    def factor_evaluations(
        self, node: NodeProto, positions: Positions, kernel: tuple[int, ...], fold: Fold, *, transposed: bool
    ) -> tuple[int, int]:
        """One factor is looked up, the other multiplied."""
        return (positions.batch, 0) if transposed else (0, positions.batch)

    def macs_undecomposed(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """Looking rows up counts nothing."""
        return 0

    def feature_axis(self, use: Use) -> int | None:
        """The features are the last axis."""
        return -1

    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """The looked-up rows."""
        self.looked_up(fragment, site, names)

    def looked_up(self, fragment: Fragment, site: Site, names: Operands) -> str:
        """Gather of the narrow factor, then MatMul; a sparse table adds a kept row, or zeros.

        Returns:
            The name of the looked-up rows.
        """
        first, second = self.stored_factors(fragment, site, names)
        hidden = fragment.add("encoder", "Gather", [first, names.value], axis=0)
        low = fragment.add("decoder", "MatMul", [hidden, second])
        if names.rows is None:
            return low
        places, rows = names.rows
        place = fragment.add("place", "Gather", [places, names.value], axis=0)
        kept = fragment.add("kept", "Gather", [rows, place], axis=0)
        return fragment.add("sum", "Add", [low, kept])

    def sample(self, layer: Layer, use: Use, node: NodeProto) -> Sample:
        """A few indices."""
        return Sample(1, (_ROWS,), TensorProto.INT64)

    def timed(self, layer: Layer, use: Use, node: NodeProto) -> Timed | None:
        """None: the time depends on the rows that are looked up."""
        return None
