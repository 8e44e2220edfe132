"""The pass of onnx_ir: in place, alone and with onnxscript's rewriter."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import onnx
import onnxruntime
import pytest
from follow import MODELS, feed, pairs

from onnx_lowrank import BudgetError, InputError
from tiny import cnn

pytestmark = [
    pytest.mark.toolchains,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("onnx_ir") is None, reason="onnx_ir is not installed"),
]
needs_rewriter = pytest.mark.skipif(find_spec("onnxscript") is None, reason="onnxscript is not installed")


def low_rank(*arguments, **options):
    from onnx_lowrank.toolchains.ir import LowRankPass

    return LowRankPass(*arguments, **options)


def taken(proto):
    import onnx_ir as ir

    return ir.from_proto(proto)


def given(model):
    import onnx_ir as ir

    return ir.to_proto(model)


def tensors(model):
    return {name: value.const_value for name, value in model.graph.initializers.items()}


def outputs(proto, name):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed(name))[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_that_of_the_library_and_the_same_object(name):
    from onnx_lowrank import compress

    build, _ = MODELS[name]
    model = taken(build())
    result = low_rank(0.5)(model)
    assert result.model is model
    assert result.modified
    onnx.checker.check_model(given(model), full_check=True)
    with compress(build(), 0.5) as expected:
        np.testing.assert_array_equal(outputs(given(model), name), outputs(expected.proto, name))
        assert pairs(given(model)) == pairs(expected.proto) > 0


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": 0.5, "dry_run": True}])
def test_a_model_that_stays_is_not_modified_and_not_touched(options):
    model = taken(cnn())
    graph, nodes = model.graph, list(model.graph)
    assert not low_rank(**options)(model).modified
    assert model.graph is graph
    assert list(model.graph) == nodes


def test_tensors_that_stay_are_the_same_objects():
    model = taken(cnn())
    before = tensors(model)
    low_rank(0.5)(model)
    assert [name for name, tensor in tensors(model).items() if tensor is before.get(name)] == ["fc"]


def test_external_data_stay_external_and_new_factors_need_no_file(tmp_path):
    import onnx_ir as ir

    ir.save(taken(cnn()), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    low_rank(0.5)(model)
    kinds = {name: isinstance(tensor, ir.ExternalTensor) for name, tensor in tensors(model).items()}
    assert [name for name, is_external in kinds.items() if is_external] == ["fc"]
    assert tensors(model)["fc"].path == str(tmp_path / "m.data")
    whole = ir.external_data.load_to_model(model)
    same = taken(cnn())
    low_rank(0.5)(same)
    np.testing.assert_array_equal(outputs(given(whole), "convolutions"), outputs(given(same), "convolutions"))


@needs_rewriter
@pytest.mark.parametrize("name", MODELS)
def test_it_works_between_passes_of_the_rewriter(name):
    import onnx_ir as ir
    from onnxscript import rewriter

    build, _ = MODELS[name]
    model, alone = taken(build()), taken(build())
    rules = rewriter.RewritePass(rewriter._DEFAULT_REWRITE_RULES)
    result = ir.passes.Sequential(rules, low_rank(0.5), rules)(model)
    low_rank(0.5)(alone)
    assert result.model is model
    assert result.modified
    assert pairs(given(model)) == pairs(given(alone)) > 0
    np.testing.assert_allclose(outputs(given(model), name), outputs(given(alone), name), rtol=1e-4, atol=1e-5)


def test_an_initializer_without_a_value_fails_the_precondition():
    import onnx_ir as ir

    model = taken(cnn())
    model.graph.initializers["fc"].const_value = None
    with pytest.raises(ir.passes.PreconditionError, match="'fc' has no value: load the weights"):
        low_rank(0.5)(model)


def test_an_output_that_nothing_computes_fails_the_postcondition():
    import onnx_ir as ir

    model = taken(cnn())
    model.graph.outputs[0] = ir.Value(name="lost")
    with pytest.raises(ir.passes.PostconditionError, match="No node computes the output 'lost'"):
        low_rank(0.5).ensures(model)


def test_errors_name_the_graph_and_leave_the_model():
    model = taken(cnn())
    graph = model.graph
    with pytest.raises(
        BudgetError, match=r"^The ratio 0.001 of params cannot be reached for cnn: "
    ) as caught:
        low_rank(0.001)(model)
    assert caught.value.smallest_ratio > 0.001
    assert model.graph is graph


def test_wrong_options_fail_when_the_pass_is_made():
    with pytest.raises(InputError, match="The ratio is 3"):
        low_rank(3)
