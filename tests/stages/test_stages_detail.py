"""What a plan has chosen from, as the report tells it."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank import compress
from onnx_lowrank.report.content import LayerRow
from onnx_lowrank.report.report import Report
from tiny import cnn, weights

X = np.random.default_rng(0).standard_normal((40, 8, 6, 6)).astype(np.float32)


def rewritten(report: Report) -> list[LayerRow]:
    found = [row for row in report.layers if row.option is not None]
    assert found
    return found


@pytest.mark.parametrize("budget", ["params", "bytes"])
def test_the_curve_goes_through_the_choice_of_the_plan(budget: str) -> None:
    with compress(cnn(), 0.6, budget=budget) as result:
        for row, choice in zip(result.report.layers, result.plan.choices, strict=True):
            assert row.cost.after == choice.cost
            if choice.option is None:
                continue
            curve = row.detail.curve
            assert (curve.fold, curve.k) == (row.option.fold, row.option.k)
            at = dict(zip(curve.ranks, curve.errors, strict=True))
            assert at[row.option.j] == pytest.approx(row.error, rel=1e-4)
            assert row.cost.before > choice.cost


def test_the_values_are_the_singular_values_that_a_rank_leaves_out() -> None:
    with compress(cnn(), 0.6, recipe="svd") as result:
        row = rewritten(result.report)[0]
    weight = weights()[row.id]
    spectrum = np.linalg.svd(weight.reshape(len(weight), -1), compute_uv=False)
    curve = row.detail.curve
    assert (curve.fold, curve.k) == ("encode", 1)
    assert curve.values == pytest.approx([spectrum[min(rank, 15)] for rank in curve.ranks], rel=1e-4)


def test_alternatives_cost_more_where_they_err_less() -> None:
    with compress(cnn(), 0.6) as result:
        for row in rewritten(result.report):
            found = row.detail.alternatives
            assert 2 <= len(found) <= 10
            assert [a.cost for a in found] == sorted(a.cost for a in found)
            assert [a.error for a in found] == sorted((a.error for a in found), reverse=True)
            assert found[-1].cost < row.cost.before


@pytest.mark.parametrize("recipe", ["activation", "output"])
def test_a_calibrated_measure_has_errors_and_no_spectrum(recipe: str) -> None:
    with compress(cnn(), 0.7, recipe=recipe, calibration={"x": X}) as result:
        curves = [row.detail.curve for row in result.report.layers if row.detail.curve is not None]
    assert curves
    assert all(curve.errors and not curve.values for curve in curves)


def test_a_replayed_plan_and_a_dry_run() -> None:
    with compress(cnn(), 0.6, dry_run=True) as planned:
        assert rewritten(planned.report)[0].detail.alternatives
        assert planned.report.graph is None
        with compress(cnn(), plan=planned.plan) as result:
            assert all(row.detail.curve is None for row in result.report.layers)
            assert [row.cost.after for row in result.report.layers] == [c.cost for c in planned.plan.choices]
