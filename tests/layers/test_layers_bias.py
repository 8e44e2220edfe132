"""Which layers have a bias that can change, what it is, and what a new one changes in the model."""
# ruff: noqa: E501 - tables of models, one a line

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from onnx_lowrank.core.factors import Certificate, Factors
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.save import save
from onnx_lowrank.files.spilling import Spill
from onnx_lowrank.files.tensors import inline
from onnx_lowrank.graph.parameters import parameters
from onnx_lowrank.graph.walk import Place
from onnx_lowrank.layers.bias import Bias, bias
from onnx_lowrank.layers.find import read
from onnx_lowrank.rewrite.replace import Replacement, rewrite
from rewriting import (
    Found,
    assert_only_named_changes,
    constants,
    difference,
    draw,
    evaluate,
    feed_of,
    found,
    model,
    rewritten,
    run,
)

F = 6
C = np.random.default_rng(4).standard_normal(F).astype(np.float32)
"""The bias."""
IMAGE, ROWS, COLUMNS = "float[2,4,6,6] x", "float[5,8] x", "float[8,5] x"
KERNEL, RIGHT, LEFT = (F, 4, 3, 3), (8, F), (F, 8)
NORM = {
    "s": np.linspace(0.5, 1.5, F),
    "b": np.linspace(-1, 1, F),
    "m": np.linspace(0, 2, F),
    "v": np.linspace(0.5, 2, F),
}
BN = "y = BatchNormalization <epsilon = 0.25> (h, s, b, m, v)"


def normed(value: np.ndarray) -> np.ndarray:
    return NORM["s"] * (value - NORM["m"]) / np.sqrt(NORM["v"] + 0.25) + NORM["b"]


# inputs, nodes, weights, values, scale, index and operand of the node that adds it, its shape there
FOUND: dict[str, tuple[str, str, dict[str, Any], np.ndarray, float, int, int, tuple[int, ...]]] = {
    "conv": (IMAGE, "y = Conv (x, w, c)", {"w": KERNEL, "c": C}, C, 1, 0, 2, (F,)),
    "conv, groups": (IMAGE, "y = Conv <group = 2> (x, w, c)", {"w": (F, 2, 3, 3), "c": C}, C, 1, 0, 2, (F,)),
    "conv transposed": (IMAGE, "y = ConvTranspose <strides = [2,2]> (x, w, c)", {"w": (4, F, 3, 3), "c": C}, C, 1, 0, 2, (F,)),
    "conv transposed, groups": (IMAGE, "y = ConvTranspose <group = 2> (x, w, c)", {"w": (4, 3, 3, 3), "c": C}, C, 1, 0, 2, (F,)),
    "conv, one feature": (IMAGE, "y = Conv (x, w, c)", {"w": (1, 4, 3, 3), "c": C[:1]}, C[:1], 1, 0, 2, (1,)),
    "gemm": (ROWS, "y = Gemm (x, w, c)", {"w": RIGHT, "c": C}, C, 1, 0, 2, (F,)),
    "gemm, row": (ROWS, "y = Gemm (x, w, c)", {"w": RIGHT, "c": C[None]}, C, 1, 0, 2, (1, F)),
    "gemm, scaled": (ROWS, "y = Gemm <alpha = 0.5, beta = -2.0> (x, w, c)", {"w": RIGHT, "c": C}, -2.0 * C, 0.5, 0, 2, (F,)),
    "gemm, transposed": (COLUMNS, "y = Gemm <transA = 1, transB = 1> (x, w, c)", {"w": LEFT, "c": C}, C, 1, 0, 2, (F,)),
    "gemm, left": (COLUMNS, "y = Gemm <beta = 0.5> (w, x, c)", {"w": LEFT, "c": C[:, None]}, 0.5 * C, 1, 0, 2, (F, 1)),
    "gemm, as many rows as features": ("float[6,8] x", "y = Gemm (x, w, c)", {"w": RIGHT, "c": C[None]}, C, 1, 0, 2, (1, F)),
    "gemm, left, as many columns as features": ("float[8,6] x", "y = Gemm (w, x, c)", {"w": LEFT, "c": C[:, None]}, C, 1, 0, 2, (F, 1)),
    "matmul": (ROWS, "h = MatMul (x, w) y = Add (h, c)", {"w": RIGHT, "c": C}, C, 1, 1, 1, (F,)),
    "matmul, bias first": (ROWS, "h = MatMul (x, w) y = Add (c, h)", {"w": RIGHT, "c": C}, C, 1, 1, 0, (F,)),
    "matmul, more axes": (ROWS, "h = MatMul (x, w) y = Add (h, c)", {"w": RIGHT, "c": C[None, None]}, C, 1, 1, 1, (1, 1, F)),
    "matmul, left": (COLUMNS, "h = MatMul (w, x) y = Add (h, c)", {"w": LEFT, "c": C[:, None]}, C, 1, 1, 1, (F, 1)),
    "matmul, vector": ("float[8] x", "h = MatMul (w, x) y = Add (h, c)", {"w": LEFT, "c": C}, C, 1, 1, 1, (F,)),
    "matmul, other nodes between": (ROWS, "h = MatMul (x, w) r = Relu (x) y = Add (h, c) z = Neg (r)", {"w": RIGHT, "c": C}, C, 1, 2, 1, (F,)),
    "conv, norm": (IMAGE, f"h = Conv (x, w) {BN}", {"w": KERNEL}, normed(np.zeros(F)), 1, 0, 2, (F,)),
    "conv, bias, norm": (IMAGE, f"h = Conv (x, w, c) {BN}", {"w": KERNEL, "c": C}, normed(C), 1, 0, 2, (F,)),
    "conv, shared bias, norm": (IMAGE, f"h = Conv (x, w, c) {BN} z = Neg (c)", {"w": KERNEL, "c": C}, normed(C), 1, 0, 2, (F,)),
    "gemm, scaled, norm": (ROWS, f"h = Gemm <alpha = 0.5, beta = 2.0> (x, w, c) {BN}", {"w": RIGHT, "c": C[None]}, normed(2.0 * C), 0.5, 0, 2, (F,)),
    "gemm, scalar, norm": (ROWS, f"h = Gemm (x, w, c) {BN}", {"w": RIGHT, "c": C[0]}, normed(C[0]), 1, 0, 2, (F,)),
}  # fmt: skip


