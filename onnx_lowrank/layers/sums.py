"""Layers whose results are added up: attention beside a feed-forward block, a convolution and its shortcut.

Rules:

1. The results meet in a tree of Adds and Sums in the main graph. Nothing else reads the results, or what the
   tree adds up before its end. Its further addends may be anything: biases, a residual.
2. All have one use, in the main graph, and a plain linear family (`Operator.product`) of one operator group,
   without a factor (a Gemm's alpha). No weight is cast.
3. One decoder fits all: the same operator, with the features on the same axis, in the same dtype. The results
   have one shape, as far as it is known, so the sum has as many positions as each of them.
4. All can be decomposed in the fold whose encoder holds the whole kernel.
5. A bias that a node adds can change (`layers.bias`): all of them move behind the sum as one. At most two are
   no part of a BatchNorm, so that no layer costs less than nothing. Their sum is within half of the dtype's
   range, which leaves room for its correction.
6. Of several groups of such layers in one tree, the largest one counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.shapes import Shapes, shape_of
from onnx_lowrank.graph.walk import Place, Walk, is_op
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding, Sum
from onnx_lowrank.layers.prepare import largest_of
from onnx_lowrank.layers.siblings import plain

_ALIGNED = 7
"""The first opset whose Add aligns the last axes of its operands."""

_MOST_BIASES = 2


def with_sums(model: Model, walk: Walk, shapes: Shapes, bindings: tuple[Binding, ...]) -> tuple[Binding, ...]:
    """The layers; those that can share a decoder know each other and their sum.

    Args:
        model: The model.
        walk: Its walk.
        shapes: Its inferred shapes.
        bindings: Its layers, in graph order.
    """
    if walk.opsets[""] < _ALIGNED:
        return bindings
    named: dict[str, tuple[Binding, Hashable]] = {}
    for binding in bindings:
        key = _decoder(model, walk, shapes, binding)
        if key is not None:
            named[_result(walk, binding)] = binding, key
    made: dict[str, Binding] = {}
    for place in walk.places():
        if _adds(walk, place) and not _is_inside(walk, place):
            made |= {binding.layer.id: binding for binding in _tree(model, walk, place, named)}
    return tuple(made.get(binding.layer.id, binding) for binding in bindings)


def _decoder(model: Model, walk: Walk, shapes: Shapes, binding: Binding) -> Hashable | None:
    """What the decoder of a layer has to fit (rule 3); None if a rule of one layer fails."""
    known, layer = plain(walk, binding), binding.layer
    if known is None:
        return None
    (place, operator), (use,) = known, layer.uses
    node, shape = walk.node(place), shape_of(walk, shapes, walk.result(place))
    if operator.scale(node) != 1 or shape is None:
        return None
    has_bias = operator.bias is not None and walk.operand(place, operator.bias) is not None
    if has_bias and bias(model, walk, binding) is None:
        return None
    return node.op_type, use.operand, operator.feature_axis(use), shape, layer.f, layer.dtype


def _result(walk: Walk, binding: Binding) -> str:
    """Name of a layer's result, behind a folded BatchNorm."""
    use, norm = binding.layer.uses[0], binding.layer.batchnorm
    return walk.node(Place(use.scope, use.node if norm is None else norm.node)).output[0]


def _adds(walk: Walk, place: Place) -> bool:
    return not place.scope and is_op(walk.node(place), ("Add", "Sum"))


def _is_inside(walk: Walk, place: Place) -> bool:
    """Whether an operator is inside a tree: only another Add or Sum reads its result, and once."""
    result = walk.result(place)
    readers = [] if result is None or walk.is_output(result) else walk.consumers(result)
    return len(readers) == 1 and _adds(walk, readers[0][0])


def _tree(
    model: Model, walk: Walk, root: Place, named: dict[str, tuple[Binding, Hashable]]
) -> Iterator[Binding]:
    """The layers that can share a decoder in the tree with this end (rules 5 and 6), with their sum."""
    nodes, leaves = _explored(walk, root)
    groups: dict[Hashable, list[tuple[Place, int]]] = {}
    for place, operand in leaves:
        tensor = walk.operand(place, operand)
        scope, name = ("", "") if tensor is None else walk.origin(tensor)
        is_read_once = tensor is not None and walk.consumers(tensor) == [(place, operand)]
        if not scope and name in named and is_read_once and not walk.is_output(tensor):
            groups.setdefault(named[name][1], []).append((place, operand))
    chosen = max(groups.values(), key=len, default=[])
    results = {walk.node(place).input[operand] for place, operand in chosen}
    layers = [named[name][0] for name in sorted(results, key=lambda name: _node(named[name][0]))]
    biases = [binding for binding in layers if _bias_inside(model, walk, binding)]
    if len(layers) < 2 or len(biases) > _MOST_BIASES or not _can_store_bias(model, walk, layers):
        return
    others = tuple(leaf for leaf in leaves if leaf not in chosen)
    added = Sum(tuple(_result(walk, binding) for binding in layers), nodes, others)
    is_moved = bool(biases) or any(binding.layer.batchnorm is not None for binding in layers)
    addends = tuple(binding.layer.id for binding in layers)
    for binding in layers:
        first = binding is layers[0]
        summed_bias = (is_moved - len(biases)) * binding.layer.f if first else 0
        layer = replace(binding.layer, addends=addends, summed_bias=summed_bias)
        yield replace(binding, layer=layer, sum=added)


def _explored(walk: Walk, root: Place) -> tuple[tuple[Place, ...], list[tuple[Place, int]]]:
    """The operators of a tree, in graph order, and the places and operands of its addends."""
    nodes, leaves, waiting = {root}, [], [(root, n) for n in range(len(walk.node(root).input))]
    while waiting:
        place, operand = waiting.pop(0)
        tensor = walk.operand(place, operand)
        before = None if tensor is None else walk.producer(tensor)
        if before is not None and _adds(walk, before) and _is_inside(walk, before):
            nodes.add(before)
            waiting = [*((before, n) for n in range(len(walk.node(before).input))), *waiting]
        else:
            leaves.append((place, operand))
    return tuple(sorted(nodes)), leaves


def _node(binding: Binding) -> int:
    return binding.layer.uses[0].node


def _bias_inside(model: Model, walk: Walk, binding: Binding) -> bool:
    """Whether a layer's own node adds a bias that no BatchNorm takes in."""
    own = bias(model, walk, binding)
    return own is not None and own.in_node and binding.layer.batchnorm is None


def _can_store_bias(model: Model, walk: Walk, layers: Sequence[Binding]) -> bool:
    """Whether the bias behind a sum is far from the largest number of its dtype."""
    known = [
        own.values for binding in layers if (own := bias(model, walk, binding)) is not None and own.in_node
    ]
    largest = largest_of(np.dtype(layers[0].layer.dtype)) if layers else 0.0
    return bool(np.all(np.abs(sum(known, np.zeros(1))) <= largest / 2))
