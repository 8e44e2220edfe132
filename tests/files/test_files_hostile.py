"""Broken models: every one is refused with an error of this package, or its broken part is left alone."""
# ruff: noqa: E501 - tables of models, one a line

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto

from onnx_lowrank.errors import InputError, LowRankError
from rewriting import found, model, rewritten

CONV = "g (float[1,4,6,6] x) => (float[] y) { y = Conv <pads = [1,1,1,1]> (x, w) }"


def conv(**attributes: object) -> ModelProto:
    proto = model(CONV, w=(6, 4, 3, 3))
    node = proto.graph.node[0]
    for name, value in attributes.items():
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
    return proto


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"group": 0}, "group 0"),
        ({"group": -2}, "group -2"),
        ({"group": 4}, "group 4"),
        ({"strides": [1, 1, 1]}, "strides"),
        ({"strides": [1]}, "strides"),
        ({"dilations": [1]}, "dilations"),
        ({"pads": [1, 1]}, "pads"),
        ({"kernel_shape": [3, 5]}, "kernel_shape"),
        ({"kernel_shape": [3]}, "kernel_shape"),
    ],
)
def test_attributes_that_do_not_fit_the_kernel(attributes, words):
    assert words in found(conv(**attributes)).reason


@pytest.mark.parametrize("name", ["strides", "dilations", "kernel_shape", "pads"])
def test_an_empty_attribute_stands_for_its_default(name):
    proto = conv()
    node = proto.graph.node[0]
    del node.attribute[:]
    node.attribute.add(name=name, type=AttributeProto.INTS)
    assert rewritten(found(proto)).chains["w"]


@pytest.mark.parametrize(
    "attributes",
    [{"group": 1.0}, {"group": "1"}, {"strides": 2}, {"pads": [1.0] * 4}, {"kernel_shape": "3x3"}],
)
def test_attributes_of_the_wrong_type(attributes):
    if attributes == {"pads": [1.0] * 4}:
        assert found(conv(**attributes)).bindings  # a list all the same; the checker refuses it
        return
    with pytest.raises(InputError, match=next(iter(attributes))):
        found(conv(**attributes))


def test_an_attribute_without_a_type():
    proto = conv()
    proto.graph.node[0].attribute.add(name="group", i=2)
    with pytest.raises(InputError, match="group"):
        found(proto)


@pytest.mark.parametrize("shape", [(6,), (6, 4), ()])
def test_a_kernel_without_spatial_axes(shape):
    proto = model("g (float[1,4,6] x) => (float[1,6,6] y) { y = Conv (x, w) }", w=np.ones(shape, np.float32))
    assert "does not fit" in found(proto).reason


@pytest.mark.parametrize("inputs", [(), ("x",), ("x", ""), ("", "w")])
@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul", "Gather", "ConvTranspose"])
def test_missing_inputs(op, inputs):
    proto = model(f"g (float[4,4] x) => (float[4,4] y) {{ y = {op} (x, w) }}", w=(4, 4))
    del proto.graph.node[0].input[:]
    proto.graph.node[0].input.extend(inputs)
    assert "lacks an input" in found(proto).reason


@pytest.mark.parametrize("outputs", [(), ("",)])
def test_missing_outputs(outputs):
    proto = model(
        "g (float[4,4] x) => (float[4,4] y) { v = Identity (w) z = MatMul (x, v) y = Relu (x) }", w=(4, 4)
    )
    for node in proto.graph.node[:2]:
        del node.output[:]
        node.output.extend(outputs)
    assert found(proto).bindings == ()


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Identity (b) b = Identity (a) y = MatMul (x, a)",
        "a = Transpose (a) y = MatMul (x, a)",
        "s = Reshape (w, s) y = MatMul (x, s)",
        "s = Reshape (s, s) y = MatMul (x, s)",
        "h = MatMul (y, w) y = MatMul (h, w)",
        "a = Identity (w) a = Identity (a) y = MatMul (x, a)",
    ],
)
def test_cycles(nodes):
    proto = model(f"g (float[4,4] x) => (float[4,4] y) {{ {nodes} }}", w=(4, 4))
    seen = found(proto)
    rewritten(seen)
    assert seen.bindings or seen.skipped