def built(inputs: str, nodes: str, weights: dict[str, Any], opset: int = 17, ir: int = 8) -> ModelProto:
    names = re.findall(r"\w+", nodes)
    norm = {name: value.astype(np.float32) for name, value in NORM.items() if name in names}
    extra = ", float[] z" if " z =" in nodes else ""
    return model(
        f"g ({inputs}) => (float[] y{extra}) {{ {nodes} }}", opset=opset, ir=ir, **{**norm, **weights}
    )


def bias_of(seen: Found) -> Bias | None:
    return bias(seen.model, seen.walk, seen.bindings[0])


def axis_of(nodes: str, y: np.ndarray) -> int:
    """The axis of the output features."""
    return 1 if "Conv" in nodes or BN in nodes else -2 if "(w, x" in nodes and y.ndim > 1 else -1


def plus(y: np.ndarray, change: np.ndarray, axis: int) -> np.ndarray:
    """Add one number per feature along an axis."""
    return y + np.moveaxis(change.reshape(-1, *[1] * (y.ndim - 1)), 0, axis)


def repointed(before: ModelProto, after: ModelProto, gone: set[str]) -> ModelProto:
    """The input model with its Adds reading what those of the output model read, without what has gone."""
    copy = ModelProto()
    copy.CopyFrom(before)
    adds = {node.output[0]: node for node in after.graph.node if node.op_type == "Add"}
    for node in copy.graph.node:
        if node.op_type == "Add":
            node.input[:] = adds[node.output[0]].input
    nodes = [node for node in copy.graph.node if not gone.issuperset(node.output)]
    kept = [tensor for tensor in copy.graph.initializer if tensor.name not in gone]
    inputs = [value for value in copy.graph.input if value.name not in gone]
    for field, entries in (
        (copy.graph.node, nodes),
        (copy.graph.initializer, kept),
        (copy.graph.input, inputs),
    ):
        del field[:]
        field.extend(entries)
    return copy


