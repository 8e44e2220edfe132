"""Models with cycles, deep nesting, names that are used twice, odd tensors and escapes in names."""
# ruff: noqa: E501 - nodes as text, one model a line

from __future__ import annotations

import numpy as np
import onnx
from attacking import ESCAPES, HUGE, attack, matrices
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from tiny import built, cnn, decaying

# --- recursion --------------------------------------------------------------------------------------------


def nested(levels: int) -> ModelProto:
    """Ifs inside each other."""
    graph = onnx.parser.parse_graph("leaf () => (float[N, 16] r) { r = MatMul (x, w) }")
    for level in range(levels):
        node = helper.make_node("If", ["c"], [f"r{level}"])
        node.attribute.add(name="then_branch", type=AttributeProto.GRAPH).g.CopyFrom(graph)
        other = onnx.parser.parse_graph("e () => (float[N, 16] s) { s = Relu (x) }")
        node.attribute.add(name="else_branch", type=AttributeProto.GRAPH).g.CopyFrom(other)
        value = helper.make_tensor_value_info(f"r{level}", 1, ["N", 16])
        graph = GraphProto(name=f"g{level}", node=[node], output=[value])
    proto = matrices(inputs="float[N, 16] x, bool c")
    graph.node[0].output[0] = graph.output[0].name
    proto.graph.node.insert(0, graph.node[0])
    return proto


@attack
def bodies_20_deep() -> ModelProto:
    return nested(20)


@attack
def bodies_32_deep() -> ModelProto:
    return nested(32)


@attack
def a_function_that_calls_itself() -> ModelProto:
    return matrices(
        "z = local.f (x)",
        head="""<domain: "local", opset_import: ["": 17, "local": 1]> f (x) => (y) { y = local.f (x) }""",
    )


@attack
def two_functions_that_call_each_other() -> ModelProto:
    return matrices(
        "z = local.f (x)",
        head="""<domain: "local", opset_import: ["": 17, "local": 1]> f (x) => (y) { y = local.h (x) }
        <domain: "local", opset_import: ["": 17, "local": 1]> h (x) => (y) { y = local.f (x) }""",
    )


@attack
def a_function_that_calls_itself_in_a_body() -> ModelProto:
    return matrices(
        "z = local.f (x, c)",
        inputs="float[N, 16] x, bool c",
        head="""<domain: "local", opset_import: ["": 17, "local": 1]> f (x, c) => (y) {
        y = If (c) <then_branch = t () => (float[N, 16] p) { p = local.f (x, c) },
        else_branch = e () => (float[N, 16] q) { q = Relu (x) }> }""",
    )


@attack
def a_function_named_like_an_operator() -> ModelProto:
    proto = matrices("z = Relu (x)")
    proto.functions.append(
        onnx.parser.parse_function(
            """<domain: "local", opset_import: ["": 17]> Relu (x) => (y) { y = Relu (x) }"""
        )
    )
    proto.functions[0].domain = ""
    return proto


@attack
def a_MatMul_function_that_calls_itself() -> ModelProto:
    proto = matrices()
    proto.functions.append(
        onnx.parser.parse_function(
            """<domain: "local", opset_import: ["": 17]> MatMul (a, b) => (c) { c = MatMul (a, b) }"""
        )
    )
    proto.functions[0].domain = ""
    return proto


@attack
def a_runtime_operator_that_calls_itself() -> ModelProto:
    text = """<domain: "local", opset_import: ["": 17, "com.microsoft": 1]> Gelu (a) => (c) { c = com.microsoft.Gelu (a) }"""
    proto = matrices("z = local.Gelu (x)", head=text)
    proto.functions[0].domain = proto.graph.node[0].domain = "com.microsoft"
    proto.opset_import.add(domain="com.microsoft", version=1)
    return proto


# --- names and edges --------------------------------------------------------------------------------------


@attack
def a_cycle() -> ModelProto:
    return matrices("a = Relu (b) b = Relu (a)")


@attack
def a_node_that_reads_itself() -> ModelProto:
    return matrices("a = Add (a, x)")


