"""A rewrite changes what the plan names, and nothing else."""
# ruff: noqa: E501 - tables of models, one a line

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import onnx_lowrank
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.core.plan import Choice, Plan
from onnx_lowrank.graph.parameters import parameters
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.probe.excerpt import excerpts
from rewriting import assert_only_named_changes, assert_same, found, full_rank, model, rewritten, tensors

W = (8, 10)
BODY = "g (float[3,8] x) => (float[] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"


def decorated(ir: int = 10) -> onnx.ModelProto:
    """A model with something in every field that a rewrite could lose."""
    proto = model(
        "g (float[3,8] x) => (float[] y) { h = MatMul (x, w) q = local.Odd <level = 3> (h) y = MatMul (h, v) }",
        opset=21,
        ir=ir,
        functions='<domain: "local", opset_import: ["" : 21]> Odd <level> (a) => (b) { b = Relu (a) }',
        w=W,
        v=(10, 8),
        unused=(5,),
    )
    proto.producer_name, proto.producer_version, proto.domain = "maker", "1.2", "org.example"
    proto.model_version, proto.doc_string = 7, "the model"
    proto.metadata_props.add(key="author", value="somebody")
    proto.metadata_props.add(key="onnx_lowrank.run", value="an older run")
    graph = proto.graph
    graph.doc_string = "the graph"
    graph.metadata_props.add(key="graph", value="note")
    graph.node[0].doc_string, graph.node[0].name = "first", "linear"
    graph.node[0].metadata_props.add(key="node", value="note")
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [3, 10]))
    graph.value_info.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, W))
    graph.input[0].doc_string = "the input"
    for name in ("h", "w", "y"):
        note = graph.quantization_annotation.add(tensor_name=name)
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unused")
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [2.0])
    indices = helper.make_tensor("", TensorProto.INT64, [1], [3])
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))
    proto.training_info.add().initialization.name = "training"
    proto.functions[0].doc_string = "the function"
    proto.functions[0].node[0].doc_string = "its node"
    return proto


@pytest.mark.parametrize("chosen", [("w",), ("v",), ("w", "v"), ()])
@pytest.mark.parametrize("ir", [8, 10])
def test_everything_else_survives(chosen, ir):
    proto = decorated(ir)
    data = proto.SerializeToString(deterministic=True)
    seen = found(proto)
    layers = [seen.layers[name] for name in chosen]
    result = rewritten(seen, {layer.id: full_rank(layer) for layer in layers})
    new = result.model.proto
    assert_only_named_changes(proto, new, layers, result.chains)
    assert proto.SerializeToString(deterministic=True) == data
    assert (
        [note.tensor_name for note in new.graph.quantization_annotation] == ["h", "w", "y"]
        if "w" not in chosen
        else ["h", "y"]
    )
    assert [v.name for v in new.graph.value_info] == (["h"] if "w" in chosen else ["h", "w"])
    assert "unused" in {tensor.name for tensor in new.graph.initializer}


@pytest.mark.parametrize("ir", [8, 10])
def test_an_add_keeps_everything_but_its_bias(ir):
    body = "g (float[3,8] x) => (float[3,10] y) { h = MatMul (x, w) y = Add (h, c) }"
    proto = model(body, ir=ir, opset=21, w=W, c=(10,), y_bias=(2,), h_bias=(3,))
    graph = proto.graph
    add = graph.node[1]
    add.name, add.doc_string = "shift", "a note"
    if ir >= 10:
        add.metadata_props.add(key="node", value="note")
    graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [10]))
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [3, 10]))
    graph.quantization_annotation.add(tensor_name="c")
    graph.quantization_annotation.add(tensor_name="y")
    graph.input.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [10]))
    data = proto.SerializeToString(deterministic=True)
    seen = found(proto)
    result = rewritten(seen, biases={"w": np.arange(10.0)})
    new = result.model.proto
    onnx.checker.check_model(new, full_check=True)
    assert proto.SerializeToString(deterministic=True) == data
    expected = onnx.NodeProto.FromString(add.SerializeToString())
    expected.input[1] = "h_bias_2"
    assert new.graph.node[-1] == expected
    assert new.metadata_props == rewritten(seen).model.proto.metadata_props
    assert [value.name for value in new.graph.value_info] == ["h"]
    assert [note.tensor_name for note in new.graph.quantization_annotation] == ["y"]
    assert result.removed_inputs == ("c",)
    names = [tensor.name for tensor in new.graph.initializer]
    assert names == ["y_bias", "h_bias", "w_encoder", "w_decoder", "h_bias_2"]