def check_rewrite(proto: ModelProto, nodes: str, *, gone: set[str], engine: Any = run) -> ModelProto:
    """Put a new bias in: the output moves by the difference, and nothing else changes."""
    data = proto.SerializeToString(deterministic=True)
    seen = found(proto)
    old = bias_of(seen)
    assert old is not None
    change = 3 * draw(np.random.default_rng(9), (seen.layer.f,), np.float64)
    result = rewritten(seen, biases={"w": old.values + change})
    new = result.model.proto
    onnx.checker.check_model(new, full_check=True)
    feed = feed_of(proto)
    y = engine(proto, feed)[0]
    names = {value.name for value in new.graph.input}
    outputs = engine(new, {name: value for name, value in feed.items() if name in names})
    expected = plus(y.astype(np.float64), change, axis_of(nodes, y))
    assert difference([expected], [y]) > 0.1
    assert difference([expected], outputs[:1]) < 1e-5
    if seen.layer.op == "MatMul":
        same = repointed(proto, new, gone - {"w"})
        assert_only_named_changes(same, new, [found(same).layer], result.chains)
    else:
        assert_only_named_changes(proto, new, [seen.layer], result.chains)
    tensors = {name for node in new.graph.node for name in (*node.input, *node.output)}
    assert gone.isdisjoint(tensors | names | {tensor.name for tensor in new.graph.initializer})
    assert proto.SerializeToString(deterministic=True) == data
    added = parameters(result.model) - parameters(seen.model)
    norm = seen.layer.batchnorm is not None
    assert added == factor_cost(seen) - seen.layer.size + norm * (F - seen.layer.freed)
    return new


def factor_cost(seen: Found) -> int:
    layer = seen.layer
    fold = layer.folds[0]
    encoder, decoder = fold.kernels(layer.kernel)
    k = layer.slices[0]
    return layer.full_rank(fold, k) * int(k * layer.f * np.prod(decoder) + layer.c * np.prod(encoder))


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    inputs, nodes, weights, values, scale, node, operand, shape = FOUND[name]
    old = bias_of(found(built(inputs, nodes, weights)))
    assert (old.place, old.operand, old.shape, old.scale) == (Place("", node), operand, shape, scale)
    assert old.values.dtype == np.float64
    np.testing.assert_allclose(old.values, values, rtol=1e-6)


@pytest.mark.parametrize(("opset", "ir"), [(7, 3), (9, 4), (13, 8), (22, 10)])
@pytest.mark.parametrize("name", FOUND)
def test_a_new_bias(name, opset, ir):
    inputs, nodes, weights, _, _, _, _, shape = FOUND[name]
    proto = built(inputs, nodes, weights, opset, max(ir, 4))
    proto.ir_version = ir
    if ir < 4:
        for tensor in proto.graph.initializer:
            proto.graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    shared = " z = Neg (c)" in nodes
    new = check_rewrite(proto, nodes, gone={"w"} if shared or "c" not in weights else {"w", "c"})
    stored = {tensor.name: tensor for tensor in new.graph.initializer}
    stored |= {n.output[0]: n.attribute[0].t for n in new.graph.node if n.op_type == "Constant"}
    (tensor,) = (tensor for tensor_name, tensor in stored.items() if tensor_name.endswith("_bias"))
    assert (tuple(tensor.dims), tensor.data_type) == (shape, TensorProto.FLOAT)


VIEWS = {
    "identity": ("d = Identity (c)", C, {"c", "d"}),
    "squeezed": ("d = Squeeze (c)", C[None], {"c", "d"}),
    "reshaped": ("d = Reshape (c, t)", C.reshape(2, 3), {"c", "d", "t"}),
    "transposed, flattened": ("a = Transpose (c) d = Reshape (a, t)", C.reshape(2, 3), {"a", "c", "d", "t"}),
    "cast from double": ("d = Cast <to = 1> (c)", C.astype(np.float64), {"c", "d"}),
    "cast from half": ("d = Cast <to = 1> (c)", C.astype(np.float16), {"c", "d"}),
    "two views": ("a = Identity (c) d = Unsqueeze (a, t)", C, {"a", "c", "d", "t"}),
    "constant": ("d = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]> ()", None, {"d"}),
}
HOLDERS = {
    "conv": (IMAGE, "y = Conv (x, w, d)", KERNEL),
    "gemm": (ROWS, "y = Gemm <alpha = 2.0, beta = 0.5> (x, w, d)", RIGHT),
    "matmul": (ROWS, "h = MatMul (x, w) y = Add (d, h)", RIGHT),
    "conv, norm": (IMAGE, f"h = Conv (x, w, d) {BN}", KERNEL),
}