@attack
def a_cycle_through_the_layer() -> ModelProto:
    return built(
        """<ir_version: 10, opset_import: ["": 17]> g (float[N, 16] x) => (float[] y)
        { h = Add (x, y) y = MatMul (h, w) }""",
        {"w": decaying(1, 16, 16)},
    )


@attack
def nodes_in_the_wrong_order() -> ModelProto:
    proto = cnn()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


@attack
def an_input_that_nothing_makes() -> ModelProto:
    return matrices("z = Relu (nothing)")


@attack
def a_layer_on_an_input_that_nothing_makes() -> ModelProto:
    return matrices("z = MatMul (nothing, w)")


@attack
def an_output_that_nothing_makes() -> ModelProto:
    proto = matrices()
    proto.graph.output.append(helper.make_tensor_value_info("nothing", 1, [1]))
    return proto


@attack
def an_output_without_a_name() -> ModelProto:
    proto = matrices()
    proto.graph.output.append(helper.make_tensor_value_info("", 1, [1]))
    return proto


@attack
def two_initializers_of_one_name() -> ModelProto:
    proto = matrices()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(decaying(2, 16, 8), "w"))
    return proto


@attack
def two_inputs_of_one_name() -> ModelProto:
    proto = matrices()
    proto.graph.input.append(proto.graph.input[0])
    return proto


@attack
def two_outputs_of_one_name() -> ModelProto:
    proto = matrices()
    proto.graph.output.append(proto.graph.output[0])
    return proto


@attack
def two_nodes_with_one_output() -> ModelProto:
    return matrices("y = Relu (x)")


@attack
def a_node_with_the_output_twice() -> ModelProto:
    return matrices("a, a = Split (x)")


@attack
def an_output_named_like_the_weight() -> ModelProto:
    return matrices("w = Relu (x)")


@attack
def an_output_named_like_an_input() -> ModelProto:
    return matrices("x = Relu (x)")


@attack
def two_functions_of_one_name() -> ModelProto:
    text = """<domain: "local", opset_import: ["": 17]> f (x) => (y) { y = Relu (x) }"""
    proto = matrices("z = local.f (x)", head=text)
    proto.functions.append(proto.functions[0])
    return proto


@attack
def an_attribute_twice() -> ModelProto:
    proto = cnn()
    proto.graph.node[0].attribute.append(proto.graph.node[0].attribute[0])
    return proto


@attack
def an_opset_twice() -> ModelProto:
    proto = matrices()
    proto.opset_import.add(domain="", version=9)
    return proto


@attack
def an_opset_of_the_far_future() -> ModelProto:
    proto = matrices()
    proto.opset_import[0].version = 2**62
    return proto


@attack
def a_negative_opset() -> ModelProto:
    proto = matrices()
    proto.opset_import[0].version = -(2**63)
    return proto


@attack
def an_ir_version_of_the_far_future() -> ModelProto:
    proto = matrices()
    proto.ir_version = 2**62
    return proto


@attack
def many_bodies() -> ModelProto:
    proto = matrices(inputs="float[N, 16] x, bool c")
    body = GraphProto(name="b", node=[NodeProto(op_type="Relu", input=["x"], output=["r"])])
    body.output.append(helper.make_tensor_value_info("r", 1, None))
    node = helper.make_node("If", ["c"], ["i"], then_branch=body, else_branch=body)
    for number in range(200):
        node.output[0] = f"i{number}"
        proto.graph.node.insert(0, node)
    return proto


@attack
def many_nodes_of_one_name() -> ModelProto:
    proto = matrices()
    for number in range(3000):
        proto.graph.node.add(op_type="Relu", name="n", input=["x"], output=[f"r{number}"])
    return proto


@attack
def a_long_chain() -> ModelProto:
    proto = matrices()
    last = "x"
    for number in range(3000):
        proto.graph.node.add(op_type="Relu", name="n", input=[last], output=[f"r{number}"])
        last = f"r{number}"
    return proto


@attack
def a_long_chain_of_views() -> ModelProto:
    proto = matrices()
    last = "w"
    for number in range(2000):
        proto.graph.node.add(op_type="Identity", name="n", input=[last], output=[f"r{number}"])
        last = f"r{number}"
    proto.graph.node.add(op_type="MatMul", input=["x", last], output=["z"])
    return proto


