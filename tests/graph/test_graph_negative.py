"""Sizes below 0, for which onnx's shape inference ends the process."""

import onnx
import onnx.parser
import pytest

from onnx_lowrank import compress
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.negative import infer_shapes

DIRECT = "a = Conv (x, w) y = Slice (a, s, end, axis)"
BEHIND = "p = Slice (x, s, end, axis) a = Conv (p, w) b = Relu (a) y = Slice (b, s, end, axis)"
TWICE = """a = Conv <pads = [1, 1, 1, 1]> (x, w) p = Slice (a, s, end, axis) f = Slice (p, s, one)
    q = MaxPool <kernel_shape = [3, 3]> (f) y = Slice (q, s, one, axis)"""
INSIDE = """y = If (c) <then_branch = t () => (float[A, B, C, D] u)
    { a = Conv (x, w) u = Slice (a, s, end, axis) },
    else_branch = f () => (float[A, B, C, D] v) { v = Identity (x) }>"""


def model(body: str, height: int, end: int) -> onnx.ModelProto:
    """A model whose Slices take so many rows of images of a height."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[1, 1, {height}, 8] x, float[2, 1, 3, 3] w, bool c) => (float[A, B, C, D] y)
    <int64[1] s = {{0}}, int64[1] one = {{1}}, int64[1] end = {{{end}}}, int64[1] axis = {{2}}>
    {{ {body} }}"""
    return onnx.parser.parse_model(text)


@pytest.mark.parametrize(
    ("body", "height", "end", "tensor"),
    [(DIRECT, 1, 1, "a"), (BEHIND, 8, 1, "b"), (TWICE, 8, 1, "q"), (INSIDE, 1, 1, "a")],
)
def test_the_tensor_is_named(body, height, end, tensor):
    proto = model(body, height, end)
    before = proto.SerializeToString()
    with pytest.raises(InputError, match=rf"'{tensor}' has a size of -1, as a window is larger"):
        infer_shapes(proto)
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("body", [DIRECT, BEHIND, TWICE, INSIDE])
def test_sound_sizes_are_those_of_onnx(body):
    proto = model(body, 8, 6)
    assert infer_shapes(proto) == onnx.shape_inference.infer_shapes(proto)


def test_a_run_says_so():
    with pytest.raises(InputError, match="pass larger inputs with --input-shape"):
        compress(model(DIRECT, 1, 1), 0.5)
