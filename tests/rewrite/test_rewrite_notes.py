"""What a compressed model says of itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper

from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.rewrite.merge import merge
from onnx_lowrank.rewrite.notes import stamp, unstamp
from rewriting import found, model, rewritten

BODY = "g (float[1,8,6,6] x) => (float[] y) { h = Conv (x, v) y = Conv (h, w) }"


def merged(ir):
    """Two layers, of which the decoder and the encoder between them are one operator."""
    seen = found(model(BODY, opset=21, ir=ir, v=(9, 8, 3, 3), w=(10, 9, 3, 3)))
    before = rewritten(seen, {"v": Option(Fold.ENCODE, 1, 4), "w": Option(Fold.ENCODE, 1, 3)})
    del before.model.proto.metadata_props[:]
    for node in before.model.proto.graph.node:
        del node.metadata_props[:]
    after, merges = merge(before)
    stamp(after, {"recipe": "r"}, merges)
    return before, after, merges


@pytest.mark.parametrize("ir", [8, 10])
def test_a_product_is_certified_in_place_of_the_factors_that_are_gone(ir):
    before, after, merges = merged(ir)
    notes = {entry.key: json.loads(entry.value) for entry in after.model.proto.metadata_props}
    assert set(notes) == {"onnx_lowrank.run", "onnx_lowrank.layers", "onnx_lowrank.products"}
    for layer in ("v", "w"):
        assert set(notes["onnx_lowrank.layers"][layer]) == {"option", "multiplied"}
    (product,) = notes["onnx_lowrank.products"]
    assert product["nodes"] == [merges[0].first, merges[0].second]
    weights = {t.name: numpy_helper.to_array(t).astype(float) for t in before.model.proto.graph.initializer}
    exact = np.einsum("jfyx,fi->jyxi", weights["w_encoder"], weights["v_decoder"][:, :, 0, 0]).reshape(-1, 4)
    (stored,) = (
        numpy_helper.to_array(t) for t in after.model.proto.graph.initializer if t.name.endswith("_merged")
    )
    stored = stored.transpose(0, 2, 3, 1).reshape(-1, 4)
    lost = np.linalg.norm(exact - stored, 2) / np.linalg.norm(exact, 2)
    assert 0 < lost <= product["spectral"][0] <= 1.01 * lost


def test_nodes_say_what_they_stand_for_from_ir_10_on():
    _, after, merges = merged(10)
    notes = [{e.key: e.value for e in node.metadata_props} for node in after.model.proto.graph.node]
    first, product, last = notes
    assert (first["onnx_lowrank.layer"], last["onnx_lowrank.layer"]) == ("v", "w")
    assert "onnx_lowrank.spectral" not in first
    assert json.loads(product["onnx_lowrank.product"])["layers"] == list(merges[0].layers)
    _, old, _ = merged(8)
    assert not any(node.metadata_props for node in old.model.proto.graph.node)


def test_no_node_gets_the_notes_of_another_one_with_the_same_name():
    proto = model("g (float[5,12] x) => (float[] y) { h = MatMul (x, w) y = Relu (h) }", ir=10, w=(12, 12))
    for node in proto.graph.node:
        node.name = "n"
    new = rewritten(found(proto), {"w": Option(Fold.ENCODE, 1, 3)}).model.proto
    noted = {node.op_type: len(node.metadata_props) for node in new.graph.node if node.name == "n"}
    assert noted == {"MatMul": 0, "Relu": 0}
    assert "w" in json.loads(next(e.value for e in new.metadata_props if e.key == "onnx_lowrank.layers"))


@pytest.mark.parametrize("ir", [8, 10])
def test_notes_are_taken_out_again_and_older_ones_stay(ir):
    _, after, merges = merged(ir)
    before = after.model.proto.SerializeToString()
    stamp(after, {"recipe": "r"}, merges)
    assert after.model.proto.SerializeToString() != before
    unstamp(after, {"recipe": "r"}, merges)
    assert after.model.proto.SerializeToString() == before


def test_layers_without_a_certificate_say_that_they_were_trained():
    seen = found(model("g (float[5,12] x) => (float[] y) { y = MatMul (x, w) }", ir=10, w=(12, 12)))
    made = rewritten(seen, {"w": Option(Fold.ENCODE, 1, 4)})
    unstamp(made, {"run": "test"})
    assert not made.model.proto.metadata_props
    option, _ = made.proofs["w"]
    stamp(replace(made, proofs={"w": (option, None)}), {"run": "test"})
    notes = {entry.key: json.loads(entry.value) for entry in made.model.proto.metadata_props}
    assert notes["onnx_lowrank.layers"] == {"w": {"option": str(option), "trained": True}}
