"""Shape inference that no size below 0 ends.

A window that is larger than its input gives a size below 0, and for a Slice of such a tensor onnx's inference
ends the whole process. So a Slice is hidden from it until the sizes that it reads are known to be sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import onnx
from onnx import GraphProto, ModelProto, NodeProto

from onnx_lowrank.errors import InputError

_SHRINKING = frozenset({
    "AveragePool", "Conv", "ConvInteger", "ConvTranspose", "LpPool", "MaxPool", "Pad", "QLinearConv",
})  # fmt: skip
_HIDDEN = "Hidden"  # a type that no domain has, so that inference passes over its nodes


def infer_shapes(proto: ModelProto, *, data_prop: bool = False) -> ModelProto:
    """As `onnx.shape_inference.infer_shapes`.

    Args:
        proto: A model without large contents; it is not changed.
        data_prop: Whether small values are propagated, too.

    Raises:
        InputError: A Slice reads a tensor with a size below 0.
    """
    slices = _Slices(proto.graph)
    for level in range(1, slices.levels + 1):
        hidden = [node for depth, node in slices.found if depth >= level]
        for node in hidden:
            node.op_type = _HIDDEN
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=data_prop)
        finally:
            for node in hidden:
                node.op_type = "Slice"
        _check(inferred.graph, {node.input[0] for node in hidden if node.input})
    return onnx.shape_inference.infer_shapes(proto, data_prop=data_prop)


class _Slices:
    """The Slices of a graph and its bodies that read what a window may have made too small.

    Attributes:
        found: The nodes, each with its level: the number of such Slices on a path to it, itself included.
        levels: The largest level.
    """

    def __init__(self, graph: GraphProto) -> None:
        self.found: list[tuple[int, NodeProto]] = []
        self._values: dict[str, tuple[int, bool]] = {}
        self._visit(graph.node)
        self.levels = max((level for level, _ in self.found), default=0)

    def _visit(self, nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            bodies = [a.g for a in node.attribute if a.HasField("g")]
            for body in bodies:
                self._visit(body.node)
            read = [*node.input, *(output.name for body in bodies for output in body.output)]
            known = [self._values.get(name, (0, False)) for name in read]
            level, is_small = max((k[0] for k in known), default=0), any(k[1] for k in known)
            if node.op_type == "Slice" and not node.domain and is_small:
                level, is_small = level + 1, False
                self.found.append((level, node))
            is_small = (is_small or node.op_type in _SHRINKING) and node.op_type != "Shape"
            self._values.update(dict.fromkeys(filter(None, node.output), (level, is_small)))


def _check(graph: GraphProto, names: Set[str]) -> None:
    for value in (*graph.value_info, *graph.input, *graph.output):
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim if d.HasField("dim_value")]
        if value.name in names and min(sizes, default=0) < 0:
            raise InputError(
                f"The tensor {value.name!r} has a size of {min(sizes)}, as a window is larger than its "
                "input: pass larger inputs with --input-shape, or export the model again."
            )
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _check(attribute.g, names)