def viewed_model(view: str, holder: str) -> tuple[ModelProto, str, set[str]] | None:
    views, value, gone = VIEWS[view]
    inputs, nodes, weight = HOLDERS[holder]
    weights: dict[str, Any] = {"w": weight}
    if value is not None:
        weights["c"] = value
    if "Reshape" in views:
        weights["t"] = np.array([F])
    if "Unsqueeze" in views:
        weights["t"] = np.array([0])
    return built(inputs, f"{views} {nodes}", weights), nodes, gone | {"w"}


@pytest.mark.parametrize("holder", [h for h in HOLDERS if "conv" not in h])
@pytest.mark.parametrize("view", VIEWS)
def test_a_bias_behind_views(view, holder):
    proto, nodes, gone = viewed_model(view, holder)
    check_rewrite(proto, nodes, gone=gone)


@pytest.mark.parametrize("holder", [h for h in HOLDERS if "conv" in h])
@pytest.mark.parametrize("view", [v for v in VIEWS if v != "two views"])
def test_a_convolution_s_bias_behind_views(view, holder):
    proto, nodes, gone = viewed_model(view, holder)
    check_rewrite(proto, nodes, gone=gone)


@pytest.mark.parametrize("view", VIEWS)
def test_values_behind_views(view):
    proto, _, _ = viewed_model(view, "gemm")
    value = VIEWS[view][1]
    expected = np.arange(1.0, 7.0) if value is None else value
    expected = expected.T if view.startswith("transposed") else expected
    np.testing.assert_allclose(bias_of(found(proto)).values, 0.5 * expected.ravel(), rtol=1e-6)


@pytest.mark.parametrize("stored", [np.float16, np.float64])
@pytest.mark.parametrize("holder", HOLDERS)
def test_the_new_bias_has_the_dtype_in_which_the_layer_computes(stored, holder):
    inputs, nodes, shape = HOLDERS[holder]
    weight = draw(np.random.default_rng(1), shape, stored)
    nodes = re.sub(r"\bw\b", "k", re.sub(r"\bd\b", "c", nodes))
    proto = built(inputs, f"k = Cast <to = 1> (w) {nodes}", {"w": weight, "c": C})
    seen = found(proto)
    new = rewritten(seen, biases={"w": bias_of(seen).values}).model.proto
    types = {tensor.name.rsplit("_", 1)[-1]: tensor.data_type for tensor in new.graph.initializer}
    assert types["bias"] == TensorProto.FLOAT
    assert types["encoder"] == types["decoder"] == helper.np_dtype_to_tensor_dtype(np.dtype(stored))
    assert difference(run(proto, feed_of(proto)), run(new, feed_of(proto))) < 1e-2


