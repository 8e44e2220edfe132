"""Tables that keep rows in whole models: rows that are read often stay, at no cost that is not counted."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from calibrating import made, measured, plan_of, run, seen
from editing import edited_plan
from onnx_lowrank import PlanError, compress
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.documents import recipes
from onnx_lowrank.graph.parameters import parameters as counted
from onnx_lowrank.report.terminal import show
from rewriting import model

ROWS, FEATURES = 640, 8
TEXT = """g (int64[N,L] x) => (float[N,L,8] y) {
    e = Gather (w, x) h = MatMul (e, v) a = Tanh (h) y = MatMul (a, u) }"""


SPARSE = replace(recipes.load("activation"), sparse=True)


def weights(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"w": (ROWS, FEATURES), "v": (FEATURES, FEATURES), "u": (FEATURES, FEATURES)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def ids(seed=1, number=200):
    """Indices with the frequencies of words."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.zipf(1.6, (number, 6)) - 1, ROWS - 1)


def sparse(j):
    return Option(Fold.ENCODE, 1, j, Lowering.SPARSE)


def rewritten(proto, x, j=4):
    """What is made of a plan that changes the table only."""
    found = seen(proto)
    (table,) = (layer for layer in found.layers if layer.kept_per_rank)
    with measured(found, {"x": x}) as calibration:
        plan = plan_of(found, [sparse(j) if layer is table else None for layer in found.layers])
        return made(found, plan, calibration)


def read_back(built, x):
    """The rows of the table as the new model gives them."""
    proto = onnx.ModelProto()
    proto.CopyFrom(built.rewritten.model.proto)
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info("e", 1, None))
    return run(proto, x=x)


def test_rows_that_are_read_often_stay_as_they_are():
    proto, x = model(TEXT, **weights()), ids()
    built = rewritten(proto, x)
    onnx.checker.check_model(built.rewritten.model.proto, full_check=True)
    table = weights()["w"]
    fitted = x[np.arange(len(x)) % 5 != 4]
    often = np.argsort(-np.bincount(fitted.ravel(), minlength=ROWS))[:10]
    np.testing.assert_array_equal(read_back(built, often.reshape(-1, 1)), table[often].reshape(-1, 1, 8))
    never = np.arange(ROWS)[-6:].reshape(1, 6)
    assert 0.01 < np.abs(read_back(built, never) - table[never]).max() < 10
    assert [n.op_type for n in built.rewritten.model.proto.graph.node][:5] == [
        "Gather", "MatMul", "Gather", "Gather", "Add",
    ]  # fmt: skip


def test_the_error_told_is_that_of_the_held_out_rows():
    proto, x = model(TEXT, **weights()), ids()
    built = rewritten(proto, x)
    held, table = x[np.arange(len(x)) % 5 == 4], weights()["w"]
    lost = read_back(built, held) - table[held]
    (fit,) = built.fits.values()
    assert fit.error == pytest.approx(np.sum(lost**2) / np.sum(table[held].astype(np.float64) ** 2), rel=1e-4)


def test_kept_rows_err_less_than_a_larger_rank():
    proto, x = model(TEXT, **weights()), ids()
    found = seen(proto)
    with measured(found, {"x": x}) as calibration:
        low = made(found, plan_of(found, [Option(Fold.ENCODE, 1, 5), None, None]), calibration)
    kept = rewritten(proto, x, 4)
    assert counted(kept.rewritten.model) < counted(low.rewritten.model)
    new = ids(7)
    wanted = run(proto, x=new)
    errors = [np.linalg.norm(run(b.rewritten.model.proto, x=new) - wanted) for b in (kept, low)]
    assert 0 < errors[0] < 0.7 * errors[1]


