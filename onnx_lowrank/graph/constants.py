"""Small tensors that follow from shapes: exporters compute pads and targets of Reshape from them.

ONNX shape inference stops at such computations. It also stops at an If with branches of different rank,
even where the shapes decide the condition. This module puts the results in as constants, in all graphs.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from itertools import zip_longest
from math import prod
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_graph, make_model, make_node, make_tensor_value_info

from onnx_lowrank.graph import negative
from onnx_lowrank.graph.growth import propagates_little
from onnx_lowrank.graph.walk import attribute_of

# fmt: off
_GROWING = frozenset({  # the result can be larger than the first operand
    "Add", "And", "Concat", "ConstantOfShape", "Div", "Equal", "Gather", "Greater", "GreaterOrEqual",
    "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Or", "ReduceProd", "Sub", "Where",
})
_OPERATORS = _GROWING | {
    "Abs", "Cast", "Ceil", "Floor", "Identity", "Neg", "Not", "Reshape", "Slice", "Squeeze",
    "Transpose", "Unsqueeze",
}
# fmt: on
_LARGEST = 1024  # elements; shapes and pads have a few
_MOST = 1 << 22  # elements of all inserted constants together
_ROUNDS = 32  # each round resolves one more Shape of a chain; chains are short

UNKNOWN = (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError)
"""The errors of an inference that fails: the shapes stay unknown."""

_Values = ChainMap[str, NDArray[Any] | None]
_Shapes = ChainMap[str, tuple[int, ...] | None]


def infer_shapes(light: ModelProto) -> ModelProto:
    """Infer shapes, also through the small tensors computed from shapes, in all graphs.

    Args:
        light: A model without large contents; it is not changed.

    Returns:
        The model with its shapes. A Constant stands in the place of every node with a known result; all
        other nodes keep their positions.

    Raises:
        RecursionError: A function calls itself.
    """
    proto = ModelProto()
    proto.CopyFrom(light)
    inferred = negative.infer_shapes(proto)
    folder = _Folder(proto)
    propagated = False
    for _ in range(_ROUNDS):
        if not folder.fold(inferred.graph) and propagated:
            break
        propagated = True
        inferred = negative.infer_shapes(proto, data_prop=propagates_little(inferred))
    return inferred


class _Folder:
    """Puts constants into a model, in place, until new shapes give no new constants."""

    def __init__(self, proto: ModelProto) -> None:
        self._proto = proto
        self._room = _MOST
        self._failed: set[str] = set()
        self._changed = False

    def fold(self, inferred: GraphProto) -> bool:
        """Go once through all graphs, with the shapes of a copy; True if the model changed."""
        self._changed = False
        self._graph(self._proto.graph, inferred, ChainMap(), ChainMap(), "")
        return self._changed

    def _graph(
        self, graph: GraphProto, inferred: GraphProto, outer: _Values, around: _Shapes, path: str
    ) -> None:
        # None first: a name that a graph defines hides the same name of the graphs around it.
        local: dict[str, NDArray[Any] | None] = dict.fromkeys(_defined(graph))
        local |= {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if _is_small(t)}
        values: _Values = outer.new_child(local)
        shapes: _Shapes = around.new_child({**dict.fromkeys(local), **_known_shapes(inferred)})
        for index, (node, seen) in enumerate(zip(graph.node, inferred.node, strict=True)):
            here = f"{path}/{index}"
            self._capture(graph, node, values, local)
            if self._replace(node, values, shapes, here):
                continue
            for attribute, copy in zip(node.attribute, seen.attribute, strict=True):
                inner = f"{here}.{attribute.name}"
                if attribute.HasField("g"):
                    self._graph(attribute.g, copy.g, values, shapes, inner)
                for i, pair in enumerate(zip(attribute.graphs, copy.graphs, strict=True)):
                    self._graph(*pair, values, shapes, f"{inner}[{i}]")
            if node.op_type == "If" and node.domain in ("", "ai.onnx"):
                self._decide(graph, node, seen, values)

    def _capture(
        self, graph: GraphProto, node: NodeProto, values: _Values, local: dict[str, NDArray[Any] | None]
    ) -> None:
        """Copy a node's known operands of outer scopes into its graph: inference reads values there alone."""
        for i, name in enumerate(node.input):
            value = values.get(name)
            if value is None or name in local or not self._takes(value):
                continue
            alias = f"{name}:captured"
            while alias in values:
                alias += "_"
            graph.initializer.append(onnx.numpy_helper.from_array(value, alias))
            local[alias] = value
            node.input[i] = alias
            self._changed = True

    def _replace(self, node: NodeProto, values: _Values, shapes: _Shapes, here: str) -> bool:
        """Replace a node by a Constant if its result is small and known; True if it was replaced."""
        if here in self._failed or node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            return False
        if node.op_type == "Constant":
            tensor = next((a.t for a in node.attribute if a.name == "value"), None)
            if tensor is not None and _is_small(tensor):
                values[node.output[0]] = onnx.numpy_helper.to_array(tensor)
            return False
        try:
            result = _result(self._proto, node, values, shapes)
        except Exception:
            # The reference implementation cannot compute it, so it stays unknown, and is not tried again.
            self._failed.add(here)
            return False
        if result is None or result.size > _LARGEST or not self._takes(result):
            return False
        output = node.output[0]
        values[output] = result
        # In place: the paths of subgraphs of nameless nodes contain the node's index.
        node.CopyFrom(
            make_node("Constant", [], [output], node.name, value=onnx.numpy_helper.from_array(result))
        )
        self._changed = True
        return True

    def _takes(self, value: NDArray[Any]) -> bool:
        """Count one more tensor; True if there is room for it."""
        # Empty tensors count, too, or their number would have no bound.
        self._room -= max(value.size, 1)
        return self._room >= 0

    def _decide(self, graph: GraphProto, node: NodeProto, seen: NodeProto, values: _Values) -> None:
        """Give an If's outputs the shapes of the branch that it takes, where its condition is known."""
        condition = values.get(node.input[0]) if node.input else None
        if condition is None or condition.size != 1:
            return
        taken = "then_branch" if condition.item() else "else_branch"
        results = [value for a in seen.attribute if a.name == taken for value in a.g.output]
        for name, result in zip(node.output, results, strict=False):
            if result.type.tensor_type.HasField("shape") and _state(graph, name, result):
                self._changed = True


