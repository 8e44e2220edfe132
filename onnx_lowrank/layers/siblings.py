"""Layers that read the same tensor, such as the three projections of an attention block.

Rules:

1. All have one use, in the main graph, and a plain linear family (`Operator.product`) of one operator group.
   No weight is cast.
2. All read the same tensor in the same way: the same operator, kernel, strides, padding, dilation and scale,
   so that the vectors that meet their weights are the same. They store their weights in the same dtype.
3. All can be decomposed in the fold whose encoder holds the whole kernel.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import geometry
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.family import Operator


def siblings(walk: Walk, bindings: Sequence[Binding]) -> dict[str, tuple[str, ...]]:
    """For every layer that can share an encoder, the ids of all layers of its group, in graph order.

    Args:
        walk: The model's walk.
        bindings: Its layers, in graph order.
    """
    groups: dict[Hashable, list[Binding]] = {}
    for binding in bindings:
        key = _input(walk, binding)
        if key is not None:
            groups.setdefault(key, []).append(binding)
    found: dict[str, tuple[str, ...]] = {}
    for group in groups.values():
        ordered = sorted(group, key=lambda binding: binding.layer.uses[0].node)
        ids = tuple(binding.layer.id for binding in ordered)
        found |= dict.fromkeys(ids, ids) if len(ids) > 1 else {}
    return found


def plain(walk: Walk, binding: Binding) -> tuple[Place, Operator] | None:
    """The node and the operator of a layer that can share a factor (rules 1 and 3); None for other layers."""
    layer = binding.layer
    if len(layer.uses) > 1 or layer.uses[0].scope or layer.groups > 1 or binding.casts[0] is not None:
        return None
    if layer.shared_fold not in layer.folds or 1 not in layer.slices:
        return None
    place = Place(layer.uses[0].scope, layer.uses[0].node)
    operator = registry.family(walk.node(place))
    return (place, operator) if operator.product is not None and operator.is_linear else None


def _input(walk: Walk, binding: Binding) -> Hashable | None:
    """The tensor that a layer reads, and the way it reads it (rule 2); None if it can share no encoder."""
    known, layer = plain(walk, binding), binding.layer
    if known is None:
        return None
    (place, operator), (use,) = known, layer.uses
    tensor = walk.operand(place, operator.activation(use.operand))
    if tensor is None:
        return None
    way = walk.node(place).op_type, use.operand, geometry(walk, binding, 0)
    return (*walk.origin(tensor), *way, layer.c, layer.kernel, layer.dtype)
