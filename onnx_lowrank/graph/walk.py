"""Producers and consumers across all scopes of a model, walked on a graphsurgeon skeleton.

graphsurgeon loses or rejects much of a real model when it imports it whole, so it gets a skeleton:
node types, edges and graph attributes, nothing else. The skeleton's nodes stand in the model's
order, and its tensors are named by the scope that defines them, so both lead back to the protos
even where a subgraph shadows an outer name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from onnx_lowrank.graph.model import Scope, scopes

_SEPARATOR = "\0"


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A node: the path of its scope and its index there."""

    scope: str
    node: int


class Walk:
    """The nodes of a model in all scopes, with the producer and the consumers of every tensor.

    Attributes:
        scopes: Every scope by its path, in the model's order, each after the one that holds it.
        opsets: The version of the default domain in every scope.
        tensors: Every tensor that a node or an interface names, by (defining scope, name).
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
        self.tensors: dict[tuple[str, str], Any] = {}
        self._nodes: dict[Place, Any] = {}
        self._places: dict[int, Place] = {}
        self._outputs: set[int] = set()
        self._bodies = {
            id(scope.graph or scope.function): path for path, scope in self.scopes.items()
        }
        self._add_root("", proto.graph, _opset(proto))
        for function in proto.functions:
            self._add_root(self._bodies[id(function)], function, _opset(function))

    def _add_root(self, path: str, body: GraphProto | FunctionProto, opset: int) -> None:
        skeleton = onnx.helper.make_model(self._skeleton(path, body, {}))
        self._index(path, gs.import_onnx(skeleton), opset)

    def _skeleton(self, path: str, body: GraphProto | FunctionProto, outer: Mapping[str, str]) -> GraphProto:
        """Copy a body's structure, with every tensor named by the scope that defines it."""
        names = dict(outer) | {name: path + _SEPARATOR + name for name in _defined(body)}
        names[""] = ""
        skeleton = GraphProto(name=path or "main")
        if isinstance(body, GraphProto):
            for tensor in body.initializer:
                skeleton.initializer.add(name=names[tensor.name], data_type=onnx.TensorProto.FLOAT)
            for sparse in body.sparse_initializer:
                skeleton.initializer.add(name=names[sparse.values.name], data_type=onnx.TensorProto.FLOAT)
        for target, values in ((skeleton.input, body.input), (skeleton.output, body.output)):
            for value in values:
                name = value if isinstance(value, str) else value.name
                target.add(name=names.get(name, path + _SEPARATOR + name))
        for node in body.node:
            copy = skeleton.node.add(op_type=node.op_type, domain=node.domain, name=node.name)
            copy.input.extend(names.get(name, path + _SEPARATOR + name) for name in node.input)
            copy.output.extend(names[name] for name in node.output)
            for attribute in node.attribute:
                bodies = [self._skeleton(self._bodies[id(g)], g, names) for g in graphs(attribute)]
                if bodies:
                    # One attribute per body: graphsurgeon does not read lists of graphs.
                    for index, subgraph in enumerate(bodies):
                        copy.attribute.add(name=f"{attribute.name}{_SEPARATOR}{index}", type=5, g=subgraph)
        return skeleton

    def _index(self, path: str, graph: Any, opset: int) -> None:
        self.opsets[path] = opset
        self._outputs.update(id(tensor) for tensor in graph.outputs)
        tensors = [*graph.inputs, *graph.outputs]
        tensors += [tensor for node in graph.nodes for tensor in (*node.inputs, *node.outputs) if tensor.name]
        self.tensors |= {self.origin(tensor): tensor for tensor in tensors}
        for index, (node, proto) in enumerate(zip(graph.nodes, self.scopes[path].nodes, strict=True)):
            place = Place(path, index)
            self._nodes[place] = node
            self._places[id(node)] = place
            bodies = [g for attribute in proto.attribute for g in graphs(attribute)]
            for body, imported in zip(bodies, node.attrs.values(), strict=True):
                self._index(self._bodies[id(body)], imported, opset)

    def places(self) -> Iterator[Place]:
        """All nodes, scope by scope, in the model's order."""
        return iter(self._nodes)

    def node(self, place: Place) -> NodeProto:
        """The proto of a node."""
        return self.scopes[place.scope].nodes[place.node]

    def operand(self, place: Place, index: int) -> Any | None:
        """The tensor that a node reads as its input number `index`; None where it is left out."""
        inputs = self._nodes[place].inputs
        return inputs[index] if index < len(inputs) and inputs[index].name else None

    def result(self, place: Place, index: int = 0) -> Any:
        """The tensor that a node computes as its output number `index`."""
        return self._nodes[place].outputs[index]

    def producer(self, tensor: Any) -> Place | None:
        """The node that computes a tensor; None for inputs and initializers."""
        return self._places[id(tensor.inputs[0])] if tensor.inputs else None

    def consumers(self, tensor: Any) -> list[tuple[Place, int]]:
        """Every (node, operand index) that reads a tensor, in the model's order."""
        nodes = {id(node): node for node in tensor.outputs}.values()
        return sorted(
            (self._places[id(node)], index)
            for node in nodes
            for index, operand in enumerate(node.inputs)
            if operand is tensor
        )

    def is_output(self, tensor: Any) -> bool:
        """Whether a graph or function returns the tensor."""
        return id(tensor) in self._outputs

    @staticmethod
    def origin(tensor: Any) -> tuple[str, str]:
        """The scope that defines a tensor, and the tensor's name there."""
        scope, name = tensor.name.split(_SEPARATOR, 1)
        return scope, name


def graphs(attribute: AttributeProto) -> list[GraphProto]:
    """The subgraphs of an attribute."""
    return [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


def attribute_of(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or the default; strings are decoded.

    A reference to a function's attribute has no value of its own, so it yields the default;
    layers with such references are left alone before this is asked.
    """
    for attribute in node.attribute:
        if attribute.name == name and not attribute.ref_attr_name:
            value = onnx.helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return default


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