@pytest.mark.parametrize("node", ["y = Gemm <beta = 2.0> (x, w, c)", "h = MatMul (x, w) y = Add (h, c)"])
def test_a_bias_changes_only_where_one_is_given(node):
    proto = model(f"g (float[3,8] x) => (float[3,10] y) {{ {node} }}", w=W, c=(10,))
    new = rewritten(found(proto)).model.proto
    (old,) = (tensor for tensor in proto.graph.initializer if tensor.name == "c")
    assert [tensor for tensor in new.graph.initializer if "bias" in tensor.name or tensor.name == "c"] == [
        old
    ]
    last, original = new.graph.node[-1], proto.graph.node[-1]
    assert last.input[-1] == "c"
    assert last.attribute == original.attribute


def test_the_last_node_keeps_name_and_notes():
    seen = found(decorated())
    new = rewritten(seen).model.proto
    last = next(node for node in new.graph.node if node.name == "linear")
    assert (last.doc_string, last.output[0], last.metadata_props[0].key) == ("first", "h", "node")


@pytest.mark.parametrize("ir", [8, 10])
def test_provenance(ir):
    new = rewritten(found(decorated(ir))).model.proto
    keys = [entry.key for entry in new.metadata_props]
    assert keys == ["author", "onnx_lowrank.run", "onnx_lowrank.run.2", "onnx_lowrank.layers"]
    stamped = [{e.key: e.value for e in node.metadata_props} for node in new.graph.node]
    options = [notes["onnx_lowrank.option"] for notes in stamped if "onnx_lowrank.option" in notes]
    assert options == (["encode k=1 j=8"] * 4 if ir >= 10 else [])


def test_new_names_never_collide():
    proto = model(BODY, w=W, v=(10, 8), w_encoder=(1,), w_decoder=(1,))
    first = found(proto)
    chain = rewritten(first).model.proto
    names = {name for node in chain.graph.node for name in (node.name, *node.input, *node.output)}
    names |= {tensor.name for tensor in chain.graph.initializer}
    planted = sorted(names - {"x", "y", "h", "r", "w", "v", ""})
    for kind in ("value_info", "initializer", "output", "node"):
        again = model(BODY, w=W, v=(10, 8))
        for name in planted:
            if kind == "value_info":
                again.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))
            elif kind == "initializer":
                again.graph.initializer.extend(tensors(**{name: (1,)}))
            else:
                again.graph.node.add(
                    op_type="Relu", input=["x"], output=[name if kind == "output" else f"o{name}"]
                )
                again.graph.node[-1].name = name if kind == "node" else ""
        seen = found(again)
        result = rewritten(seen)
        new = {n for node in result.model.proto.graph.node for n in (node.name, *node.output)}
        assert_only_named_changes(again, result.model.proto, list(seen.layers.values()), result.chains)
        new -= {n for node in again.graph.node for n in (node.name, *node.output)}
        assert new.isdisjoint(planted)
        if kind != "value_info":
            assert_same(again, result.model.proto)


def test_duplicated_node_names():
    proto = model(BODY, w=W, v=(10, 8))
    for node in proto.graph.node:
        node.name = "same"
    seen = found(proto)
    result = rewritten(seen)
    walk = Walk(result.model.proto)
    for binding in seen.bindings:
        chain = result.chains[binding.layer.id][0]
        dense, small = excerpts(seen.model, seen.walk, result.model, walk, binding, chain)
        assert dense.graph.node[0].input[1] == binding.layer.id
        assert small.graph.node[-1].output == dense.graph.node[-1].output
        assert len(small.graph.node) == 2


def test_what_was_unread_before_stays():
    proto = model("g (float[3,8] x) => (float[] y) { d = Transpose (c) y = MatMul (x, w) }", w=W, c=(3, 3))
    seen = found(proto)
    result = rewritten(seen)
    assert_only_named_changes(proto, result.model.proto, [seen.layer], result.chains)


def test_a_view_that_something_else_reads_stays():
    proto = model(
        "g (float[3,8] x) => (float[] y, int64[] z) { s = Identity (t) v = Reshape (w, s) y = MatMul (x, v) z = Neg (s) }",
        w=(80,),
        t=np.array([8, 10]),
    )
    seen = found(proto)
    new = rewritten(seen).model.proto
    assert {node.op_type for node in new.graph.node} == {"Identity", "MatMul", "Neg"}
    assert_same(proto, new)


def full_rank_plan(model: onnx.ModelProto, fold_index: int = 0, k_index: int = 0) -> Plan:
    seen = found(model)
    choices = []
    for layer in seen.layers.values():
        fold = layer.folds[fold_index % len(layer.folds)]
        k = layer.slices[k_index % len(layer.slices)]
        choices.append(Choice(layer.id, Option(fold, k, layer.full_rank(fold, k)), 0, 0.0))
    return Plan(seen.model.sha256, "test", "spectral", 1.0, "params", tuple(choices))


MODELS = {
    "matrices": (BODY, {"w": W, "v": (10, 8)}),
    "conv": (
        "g (float[1,4,6,6] x) => (float[] y) { h = Conv <strides = [2,1]> (x, w) r = Relu (h) y = Conv (r, v) }",
        {"w": (8, 4, 3, 3), "v": (6, 8, 2, 2)},
    ),
    "gather": (
        "g (int64[5] i) => (float[] y) { e = Gather (w, i) y = Gemm (e, v) }",
        {"w": (30, 8), "v": (8, 8)},
    ),
}