def _defined(graph: GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    for node in graph.node:
        yield from node.output


def _state(graph: GraphProto, name: str, known: ValueInfoProto) -> bool:
    """Write a known shape into a graph; True if this adds to what the graph stated."""
    stated = next((value for value in (*graph.output, *graph.value_info) if value.name == name), None)
    if stated is None:
        stated = graph.value_info.add(name=name)
    tensor, before, new = (
        stated.type.tensor_type,
        *(_sizes(v.type.tensor_type.shape) for v in (stated, known)),
    )
    same_rank = tensor.HasField("shape") and len(before) == len(new)
    # A size that only the graph states stays.
    sizes = [old if n is None else n for old, n in zip(before, new, strict=True)] if same_rank else new
    if same_rank and sizes == before:
        return False
    tensor.elem_type = known.type.tensor_type.elem_type
    tensor.shape.ClearField("dim")
    tensor.shape.SetInParent()
    for size in sizes:
        tensor.shape.dim.add(dim_value=size)
    return True


def _sizes(shape: onnx.TensorShapeProto) -> list[int | None]:
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in shape.dim]


def _known_shapes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    found = {}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            sizes = _sizes(value.type.tensor_type.shape)
            if None not in sizes:
                found[value.name] = tuple(cast(list[int], sizes))
    return found


def _is_small(tensor: TensorProto) -> bool:
    """Whether a light copy still holds the tensor's contents, of a plain type and with few elements."""
    has_contents = (
        tensor.raw_data or tensor.int64_data or tensor.int32_data or tensor.float_data or 0 in tensor.dims
    )
    plain = tensor.data_type in (TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.BOOL)
    return bool(has_contents) and plain and prod(tensor.dims) <= _LARGEST


def _most_elements(node: NodeProto, operands: list[NDArray[Any]]) -> int:
    """A bound on the elements that an operator of _GROWING computes, partial results included."""
    shapes: list[tuple[int, ...]] = [operand.shape for operand in operands]
    match node.op_type:
        case "ConstantOfShape":
            return int(prod(operands[0].tolist()))
        case "Concat":
            return sum(map(prod, shapes))
        case "Gather":
            others = list(shapes[0])
            del others[attribute_of(node, "axis", 0)]
            return prod(shapes[1]) * prod(others)
        case "ReduceProd":
            # Not the operand's size: the product along an empty axis is 1, so an empty operand has results.
            return prod(max(n, 1) for n in shapes[0])
        case _:
            axes = zip_longest(*map(reversed, shapes), fillvalue=1)
            # Not the result's size: Max of three operands first computes the Max of two, which may be large
            # although the third operand is empty.
            return prod(max(1, *sizes) for sizes in axes)


def _result(proto: ModelProto, node: NodeProto, values: _Values, shapes: _Shapes) -> NDArray[Any] | None:
    """The result of a node if it follows from known operands or shapes; otherwise None."""
    names: list[str] = [name for name in node.input if name]
    if node.op_type in ("Shape", "Size"):
        shape = shapes.get(names[0])
        if shape is None:
            return None
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        part = shape[ends.get("start", 0) : ends.get("end")]
        return np.array(prod(shape) if node.op_type == "Size" else part, np.int64)
    known = {name: value for name in names if (value := values.get(name)) is not None}
    if node.op_type not in _OPERATORS or any(name not in known for name in names):
        return None
    if node.op_type in _GROWING and _most_elements(node, [known[name] for name in names]) > _LARGEST:
        return None
    entries = [
        make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in known.items()
    ]
    graph = make_graph([node], "one", entries, [onnx.ValueInfoProto(name=node.output[0])])
    model = make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    from onnx import reference  # Its import takes long, and few models compute shapes.

    outputs = cast(list[Any], reference.ReferenceEvaluator(model).run(None, known))
    return np.asarray(outputs[0])
