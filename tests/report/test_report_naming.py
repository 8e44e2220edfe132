import pytest

from onnx_lowrank.report.naming import display_names

COUNTED = [
    "onnx::MatMul_735",
    "onnx::Conv_284",
    "_v_123",
    "123",
    "val_12",
    "const_fold_opt__12",
    "Constant_output_0",
    "/encoder/layer.0/Constant_3_output_0",
    "Const:0",
    "jax2tf_get_logits_/Const_24:0",
]
TELLING = [
    "fc.weight",
    "w1",
    "layers.0.weight",
    "encoder.0",
    "value_12",
    "oval_12",
    "onnx::MatMul_735_quantized",
    "/encoder/Transpose_output_0",
    "dense/MatMul/ReadVariableOp:0",
    "Constants_output_0",
    "MyConst:0",
    "12a",
    "",
]


@pytest.mark.parametrize("weight", COUNTED)
@pytest.mark.parametrize("scope", ["", "If_0.then_branch/"])
def test_a_weight_that_an_exporter_counted_is_shown_as_its_node(weight, scope):
    assert display_names([(scope + weight, weight, "/fc/MatMul")]) == ("/fc/MatMul",)


@pytest.mark.parametrize("weight", TELLING)
def test_a_name_that_tells_something_stays(weight):
    assert display_names([(f"scope/{weight}", weight, "/fc/MatMul")]) == (f"scope/{weight}",)


def test_a_weight_in_a_scope_is_judged_by_its_own_name():
    assert display_names([("encoder/12", "encoder/12", "n")]) == ("encoder/12",)


@pytest.mark.parametrize("node", COUNTED)
def test_a_node_that_an_exporter_counted_tells_no_more(node):
    assert display_names([("onnx::Conv_1", "onnx::Conv_1", node)]) == ("onnx::Conv_1",)


def test_a_name_stands_for_one_layer_only():
    layers = [("1", "1", "n"), ("2", "2", "n"), ("3", "3", "m"), ("4", "4", "w"), ("w", "w", "o")]
    assert display_names(layers) == ("1", "2", "m", "4", "w")


def test_no_layers_have_no_names():
    assert display_names([]) == ()
