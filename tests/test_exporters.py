"""Models as exporters, quantizers and optimizers write them: layers are found, the rest is listed with reasons."""
# ruff: noqa: E501 - models as text, one node a line

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime import quantization

from onnx_lowrank import InputError, compress
from rewriting import constants, feed_of, found, model, run
from tiny import built, cnn, decaying

# PyTorch's TorchScript exporter without folding, with initializers as inputs: scoped names, BatchNormalization
# behind Conv, a linear layer as a Transpose in front of a MatMul.
TORCHSCRIPT = """
<ir_version: 8, opset_import: ["": 15]>
main_graph (float[2, 8, 6, 6] x, float[16, 8, 3, 3] "c.weight", float[16] "b.scale", float[16] "b.mean",
            float[4, 16] "fc.weight") => (float[2, 4] "50") {
  "/c/Conv_output_0" = Conv <dilations = [1, 1], group = 1, kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, "c.weight")
  "/b/output_0" = BatchNormalization <epsilon = 0.00001, momentum = 0.9, training_mode = 0>
      ("/c/Conv_output_0", "b.scale", "b.mean", "b.mean", "b.scale")
  "/Relu_output_0" = Relu ("/b/output_0")
  "/ReduceMean_output_0" = ReduceMean <axes = [2, 3], keepdims = 0> ("/Relu_output_0")
  "onnx::MatMul_4" = Transpose <perm = [1, 0]> ("fc.weight")
  "50" = MatMul ("/ReduceMean_output_0", "onnx::MatMul_4")
}
"""

# PyTorch's dynamo exporter: torch.cond is an If without names, whose branches read weights of the graph around.
DYNAMO = """
<ir_version: 10, opset_import: ["": 20]>
main_graph (float[2, 32] x) => (float[2, 32] getitem) <float scalar_tensor_default = {0}> {
  sum_1 = ReduceSum <keepdims = 0, noop_with_empty_axes = 0> (x)
  gt = Greater (sum_1, scalar_tensor_default)
  getitem = If (gt) <
    then_branch = true_graph_0 () => (float[2, 32] linear_true) { linear_true = Gemm <transB = 1> (x, "a.weight", "a.bias") },
    else_branch = false_graph_0 () => (float[2, 32] linear_false) { linear_false = Gemm <transB = 1> (x, "b.weight", "b.bias") }
  >
}
"""

# TorchScript with export_modules_as_functions: the function gets its weight from its caller.
FUNCTIONS = """
<ir_version: 8, opset_import: ["": 17, "torch.nn.modules.linear": 1]>
main_graph (float[2, 32] x) => (float[2, 32] y) {
  h = torch.nn.modules.linear.Linear (x, "fc.weight")
  y = MatMul (h, "onnx::MatMul_9")
}
<domain: "torch.nn.modules.linear", opset_import: ["": 17]>
Linear (input, weight) => (output) { output = Gemm <transB = 1> (input, weight) }
"""

# tf2onnx and Keras: Conv between Transposes, a kernel behind Transpose and Reshape, BatchNormalization as Mul and Add,
# a 1x1 convolution as MatMul, and names with colons and slashes.
TF2ONNX = """
<ir_version: 8, opset_import: ["": 18, "ai.onnx.ml": 2]>
tf2onnx (float[unk__1, 6, 6, 8] input) => (float[unk__2, 4] "Identity:0")
  <int64[4] "const_fold_opt__9" = {16, 8, 3, 3}, int64[2] axes = {1, 2}> {
  "Conv__6:0" = Transpose <perm = [0, 3, 1, 2]> (input)
  "kernel_t:0" = Transpose <perm = [3, 2, 0, 1]> ("conv2d/Conv2D/ReadVariableOp:0")
  "kernel:0" = Reshape ("kernel_t:0", "const_fold_opt__9")
  "m/conv2d/Conv2D:0" = Conv <auto_pad = "SAME_UPPER", kernel_shape = [3, 3]> ("Conv__6:0", "kernel:0")
  "m/bn/mul:0" = Mul ("m/conv2d/Conv2D:0", "m/bn/scale:0")
  "m/bn/add:0" = Add ("m/bn/mul:0", "m/bn/shift:0")
  "Relu__7:0" = Clip ("m/bn/add:0", zero, six)
  "m/depthwise:0" = Conv <group = 16, pads = [1, 1, 1, 1]> ("Relu__7:0", "depthwise_kernel:0")
  "m/nhwc:0" = Transpose <perm = [0, 2, 3, 1]> ("m/depthwise:0")
  "m/pointwise:0" = MatMul ("m/nhwc:0", "pointwise_kernel:0")
  "m/Mean:0" = ReduceMean <keepdims = 0> ("m/pointwise:0", axes)
  "Identity:0" = MatMul ("m/Mean:0", "dense/MatMul/ReadVariableOp:0")
}
"""

