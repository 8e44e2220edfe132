"""Models with sizes that overflow, and small ones that grow when they are read or run."""
# ruff: noqa: E501 - nodes as text, one model a line

from __future__ import annotations

import numpy as np
from attacking import ATTACKS, HUGE, attack, function_chain, matrices
from onnx import ModelProto, helper

from tiny import built, cnn, decaying

# --- sizes ------------------------------------------------------------------------------------------------


def with_dims(*dims: int) -> ModelProto:
    proto = matrices()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)
    return proto


for dims in (
    (HUGE, HUGE),
    (2**32, 2**32),
    (-16, -16),
    (-1, 16),
    (2**62, 4),
    (0, HUGE),
    (2**63 - 1, 0),
    (1,) * 65,
):
    ATTACKS[f"dims {dims[:4]}"] = lambda dims=dims: with_dims(*dims)


def with_size(size: int, place: str) -> ModelProto:
    proto = matrices()
    values = {"input": proto.graph.input, "output": proto.graph.output, "value": proto.graph.value_info}[
        place
    ]
    value = values[0] if values else values.add(name="w")
    value.type.tensor_type.elem_type = 1
    value.type.tensor_type.shape.ClearField("dim")
    for _ in range(2):
        value.type.tensor_type.shape.dim.add(dim_value=size)
    return proto


for place in ("input", "output", "value"):
    for size in (HUGE, -1, -HUGE, 2**63 - 1, -(2**63), 2**32, 0):
        ATTACKS[f"{place} of the size {size}"] = lambda place=place, size=size: with_size(size, place)


@attack
def a_weight_from_ConstantOfShape() -> ModelProto:
    return built(
        f"""<ir_version: 10, opset_import: ["": 17]> g (float[N, 16] x) => (float[] y) <int64[2] s = {{16, {HUGE}}}>
        {{ v = ConstantOfShape (s) h = MatMul (x, w) y = MatMul (h, v) }}""",
        {"w": decaying(1, 16, 16)},
    )


@attack
def a_weight_from_ConstantOfShape_of_8_GiB() -> ModelProto:
    return built(
        f"""<ir_version: 10, opset_import: ["": 17]> g (float[N, 16] x) => (float[] y) <int64[2] s = {{16, {2**27}}}>
        {{ v = ConstantOfShape (s) h = MatMul (x, w) y = MatMul (h, v) }}""",
        {"w": decaying(1, 16, 16)},
    )


@attack
def a_weight_from_Expand() -> ModelProto:
    return built(
        f"""<ir_version: 10, opset_import: ["": 17]> g (float[N, 16] x) => (float[] y)
        <int64[2] s = {{16, {2**27}}}, float one = {{1}}>
        {{ v = Expand (one, s) h = MatMul (x, w) y = MatMul (h, v) }}""",
        {"w": decaying(1, 16, 16)},
    )


@attack
def a_range_without_end() -> ModelProto:
    return matrices(
        "i = Range (zero, many, one) f = Cast <to = 1> (i) z = ReduceSum (f)",
        zero=np.array(0),
        one=np.array(1),
        many=np.array(2**33),
    )


@attack
def strides_and_dilations_that_overflow() -> ModelProto:
    proto = cnn()
    proto.graph.node[0].attribute.append(helper.make_attribute("strides", [2**62, 2**62]))
    proto.graph.node[2].attribute.append(helper.make_attribute("dilations", [2**62, 2**62]))
    return proto


@attack
def pads_that_overflow() -> ModelProto:
    proto = cnn()
    for node in (proto.graph.node[0], proto.graph.node[2]):
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("pads", [2**62, 2**62, 2**62, 2**62]))
    return proto


@attack
def pads_of_many_GiB() -> ModelProto:
    proto = cnn()
    del proto.graph.node[0].attribute[:]
    proto.graph.node[0].attribute.append(helper.make_attribute("pads", [20000] * 4))
    return proto


@attack
def a_group_that_overflows() -> ModelProto:
    proto = cnn()
    proto.graph.node[0].attribute.append(helper.make_attribute("group", 2**62))
    return proto