NONE = {
    "no bias": (IMAGE, "y = Conv (x, w)", {"w": KERNEL}),
    "gemm, no bias": (ROWS, "y = Gemm (x, w)", {"w": RIGHT}),
    "bias left out": (ROWS, 'y = Gemm (x, w, "")', {"w": RIGHT}),
    "computed": (IMAGE, "d = Relu (c) y = Conv (x, w, d)", {"w": KERNEL, "c": C}),
    "from an input": (f"{IMAGE}, float[6] c", "y = Conv (x, w, c)", {"w": KERNEL}),
    "full": (ROWS, "y = Gemm (x, w, c)", {"w": RIGHT, "c": (5, F)}),
    "column on the right": (ROWS, "y = Gemm (x, w, c)", {"w": RIGHT, "c": (5, 1)}),
    "column on the right, as many rows as features": ("float[6,8] x", "y = Gemm (x, w, c)", {"w": RIGHT, "c": C[:, None]}),
    "row on the left": (COLUMNS, "y = Gemm (w, x, c)", {"w": LEFT, "c": (5,)}),
    "row on the left, as many columns as features": ("float[8,6] x", "y = Gemm (w, x, c)", {"w": LEFT, "c": C}),
    "scalar": (ROWS, "y = Gemm (x, w, c)", {"w": RIGHT, "c": C[0]}),
    "scalar of one axis": (ROWS, "y = Gemm (x, w, c)", {"w": RIGHT, "c": C[:1]}),
    "beta 0": (ROWS, "y = Gemm <beta = 0.0> (x, w, c)", {"w": RIGHT, "c": C}),
    "not finite": (IMAGE, "y = Conv (x, w, c)", {"w": KERNEL, "c": np.where(C > 0, C, np.inf)}),
    "not finite, beta 0": (ROWS, "y = Gemm <beta = 0.0> (x, w, c)", {"w": RIGHT, "c": np.where(C > 0, C, np.inf)}),
    "cast beyond float": (ROWS, "d = Cast <to = 1> (c) y = Gemm <beta = 1e38> (x, w, d)", {"w": RIGHT, "c": 1e39 * C.astype(np.float64)}),
    "integers": (IMAGE, "d = Cast <to = 1> (c) y = Conv (x, w, d)", {"w": KERNEL, "c": np.arange(F)}),
    "quantized": (IMAGE, "d = DequantizeLinear (c, q) y = Conv (x, w, d)", {"w": KERNEL, "c": np.arange(F, dtype=np.int8), "q": C[0]}),
    "shared": (IMAGE, "y = Conv (x, w, c) z = Neg (c)", {"w": KERNEL, "c": C}),
    "shared behind a view": (IMAGE, "d = Identity (c) y = Conv (x, w, d) z = Neg (c)", {"w": KERNEL, "c": C}),
    "its view is shared": (IMAGE, "d = Identity (c) y = Conv (x, w, d) z = Neg (d)", {"w": KERNEL, "c": C}),
    "returned": (IMAGE, "y = Conv (x, w, c) z = Identity (c)", {"w": KERNEL, "c": C}),
    "two uses": (IMAGE, "y = Conv (x, w, c) z = Conv (x, w, d)", {"w": KERNEL, "c": C, "d": C}),
    "two uses of a bias": (IMAGE, "y = Conv (x, w, c) k = Relu (x) z = Conv (k, w, c)", {"w": KERNEL, "c": C}),
    "gather": ("int64[3] x", "h = Gather (w, x) y = Add (h, c)", {"w": (20, F), "c": C}),
    "no add": (ROWS, "y = MatMul (x, w)", {"w": RIGHT}),
    "relu between": (ROWS, "h = MatMul (x, w) k = Relu (h) y = Add (k, c)", {"w": RIGHT, "c": C}),
    "other readers": (ROWS, "h = MatMul (x, w) y = Add (h, c) z = Neg (h)", {"w": RIGHT, "c": C}),
    "returned result": (ROWS, "z = MatMul (x, w) y = Add (z, c)", {"w": RIGHT, "c": C}),
    "added to itself": (ROWS, "h = MatMul (x, w) y = Add (h, h)", {"w": RIGHT}),
    "added to another": (ROWS, "h = MatMul (x, w) k = Gemm (x, v) y = Add (h, k)", {"w": RIGHT, "v": RIGHT}),
    "subtracted": (ROWS, "h = MatMul (x, w) y = Sub (h, c)", {"w": RIGHT, "c": C}),
    "full addend": (ROWS, "h = MatMul (x, w) y = Add (h, c)", {"w": RIGHT, "c": (5, F)}),
    "addend along the rows": ("float[6,8] x", "h = MatMul (x, w) y = Add (h, c)", {"w": RIGHT, "c": C[:, None]}),
    "addend along the columns": ("float[8,6] x", "h = MatMul (w, x) y = Add (h, c)", {"w": LEFT, "c": C}),
    "addend with a batch": (ROWS, "h = MatMul (x, w) y = Add (h, c)", {"w": RIGHT, "c": (2, 1, F)}),
    "scalar addend": (ROWS, "h = MatMul (x, w) y = Add (h, c)", {"w": RIGHT, "c": C[0]}),
    "batched weight": ("float[2,5,8] x", "h = MatMul (x, w) y = Add (h, c)", {"w": (2, 8, 3), "c": (2, 1, 3)}),
    "batched weight, bias per column": ("float[2,5,8] x", "h = MatMul (x, w) y = Add (h, c)", {"w": (2, 8, 3), "c": (3,)}),
    "shared addend": (ROWS, "h = MatMul (x, w) y = Add (h, c) z = Neg (c)", {"w": RIGHT, "c": C}),
    "other domain": (ROWS, "h = MatMul (x, w) y = local.Add (h, c)", {"w": RIGHT, "c": C}),
    "in a branch": (ROWS, "h = MatMul (x, w) y = If (o) <then_branch = t () => (float[5,6] p) { p = Add (h, c) }, else_branch = e () => (float[5,6] q) { q = Constant <value = float[1,1] {1.0}> () }>", {"w": RIGHT, "c": C, "o": np.array(True)}),
}  # fmt: skip


