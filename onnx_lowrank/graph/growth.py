"""A bound on the values that ONNX shape inference propagates: short files can make it allocate any amount.

It keeps one entry for each element of a vector, known or not. A chain of Concats doubles a vector with every
node, and a ConstantOfShape makes one of any length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

_MOST = 1 << 23  # entries together; each takes some 50 bytes
_USUAL_RANK = 64

_Sizes = dict[str, int]


def propagates_little(inferred: ModelProto) -> bool:
    """Whether the values that shape inference propagates take little memory, in all calls of functions.

    Args:
        inferred: A model without large contents, with the shapes that follow without propagated values.

    Raises:
        RecursionError: A function calls itself.
    """
    functions = {(function.domain, function.name): function for function in inferred.functions}
    count = _Count(functions)
    count.graph(inferred.graph)
    return count.total <= _MOST


class _Count:
    """Adds up the entries of values, as long as there are not too many."""

    def __init__(self, functions: Mapping[tuple[str, str], FunctionProto]) -> None:
        self.total = 0
        self._functions = functions

    def graph(self, graph: GraphProto) -> None:
        """Count the values in a graph and in the bodies of its nodes."""
        values = (*graph.value_info, *graph.input, *graph.output)
        vectors = {value.name: _length(value) for value in values if value.type.tensor_type.HasField("shape")}
        known = {tensor.name: _elements(tensor) for tensor in graph.initializer}
        known |= {value.name: vectors.get(value.name, 0) for value in graph.input}
        self.nodes(graph.node, known, vectors)

    def nodes(self, nodes: Iterable[NodeProto], known: _Sizes, vectors: _Sizes) -> None:
        """Count the values of nodes in their order.

        Args:
            nodes: The nodes.
            known: The entries by name; those of the nodes' results are added.
            vectors: The length of every result of known rank, 0 for results that are no vectors.
        """
        for node in nodes:
            if self.total > _MOST:
                return
            function = self._functions.get((node.domain, node.op_type))
            held = [known.get(name, 0) for name in node.input]
            if function is None:
                made = dict.fromkeys(node.output, _made(node, held))
            else:
                inside = dict(zip(function.input, held, strict=False))
                self.nodes(function.node, inside, {})
                results = (inside.get(name, 0) for name in function.output)
                made = dict(zip(node.output, results, strict=False))
            known.update({name: vectors.get(name, size) for name, size in made.items()})
            self.total += sum(known[name] for name in made)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    self.graph(attribute.g)
                for graph in attribute.graphs:
                    self.graph(graph)


def _made(node: NodeProto, held: Sequence[int]) -> int:
    match node.op_type:
        case "Constant":
            return max(map(_literal, node.attribute), default=0)
        case "Shape":
            return _USUAL_RANK
        case "Concat":
            return sum(held)
    return max(held, default=0)


def _literal(attribute: AttributeProto) -> int:
    return _elements(attribute.t) if attribute.HasField("t") else len(attribute.ints)


def _elements(tensor: TensorProto) -> int:
    """The elements of a tensor that a light copy still holds."""
    has_contents = tensor.raw_data or tensor.int64_data or tensor.int32_data
    return prod(tensor.dims) if has_contents else 0


def _length(value: ValueInfoProto) -> int:
    """The length of a vector; 0 for tensors that are no vectors, and if it is unknown."""
    sizes = value.type.tensor_type.shape.dim
    return max(0, sizes[0].dim_value) if len(sizes) == 1 else 0