# paddle2onnx: all weights in Constant nodes.
PADDLE = """
<ir_version: 8, opset_import: ["": 11]>
"Model from PaddlePaddle." (float[2, 8, 6, 6] x) => (float[2, 4] "fetch_name_0") <int64[2] shape = {2, -1}> {
  "p2o.Conv.0" = Conv <dilations = [1, 1], group = 1, kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, "conv2d_0.w_0")
  "p2o.BatchNormalization.0" = BatchNormalization <epsilon = 0.00001, momentum = 0.9>
      ("p2o.Conv.0", "bn.w_0", "bn.b_0", "bn.b_0", "bn.w_0")
  "p2o.GlobalAveragePool.0" = GlobalAveragePool ("p2o.BatchNormalization.0")
  "p2o.Reshape.0" = Reshape ("p2o.GlobalAveragePool.0", shape)
  "p2o.MatMul.0" = MatMul ("p2o.Reshape.0", "linear_0.w_0")
  "fetch_name_0" = Softmax <axis = -1> ("p2o.MatMul.0")
}
"""

# skl2onnx: a multi-layer perceptron, the label as a text, the probabilities as a sequence of maps.
SKLEARN = """
<ir_version: 10, opset_import: ["": 21, "ai.onnx.ml": 3]>
"ONNX(MLPClassifier)" (float[N, 16] X) => (string[N] output_label, seq(map(string, float)) output_probability)
  <int64[1] shape_tensor = {-1}, string[3] classes = {"one", "two", "three"}> {
  cast_input = Cast <to = 1> (X)
  mul_result = MatMul (cast_input, coefficient)
  add_result = Add (mul_result, intercepts)
  next_activations = Relu (add_result)
  mul_result1 = MatMul (next_activations, coefficient1)
  out_activations_result = Softmax <axis = -1> (mul_result1)
  argmax_output = ArgMax <axis = 1> (out_activations_result)
  array_feature_extractor_result = ai.onnx.ml.ArrayFeatureExtractor (classes, argmax_output)
  output_label = Reshape (array_feature_extractor_result, shape_tensor)
  output_probability = ai.onnx.ml.ZipMap <classlabels_strings = ["one", "two", "three"]> (out_activations_result)
}
"""

# Optimum's merged decoder: both branches read the same weights, and use_cache_branch chooses.
MERGED = """
<ir_version: 9, opset_import: ["": 17]>
merged (int64[batch_size, sequence_length] input_ids, bool[1] use_cache_branch)
    => (float[batch_size, sequence_length, 16] logits) {
  logits = If (use_cache_branch) <
    then_branch = with_past () => (float[batch_size, sequence_length, 16] logits_p) {
      x_p = Gather (table, input_ids)
      h_p = MatMul (x_p, "onnx::MatMul_1")
      logits_p = MatMul (h_p, "onnx::MatMul_2")
    },
    else_branch = no_past () => (float[batch_size, sequence_length, 16] logits_n) {
      x_n = Gather (table, input_ids)
      h_n = MatMul (x_n, "onnx::MatMul_1")
      logits_n = MatMul (h_n, "onnx::MatMul_2")
    }
  >
}
"""

