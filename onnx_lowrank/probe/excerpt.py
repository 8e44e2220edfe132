"""One layer on its own: a model of its node, and one of the chain that replaced it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import (
    make_graph,
    make_model,
    make_opsetid,
    make_tensor_value_info,
)

from onnx_lowrank.core.layer import Layer
from onnx_lowrank.files.arrays import MAX_BYTES
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import constant
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.operators import registry


def excerpts(
    original: Model, walk: Walk, rewritten: Model, new_walk: Walk, binding: Binding, chain: Sequence[str]
) -> tuple[ModelProto, ModelProto] | None:
    """Cut a layer's first use out of both models, with a folded BatchNorm and the same input and output.

    Args:
        original: The input model.
        walk: Its walk.
        rewritten: The compressed model.
        new_walk: Its walk.
        binding: The layer.
        chain: Names of the nodes of the chain that replaced its first use, in order.

    Returns:
        A model of the layer as it was, and one of its chain; None if the node does not run on its own.
    """
    layer, use = binding.layer, binding.layer.uses[0]
    node = walk.node(Place(use.scope, use.node))
    places = [Place(use.scope, use.node)]
    if layer.batchnorm is not None:
        places.append(Place(use.scope, layer.batchnorm.node))
    kind = binding.casts[0] or binding.stored.source.tensor.data_type
    entry = _entry(layer, node, kind)
    if entry is None:
        return None
    # By its output: the last node has the old node's name, which need not be unique.
    result = _result(walk.node(places[-1]))
    new_nodes = new_walk.scopes[use.scope].nodes
    names = {node.name: index for index, node in enumerate(new_nodes)}
    names[chain[-1]] = next(index for index, node in enumerate(new_nodes) if result in node.output)
    new_places = [Place(use.scope, names[name]) for name in chain]
    dense = _excerpt(original, walk, places, entry, kind)
    pair = _excerpt(rewritten, new_walk, new_places, entry, kind)
    return None if dense is None or pair is None else (dense, pair)


def _result(node: NodeProto) -> str:
    """The name of a node's first output that is not left out."""
    return next(name for name in node.output if name)


def _entry(layer: Layer, node: NodeProto, kind: int) -> ValueInfoProto | None:
    """The graph input for the layer's activation, in the shape of the smallest sample; None if it is huge."""
    sample = registry.family(node).sample(layer, layer.uses[0], node)
    if sample is None or prod(sample.shape) > MAX_BYTES:
        return None
    return make_tensor_value_info(node.input[sample.operand], sample.kind or kind, sample.shape)


def _excerpt(
    model: Model, walk: Walk, places: Sequence[Place], entry: ValueInfoProto, kind: int
) -> ModelProto | None:
    """A model of some nodes; None if they read another computed tensor (a bias, a state)."""
    nodes = [walk.node(place) for place in places]
    made = {name for node in nodes for name in node.output} | {entry.name, ""}
    constants: dict[str, TensorProto] = {}
    for place, node in zip(places, nodes, strict=True):
        for index, name in enumerate(node.input):
            if name in made or name in constants:
                continue
            value = constant(walk, model, walk.operand(place, index))
            if value is None:
                return None
            constants[name] = inline(name, value)
    result = make_tensor_value_info(_result(nodes[-1]), kind, None)
    graph = make_graph(nodes, "layer", [entry], [result], list(constants.values()))
    opset = make_opsetid("", walk.opsets[places[0].scope])
    return make_model(graph, opset_imports=[opset], ir_version=max(model.proto.ir_version, 4))