def unchangeable(name: str) -> Found:
    inputs, nodes, weights = NONE[name]
    extra = ", float[] z" if re.search(r"\bz =", nodes) else ""
    header = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'
    proto = onnx.parser.parse_model(f"{header} g ({inputs}) => (float[] y{extra}) {{ {nodes} }}")
    proto.graph.initializer.extend(model("g () => () { }", **weights).graph.initializer)
    return found(proto, exclude=("v",))


@pytest.mark.parametrize("name", NONE)
def test_none(name):
    seen = unchangeable(name)
    assert [binding.layer.id for binding in seen.bindings] == ["w"]
    assert seen.layer.batchnorm is None
    assert bias_of(seen) is None
    with pytest.raises(InputError, match="'w' has no bias that can be changed"):
        rewritten(seen, biases={"w": np.ones(seen.layer.f)})


@pytest.mark.parametrize(
    ("held", "shape", "is_found"),
    [
        ((F, 1), None, False),
        ((F,), None, False),
        ((F, 1), (8, 5), True),
        ((F,), (8, 6), False),
        ((F,), (8,), True),
    ],
)
def test_a_weight_on_the_left_needs_a_known_rank(held, shape, is_found):
    proto = built("float x", "h = MatMul (w, x) y = Add (h, c)", {"w": LEFT, "c": C.reshape(held)})
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    assert (bias_of(found(proto, {} if shape is None else {"x": shape})) is not None) == is_found


@pytest.mark.parametrize(("opset", "is_found"), [(6, False), (7, True)])
def test_an_add_that_cannot_broadcast(opset, is_found):
    attribute = "<broadcast = 1>" if opset < 7 else ""
    proto = built(ROWS, f"h = MatMul (x, w) y = Add {attribute} (h, c)", {"w": RIGHT, "c": C}, opset)
    assert (bias_of(found(proto)) is not None) == is_found


def test_a_gemm_of_an_old_opset_keeps_the_shape_that_it_broadcasts():
    nodes = "y = Gemm <broadcast = 1> (x, w, c)"
    proto = built(ROWS, nodes, {"w": RIGHT, "c": C}, opset=6, ir=4)
    check_rewrite(proto, nodes, gone={"w", "c"}, engine=evaluate)  # the runtime knows no Gemm this old


def test_what_training_names_stays():
    proto = built(ROWS, "y = Gemm (x, w, c)", {"w": RIGHT, "c": C})
    proto.training_info.add().update_binding.add(key="c", value="c")
    assert bias_of(found(proto)) is None


# --- scopes and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["wc", "w", "c", ""])
@pytest.mark.parametrize("node", ["y = Gemm <beta = 2.0> (x, w, c)", "h = MatMul (x, w) y = Add (h, c)"])
def test_in_a_branch(node, inside):
    values = {tensor.name: tensor for tensor in model("g () => () { }", w=RIGHT, c=C).graph.initializer}
    other = "e () => (float[5,6] q) { q = Relu (u) }"
    proto = model(
        f"g (float[5,8] x, bool o) => (float[] r) {{ r = If (o) <then_branch = t () => (float[5,6] y) {{ {node} }}, else_branch = {other}> }}",
        u=(5, F),
        **{name: onnx.numpy_helper.to_array(values[name]) for name in "wc" if name not in inside},
    )
    branch = proto.graph.node[0].attribute[0].g
    branch.initializer.extend(values[name] for name in inside)
    seen = found(proto)
    old = bias_of(seen)
    change = 3 * draw(np.random.default_rng(9), (F,), np.float64)
    (name,) = seen.layers
    result = rewritten(seen, biases={name: old.values + change})
    new = result.model.proto
    onnx.checker.check_model(new, full_check=True)
    feed = feed_of(proto) | {"o": np.array(True)}
    assert difference([run(proto, feed)[0] + change], run(new, feed)) < 1e-5
    assert parameters(result.model) == parameters(seen.model) + factor_cost(seen) - seen.layer.size
    scopes = (new.graph, new.graph.node[0].attribute[0].g)
    assert all({"w", "c"}.isdisjoint(t.name for t in scope.initializer) for scope in scopes)