FORMS = {
    "negative": lambda x: (model(TEXT, **weights()), x - ROWS),
    "int32": lambda x: (model(TEXT.replace("int64[N,L]", "int32[N,L]"), **weights()), x.astype(np.int32)),
    "views": lambda x: (
        model(TEXT.replace("e = Gather (w, x)", "f = Cast <to = 6> (x) i = Identity (f) e = Gather (w, i)"),
              **weights()),
        x,
    ),
    "stored as float16": lambda x: (
        model(TEXT.replace("e = Gather (w, x)", "c = Cast <to = 1> (w) e = Gather (c, x)"),
              **weights() | {"w": weights(dtype=np.float16)["w"]}),
        x,
    ),
    "looked up twice": lambda x: (
        model(TEXT.replace("h = MatMul (e, v)", "d = Gather (w, x) s = Add (e, d) h = MatMul (s, v)"),
              **weights()),
        x,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_look_up(name):
    proto, x = FORMS[name](ids())
    built = rewritten(proto, x)
    onnx.checker.check_model(built.rewritten.model.proto, full_check=True)
    often = np.full((1, 6), -ROWS if name == "negative" else 0, x.dtype)
    np.testing.assert_allclose(
        run(built.rewritten.model.proto, x=often), run(proto, x=often), rtol=1e-5, atol=1e-5
    )
    wanted, given = run(proto, x=x), run(built.rewritten.model.proto, x=x)
    assert 0 < np.linalg.norm(given - wanted) / np.linalg.norm(wanted) < 0.3


COMPUTED = {
    "computed": "i = Abs (x) e = Gather (w, i)",
    "constant": "i = Constant <value_ints = [0,1,2,3,4,5]> () d = Gather (w, i) f = Cast <to = 1> (x) "
    "q = Unsqueeze (f, last) e = Add (d, q)",
}


@pytest.mark.parametrize("name", COMPUTED)
def test_tables_whose_indices_are_no_input_keep_no_rows(name):
    proto = model(TEXT.replace("e = Gather (w, x)", COMPUTED[name]), **weights(), last=np.array([2]))
    found = seen(proto)
    with measured(found, {"x": ids()}) as calibration:
        assert not any(calibration.statistics.reference(layer.id).has_counts for layer in found.layers)


def test_small_tables_and_tied_ones_keep_no_rows():
    small = seen(model("g (int64[N] x) => (float[] y) { y = Gather (w, x) }", w=(40, 8)))
    text = "g (int64[N] x) => (float[] y) { e = Gather (w, x) y = Gemm <transB = 1> (e, w) }"
    tied = seen(model(text, w=(640, 8)))
    assert [layer.kept_per_rank for layer in (*small.layers, *tied.layers)] == [0, 0]


@pytest.mark.parametrize(
    ("features", "block", "step"), [(384, 1, 12), (384, 16, 16), (8, 1, 1), (2048, 8, 64)]
)
def test_about_32_ranks_are_tried(features, block, step):
    (layer,) = seen(model("g (int64[N] x) => (float[] y) { y = Gather (w, x) }", w=(40, 8))).layers
    assert replace(layer, f=features).sparse_step(block) == step


def compressed(ratio=0.7, **options):
    proto = model(TEXT, **weights())
    return proto, compress(proto, ratio, recipe=SPARSE, calibration={"x": ids()}, **options)


def lowerings(plan):
    return {choice.layer: choice.option and choice.option.lowering for choice in plan.choices}


def test_a_run_chooses_kept_rows_and_counts_them():
    proto, result = compressed()
    assert lowerings(result.plan)["w"] is Lowering.SPARSE
    stored = [t for t in result.model.proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    after = sum(numpy_helper.to_array(t).size for t in stored)
    totals = result.report.totals.amount("params")
    assert totals.after == after <= 0.7 * totals.before
    new = ids(9)
    wanted, given = run(proto, x=new), run(result.model.proto, x=new)
    assert 0 < np.linalg.norm(given - wanted) / np.linalg.norm(wanted) < 0.2


def test_the_table_of_layers_tells_the_kept_rows():
    _, result = compressed()
    (row,) = (row for row in result.report.layers if row.id == "w")
    console = Console(file=StringIO(), width=160)
    show(result.report, console)
    assert row.kept == row.option.j * (ROWS // (8 * FEATURES))
    assert f"{row.option.j} of 8, {row.kept} rows stay" in console.file.getvalue()


def test_a_dry_run_tells_the_same_figures():
    whole, dry = (compressed(dry_run=flag)[1].report for flag in (False, True))
    for figure in ("params", "macs"):
        assert whole.totals.amount(figure).after == dry.totals.amount(figure).after


def test_a_plan_is_replayed_to_the_same_bytes(tmp_path):
    proto, first = compressed()
    first.save_plan(tmp_path / "plan.json")
    again = compress(proto, plan=tmp_path / "plan.json", calibration={"x": ids()})
    assert again.model.proto.SerializeToString() == first.model.proto.SerializeToString()


def edited(tmp_path, **changes):
    proto, result = compressed()
    return proto, edited_plan(result, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w": {"k": 2}}, "'w' cannot be cut into k = 2 slices"),
        ({"w": {"j": 9}}, "cannot have rank j = 9: choose one between 1 and 8"),
        (
            {"v": {"fold": "encode", "k": 1, "j": 2, "lowering": "sparse"}},
            "'v' cannot be lowered as sparse: choose one of native",
        ),
        ({"budget": "bytes"}, "The plan keeps rows of tables, and the budget bytes does not count them"),
    ],
)
def test_wrong_plans_are_refused(tmp_path, changes, message):
    proto, plan = edited(tmp_path, **changes)
    with pytest.raises(PlanError, match=message):
        compress(proto, plan=plan, calibration={"x": ids()})


def test_without_inputs_nothing_shows_which_rows_stay(tmp_path):
    proto, plan = edited(tmp_path, factors="weights", recover=False)
    with pytest.raises(PlanError, match="needs inputs that show which are read: pass --calibration"):
        compress(proto, plan=plan)


@pytest.mark.parametrize("budget", ["bytes", "macs"])
def test_other_budgets_keep_no_rows(budget):
    _, result = compressed(0.9, budget=budget, input_shape={"x": (4, 6)})
    assert Lowering.SPARSE not in lowerings(result.plan).values()


def test_recipes_that_ship_keep_no_rows():
    assert not any(recipe.sparse for recipe in recipes.load_all())
    proto = model(TEXT, **weights())
    result = compress(proto, 0.7, recipe="activation", calibration={"x": ids()})
    assert Lowering.SPARSE not in lowerings(result.plan).values()
