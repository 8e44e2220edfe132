"""What copies of a model need to compute the same as the model, although they return more of its tensors."""

from __future__ import annotations

from onnx import GraphProto

from onnx_lowrank.graph.walk import is_op


def without_dropout(graph: GraphProto) -> None:
    """Let every Dropout without a mask among its outputs pass its input on, in a graph and in its bodies.

    Exporters write models in training mode (PyTorch's dynamo does, with `training_mode` true). ONNX Runtime
    removes these nodes from the model all the same, but not where a copy returns their result: it would be
    random there.

    Args:
        graph: The graph of a copy; its nodes change in place.
    """
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                without_dropout(body)
        if is_op(node, ("Dropout",)) and not any(node.output[1:]):
            node.op_type = "Identity"
            del node.input[1:], node.output[1:], node.attribute[:]
