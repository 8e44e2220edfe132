"""Producers and consumers across all scopes of a model, walked on a graphsurgeon skeleton.

graphsurgeon loses or rejects parts of a real model when it imports the whole model, so it gets a skeleton:
node types, edges and graph attributes, nothing else. The skeleton keeps the order of the nodes, and
prefixes the name of a tensor with the number of the scope that defines it. Order and prefix lead back to
the protos, even where a subgraph shadows an outer name.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.regions import Region
from onnx_lowrank.files.tensors import is_external, region, tensors
from onnx_lowrank.graph.scopes import Scope, scopes

_SEPARATOR = ":"
_DRAWN = frozenset({"RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"})


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """The position of a node: the path of its scope and its index there."""

    scope: str
    node: int


class Walk:
    """The nodes of a model in all scopes, with the producer and the consumers of every tensor.

    Attributes:
        scopes: Every scope by its path, in the model's order, each after the scope that holds it.
        opsets: The version of the default domain in every scope.
        initializers: Every initializer, by (scope, name).
    """

    def __init__(self, proto: ModelProto) -> None:
        """Index a model; the proto must not change while the walk is in use."""
        self.scopes: dict[str, Scope] = {scope.path: scope for scope in scopes(proto)}
        self.opsets: dict[str, int] = {}
        self.initializers = {
            (path, tensor.name): tensor
            for path, scope in self.scopes.items()
            if scope.graph is not None
            for tensor in scope.graph.initializer
        }
        self._functions = {(function.domain, function.name) for function in proto.functions}
        self._regions: Counter[Region] | None = None
        self._fixed: set[int] | None = None
        self._paths = list(self.scopes)
        self._numbers = {path: number for number, path in enumerate(self._paths)}
        self._nodes: dict[Place, Any] = {}
        self._places: dict[int, Place] = {}
        self._outputs: set[tuple[str, str]] = set()
        self._bodies = {id(scope.graph or scope.function): path for path, scope in self.scopes.items()}
        for name in self.names():
            if not isinstance(name, str):  # what protobuf gives for other bytes
                raise InputError(f"The model has the name {name!r}, which is no UTF-8 text: export it again.")
        self._add_root("", proto.graph, _opset(proto))
        for function in proto.functions:
            self._add_root(self._bodies[id(function)], function, _opset(function))
        for training in proto.training_info:
            bound = (*training.initialization_binding, *training.update_binding)
            self._outputs.update(("", entry.key) for entry in bound)
            # An algorithm reads the main graph's tensors by their names.
            nodes = (*training.initialization.node, *training.algorithm.node)
            self._outputs.update(("", name) for node in nodes for name in node.input)

    def readers_of_bytes(self, model: Model, tensor: TensorProto) -> int:
        """The number of tensors in the model that refer to the bytes of an external tensor."""
        if self._regions is None:  # counted once: a walk over all tensors per question is quadratic
            external = (other for other in tensors(model.proto) if is_external(other))
            self._regions = Counter(region(other, model.files, model.name) for other in external)
        return self._regions[region(tensor, model.files, model.name)]

    def calls_function(self, node: NodeProto) -> bool:
        """Whether a node calls one of the model's own functions."""
        return (node.domain, node.op_type) in self._functions

    def _add_root(self, path: str, body: GraphProto | FunctionProto, opset: int) -> None:
        skeleton = onnx.helper.make_model(self._skeleton(path, body, ChainMap()))
        self._index(path, gs.import_onnx(skeleton), opset)

    def _skeleton(self, path: str, body: GraphProto | FunctionProto, outer: ChainMap[str, str]) -> GraphProto:
        """Copy a body's structure, with every tensor named by the scope that defines it."""
        prefix = f"{self._numbers[path]}{_SEPARATOR}"
        # Not a copy of the outer names: a model may have thousands of bodies.
        names = outer.new_child({name: prefix + name for name in _defined(body)} | {"": ""})
        skeleton = GraphProto(name=path or "main")
        if isinstance(body, GraphProto):
            for tensor in body.initializer:
                skeleton.initializer.add(name=names[tensor.name], data_type=onnx.TensorProto.FLOAT)
            for sparse in body.sparse_initializer:
                skeleton.initializer.add(name=names[sparse.values.name], data_type=onnx.TensorProto.FLOAT)
        for value in body.input:
            skeleton.input.add(name=names[value if isinstance(value, str) else value.name])
        for value in body.output:
            name = value if isinstance(value, str) else value.name
            if name:
                self._outputs.add(self._origin(names.get(name, prefix + name)))
        for node in body.node:
            copy = skeleton.node.add(op_type=node.op_type, domain=node.domain, name=node.name)
            copy.input.extend(names.get(name, prefix + name) for name in node.input)
            copy.output.extend(names[name] for name in node.output)
            # One attribute per body: graphsurgeon does not read lists of graphs.
            for index, subgraph in enumerate(_bodies(node)):
                inner = self._skeleton(self._bodies[id(subgraph)], subgraph, names)
                copy.attribute.add(name=str(index), type=AttributeProto.GRAPH, g=inner)
        return skeleton

    def _index(self, path: str, graph: Any, opset: int) -> None:
        self.opsets[path] = opset
        for index, (node, proto) in enumerate(zip(graph.nodes, self.scopes[path].nodes, strict=True)):
            place = Place(path, index)
            self._nodes[place] = node
            self._places[id(node)] = place
            for body, imported in zip(_bodies(proto), node.attrs.values(), strict=True):
                self._index(self._bodies[id(body)], imported, opset)

    def places(self) -> Iterator[Place]:
        """All nodes in the model's order; the nodes of a body follow the node that holds it."""
        return iter(self._nodes)

    def node(self, place: Place) -> NodeProto:
        """The proto of a node."""
        return self.scopes[place.scope].nodes[place.node]

    def operand(self, place: Place, index: int) -> Any | None:
        """The tensor that a node reads as its input number `index`; None if it is left out."""
        inputs = self._nodes[place].inputs
        return inputs[index] if index < len(inputs) and inputs[index].name else None

    def result(self, place: Place) -> Any | None:
        """The tensor that a node computes as its first output; None if it is left out."""
        outputs = self._nodes[place].outputs
        return outputs[0] if outputs and outputs[0].name else None

    def read_outputs(self, place: Place) -> frozenset[str]:
        """The names of a node's outputs that a node reads or a graph returns."""
        pairs = zip(self.node(place).output, self._nodes[place].outputs, strict=True)
        return frozenset(
            name for name, tensor in pairs if name and (tensor.outputs or self.is_output(tensor))
        )

    def producer(self, tensor: Any) -> Place | None:
        """The node that computes a tensor; None for inputs and initializers."""
        return self._places[id(tensor.inputs[0])] if tensor.inputs else None

    def consumers(self, tensor: Any) -> list[tuple[Place, int]]:
        """Every (node, operand index) that reads a tensor, sorted."""
        # Each node once: graphsurgeon lists a node once per operand that reads the tensor.
        nodes = {id(node): node for node in tensor.outputs}.values()
        return sorted(
            (self._places[id(node)], index)
            for node in nodes
            for index, operand in enumerate(node.inputs)
            if operand is tensor
        )

    def is_output(self, tensor: Any) -> bool:
        """Whether a graph or function returns the tensor, or the model's training information names it."""
        return self.origin(tensor) in self._outputs

    def is_argument(self, tensor: Any) -> bool:
        """Whether a tensor is an input of a function, so that the function's caller passes it."""
        scope, name = self.origin(tensor)
        function = self.scopes[scope].function
        return function is not None and name in function.input

    def is_fixed(self, tensor: Any) -> bool:
        """Whether a tensor is a constant, or is computed from constants alone."""
        if self._fixed is None:  # One pass over the model: a search behind every tensor is quadratic.
            self._fixed = set()
            for place, node in self._nodes.items():
                if self._gives_constants(place):
                    self._fixed.update(map(id, node.outputs))
        return id(tensor) in self._fixed or self.origin(tensor) in self.initializers

    def _gives_constants(self, place: Place) -> bool:
        """Whether a node computes the same in every run; nodes with bodies count as if they did not."""
        node, operands = self.node(place), [t for t in self._nodes[place].inputs if t.name]
        if not operands:
            return is_op(node, ("Constant",)) and not any(a.ref_attr_name for a in node.attribute)
        is_drawn = is_op(node, _DRAWN)
        return not is_drawn and not _bodies(node) and all(map(self.is_fixed, operands))

    def is_invariant(self, tensor: Any) -> bool:
        """Whether a tensor is a state of a Loop or Scan that its body returns as it is."""
        scope, name = self.origin(tensor)
        graph = self.scopes[scope].graph if scope else None
        names = () if graph is None else (value.name for value in graph.input)
        return self.producer(tensor) is None and self.is_output(tensor) and name in names

    def origin(self, tensor: Any) -> tuple[str, str]:
        """The scope that defines a tensor, and the tensor's name there."""
        return self._origin(tensor.name)

    def _origin(self, mangled: str) -> tuple[str, str]:
        number, name = mangled.split(_SEPARATOR, 1)
        return self._paths[int(number)], name

    def names(self) -> Iterator[str]:
        """Every name of a tensor, node or operator, in all scopes."""
        for scope in self.scopes.values():
            body: Any = scope.graph or scope.function
            for value in (*body.input, *body.output):
                yield value.name if scope.graph is not None else value
            yield from (value.name for value in body.value_info)
            if scope.graph is not None:
                yield from (t.name for t in scope.graph.initializer)
                yield from (t.values.name for t in scope.graph.sparse_initializer)
                yield from (note.tensor_name for note in scope.graph.quantization_annotation)
            for node in scope.nodes:
                yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
                yield from (attribute.name for attribute in node.attribute)


