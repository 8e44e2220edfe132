"""The strategy of whole models: an input, blocks one after the other, outputs, and other names."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from .blocks import square, weighted
from .drafts import Draft, Value
from .naming import namings
from .wrapping import around

OLDEST = 7
NEWEST = onnx.defs.onnx_opset_version()
_IR_OF_FUNCTIONS = 8
_BFLOAT16 = 13
"""The first version in which matrices and convolutions, of opset 22, have this type."""


@st.composite
def models(draw: st.DrawFn, longest: int = 4) -> ModelProto:
    """A valid model with one weight or more.

    Args:
        draw: Draws from a strategy.
        longest: The largest number of steps.
    """
    kind = draw(st.sampled_from([*["float"] * 6, "double", "float16", "bfloat16"]))
    opset = draw(st.integers(OLDEST if kind != "bfloat16" else 22, NEWEST))
    d = Draft(draw, kind, opset, ir=draw(st.integers(3, onnx.IR_VERSION)))
    x = _entry(d)
    steps = d.size(1, longest)
    at = d.size(0, steps - 1)  # A block with a weight stands there, at least.
    for index in range(steps):
        blocks = weighted(d, x)
        if index != at and d.pick(False, True):
            blocks = around(d, x)
        y = d.pick(*blocks)(d, x)
        if index < steps - 1 and y != x and d.rarely(8):
            d.outputs.append(d.value_info(y))
        x = y
    _leave(d, x)
    proto = d.model()
    for index, node in enumerate(proto.graph.node):
        if d.rarely(12):
            node.doc_string = f"node {index}"
    return draw(namings())(proto)


@st.composite
def siblings(draw: st.DrawFn) -> ModelProto:
    """A model of layers that read one tensor, and whose results may be added; its input is open."""
    d = Draft(draw, "float", draw(st.integers(13, NEWEST)), ir=draw(st.integers(8, onnx.IR_VERSION)))
    shape = (2, d.size(4, 10), *d.pick((), (5,), (4, 5)))
    x = Value(d.input("x", d.number, ["N", *shape[1:]]), shape, is_open=True)
    parts = [square(d, x) for _ in range(d.size(2, 3))]
    if d.pick(False, True):
        parts = [Value(d.node("Tanh", [part.name]), part.shape, part.is_open) for part in parts]
    name = d.node("Sum", [part.name for part in parts])
    d.outputs.append(d.value_info(Value(name, shape, is_open=True)))
    return d.model()


def _entry(d: Draft) -> Value:
    """The input: numbers, in a sequence or an optional too, or ids that a table is looked up with."""
    is_open = d.pick(False, True)
    if d.rarely(5):
        return _looked_up(d, is_open)
    rank = d.pick(2, 3, 4, 4, 5, 1)
    shape = (2, d.size(3, 16), *(d.size(1, 8) for _ in range(2, rank)))[:rank]
    shape = (d.size(4, 16),) if rank == 1 else shape
    is_open = is_open and rank > 1
    given = Value("x", shape, is_open)
    kind = d.pick("tensor", "tensor", "tensor", "tensor", "sequence", "optional")
    if kind == "sequence" and d.opset >= 11 and d.kind != "bfloat16":
        d.inputs.append(helper.make_tensor_sequence_value_info("x", d.number, [given.batch, *shape[1:]]))
        return Value(d.node("SequenceAt", ["x", d.keep(np.int64(0))]), shape, is_open)
    if kind == "optional" and d.opset >= 15 and d.kind in ("float", "double"):
        tensor = helper.make_tensor_type_proto(d.number, [given.batch, *shape[1:]])
        d.inputs.append(helper.make_value_info("x", helper.make_optional_type_proto(tensor)))
        return Value(d.node("OptionalGetElement", ["x"]), shape, is_open)
    d.input("x", d.number, [given.batch, *shape[1:]])
    return given


def _looked_up(d: Draft, is_open: bool) -> Value:
    """The rows of a table, or ONNX Runtime's own sum of several tables."""
    words, width = d.size(4, 24), d.size(3, 12)
    if d.kind == "float" and d.opset >= 10 and d.pick(False, True):
        ids = d.input("x", TensorProto.INT32, ["N" if is_open else 2, 3])
        tables = [d.weight(words, width), d.weight(4, width)]
        scales = [d.small(width, least=0.5), d.small(width)]
        operands = [_limited(d, ids, words), "", *tables, "", *scales]
        name, _ = d.node("EmbedLayerNormalization", operands, 2, domain="com.microsoft")
        return Value(name, (2, 3, width), is_open)
    shape = (2, *(d.size(1, 3) for _ in range(d.size(0, 1))))
    ids = d.input("x", d.pick(TensorProto.INT64, TensorProto.INT32), ["N" if is_open else 2, *shape[1:]])
    name = d.node("Gather", [d.weight(words, width), _limited(d, ids, words)], axis=0)
    return Value(name, (*shape, width), is_open)


def _limited(d: Draft, ids: str, words: int) -> str:
    """Ids that are rows of the table, whatever the input is."""
    kind = helper.tensor_dtype_to_np_dtype(d.inputs[0].type.tensor_type.elem_type)
    return d.node("Mod", [ids, d.keep(np.asarray(words, kind))]) if d.opset >= 10 else ids


def _leave(d: Draft, x: Value) -> None:
    """Return the last value, perhaps in a sequence."""
    if d.opset >= 11 and d.kind != "bfloat16" and d.rarely(10):
        name = d.node("SequenceConstruct", [x.name, x.name])
        d.outputs.append(helper.make_tensor_sequence_value_info(name, d.number, [x.batch, *x.shape[1:]]))
        return
    d.outputs.append(d.value_info(x))
