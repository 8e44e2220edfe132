"""Every scope of a model: the main graph, its subgraphs, its functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto


@dataclass(frozen=True, slots=True)
class Scope:
    """A graph or a function: its nodes can read each other's outputs by name.

    Attributes:
        path: The main graph has "". The graph in attribute A of node N of the scope P has "P/N.A", or
            "N.A" below the main graph; "#index" replaces an empty node name and follows a repeated one;
            in a list of graphs, A is "A[i]". A function has "domain:name", or "domain:name:overload".
        nodes: The repeated field of the nodes.
        graph: The graph, or None for a function.
        function: The function, or None for a graph.
        parent: The path of the scope around it, or None for the main graph and for functions.
        node: The index of the node in the parent that holds this graph; None if there is no parent.
        attribute: The name of the attribute that holds this graph; "" if there is no parent.
    """

    path: str
    nodes: Sequence[NodeProto]
    graph: GraphProto | None
    function: FunctionProto | None
    parent: str | None
    node: int | None = None
    attribute: str = ""


def scopes(proto: onnx.ModelProto) -> Iterator[Scope]:
    """Every scope: the main graph, its subgraphs in the order of their nodes, then the functions."""
    taken: set[str] = set()
    yield from _below(Scope("", proto.graph.node, proto.graph, None, None), taken)
    for function in proto.functions:
        path = f"{function.domain}:{function.name}" + f":{function.overload}" * bool(function.overload)
        yield from _below(Scope(_free(path, "", 0, taken), function.node, None, function, None), taken)


def reads(node: NodeProto) -> Iterator[str]:
    """The names that a node and its bodies read; those that a body makes itself are among them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from reads(inner)
            yield from (output.name for output in graph.output)


def _below(scope: Scope, taken: set[str]) -> Iterator[Scope]:
    yield scope
    for index, node in enumerate(scope.nodes):
        label = f"{scope.path}/" * bool(scope.path) + (node.name or f"#{index}")
        for attribute in node.attribute:
            for suffix, graph in _graphs(attribute):
                path = _free(label, f".{attribute.name}{suffix}", index, taken)
                yield from _below(
                    Scope(path, graph.node, graph, None, scope.path, index, attribute.name), taken
                )


def _graphs(attribute: AttributeProto) -> Iterator[tuple[str, GraphProto]]:
    if attribute.HasField("g"):
        yield "", attribute.g
    for i, graph in enumerate(attribute.graphs):
        yield f"[{i}]", graph


def _free(label: str, suffix: str, index: int, taken: set[str]) -> str:
    while label + suffix in taken:
        label += f"#{index}"
    taken.add(label + suffix)
    return label + suffix
