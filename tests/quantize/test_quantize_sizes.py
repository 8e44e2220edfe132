"""The bytes that are predicted are never too few, and hardly too many."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_lowrank.quantize.ends import finish, lifted
from onnx_lowrank.quantize.fp16 import Half
from onnx_lowrank.quantize.int4 import Packed
from onnx_lowrank.quantize.int8 import Dynamic, Static
from tiny import DIGITS, built, decaying

CHAIN = """
<ir_version: 8, opset_import: ["": 17]>
chain (float[N, 200] x) => (float[N, 300] y) { a = MatMul (x, v) b = Add (a, c) y = MatMul (b, w) }
"""


def chain():
    arrays = {"v": decaying(1, 200, 64), "c": np.ones(64, np.float32), "w": decaying(2, 64, 300)}
    return built(CHAIN, arrays)


STACK = """
<ir_version: 8, opset_import: ["": 17]>
stack (float[4, N, 50] x) => (float[4, N, 300] y) { a = MatMul (x, v) y = MatMul (a, w) }
"""


def stack():
    return built(STACK, {"v": decaying(1, 200, 64).reshape(4, 50, 64), "w": decaying(2, 64, 300)})


@pytest.mark.parametrize(
    ("proto", "method", "most"),
    [
        (lambda: onnx.load(DIGITS), Static(), 1.08),
        (lambda: onnx.load(DIGITS), Dynamic("", is_signed=False), 1.15),
        (lambda: onnx.load(DIGITS), Half(), 1.02),
        (chain, Dynamic("", is_signed=True), 1.05),
        (chain, Packed(), 1.02),
        (stack, Dynamic("", is_signed=True), 1.05),
        (stack, Packed(), 1.02),
        (chain, Half(), 1.02),
    ],
    ids=["static", "dynamic", "half", "matrices", "packed", "stack", "packed stack", "half matrices"],
)
def test_an_upper_bound_on_the_bytes(proto, method, most, tmp_path):
    before = lifted(proto())
    onnx.save(before, tmp_path / "in.onnx")
    shape = [d.dim_value or 2 for d in before.graph.input[0].type.tensor_type.shape.dim]
    feeds = [{before.graph.input[0].name: np.ones(shape, np.float32)}]
    method.write(tmp_path / "in.onnx", tmp_path / "out.onnx", feeds, is_large=False)
    made = onnx.load(tmp_path / "out.onnx")
    finish(made, before, method.kind, method.method)
    note = 20 + sum(each.ByteSize() for each in made.metadata_props)
    size, predicted = made.ByteSize() - note, before.ByteSize() - method.saved(before)
    assert size <= predicted <= most * size


def test_constants_become_initializers():
    text = CHAIN.replace("{ a", "{ c = Constant <value = float[64] {0}> () a")
    proto = onnx.parser.parse_model(text.replace("{0}", "{" + ", ".join(["1.0"] * 64) + "}"))
    made = lifted(proto)
    assert [node.op_type for node in made.graph.node] == ["MatMul", "Add", "MatMul"]
    assert [each.name for each in made.graph.initializer] == ["c"]
    assert len(proto.graph.node) == 4, "the input stays as it is"
