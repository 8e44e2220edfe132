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


def _input(walk: Walk, binding: Binding) -> Hashable | None:
    """The tensor that a layer reads, and the way it reads it (rule 2); None if it can share no encoder."""
    layer = binding.layer
    if len(layer.uses) > 1 or layer.uses[0].scope or layer.groups > 1 or binding.casts[0] is not None:
        return None
    if layer.shared_fold not in layer.folds or 1 not in layer.slices:
        return None
    (use,) = layer.uses
    place = Place(use.scope, use.node)
    node = walk.node(place)
    operator = registry.family(node)
    tensor = walk.operand(place, operator.activation(use.operand))
    if tensor is None or operator.product is None or not operator.is_linear:
        return None
    way = node.op_type, use.operand, geometry(walk, binding, 0)
    return (*walk.origin(tensor), *way, layer.c, layer.kernel, layer.dtype)