@pytest.mark.parametrize("fold", range(4))
@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_compress_at_full_rank(name, fold, k):
    body, weights = MODELS[name]
    proto = model(body, **weights)
    result = onnx_lowrank.compress(proto, plan=full_rank_plan(proto, fold, k))
    validation = result.report.validation
    assert validation is not None
    assert validation.worst < 1e-5
    assert result.report.totals.amount("params").after == parameters(result.model)


@pytest.mark.parametrize("name", MODELS)
def test_compressing_twice(name):
    body, weights = MODELS[name]
    proto = model(body, **weights)
    once = onnx_lowrank.compress(proto, ratio=0.8)
    twice = onnx_lowrank.compress(once.proto, ratio=0.8)
    assert parameters(twice.model) <= 0.8 * parameters(once.model) <= 0.64 * parameters(found(proto).model)
    assert twice.report.validation is not None


def test_external_data(tmp_path):
    proto = model(BODY, w=W, v=(10, 8))
    choices = full_rank_plan(proto).choices
    path = tmp_path / "in.onnx"
    inline = onnx.ModelProto.FromString(proto.SerializeToString())
    onnx.save(proto, path, save_as_external_data=True, location="data", size_threshold=0)
    seen = found(path)
    plan = Plan(seen.model.sha256, "test", "spectral", 1.0, "params", choices)
    result = onnx_lowrank.compress(path, plan=plan)
    result.save(tmp_path / "out.onnx")
    result.close()
    assert_same(inline, onnx.load(tmp_path / "out.onnx"))


@pytest.mark.parametrize("shape", [(0, 16, 3), (2, 16, 0), (2, 16, 3)])
@pytest.mark.parametrize("opset", [11, 13])
def test_slices_of_a_weight_on_the_left_meet_empty_batches(shape, opset):
    proto = model("g (float[A,16,B] x) => (float[A,10,B] y) { y = MatMul (w, x) }", opset=opset, w=(10, 16))
    seen = found(proto)
    new = rewritten(seen, {"w": Option(Fold.ENCODE, 4, 4)}).model.proto
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    one, other = (
        onnxruntime.InferenceSession(some.SerializeToString()).run(None, {"x": x})[0] for some in (proto, new)
    )
    assert one.shape == other.shape == (shape[0], 10, shape[2])
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_weights_that_share_their_bytes_in_the_data_file_are_left_alone(tmp_path):
    path = tmp_path / "in.onnx"
    body = "g (float[3,16] x) => (float[3,16] y) { h = MatMul (x, w) k = MatMul (h, v) y = MatMul (k, u) }"
    onnx.save(
        model(body, w=(16, 16), v=(16, 16), u=(16, 16)),
        path,
        save_as_external_data=True,
        location="data",
        size_threshold=0,
    )
    proto = onnx.load(path, load_external_data=False)
    first, second, _ = proto.graph.initializer
    del second.external_data[:]
    second.external_data.extend(first.external_data)
    path.write_bytes(proto.SerializeToString())
    seen = found(path)
    assert parameters(seen.model) == 2 * 16 * 16
    assert [binding.layer.id for binding in seen.bindings] == ["u"]
    assert {item.weight for item in seen.skipped} == {"w", "v"}
    assert all("share its bytes in the data file" in item.reason for item in seen.skipped)
    result = onnx_lowrank.compress(path, ratio=0.9)
    assert parameters(result.model) <= 0.9 * parameters(seen.model)


@pytest.mark.parametrize("opset", [6, 7, 8, 9])
@pytest.mark.parametrize("node", ["y = MatMul (x, w)", "y = Gemm (x, w, b)"])
def test_matrices_of_old_opsets_pass_the_checker_whatever_the_plan(node, opset):
    biased = {"b": (12,)} if "Gemm" in node else {}
    node = node.replace("Gemm", "Gemm <broadcast = 1>") if opset < 7 else node
    proto = model(
        f"g (float[3,16] x) => (float[3,12] y) {{ {node} }}", opset=opset, ir=4, w=(16, 12), **biased
    )
    layer = found(proto).layer
    assert layer.slices == ((1,) if opset < 9 else (1, 2, 4, 8, 16))
    for k in layer.slices:
        choice = Choice("w", Option(Fold.ENCODE, k, layer.full_rank(Fold.ENCODE, k)), 0, 0.0)
        digest = found(proto).model.sha256
        plan = Plan(digest, "test", "spectral", 1.0, "params", (choice,))
        validation = onnx_lowrank.compress(proto, plan=plan).report.validation
        assert validation.worst < 1e-6
        assert not any("checker" in note for note in validation.notes)
