"""The places where the graphs of two models differ."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
from onnx import ModelProto

from onnx_lowrank import compress
from onnx_lowrank.core.outcome import Change, Node
from onnx_lowrank.files.load import Model, load
from onnx_lowrank.graph.difference import changes
from tiny import built, cnn

BRANCHED = """
<ir_version: 8, opset_import: ["": 17]>
g (float[4, 4] x, bool c) => (float[4, 4] y) {
  y = If (c) <then_branch = t () => (float[4, 4] a) { a = MatMul (x, w) },
             else_branch = e () => (float[4, 4] b) { b = Relu (x) }>
}
"""


def model(proto: ModelProto) -> Model:
    return load(proto, ExitStack())


def nodes(change: Change) -> tuple[list[str], list[str]]:
    return [node.name for node in change.gone], [node.name for node in change.new]


def test_a_rewritten_model_differs_in_its_layers_alone() -> None:
    with compress(cnn(), 0.6) as result:
        found = changes(model(cnn()), result.model)
        rewritten = [row.nodes[0] for row in result.report.layers if row.option is not None]
    assert [nodes(change) for change in found if change.gone] == [
        ([name], [f"{name}/encoder", name]) for name in rewritten
    ]
    assert sum(sum(change.same.values()) for change in found) == 6 - len(rewritten)
    assert result.report.graph is not None
    assert result.report.graph.changes == found


def test_a_weight_of_another_shape_changes_its_node() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2, 4] x) => (float[2, N] y) { y = MatMul (x, w) }'
    )
    narrow, wide = (model(built(text, {"w": np.ones((4, n), np.float32)})) for n in (3, 5))
    (change,) = changes(narrow, wide)
    assert change == Change("", {}, (Node("MatMul", "n.y", ((4, 3),)),), (Node("MatMul", "n.y", ((4, 5),)),))
    assert changes(narrow, narrow) == ()


def test_nodes_in_another_order_are_told_without_an_end() -> None:
    first, second = cnn(), cnn()
    moved = list(second.graph.node)
    del second.graph.node[:]
    second.graph.node.extend([moved[1], moved[0], *moved[2:]])
    found = changes(model(first), model(second))
    assert sum(sum(change.same.values()) for change in found) in (0, 6)


def test_branches_are_scopes_of_their_own() -> None:
    first = built(BRANCHED, {"w": np.eye(4, dtype=np.float32)})
    second = built(BRANCHED, {"w": np.eye(4, dtype=np.float32)})
    second.graph.node[0].attribute[1].g.node[0].op_type = "Tanh"
    (change,) = (c for c in changes(model(first), model(second)) if c.gone or c.new)
    assert change.scope.endswith(".else_branch")
    assert [(node.op) for node in (*change.gone, *change.new)] == ["Relu", "Tanh"]


def test_models_without_common_nodes() -> None:
    one = model(cnn())
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[2, 4] x) => (float[2, 4] y) { y = Relu (x) }'
    (change,) = changes(one, model(built(text, {})))
    assert (len(change.gone), len(change.new), dict(change.same)) == (6, 1, {})