@attack
def one_weight_of_many_readers() -> ModelProto:
    proto = matrices()
    for number in range(300):
        proto.graph.node.add(op_type="MatMul", input=["x", "w"], output=[f"r{number}"])
    return proto


# --- kinds of tensors -------------------------------------------------------------------------------------


@attack
def a_weight_of_strings() -> ModelProto:
    proto = matrices()
    weight = proto.graph.initializer[0]
    weight.Clear()
    weight.name, weight.data_type = "w", TensorProto.STRING
    weight.dims.extend([16, 16])
    weight.string_data.extend([b"\xff\x1b[31m"] * 256)
    return proto


@attack
def a_sparse_weight() -> ModelProto:
    proto = matrices()
    values = onnx.numpy_helper.from_array(np.ones(2, np.float32), "w")
    indices = onnx.numpy_helper.from_array(np.array([0, HUGE]))
    del proto.graph.initializer[:]
    proto.graph.sparse_initializer.add(values=values, indices=indices, dims=[HUGE, HUGE])
    return proto


@attack
def a_sparse_constant() -> ModelProto:
    proto = matrices("v = Constant <value_float = 1.0> () z = MatMul (x, v)")
    values = onnx.numpy_helper.from_array(np.ones(2, np.float32))
    indices = onnx.numpy_helper.from_array(np.array([0, 5]))
    node = proto.graph.node[0]
    del node.attribute[:]
    attribute = node.attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.CopyFrom(
        onnx.SparseTensorProto(values=values, indices=indices, dims=[2**16, 2**16])
    )
    return proto


@attack
def a_sparse_constant_with_wild_indices() -> ModelProto:
    proto = a_sparse_constant()
    tensor = proto.graph.node[0].attribute[0].sparse_tensor
    tensor.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([-(2**62), 2**62])))
    del tensor.dims[:]
    tensor.dims.extend([16, 16])
    return proto


@attack
def a_weight_with_a_segment() -> ModelProto:
    proto = matrices()
    proto.graph.initializer[0].segment.begin, proto.graph.initializer[0].segment.end = 0, 2**62
    return proto


@attack
def a_weight_of_an_unknown_type() -> ModelProto:
    proto = matrices()
    proto.graph.initializer[0].data_type = 2**31 - 1
    return proto


@attack
def a_weight_with_two_contents() -> ModelProto:
    proto = matrices()
    proto.graph.initializer[0].float_data.extend([1.0] * 256)
    return proto


@attack
def a_weight_of_NaN_and_Inf() -> ModelProto:
    return matrices(
        "z = MatMul (x, v)", v=np.full((16, 16), np.nan, np.float32), u=np.full(4, np.inf, np.float32)
    )


@attack
def a_weight_of_the_largest_numbers() -> ModelProto:
    return matrices("z = MatMul (x, v)", v=np.full((16, 16), np.finfo(np.float32).max, np.float32))


@attack
def no_graph_attribute() -> ModelProto:
    proto = matrices(inputs="float[N, 16] x, bool c")
    proto.graph.node.insert(0, helper.make_node("If", ["c"], ["z"]))
    return proto


@attack
def an_input_of_every_type() -> ModelProto:
    proto = matrices()
    for number in range(30):
        proto.graph.input.append(helper.make_tensor_value_info(f"i{number}", number, [1]))
    return proto


@attack
def an_input_without_a_type() -> ModelProto:
    proto = matrices()
    proto.graph.input.add(name="i")
    return proto


@attack
def escapes_in_names() -> ModelProto:
    proto = cnn()
    graph = proto.graph
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.node):
        value.name = ESCAPES + value.name
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [ESCAPES + name for name in names]
    for text in ("domain", "producer_name", "producer_version", "doc_string"):
        setattr(proto, text, ESCAPES)
    graph.node[0].doc_string = graph.name = ESCAPES
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = ESCAPES
    return proto


@attack
def escapes_in_an_operator() -> ModelProto:
    proto = matrices("z = Relu (v)", v=decaying(3, 64, 64))
    proto.graph.node[0].op_type = proto.graph.node[0].domain = ESCAPES
    proto.opset_import.add(domain=ESCAPES, version=1)
    return proto