@pytest.mark.parametrize(
    "view",
    [
        "v = Reshape (w, s)",
        "v = Transpose <perm = [0, 2, 1]> (w)",
        "v = Transpose <perm = [0, 0]> (w)",
        "v = Squeeze (w, s)",
        "v = Unsqueeze (w, s)",
        "v = Flatten <axis = 7> (w)",
        "v = Reshape (w, x)",
    ],
)
@pytest.mark.parametrize("numbers", [(5, 5), (2**62, 4), (-1, -1), (-9, 3), (0, 0, 0), (0,) * 70])
def test_views_that_do_not_fit(view, numbers):
    proto = model(
        f"g (float[4,4] x) => (float[4,4] y) {{ {view} y = MatMul (x, v) }}",
        w=(4, 4),
        s=np.array(numbers, np.int64),
    )
    seen = found(proto)
    if seen.bindings:
        assert view.startswith("v = Flatten")
    else:
        assert "views" in seen.reason


def test_names_that_are_no_text():
    data = model(
        "g (float[4,4] x) => (float[4,4] y) { y = MatMul (x, wwww) }", wwww=(4, 4)
    ).SerializeToString()
    proto = ModelProto.FromString(data.replace(b"wwww", b"w\xff\xfew"))
    with pytest.raises(InputError, match="UTF-8"):
        found(proto)


def test_a_node_with_two_bodies_of_one_name():
    proto = model(
        """g (bool b, float[4,4] x) => (float[4,4] y) {
        y = If (b) <then_branch = t () => (float[4,4] p) { p = MatMul (x, w) },
                    else_branch = e () => (float[4,4] q) { q = MatMul (x, v) }> }""",
        w=(4, 4),
        v=(4, 4),
    )
    proto.graph.node[0].attribute[1].name = "then_branch"
    assert len(found(proto).bindings) + len(found(proto).skipped) == 2


def test_scope_and_tensor_names_with_odd_characters():
    proto = model("g (float[8,8] x) => (float[8,8] y) { y = MatMul (x, w) }", w=(8, 8))
    for text in ("a:b", "a\0b", "/", "0:", "é"):
        proto.graph.initializer[0].name = proto.graph.node[0].input[1] = proto.graph.node[0].name = text
        assert rewritten(found(proto)).chains.keys() == {text}


SEEDS = {
    "conv": (CONV.replace("y = Conv", "h = Conv").replace(" }", " y = BatchNormalization (h, s, s, s, s) }"), {"w": (6, 4, 3, 3), "s": np.ones(6, np.float32)}),
    "matrices": (
        """g (float[N,8] x, int64[N] i) => (float[] y) {
        t = Transpose (w) a = MatMul (x, t) b = Gemm <alpha = 0.5, transB = 1> (a, v, c) e = Gather (w, i) y = Add (b, e) }""",
        {"w": (8, 8), "v": (8, 8), "c": (8,)},
    ),
    "branches": (
        """g (bool b, float[4,8] x) => (float[] y) {
        y = If (b) <then_branch = t () => (float[4,8] p) { p = MatMul (x, w) },
                    else_branch = e () => (float[4,8] q) { k = Reshape (v, s) q = MatMul (x, k) }> }""",
        {"w": (8, 8), "v": (64,), "s": np.array([8, 8])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", SEEDS)
def test_only_errors_of_this_package_escape(name, seed):
    body, weights = SEEDS[name]
    data = model(body, **weights).SerializeToString()
    rng = np.random.default_rng([seed, len(name)])
    small = [i for i in range(len(data)) if i < 400 or i > len(data) - 300]
    for _ in range(12):
        broken = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.choice(small))
            match rng.integers(0, 3):
                case 0:
                    broken[at] ^= 1 << int(rng.integers(0, 8))
                case 1:
                    broken[at] = int(rng.integers(0, 256))
                case _:
                    del broken[at]
            small = [i for i in small if i < len(broken)]
        try:
            proto = ModelProto.FromString(bytes(broken))
        except Exception:  # noqa: S112 - it is no model at all
            continue
        try:
            seen = found(proto)
            rewritten(seen)
        except LowRankError as error:
            assert str(error)  # noqa: PT017
