"""Small tensors that follow from shapes: exporters compute pads and targets of Reshape from them.

ONNX shape inference stops at such computations, so their results are put in as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.helper import make_graph, make_model, make_tensor_value_info
from onnx.reference import ReferenceEvaluator

_OPERATORS = frozenset(
    [
        *("Add", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Floor", "Gather", "Identity"),
        *("Mod", "Mul", "Neg", "ReduceProd", "Reshape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
        "Where",
    ]
)
_LARGEST = 1024  # elements; shapes and pads have a few
_ROUNDS = 32  # each reaches behind one more Shape; chains of them are short


def infer_shapes(light: ModelProto) -> ModelProto:
    """Shape inference that also follows the small tensors computed from shapes in the main graph.

    Args:
        light: A model without large contents; it is not changed.
    """
    proto = ModelProto()
    proto.CopyFrom(light)
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    for _ in range(_ROUNDS):
        if not _fold(proto, _known_shapes(inferred.graph)):
            break
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return inferred


def _known_shapes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    found = {}
    for value in (*graph.value_info, *graph.input):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def _fold(proto: ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Replace nodes of the main graph by their results where these are small and known; True if any was."""
    graph = proto.graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if _is_small(t)}
    folded = []
    for index, node in enumerate(graph.node):
        constant = next(
            (a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"), None
        )
        if constant is not None and _is_small(constant):
            values[node.output[0]] = onnx.numpy_helper.to_array(constant)
        result = _result(proto, node, values, shapes)
        if result is not None and result.size <= _LARGEST:
            values[node.output[0]] = result
            folded.append(index)
    for index in reversed(folded):
        name = graph.node[index].output[0]
        graph.initializer.append(onnx.numpy_helper.from_array(values[name], name))
        del graph.node[index]
    return bool(folded)


def _is_small(tensor: TensorProto) -> bool:
    """Whether a light copy still has the tensor's contents, and they are few numbers."""
    has_contents = (
        tensor.raw_data or tensor.int64_data or tensor.int32_data or tensor.float_data or 0 in tensor.dims
    )
    plain = tensor.data_type in (TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.BOOL)
    return bool(has_contents) and plain and prod(tensor.dims) <= _LARGEST


def _result(
    proto: ModelProto,
    node: NodeProto,
    values: Mapping[str, NDArray[Any]],
    shapes: Mapping[str, tuple[int, ...]],
) -> NDArray[Any] | None:
    """What a node computes, where that is a small tensor that is known already."""
    if node.domain not in ("", "ai.onnx") or len(node.output) != 1:
        return None
    if node.op_type == "Shape" and node.input[0] in shapes:
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        return np.array(shapes[node.input[0]][ends.get("start", 0) : ends.get("end")], np.int64)
    names: list[str] = [name for name in node.input if name]
    if node.op_type not in _OPERATORS or any(name not in values for name in names):
        return None
    if node.op_type == "ConstantOfShape" and np.prod(values[names[0]].astype(float)) > _LARGEST:
        return None
    entries = [
        make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(values[n].dtype), values[n].shape)
        for n in dict.fromkeys(names)
    ]
    graph = make_graph([node], "one", entries, [onnx.ValueInfoProto(name=node.output[0])])
    model = make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    try:
        outputs = cast(list[Any], ReferenceEvaluator(model).run(None, {n: values[n] for n in names}))
        return np.asarray(outputs[0])
    except Exception:
        # Whatever the reference implementation cannot compute stays unknown, as it was.
        return None