ONES, ZEROS = np.ones(16, np.float32), np.zeros(16, np.float32)
KERNEL = decaying(1, 16, 8, 3, 3)
CASES = {
    "torchscript": (
        TORCHSCRIPT,
        {"c.weight": KERNEL, "b.scale": 2 * ONES, "b.mean": ONES, "fc.weight": decaying(2, 4, 16)},
        {"c.weight", "fc.weight"},
        [],
    ),
    "dynamo": (
        DYNAMO,
        {"a.weight": decaying(1, 32, 32), "b.weight": decaying(2, 32, 32), "a.bias": np.ones(32, "f4"), "b.bias": np.ones(32, "f4")},
        {"a.weight", "b.weight"},
        [],
    ),
    "functions": (
        FUNCTIONS,
        {"fc.weight": decaying(1, 32, 32), "onnx::MatMul_9": decaying(2, 32, 32)},
        {"onnx::MatMul_9"},
        [("Gemm", "inline the functions first")],
    ),
    "tf2onnx": (
        TF2ONNX,
        {
            "conv2d/Conv2D/ReadVariableOp:0": KERNEL.transpose(2, 3, 1, 0).copy(),
            "m/bn/scale:0": 2 * ONES.reshape(1, 16, 1, 1),
            "m/bn/shift:0": ONES.reshape(1, 16, 1, 1),
            "zero": np.float32(0),
            "six": np.float32(6),
            "depthwise_kernel:0": decaying(2, 16, 1, 3, 3),
            "pointwise_kernel:0": decaying(3, 16, 32),
            "dense/MatMul/ReadVariableOp:0": decaying(4, 32, 4),
        },
        {"conv2d/Conv2D/ReadVariableOp:0", "pointwise_kernel:0", "dense/MatMul/ReadVariableOp:0"},
        [("Conv", "depthwise")],
    ),
    "skl2onnx": (
        SKLEARN,
        {"coefficient": decaying(1, 16, 32), "coefficient1": decaying(2, 32, 3), "intercepts": np.ones((1, 32), "f4")},
        {"coefficient", "coefficient1"},
        [],
    ),
    "optimum": (
        MERGED,
        {"table": decaying(1, 40, 16), "onnx::MatMul_1": decaying(2, 16, 32), "onnx::MatMul_2": decaying(3, 32, 16)},
        {"table", "onnx::MatMul_1", "onnx::MatMul_2"},
        [],
    ),
}  # fmt: skip


def paddle() -> onnx.ModelProto:
    arrays = {"conv2d_0.w_0": KERNEL, "bn.w_0": ONES, "bn.b_0": ZEROS, "linear_0.w_0": decaying(2, 16, 4)}
    proto = built(PADDLE, arrays)
    constants(proto.graph, *(tensor for tensor in proto.graph.initializer if tensor.name in arrays))
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in arrays]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


@pytest.mark.parametrize("name", [*CASES, "paddle"])
def test_layers_are_found_and_the_rest_is_listed(name):
    text, arrays, layers, skipped = CASES.get(name, (None, None, {"conv2d_0.w_0", "linear_0.w_0"}, []))
    proto = paddle() if text is None else built(text, arrays)
    with compress(proto, 0.75) as result:
        assert {row.id for row in result.report.layers} == layers
        assert [row.op for row in result.report.skipped] == [op for op, _ in skipped]
        for row, (_, words) in zip(result.report.skipped, skipped, strict=True):
            assert words in row.reason
        assert any(row.option for row in result.report.layers)
        assert result.report.reached <= 0.75
        assert result.report.validation.worst < 0.5
        onnx.checker.check_model(result.proto, full_check=True)


def test_probabilities_of_classes_are_one_output():
    text, arrays, _, _ = CASES["skl2onnx"]
    label, probabilities = compress(built(text, arrays), 0.75).report.validation.outputs
    assert (label.name, label.note) == ("output_label", "It holds texts.")
    assert probabilities.name == "output_probability"


