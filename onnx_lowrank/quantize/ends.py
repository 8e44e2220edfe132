"""What a model needs before ONNX Runtime's tools, and what is taken out of it after them."""

from __future__ import annotations

import json

from onnx import ModelProto

from onnx_lowrank.rewrite.notes import METADATA

_OWN = ("onnx.infer", "onnx.quant.pre_process")
"""Metadata by which ONNX Runtime's tools tell each other what they did."""

_INITIALIZERS_ALONE = 4
"""The first IR version in which initializers need not be inputs."""


def lifted(proto: ModelProto) -> ModelProto:
    """A copy whose Constant tensors of the main graph are initializers: the tools read weights only there."""
    made = ModelProto()
    made.CopyFrom(proto)
    made.ir_version = max(made.ir_version, _INITIALIZERS_ALONE)
    graph = made.graph
    kept = []
    for node in graph.node:
        values = [each.t for each in node.attribute if each.name == "value" and not each.ref_attr_name]
        if node.op_type == "Constant" and values:
            values[0].name = node.output[0]
            graph.initializer.append(values[0])
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    return made


def finish(proto: ModelProto, before: ModelProto, kind: str, method: str) -> None:
    """Note the quantization in a model, in place; drop inferred shapes and the tools' notes to each other.

    Args:
        proto: The quantized model.
        before: The model before it.
        kind: The kind of quantization.
        method: Its method.
    """
    known = {value.name for value in before.graph.value_info}
    values = [value for value in proto.graph.value_info if value.name in known]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(values)
    kept = [entry for entry in proto.metadata_props if entry.key not in _OWN]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    proto.metadata_props.add(key=f"{METADATA}.then", value=json.dumps({"kind": kind, "method": method}))
