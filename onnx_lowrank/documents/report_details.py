"""The parts of the JSON report that tell the choices of a plan and the differences of the graphs."""

from __future__ import annotations

from onnx_lowrank.core.option import Fold
from onnx_lowrank.documents.report_outputs import Table


class Total(Table, frozen=True):
    """An amount in the input model and in the compressed model.

    Attributes:
        before: The amount in the input model.
        after: The amount in the compressed model.
        ratio: after / before.
    """

    before: int | None
    after: int | None
    ratio: float | None


class Curve(Table, frozen=True):
    """How the error of a layer falls with the rank of one decomposition, at some of the ranks.

    Attributes:
        fold: Its fold.
        k: Its number of slices.
        ranks: Ranks of every slice, ascending.
        errors: The errors at these ranks in the recipe's measure.
        values: The largest singular value that each of these ranks leaves out; empty if the recipe needs no
            spectra.
    """

    fold: Fold
    k: int
    ranks: tuple[int, ...]
    errors: tuple[float | None, ...]
    values: tuple[float | None, ...] = ()


class Alternative(Table, frozen=True):
    """A decomposition of a layer that no other one beats.

    Attributes:
        fold: The unfolding of the weight.
        k: Number of slices.
        j: Rank of every slice.
        cost: Its cost in the budget's unit.
        error: Its error in the recipe's measure.
    """

    fold: Fold
    k: int
    j: int
    cost: int
    error: float | None


class Node(Table, frozen=True):
    """A node of a graph.

    Attributes:
        op: Operator type.
        name: Its name; the name of its first output if it has none.
        weights: Shapes of the initializers that it reads.
    """

    op: str
    name: str
    weights: tuple[tuple[int, ...], ...]


class Change(Table, frozen=True):
    """A place where the nodes of both graphs differ.

    Attributes:
        scope: Path of the graph or function.
        same: The nodes before this place that both have, since the last change: numbers by operator type.
        gone: The nodes that only the input model has.
        new: The nodes that only the compressed model has.
    """

    scope: str
    same: dict[str, int]
    gone: tuple[Node, ...]
    new: tuple[Node, ...]


class Graph(Table, frozen=True):
    """How the graph of the compressed model differs from that of the input model.

    Attributes:
        operators: The numbers of nodes by operator type; only types whose number differs.
        changes: The places that differ, in order.
    """

    operators: dict[str, Total]
    changes: tuple[Change, ...]
