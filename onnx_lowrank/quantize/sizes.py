"""The bytes that ONNX Runtime's tools add and take away, from the nodes and the shapes of a model alone.

They depend on names: a tool names what it adds after the tensor or the node that it belongs to. The numbers
here are upper bounds of what it adds (`tests/quantize/test_quantize_sizes.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from math import prod

from onnx import ModelProto, NodeProto, TensorProto

_OPERANDS = {"Gather": 0}
"""The operand that is the weight, where it is not the second one."""

_TRANSPOSED = "transB"

_TAKEN_IN = frozenset({"Clip", "Relu"})
"""Functions that the range of the tensor before them can stand for."""

_WHOLE = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant float32 operand of a node.

    Attributes:
        name: Its name.
        node: The node.
        size: Number of elements.
        rows: Number of output features, each of which may have a scale.
        bias: Number of elements of the node's constant bias; 0 without one.
        stack: Number of matrices in the weight of a MatMul that is a stack of them; else 1.
    """

    name: str
    node: NodeProto
    size: int
    rows: int
    bias: int
    stack: int = 1


def weights(proto: ModelProto, operators: Set[str]) -> Iterator[Weight]:
    """The weights of the main graph that these operators read, each once.

    Args:
        proto: A model; its tensors need no contents.
        operators: Types of nodes.
    """
    known, seen = _floats(proto), set()
    for node in proto.graph.node:
        operand = _OPERANDS.get(node.op_type, 1)
        if node.op_type not in operators or len(node.input) <= operand:
            continue
        name = node.input[operand]
        if name in seen or name not in known:
            continue
        seen.add(name)
        dims = known[name]
        if dims:
            bias = prod(known.get(node.input[2], (0,))) if len(node.input) > 2 else 0
            stack = prod(dims[:-2]) if node.op_type == "MatMul" else 1
            yield Weight(name, node, prod(dims), _rows(node, dims), bias, stack)


def activations(proto: ModelProto, operators: Set[str]) -> dict[str, int]:
    """The number of readers of every tensor that gets a pair of nodes beside these operators.

    Weights get none, nor integers, nor what only an activation function reads that the tool takes in.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    readers: dict[str, list[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    inside = {name for name, kinds in readers.items() if set(kinds) <= _TAKEN_IN}
    without = stored | inside | _integers(proto)
    around = (n for n in proto.graph.node if n.op_type in operators)
    names = (name for node in around for name in (*node.input, *node.output) if name not in without)
    return {name: len(readers.get(name, ())) for name in dict.fromkeys(names) if name}


def _integers(proto: ModelProto) -> set[str]:
    """The tensors that hold shapes and other whole numbers, as far as the nodes before them tell."""
    found = {t.name for t in proto.graph.initializer if t.data_type in _WHOLE}
    found |= {v.name for v in proto.graph.input if v.type.tensor_type.elem_type in _WHOLE}
    for node in proto.graph.node:
        tensors = [each.t for each in node.attribute if each.name == "value"]
        given = [t.data_type for t in tensors] + [a.i for a in node.attribute if a.name == "to"]
        if node.op_type in ("Constant", "ConstantOfShape", "Cast"):
            is_whole = any(kind in _WHOLE for kind in given)
        else:
            is_whole = node.op_type == "Shape" or (len(node.input) > 0 and node.input[0] in found)
        found.update(node.output if is_whole else ())
    return found


def floats(proto: ModelProto) -> int:
    """Number of elements of the constant float32 tensors of the main graph."""
    return sum(prod(dims) for dims in _floats(proto).values())


def _floats(proto: ModelProto) -> dict[str, tuple[int, ...]]:
    """The shapes of the constant float32 tensors of the main graph, by name."""
    found = {t.name: tuple(t.dims) for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT}
    for node in proto.graph.node:
        if node.op_type == "Constant":
            values = [each.t for each in node.attribute if each.name == "value"]
            found.update((node.output[0], tuple(t.dims)) for t in values if t.data_type == TensorProto.FLOAT)
    return found


def _rows(node: NodeProto, dims: tuple[int, ...]) -> int:
    """The output features of a weight."""
    if node.op_type == "Gemm" and any(each.name == _TRANSPOSED and each.i for each in node.attribute):
        return dims[0]
    return dims[-1] if node.op_type in ("MatMul", "Gemm", "Gather") else dims[0]