class FreeNames:
    """Makes names that are unused in a model."""

    def __init__(self, walk: Walk) -> None:
        """Collect all names of a model."""
        self._taken = set(walk.names())

    def unique(self, name: str) -> str:
        """Reserve the name, with a number behind it if it is taken, and return it."""
        candidate, n = name, 1
        while candidate in self._taken:
            n += 1
            candidate = f"{name}_{n}"
        self._taken.add(candidate)
        return candidate


def is_op(node: NodeProto, types: Container[str]) -> bool:
    """Whether a node is an operator of the default domain with one of these types."""
    return node.op_type in types and node.domain in ("", "ai.onnx")


def label(node: NodeProto) -> str:
    """The name of a node in reports; for a nameless node, the name of its first output."""
    return node.name or next((name for name in node.output if name), node.op_type)


def _bodies(node: NodeProto) -> list[GraphProto]:
    """The subgraphs of a node, in the order in which `scopes` finds them."""
    return [
        graph
        for attribute in node.attribute
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
    ]


def attribute_of(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or the default; strings are decoded.

    A reference to a function's attribute has no value of its own, so it yields the default. Layers never
    have such references: the first rule of `layers.find` skips them.

    Raises:
        InputError: The attribute has another type than the default.
    """
    for attribute in node.attribute:
        if attribute.name == name and not attribute.ref_attr_name:
            kind = AttributeProto.AttributeType.Name(attribute.type)
            value = None if kind == "UNDEFINED" else onnx.helper.get_attribute_value(attribute)
            value = value.decode(errors="replace") if isinstance(value, bytes) else value
            if value is None or (default is not None and type(value) is not type(default)):
                raise InputError(
                    f"The {node.op_type} node {node.name!r} has the attribute {name!r} of type {kind}, "
                    "which is wrong: export the model again."
                )
            return value
    return default


def attributes(node: NodeProto) -> tuple[bytes, ...]:
    """The attributes of a node, sorted, in a form that can be compared."""
    return tuple(sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute))


def _defined(body: GraphProto | FunctionProto) -> Iterator[str]:
    if isinstance(body, GraphProto):
        yield from (tensor.name for tensor in body.initializer)
        yield from (sparse.values.name for sparse in body.sparse_initializer)
        yield from (value.name for value in body.input)
    else:
        yield from body.input
    for node in body.node:
        yield from node.output


def _opset(owner: ModelProto | FunctionProto) -> int:
    return next((o.version for o in owner.opset_import if o.domain in ("", "ai.onnx")), 1)
