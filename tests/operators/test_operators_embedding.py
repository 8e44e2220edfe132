"""EmbedLayerNormalization computes the same after a rewrite, in ONNX Runtime, and is measured by its ids."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from calibrating import made, measured, plan_of, seen
from fused import model as fused_model
from onnx_lowrank import compress
from onnx_lowrank.core.layer import Positions
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.engines.id_limits import id_limits
from rewriting import found, rewritten, run

ROWS, LENGTH, FEATURES = 60, 5, 8
SHAPES = {
    "w": (ROWS, FEATURES),
    "p": (7, FEATURES),
    "s": (2, FEATURES),
    "gamma": (FEATURES,),
    "beta": (FEATURES,),
}
IDS = "int32[B,5] ids"
NODE = "com.microsoft.EmbedLayerNormalization"
FORMS = {
    "words and positions": ("ids, , w, p, , gamma, beta", "y, unread"),
    "segments": ("ids, segments, w, p, s, gamma, beta", "y, unread"),
    "the first segment": ("ids, , w, p, s, gamma, beta", "y, unread"),
    "position ids": ("ids, segments, w, p, s, gamma, beta, , places", "y, unread"),
    "position ids of all": ("ids, , w, p, , gamma, beta, , place", "y, unread"),
    "mask": ("ids, segments, w, p, s, gamma, beta, mask", "y, m"),
    "mask without segments": ("ids, , w, p, , gamma, beta, mask", "y, m"),
    "no mask": ("ids, segments, w, p, s, gamma, beta", "y, m"),
    "sum": ("ids, segments, w, p, s, gamma, beta", "y, unread, e"),
    "all": ("ids, segments, w, p, s, gamma, beta, mask, places", "y, m, e"),
}
TYPES = {"float": np.float32, "float16": np.float16}


def embedding(form="all", kind="float", epsilon="<epsilon = 0.001>", **weights):
    """The node with the inputs and the outputs of a form."""
    operands, outputs = FORMS[form]
    inputs = [IDS]
    for name, shape in (("segments", "B,5"), ("mask", "B,5"), ("places", "B,5"), ("place", "1,5")):
        inputs += [f"int32[{shape}] {name}"] * (name in operands.split(", "))
    types = {"y": f"{kind}[]", "m": "int32[]", "e": f"{kind}[]"}
    results = ", ".join(f"{types[name]} {name}" for name in outputs.split(", ") if name in types)
    node = f"{outputs} = {NODE} {epsilon} ({operands})"
    rng = np.random.default_rng(5)
    drawn = {name: rng.standard_normal(shape).astype(TYPES[kind]) for name, shape in SHAPES.items()}
    read = {name: values for name, values in drawn.items() if name in operands.split(", ")}
    return fused_model(", ".join(inputs), node, results, **read | weights)


def feed_of(proto, number=3, seed=6):
    rng = np.random.default_rng(seed)
    largest = {"ids": ROWS, "segments": 2, "mask": 3, "places": 7, "place": 7}
    names = [value.name for value in proto.graph.input]
    shapes = {name: (1 if name == "place" else number, LENGTH) for name in names}
    return {name: rng.integers(0, largest[name], shapes[name]).astype(np.int32) for name in names}


def assert_close(proto, new, tolerance, **given):
    feed = given or feed_of(proto)
    for wanted, got in zip(run(proto, feed), run(new, feed), strict=True):
        assert (wanted.shape, wanted.dtype) == (got.shape, got.dtype)
        if wanted.dtype == np.int32:
            np.testing.assert_array_equal(wanted, got)
        else:
            lost = np.linalg.norm(wanted.astype(np.float64) - got)
            assert lost <= tolerance * np.linalg.norm(wanted.astype(np.float64))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_exact_at_full_rank(form, kind):
    proto = embedding(form, kind)
    seen = found(proto)
    layer = seen.layer
    assert (layer.id, layer.f, layer.c, layer.op) == ("w", FEATURES, ROWS, "EmbedLayerNormalization")
    new = rewritten(seen).model.proto
    assert "EmbedLayerNormalization" not in {node.op_type for node in new.graph.node}
    assert_close(proto, new, {"float": 1e-5, "float16": 3e-3}[kind])


@pytest.mark.parametrize("opset", [10, 12, 13, 21])
def test_the_chain_fits_the_opset(opset):
    proto = embedding()
    proto.opset_import[0].version = opset
    for value, rank in zip(proto.graph.output, (3, 1, 3), strict=True):
        value.type.tensor_type.shape.dim.extend([onnx.TensorShapeProto.Dimension()] * rank)
    new = rewritten(found(proto)).model.proto
    onnx.checker.check_model(new)
    assert_close(proto, new, 1e-5)


def test_outputs_that_nothing_reads_are_not_computed():
    proto = embedding()
    del proto.graph.output[1:]
    new = rewritten(found(proto)).model.proto
    assert [node.op_type for node in new.graph.node] == [
        "Gather", "MatMul", "Gather", "Gather", "Add", "SkipLayerNormalization",
    ]  # fmt: skip
    assert_close(proto, new, 1e-5)


def test_a_missing_epsilon_is_that_of_the_runtime():
    proto = embedding("segments", epsilon="")
    assert_close(proto, rewritten(found(proto)).model.proto, 1e-5)


def test_ids_are_positions_without_macs():
    seen = found(embedding("segments"), {"ids": (3, 5), "segments": (3, 5)})
    (use,) = seen.layer.uses
    assert use.positions == Positions(15)
    assert use.evaluations.dense == 0
    assert use.evaluations.factors[Fold.ENCODE] == (0, 15)


def test_made_ids_stay_in_their_tables():
    assert id_limits(embedding("all")) == {"ids": ROWS, "segments": 2, "places": 7}


def removed(proto, index):
    proto.graph.node[0].input[index] = ""
    return proto


def at_opset(proto, opset):
    proto.opset_import[0].version = opset
    return proto


REFUSED = {
    "no positions": (lambda: removed(embedding("segments"), 3), "lacks an input"),
    "no gamma": (lambda: removed(embedding("segments"), 5), "lacks an input"),
    "no table of segments": (lambda: removed(embedding("segments"), 4), "no table of them"),
    "an old opset": (lambda: at_opset(embedding("segments"), 9), "opset 10"),
    "no table": (lambda: embedding("segments", w=np.ones((2, 30, 8), np.float32)), "two-dimensional"),
    "a computed table": (
        lambda: fused_model(
            f"{IDS}, float[60,8] w",
            f"y, unread = {NODE} (ids, , w, p, , gamma, beta)",
            **{name: SHAPES[name] for name in ("p", "gamma", "beta")},
        ),
        "computed",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_replaced_is_left_alone(form):
    make, words = REFUSED[form]
    assert words in found(make()).reason


def test_it_is_measured_by_the_rows_that_its_ids_select():
    proto = embedding("segments")
    table = onnx.numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    given = feed_of(proto, 40)
    with measured(seen(proto), given) as calibration:
        known = calibration.statistics["w"]
    fitted = given["ids"][np.arange(40) % 5 != 4]
    rows = table[fitted].reshape(-1, FEATURES)
    np.testing.assert_allclose(known.outputs.mean[0], rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(known.outputs.second[0], np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-6)


def test_computed_ids_leave_it_unmeasured():
    node = f"ids = Mul (given, two) y, unread = {NODE} (ids, , w, p, , gamma, beta)"
    names = ("w", "p", "gamma", "beta")
    shapes = {name: SHAPES[name] for name in names}
    proto = fused_model("int32[B,5] given", node, two=np.int32(2), **shapes)
    with measured(seen(proto), {"given": np.ones((10, 5), np.int32)}) as calibration:
        assert "make them inputs" in calibration.statistics.reasons["w"]


def test_ids_outside_the_table_are_one_sentence():
    proto = embedding("segments")
    given = feed_of(proto, 10)
    given["ids"][3, 2] = ROWS
    with (
        pytest.raises(Exception, match="'ids' selects row 60 of a table with 60 rows"),
        measured(seen(proto), given),
    ):
        pass


def network(rows=640):
    """An embedding with frequent and rare words, before a head."""
    rng = np.random.default_rng(8)
    shapes = SHAPES | {"w": (rows, FEATURES), "u": (FEATURES, 4)}
    proto = fused_model(
        f"{IDS}, {IDS.replace('ids', 'segments')}",
        f"h, unread = {NODE} (ids, segments, w, p, s, gamma, beta) y = MatMul (h, u)",
        **{name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()},
    )
    ids = np.minimum(rng.zipf(1.6, (100, 5)) - 1, rows - 1).astype(np.int32)
    return proto, {"ids": ids, "segments": np.zeros_like(ids)}


def test_frequent_rows_stay():
    proto, given = network()
    layered = seen(proto)
    option = Option(Fold.ENCODE, 1, 3, Lowering.SPARSE)
    with measured(layered, given) as calibration:
        built = made(layered, plan_of(layered, [option, None]), calibration)
    new = built.rewritten.model.proto
    assert len([node for node in new.graph.node if node.op_type == "Gather"]) == 5
    often = np.bincount(given["ids"].ravel()).argsort()[-5:].reshape(1, 5).astype(np.int32)
    assert_close(proto, new, 1e-5, ids=often, segments=np.zeros_like(often))


@pytest.mark.parametrize("calibrated", [True, False])
def test_it_is_compressed_from_end_to_end(calibrated):
    proto, given = network()
    options = {"recipe": "activation", "calibration": given} if calibrated else {}
    with compress(proto, 0.6, **options) as result:
        row = result.report.layers[0]
        assert row.op == "EmbedLayerNormalization"
        assert row.option is not None
        run(result.proto, given)
        assert result.report.validation.worst < 1.5
