"""The differences of the graphs of two models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
from onnx import NodeProto, TensorProto

from onnx_lowrank.core.outcome import Change, Differences, Node
from onnx_lowrank.files.load import Model, array
from onnx_lowrank.graph.scopes import Scope, scopes


def operators(first: Model, second: Model) -> dict[str, tuple[int, int]]:
    """The numbers of nodes of every operator type, in all scopes; only those that differ."""
    counts = [
        Counter(node.op_type for scope in scopes(model.proto) for node in scope.nodes)
        for model in (first, second)
    ]
    names = sorted(counts[0].keys() | counts[1].keys())
    return {n: (counts[0][n], counts[1][n]) for n in names if counts[0][n] != counts[1][n]}


def nodes(first: Model, second: Model) -> Differences:
    """Nodes with all their contents; a node that occurs twice counts twice."""
    kinds = [
        Counter(
            (s.path, n.SerializeToString(deterministic=True)) for s in scopes(model.proto) for n in s.nodes
        )
        for model in (first, second)
    ]
    same = (kinds[0] & kinds[1]).total()
    return Differences(same, 0, kinds[0].total() - same, kinds[1].total() - same)


def changes(first: Model, second: Model) -> tuple[Change, ...]:
    """The places where the nodes of two models differ, scope by scope.

    Nodes are the same if their types, names, inputs, outputs and the shapes of their weights are. Both models
    have the nodes that they share in the same order, as those of a rewritten model are.
    """
    found: list[Change] = []
    parts = ({scope.path: _kinds(scope) for scope in scopes(model.proto)} for model in (first, second))
    ours, theirs = parts
    for path in dict.fromkeys((*ours, *theirs)):
        found += _aligned(path, ours.get(path, []), theirs.get(path, []))
    return tuple(found)


_Kind = tuple[Node, tuple[str, ...], tuple[str, ...]]


def _kinds(scope: Scope) -> list[_Kind]:
    shapes = {t.name: tuple(t.dims) for t in (scope.graph.initializer if scope.graph is not None else ())}

    def kind(node: NodeProto) -> _Kind:
        weights = tuple(shapes[name] for name in node.input if name in shapes)
        name = node.name or next(filter(None, node.output), "")
        return Node(node.op_type, name, weights), tuple(node.input), tuple(node.output)

    return [kind(node) for node in scope.nodes]


def _aligned(path: str, ours: Sequence[_Kind], theirs: Sequence[_Kind]) -> Iterator[Change]:
    """The changes of one scope; what follows the last one has no nodes of its own."""
    shared = set(ours) & set(theirs)
    # Between two shared nodes lie the nodes that one model alone has.
    same: Counter[str] = Counter()
    is_changed = False
    for (gone, ended), (new, _) in zip_longest(
        _runs(ours, shared), _runs(theirs, shared), fillvalue=((), None)
    ):
        if gone or new:
            yield Change(path, dict(same), tuple(gone), tuple(new))
            same, is_changed = Counter(), True
        if ended is not None:
            same[ended.op] += 1
    if same and is_changed:
        yield Change(path, dict(same))


def _runs(nodes: Sequence[_Kind], shared: set[_Kind]) -> Iterator[tuple[Sequence[Node], Node | None]]:
    """The nodes before every shared one, with it; at last those behind the last shared one."""
    alone: list[Node] = []
    for kind in nodes:
        if kind in shared:
            yield alone, kind[0]
            alone = []
        else:
            alone.append(kind[0])
    yield alone, None


def tensors(first: Model, second: Model) -> Differences:
    """Initializers by name; those of one name are the same if all their numbers are."""
    ours, theirs = (dict(_initializers(model)) for model in (first, second))
    shared = ours.keys() & theirs.keys()
    same = sum(_is_same(first, ours[name], second, theirs[name]) for name in shared)
    return Differences(same, len(shared) - same, len(ours) - len(shared), len(theirs) - len(shared))


def _initializers(model: Model) -> Iterator[tuple[tuple[str, str], TensorProto]]:
    for scope in scopes(model.proto):
        for tensor in scope.graph.initializer if scope.graph is not None else ():
            yield (scope.path, tensor.name), tensor


def _is_same(first: Model, one: TensorProto, second: Model, other: TensorProto) -> bool:
    if (one.data_type, tuple(one.dims)) != (other.data_type, tuple(other.dims)):
        return False
    ours, theirs = (np.ascontiguousarray(array(m, t)).reshape(-1) for m, t in ((first, one), (second, other)))
    if ours.dtype.hasobject:
        return bool(np.array_equal(ours, theirs))
    return bool(np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)))  # as a NaN equals no NaN
