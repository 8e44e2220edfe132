"""The layers at both ends of attention, and the heads between them."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lowrank.core.layer import Rows
from onnx_lowrank.graph.walk import Place
from onnx_lowrank.layers.axes import Part
from onnx_lowrank.layers.binding import Binding, Hidden
from onnx_lowrank.layers.packed import Cut


@dataclass(frozen=True, slots=True)
class End:
    """A layer at one end of attention.

    Attributes:
        binding: The layer.
        parts: The parts of the axis of its features, or of those that are cut out of a packed matrix.
        rows: These features of a packed matrix; None for a matrix of its own.
        cut: The cut; None without one.
    """

    binding: Binding
    parts: tuple[Part, ...]
    rows: Rows | None = None
    cut: Cut | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """Two layers with heads between them.

    Attributes:
        owner: The layer that reads the result, or computes the queries.
        partner: The layer that computes the values, or the keys; it may be the same.
        hidden: The parts between.
        heads: The number of the owner's heads.
        others: The nodes that cut other parts out of a packed matrix whose parts have one size of heads.
    """

    owner: End
    partner: End
    hidden: Hidden
    heads: int
    others: frozenset[Place] = frozenset()

    @property
    def packed(self) -> tuple[End, ...]:
        """The ends in a packed matrix: the queries come before the keys."""
        return tuple(end for end in (self.owner, self.partner) if end.rows is not None)

    @property
    def is_bound(self) -> bool:
        """Whether other parts of a packed matrix have the same size of heads."""
        return any(end.cut is not None and not end.cut.has_heads for end in self.packed)
