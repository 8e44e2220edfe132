"""The limits of ids: the sizes of the embedding tables in which integer inputs select entries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

# Operators that hand on the ids of their first input and change only its type or shape.
_HANDS_ON = frozenset(("Cast", "Concat", "Expand", "Flatten", "Identity", "Pad", "Reshape", "Slice"))
_HANDS_ON |= frozenset(("Split", "Squeeze", "Transpose", "Unsqueeze"))
# Operators whose output has the shape of their first input, so the length of a table stays the same.
_KEEPS_SHAPE = frozenset(("Cast", "DequantizeLinear", "Identity"))
# The inputs of operators that look entries up: the table and the ids.
_LOOKS_UP = {"Gather": ((0, 1),), "EmbedLayerNormalization": ((2, 0), (4, 1), (3, 8))}


@dataclass(slots=True)
class _Names:
    """The tensors visible in one scope: the graph inputs whose ids reach them, and their dims."""

    ids: dict[str, frozenset[str]] = field(default_factory=dict)
    dims: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def copy(self) -> _Names:
        return _Names(dict(self.ids), dict(self.dims))


class _Walk:
    def __init__(self, functions: Iterable[FunctionProto]) -> None:
        self.functions: Mapping[tuple[str, str], FunctionProto] = {(f.domain, f.name): f for f in functions}
        self.limits: dict[str, int] = {}

    def graph(self, graph: GraphProto, names: _Names) -> None:
        names.dims.update((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
        for node in graph.node:
            self.node(node, names)

    def node(self, node: NodeProto, names: _Names) -> None:
        function = self.functions.get((node.domain, node.op_type))
        if function is not None:
            self.call(function, node, names)
            return
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                self.graph(graph, names.copy())
            if node.op_type == "Constant" and attribute.name == "value":
                names.dims[node.output[0]] = tuple(attribute.t.dims)
        first = node.input[0] if node.input else ""
        if node.op_type in _KEEPS_SHAPE and first in names.dims:
            names.dims[node.output[0]] = names.dims[first]
        if node.op_type in _HANDS_ON:
            sources = node.input if node.op_type == "Concat" else [first]
            reaching = frozenset().union(*(names.ids.get(name, frozenset()) for name in sources))
            names.ids.update((output, reaching) for output in node.output if reaching)
        for table, ids in _LOOKS_UP.get(node.op_type, ()):
            if max(table, ids) < len(node.input):
                self.look_up(node, node.input[table], node.input[ids], names)

    def look_up(self, node: NodeProto, entries: str, selected: str, names: _Names) -> None:
        """Record the limit that a table sets for the inputs whose ids select its entries."""
        table, indices = names.dims.get(entries), names.ids.get(selected, frozenset())
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if table and -len(table) <= axis < len(table):
            for name in indices:
                self.limits[name] = max(1, min(table[axis], self.limits.get(name, table[axis])))

    def call(self, function: FunctionProto, node: NodeProto, names: _Names) -> None:
        """Walk a function's body with the caller's tensors bound to its parameters."""
        inner = _Names()
        for parameter, argument in zip(function.input, node.input, strict=False):
            if argument in names.ids:
                inner.ids[parameter] = names.ids[argument]
            if argument in names.dims:
                inner.dims[parameter] = names.dims[argument]
        for body in function.node:
            self.node(body, inner)
        for result, output in zip(function.output, node.output, strict=False):
            if result in inner.ids:
                names.ids[output] = inner.ids[result]


def id_limits(proto: ModelProto) -> dict[str, int]:
    """For each graph input whose values select entries of a constant table: the number of entries.

    If an input selects from several constants, the smallest number counts.
    """
    names = _Names(ids={value.name: frozenset((value.name,)) for value in proto.graph.input})
    walk = _Walk(proto.functions)
    walk.graph(proto.graph, names)
    return walk.limits
