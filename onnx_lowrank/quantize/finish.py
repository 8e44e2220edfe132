"""The metadata of a quantized model."""

from __future__ import annotations

import json

from onnx import ModelProto

from onnx_lowrank.rewrite.notes import METADATA

_OWN = ("onnx.infer", "onnx.quant.pre_process")
"""Metadata by which ONNX Runtime's tools tell each other what they did."""


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
