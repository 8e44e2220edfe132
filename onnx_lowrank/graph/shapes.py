"""Tensor shapes through ONNX shape inference, and the MACs that follow from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from math import prod

import onnx
from onnx import ModelProto, ValueInfoProto

from onnx_lowrank.core.layer import Positions, ScopeWork
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model, outline
from onnx_lowrank.graph.constants import infer_shapes
from onnx_lowrank.graph.scopes import scopes
from onnx_lowrank.graph.walk import Place, Walk, attribute_of, is_op, label

Shape = tuple[int | None, ...]
Shapes = Mapping[tuple[str, str], Shape]
"""Shape of every tensor of known rank, by (path of its scope, name); unknown dimensions are None."""


def infer(model: Model, input_shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Infer the shapes of all tensors, with some inputs' shapes fixed.

    Raises:
        InputError: `input_shapes` names no input or contradicts the model's own shape, or the model
            has a text that is no UTF-8.
    """
    try:
        proto = outline(model)
    except UnicodeDecodeError as error:
        raise InputError(
            f"The model has the text {error.object!r}, which is no UTF-8: export it again."
        ) from error
    _fix(proto, input_shapes)
    # A model that the inference cannot follow keeps the shapes that it states itself.
    with suppress(onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        proto = infer_shapes(proto)
    shapes: dict[tuple[str, str], Shape] = {}
    for scope in scopes(proto):
        if scope.graph is not None:
            for tensor in scope.graph.initializer:
                shapes[scope.path, tensor.name] = tuple(tensor.dims)
            for value in (*scope.graph.value_info, *scope.graph.input, *scope.graph.output):
                if value.type.tensor_type.HasField("shape"):
                    shapes[scope.path, value.name] = _shape(value)
    return shapes


def _shape(value: ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in dims)


def _fix(proto: ModelProto, input_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write the given shapes into a light copy's inputs, and the same values for shared symbols."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = {value.name: value for value in proto.graph.input if value.name not in weights}
    symbols: dict[str, int] = {}
    for name, shape in input_shapes.items():
        if name not in inputs:
            raise InputError(f"--input-shape names {name!r}, but the model's inputs are {', '.join(inputs)}.")
        if not inputs[name].type.HasField("tensor_type"):
            raise InputError(f"--input-shape names {name!r}, but that input is no tensor: leave it out.")
        tensor = inputs[name].type.tensor_type
        _check_fits(inputs[name], shape)
        for dim, n in zip(tensor.shape.dim, shape, strict=False):
            if dim.dim_param and symbols.setdefault(dim.dim_param, n) != n:
                raise InputError(
                    f"--input-shape gives the dimension {dim.dim_param!r} the sizes "
                    f"{symbols[dim.dim_param]} and {n}, but the model wants them equal: give one size."
                )
        del tensor.shape.dim[:]
        for n in shape:
            tensor.shape.dim.add(dim_value=n)
    for value in inputs.values():
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = symbols[dim.dim_param]


def _check_fits(value: ValueInfoProto, shape: tuple[int, ...]) -> None:
    known = _shape(value) if value.type.tensor_type.HasField("shape") else (None,) * len(shape)
    if len(known) != len(shape) or any(k not in (None, n) for k, n in zip(known, shape, strict=True)):
        stated = "×".join("?" if k is None else str(k) for k in known)
        given = "×".join(map(str, shape))
        raise InputError(
            f"--input-shape gives {value.name!r} the shape {given}, but the model says {stated}."
        )


def open_inputs(model: Model, shapes: Shapes) -> tuple[str, ...]:
    """Names of a model's inputs of which a dimension is unknown."""
    graph = model.proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    return tuple(
        value.name
        for value in graph.input
        if value.name not in weights
        and value.type.HasField("tensor_type")
        and None in shapes.get(("", value.name), (None,))
    )


def shape_of(walk: Walk, shapes: Shapes, tensor: object) -> Shape | None:
    """Shape of a walk's tensor; None where even its rank is unknown."""
    return None if tensor is None else shapes.get(walk.origin(tensor))


def rank(walk: Walk, shapes: Shapes, place: Place, operand: int) -> int | None:
    """Number of axes of the activation that meets the weight at a node; None where unknown."""
    if walk.node(place).op_type == "Gemm":
        return 2
    shape = shape_of(walk, shapes, walk.operand(place, _activation(walk, place, operand)))
    return None if shape is None else len(shape)


def _activation(walk: Walk, place: Place, operand: int) -> int:
    """Index of the operand that meets the weight."""
    return 1 - operand if walk.node(place).op_type in ("Gemm", "MatMul", "Gather") else 0


def positions(walk: Walk, shapes: Shapes, place: Place, operand: int, features: int) -> Positions | None:
    """Where a node with a constant weight of `features` outputs is evaluated; None where unknown."""
    entering = shape_of(walk, shapes, walk.operand(place, _activation(walk, place, operand)))
    leaving = shape_of(walk, shapes, walk.result(place))
    match walk.node(place).op_type:
        case "Gather":
            rows = _elements(entering)
            return None if rows is None else Positions(rows)
        case "Gemm" | "MatMul":
            elements = _elements(leaving)
            return None if elements is None else Positions(elements // features)
    inputs, outputs = _known(entering), _known(leaving)
    if inputs is None or outputs is None or not 2 < len(inputs) == len(outputs):
        return None
    return Positions(outputs[0], inputs[2:], outputs[2:])


def _known(shape: Shape | None) -> tuple[int, ...] | None:
    """The shape where every dimension is known, else None."""
    sizes = tuple(n for n in shape if n is not None) if shape is not None else ()
    return sizes if shape is not None and len(sizes) == len(shape) else None


def _elements(shape: Shape | None) -> int | None:
    known = _known(shape)
    return None if known is None else prod(known)


def work(walk: Walk, shapes: Shapes, layers: Collection[Place]) -> tuple[ScopeWork, ...]:
    """The MACs of every scope's nodes that are not layers, and how the scopes hang together.

    Counted are Conv, ConvTranspose, Gemm and MatMul, whatever their operands; what other operators
    multiply counts nothing.
    """
    functions = {
        (scope.function.domain, scope.function.name, scope.function.overload): path
        for path, scope in walk.scopes.items()
        if scope.function is not None
    }
    found = []
    for path, scope in walk.scopes.items():
        places = (Place(path, index) for index in range(len(scope.nodes)))
        counts = {place: _node_macs(walk, shapes, place) for place in places if place not in layers}
        unknown = next((walk.node(place) for place, count in counts.items() if count is None), None)
        called = (functions.get((node.domain, node.op_type, node.overload)) for node in scope.nodes)
        branch_of = None
        if scope.parent is not None and scope.node is not None:
            holder = walk.node(Place(scope.parent, scope.node))
            branch_of = scope.node if is_op(holder, ("If",)) else None
        found.append(
            ScopeWork(
                path,
                scope.parent,
                branch_of,
                sum(filter(None, counts.values())) if unknown is None else None,
                tuple(function for function in called if function is not None),
                "" if unknown is None else label(unknown),
            )
        )
    return tuple(found)


def _node_macs(walk: Walk, shapes: Shapes, place: Place) -> int | None:
    """MACs of one node; None where a dimension is unknown, 0 for operators that are not counted."""
    node = walk.node(place)
    if not is_op(node, ("Conv", "ConvTranspose", "Gemm", "MatMul")):
        return 0
    leaving = _elements(shape_of(walk, shapes, walk.result(place)))
    left, right = (_known(shape_of(walk, shapes, walk.operand(place, index))) for index in (0, 1))
    if leaving is None or not left or not right:
        return None
    match node.op_type:
        case "Conv":
            return leaving * prod(right[1:])
        case "ConvTranspose":
            return prod(left) * prod(right[1:])
        case "Gemm":
            return leaving * left[0 if attribute_of(node, "transA", 0) else -1]
        case _:
            return leaving * left[-1]