def test_metadata_of_nodes_stays_with_nodes_that_stay():
    text, arrays, _, _ = CASES["dynamo"]
    proto = built(text, arrays)
    for node in proto.graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{node.name}']")
    with compress(proto, 0.75) as result:
        kept = {node.name: node for node in result.proto.graph.node}
        assert [kept[node.name].metadata_props for node in proto.graph.node] == [
            node.metadata_props for node in proto.graph.node
        ]


# --- optimizers ---------------------------------------------------------------------------------------


def optimized(source, target, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return target


@pytest.fixture
def exported(tmp_path):
    onnx.save(cnn(), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def stored(proto):
    return sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)


@pytest.mark.parametrize("level", ["BASIC", "EXTENDED"])
def test_files_that_the_runtime_optimized(exported, level):
    level = onnxruntime.GraphOptimizationLevel.__members__[f"ORT_ENABLE_{level}"]
    path = optimized(exported, exported.with_name("fused.onnx"), level)
    with compress(path, 0.5) as result:
        assert [row.id for row in result.report.layers] == ["conv1", "conv2", "fc"]
        assert not result.report.skipped
        assert result.report.reached <= 0.5
        result.save(exported.with_name("small.onnx"))
    again = onnx.load(optimized(exported.with_name("small.onnx"), exported.with_name("again.onnx"), level))
    assert stored(again) == stored(onnx.load(exported.with_name("small.onnx"))), (
        "the factors are multiplied again"
    )
    feed = feed_of(cnn())
    for wanted, got in zip(run(result.proto, feed), run(again, feed), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_file_in_the_runtimes_own_format_is_refused(exported):
    path = optimized(
        exported, exported.with_name("in.ort"), onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    with pytest.raises(InputError, match="own format, not ONNX: name"):
        compress(path, 0.5)


# --- quantizers ---------------------------------------------------------------------------------------


class Samples(quantization.CalibrationDataReader):
    """Two samples of noise."""

    def __init__(self):
        self._feeds = iter([feed_of(cnn(), seed) for seed in (1, 2)])

    def get_next(self):
        return next(self._feeds, None)


def statically(source, target, **options):
    quantization.quantize_static(source, target, Samples(), **options)


QUANTIZERS = {
    "dynamic": quantization.quantize_dynamic,
    "QDQ": lambda *paths, **options: statically(*paths, quant_format=quantization.QuantFormat.QDQ, **options),
    "QOperator": lambda *paths, **options: statically(
        *paths, quant_format=quantization.QuantFormat.QOperator, **options
    ),
    "QDQ of 16 bits": lambda *paths, **options: statically(
        *paths, activation_type=quantization.QuantType.QUInt16, **options
    ),
    "QDQ with float weights": lambda *paths, **options: statically(
        *paths, extra_options={"AddQDQPairToWeight": True}, **options
    ),
}


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_float_layers_beside_quantized_ones(exported, quantize):
    path = exported.with_name("quantized.onnx")
    quantize(exported, path, nodes_to_exclude=["n.c"])
    with compress(path, 0.9) as result:
        (row,) = result.report.layers
        assert (row.id, row.option is not None) == ("conv2", True)
        assert len(result.report.skipped) == 2
        assert all("compress before quantizing" in row.reason for row in result.report.skipped)


@pytest.mark.parametrize("op", ["DynamicQuantizeLSTM", "GatherBlockQuantized", "MatMulIntegerToFloat"])
def test_quantized_operators_of_the_runtime(op):
    proto = model(
        "g (float[3,8] x) => (float[3,8] y) { h = local.Quantized (x, q) y = MatMul (h, w) }", w=(8, 8)
    )
    node = proto.graph.node[0]
    node.domain, node.op_type = "com.microsoft", op
    proto.opset_import.add(domain="com.microsoft", version=1)
    (skipped,) = found(proto).skipped
    assert (skipped.op, skipped.reason) == (op, "it is quantized: compress before quantizing")