@pytest.mark.parametrize("node", ["y = Gemm <beta = 2.0> (a, w, c)", "h = MatMul (a, w) y = Add (h, c)"])
def test_in_a_function(node):
    function = f'<domain: "local", opset_import: ["" : 17]> Linear (a) => (y) {{ {node} }}'
    proto = model("g (float[5,8] x) => (float[5,6] y) { y = local.Linear (x) }", functions=function)
    constants(proto.functions[0], *model("g () => () { }", w=RIGHT, c=C).graph.initializer)
    seen = found(proto)
    change = 3 * draw(np.random.default_rng(9), (F,), np.float64)
    (name,) = seen.layers
    new = rewritten(seen, biases={name: bias_of(seen).values + change}).model.proto
    onnx.checker.check_model(new, full_check=True)
    feed = feed_of(proto)
    assert difference([run(proto, feed)[0] + change], run(new, feed)) < 1e-5


@pytest.mark.parametrize("node", ["y = Gemm (x, w, c)", "h = MatMul (x, w) y = Add (h, c)"])
def test_external_data(node, tmp_path):
    proto = built(ROWS, node, {"w": RIGHT, "c": C})
    path = tmp_path / "in.onnx"
    inlined = ModelProto.FromString(proto.SerializeToString())
    onnx.save(proto, path, save_as_external_data=True, location="data", size_threshold=0)
    seen = found(path)
    change = 3 * draw(np.random.default_rng(9), (F,), np.float64)
    with Spill() as spill:
        result = rewrite(
            seen.model, seen.walk, [replacement(seen, F, bias_of(seen).values + change)], spill.tensor
        )
        tensor = next(t for t in result.model.proto.graph.initializer if t.name.endswith("_bias"))
        assert tensor.data_location == TensorProto.EXTERNAL
        files = {**seen.model.files, **spill.files}
        save(type(result.model)(result.model.proto, "model", files, ""), tmp_path / "out.onnx")
    new = onnx.load(tmp_path / "out.onnx")
    feed = feed_of(inlined)
    assert difference([run(inlined, feed)[0] + change], run(new, feed)) < 1e-5


@pytest.mark.parametrize("shared", [False, True])
def test_bytes_that_another_tensor_shares_would_stay(shared, tmp_path):
    path = tmp_path / "in.onnx"
    proto = built(ROWS, "y = Gemm (x, w, c) z = Neg (d)", {"w": RIGHT, "c": C, "d": C})
    onnx.save(proto, path, save_as_external_data=True, location="data", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    by_name = {tensor.name: tensor for tensor in proto.graph.initializer}
    if shared:
        del by_name["d"].external_data[:]
        by_name["d"].external_data.extend(by_name["c"].external_data)
    path.write_bytes(proto.SerializeToString())
    assert (bias_of(found(path)) is None) == shared


# --- the correction -------------------------------------------------------------------------------


def replacement(seen: Found, j: int, new: np.ndarray | None) -> Replacement:
    """The layer's weight cut to rank j by a plain SVD of its encode matrix, k = 1."""
    (binding,) = seen.bindings
    weight = folded(seen)
    groups, f, c, *kernel = weight.shape
    u, s, vt = np.linalg.svd(weight.reshape(groups, f, -1), full_matrices=False)
    encoder = (s[:, :j, None] * vt[:, :j]).reshape(groups, 1, j, c, *kernel)
    decoder = u[:, :, :j].reshape(groups, f, 1, j, *[1] * len(kernel))
    dtype = read(seen.model, seen.walk, binding).dtype
    factors = Factors(Fold.ENCODE, encoder.astype(dtype), decoder.astype(dtype))
    return Replacement(binding, Option(Fold.ENCODE, 1, j), factors, Certificate((0.0,), (0.0,)), new)


def folded(seen: Found) -> np.ndarray:
    weight = read(seen.model, seen.walk, seen.bindings[0]).astype(np.float64)
    norm = seen.layer.batchnorm
    scale = np.ones(seen.layer.f) if norm is None else norm.scale
    return weight * scale.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))


