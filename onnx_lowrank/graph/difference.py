"""The differences of the graphs of two models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from onnx_lowrank.core.outcome import Differences
from onnx_lowrank.files.load import Model, array
from onnx_lowrank.graph.scopes import scopes


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
