"""Layers whose errors nothing shows: what is kept, what is measured, and what the user is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import onnx_lowrank
from calibrating import CPU, THREADS, made, measured, plan_of, run, seen
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets import registry
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.documents import recipes
from onnx_lowrank.errors import BudgetError
from onnx_lowrank.layers.find import read
from onnx_lowrank.progress import Silent
from onnx_lowrank.stages.score import Scores
from onnx_lowrank.work.fitting import activation_factors
from rewriting import model
from tied import FEATURES, ROWS, language_model, tokens

DATA_FREE = [recipe.name for recipe in recipes.load_all() if not recipe.calibrated]
ACTIVATION, OUTPUT = recipes.load("activation"), recipes.load("output")


def candidates(found, recipe, calibration=None):
    grid = Grid(registry.named("params").on(found))
    made_scores = Scores(found.model, found.walk, found.bindings, grid, THREADS, Silent(), calibration)
    return {table.layer: table for table in made_scores.candidates(replace(recipe, price=None))}


# --- without calibration --------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_kept_without_calibration(name, tied):
    tables = candidates(seen(language_model(tied=tied)), recipes.load(name))
    head = tables["table" if tied else "t"]
    assert (head.cost.size, head.option(0)) == (1, None)
    assert "output head" in head.reason
    assert "--calibration" in head.reason
    assert all(table.cost.size > 1 and not table.reason for table in tables.values() if table is not head)


def test_a_layer_as_wide_as_the_table_of_positions_is_no_head():
    proto = model(
        """g (int64[N,5] i, int64[N,5] j) => (float[] y) {
            a = Gather (t, i) b = Gather (u, j) c = Add (a, b) d = MatMul (c, w) y = Relu (d) }""",
        t=(60, 12), u=(24, 12), w=(12, 24),
    )  # fmt: skip
    assert candidates(seen(proto), recipes.load("schatten"))["w"].cost.size > 1


@pytest.mark.parametrize("recipe", ["schatten", "alds"])
def test_a_ratio_that_only_the_head_could_reach_is_refused_with_the_reason(recipe):
    with pytest.raises(BudgetError) as refused:
        onnx_lowrank.compress(language_model(), ratio=0.2, recipe=recipe)
    text = str(refused.value)
    assert "'table' is kept, as the table is an output head, too" in text
    assert "--calibration" in text
    smallest = refused.value.smallest_ratio
    with onnx_lowrank.compress(language_model(), ratio=smallest, recipe=recipe) as result:
        assert result.report.reached <= smallest


# --- with calibration -----------------------------------------------------------------------------


def test_the_error_of_a_tied_table_is_that_of_its_factors_at_both_uses(monkeypatch):
    for module in ("quadratic", "tied"):
        monkeypatch.setattr(f"onnx_lowrank.linalg.{module}.shrinkage", lambda moments, least=0.0: 0.0)
    found, x = seen(language_model()), tokens()
    with measured(found, x) as calibration:
        table = candidates(found, ACTIVATION, calibration)["table"]
        moments = calibration.statistics["table"]
        texts = [batch.feed["i"] for batch in calibration.varied.batches(99) if not batch.held]
    binding = next(b for b in found.bindings if b.layer.id == "table")
    weight = read(found.model, found.walk, binding).astype(np.float64)
    rows = weight[0].T
    fit = x[np.arange(len(x)) % 5 != 4].ravel()
    features = _features(found.model.proto, np.concatenate(texts))
    assert table.cost.size > 4
    for pick in range(1, table.cost.size):
        option = table.option(pick)
        factors = activation_factors(weight, option, moments, CPU, centred=False, steps=0)
        lost = rows - (factors.decoder.reshape(FEATURES, -1) @ factors.encoder.reshape(-1, ROWS)).T
        of_rows = np.sum(lost[fit] ** 2) / np.sum(rows[fit] ** 2)
        of_head = np.sum((features @ lost.T) ** 2) / np.sum((features @ rows.T) ** 2)
        assert table.error[pick] == pytest.approx(of_rows + of_head, rel=1e-4)


def _features(proto, x):
    """What the head reads, in float64."""
    weights = {tensor.name: np.array(onnx_array(tensor), np.float64) for tensor in proto.graph.initializer}
    e = weights["table"][x.ravel()]
    return e + np.maximum(e @ weights["w1"], 0) @ weights["w2"]


def onnx_array(tensor):
    import onnx

    return onnx.numpy_helper.to_array(tensor)


@pytest.mark.parametrize("recipe", [ACTIVATION, OUTPUT], ids=["activation", "output"])
def test_a_tied_table_does_not_pay_for_the_other_layers(recipe):
    found = seen(language_model())
    with measured(found, tokens()) as calibration:
        tables = candidates(found, recipe, calibration)
    assert all(table.cost.size > 1 and not table.reason for table in tables.values())


@pytest.mark.parametrize("j", [FEATURES, FEATURES // 2])
def test_a_tied_table_is_rewritten_at_both_uses(j):
    found, x = seen(language_model()), tokens()
    option = Option(Fold.ENCODE, 1, j)
    plan = plan_of(found, [option if layer.id == "table" else None for layer in found.layers])
    with measured(found, x) as calibration:
        built = made(found, plan, calibration)
    wanted, got = run(found.model.proto, i=x), run(built.rewritten.model.proto, i=x)
    error = np.linalg.norm(wanted - got) / np.linalg.norm(wanted)
    (fit,) = built.fits.values()
    if j == FEATURES:
        assert error < 1e-5
        assert fit.error == pytest.approx(0, abs=1e-9)
    else:
        assert error < 0.5
        assert 0 < fit.error < 0.5


def test_a_whole_run_of_a_language_model():
    with onnx_lowrank.compress(
        language_model(), ratio=0.8, calibration={"i": tokens(60)}, recipe="output"
    ) as result:
        assert result.report.reached <= 0.8
        assert result.report.validation.worst < 0.5