@attack
def an_LSTM_with_a_huge_hidden_size() -> ModelProto:
    return built(
        f"""<ir_version: 10, opset_import: ["": 17]> g (float[4, 1, 16] x) => (float[] y)
        {{ y = LSTM <hidden_size = {HUGE}> (x, w, r) }}""",
        {"w": decaying(1, 1, 64, 16), "r": decaying(2, 1, 64, 16)},
    )


@attack
def attention_with_huge_heads() -> ModelProto:
    return built(
        f"""<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]> g (float[1, 4, 16] x) => (float[] y)
        {{ y = com.microsoft.Attention <num_heads = {HUGE}, qkv_hidden_sizes = [{HUGE}, {HUGE}, {HUGE}]> (x, w, b) }}""",
        {"w": decaying(1, 16, 48), "b": np.zeros(48, np.float32)},
    )


@attack
def an_einsum_of_all_letters() -> ModelProto:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return built(
        f"""<ir_version: 10, opset_import: ["": 17]> g (float[N, 16] x) => (float[] y)
        {{ h = MatMul (x, w) y = Einsum <equation = "{letters},{letters[::-1]}->{letters}"> (h, w) }}""",
        {"w": decaying(1, 16, 16)},
    )


# --- growth -----------------------------------------------------------------------------------------------


def doubled(first: str, step: str, levels: int = 40, last: str = "", **more: object) -> ModelProto:
    """Nodes of which each makes twice of what the one before made."""
    nodes = [first.format(out="d0")]
    nodes += [step.format(into=f"d{level}", out=f"d{level + 1}") for level in range(levels)]
    return matrices(" ".join(nodes) + last.format(into=f"d{levels}"), **more)


@attack
def shapes_that_double() -> ModelProto:
    return doubled("{out} = Shape (x)", "{out} = Concat <axis = 0> ({into}, {into})")


@attack
def constants_that_double() -> ModelProto:
    return doubled("{out} = Identity (c)", "{out} = Concat <axis = 0> ({into}, {into})", c=np.arange(4))


@attack
def tiles_that_double() -> ModelProto:
    return doubled("{out} = Identity (c)", "{out} = Tile ({into}, two)", c=np.arange(4), two=np.array([2]))


@attack
def a_gather_that_doubles() -> ModelProto:
    return doubled(
        "{out} = Identity (c)", "{out} = Gather ({into}, i)", c=np.arange(2), i=np.zeros((2, 2), np.int64)
    )


@attack
def a_weight_that_doubles() -> ModelProto:
    return doubled(
        "{out} = Identity (w)", "{out} = Concat <axis = 0> ({into}, {into})", last=" z = MatMul (x, {into})"
    )


@attack
def strings_that_double() -> ModelProto:
    return doubled(
        "{out} = Identity (c)",
        "{out} = StringConcat ({into}, {into})",
        opset=20,
        c=np.array(["a" * 64], object),
    )


@attack
def functions_that_double() -> ModelProto:
    functions = [
        f"""<domain: "local", opset_import: ["": 17, "local": 1]> f{n} (x) => (y) {{ a = local.f{n + 1} (x) y = local.f{n + 1} (a) }}"""
        for n in range(40)
    ]
    functions.append("""<domain: "local", opset_import: ["": 17]> f40 (x) => (y) { y = Relu (x) }""")
    return matrices("z = local.f0 (x)", head=" ".join(functions))


@attack
def functions_100_deep() -> ModelProto:
    return function_chain(100)


@attack
def functions_3000_deep() -> ModelProto:
    return function_chain(3000)


@attack
def functions_10000_deep() -> ModelProto:
    return function_chain(10000)


@attack
def many_constants_to_fold() -> ModelProto:
    return doubled("{out} = Identity (c)", "{out} = Add ({into}, {into})", levels=300, c=np.arange(1000))


@attack
def an_empty_input_of_a_huge_size() -> ModelProto:
    proto = matrices(inputs="float[N, 16] x, float[0, 16] e")
    proto.graph.input[1].type.tensor_type.shape.dim[1].dim_value = 2**62
    return proto