MEANS = {
    "conv": ("double[4,8,3,3] x", "y = Conv (x, w, c)", (F, 8, 1, 1)),
    "conv, groups": ("double[4,8,3,3] x", "y = Conv <group = 2> (x, w, c)", (F, 4, 1, 1)),
    "conv, norm": ("double[4,8,3,3] x", f"h = Conv (x, w) {BN}", (F, 8, 1, 1)),
    "conv transposed, groups": ("double[4,8,3,3] x", "y = ConvTranspose <group = 2> (x, w, c)", (8, 3, 1, 1)),
    "gemm": ("double[5,8] x", "y = Gemm (x, w, c)", RIGHT),
    "gemm, scaled": ("double[5,8] x", "y = Gemm <alpha = 0.5, beta = 3.0> (x, w, c)", RIGHT),
    "gemm, scaled, norm": ("double[5,8] x", f"h = Gemm <alpha = 0.5, beta = 3.0> (x, w, c) {BN}", RIGHT),
    "gemm, left, scaled": ("double[8,5] x", "y = Gemm <alpha = -2.0> (w, x, c)", LEFT),
    "matmul": ("double[2,5,8] x", "h = MatMul (x, w) y = Add (h, c)", RIGHT),
    "matmul, left": ("double[2,8,5] x", "h = MatMul (w, x) y = Add (c, h)", LEFT),
}


@pytest.mark.parametrize("j", [1, 2])
@pytest.mark.parametrize("name", MEANS)
def test_the_correction_keeps_the_mean_of_the_output(name, j):
    """b' = b + α (W − Ŵ) E[x]."""
    inputs, nodes, shape = MEANS[name]
    rng = np.random.default_rng(6)
    left = "(w, x" in nodes
    weights = {"w": rng.standard_normal(shape)}
    if ", c)" in nodes or "(c," in nodes:
        weights["c"] = C.astype(np.float64).reshape((F, 1) if left else (F,))
    if BN in nodes:
        weights |= NORM
    proto = model(f"g ({inputs}) => (double[] y) {{ {nodes} }}", **weights)
    seen = found(proto)
    x = feed_of(proto)["x"] + 1
    channels = 1 if "Conv" in nodes else -2 if left else -1
    mean = np.moveaxis(x, channels, -1).reshape(-1, x.shape[channels]).mean(axis=0)
    groups, f, c = seen.layer.shape[:3]
    plain = replacement(seen, j, None)
    product = plain.factors.decoder.reshape(groups, f, j) @ plain.factors.encoder.reshape(groups, j, c)
    residual = folded(seen).reshape(product.shape) - product
    old = bias_of(seen)
    corrected = old.values + old.scale * np.einsum("gfc,gc->gf", residual, mean.reshape(groups, c)).ravel()

    def means(new: np.ndarray | None) -> np.ndarray:
        result = rewrite(seen.model, seen.walk, [replacement(seen, j, new)])
        return per_feature(evaluate(result.model.proto, {"x": x})[0])

    def per_feature(y: np.ndarray) -> np.ndarray:
        return np.moveaxis(y, channels, -1).reshape(-1, groups * f).mean(axis=0)

    expected = per_feature(evaluate(proto, {"x": x})[0])
    assert difference([expected], [means(None)]) > 0.01
    assert difference([expected], [means(corrected)]) < 1e-12


@pytest.mark.parametrize("value", [1e6, np.nan, -np.inf])
def test_a_new_bias_has_to_fit_its_dtype(value):
    proto = model(
        "g (float16[3,8] x) => (float16[3,6] y) { y = Gemm (x, w, c) }",
        w=np.ones(RIGHT, np.float16),
        c=C.astype(np.float16),
    )
    with pytest.raises(InputError, match="'w' is not finite in float16"):
        rewritten(found(proto), biases={"w": np.full(F, value)})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_stored_dtype_is_taken_as_it_is(dtype):
    seen = found(built(ROWS, "y = Gemm (x, w, c)", {"w": RIGHT, "c": C}))
    new = rewritten(seen, biases={"w": C.astype(dtype)}).model.proto
    tensor = next(t for t in new.graph.initializer if t.name.endswith("_bias"))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), C)
    assert tensor == inline(tensor.name, C)
