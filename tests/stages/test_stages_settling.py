"""Plans under a latency budget where the model saves something else than its layers do alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from onnx.numpy_helper import to_array

from onnx_lowrank import BudgetError, compress
from onnx_lowrank.engines.engine import RejectedError
from onnx_lowrank.progress import Silent
from onnx_lowrank.stages import settling
from onnx_lowrank.stages.settling import _NOISE
from timing import Recorded, by_weights
from tiny import built, cnn, decaying

SHAPE = {"x": (2, 8, 6, 6)}
DENSE = by_weights(cnn())
HELD = 1e-9 + _NOISE


def alone(proto):
    """Whether a model is one layer's."""
    return proto.graph.name == "layer"


def is_rewritten(proto, weight):
    return weight not in {tensor.name for tensor in proto.graph.initializer}


def inside(rule):
    """A cost of layers by their weights, and of whole models by another rule."""
    return lambda proto: by_weights(proto) if alone(proto) else max(1, round(rule(proto)))


def is_random(proto):
    """Whether a model has the factors with which plans are timed: none is negative."""
    new = [to_array(tensor) for tensor in proto.graph.initializer if "encoder" in tensor.name]
    return bool(new) and all((array > 0).all() for array in new if array.dtype.kind == "f")


def saving(share):
    """In the model this share is saved of what its weights save."""
    return inside(lambda proto: DENSE - share * (DENSE - by_weights(proto)))


@pytest.fixture
def run(monkeypatch):
    """Compress under a rule of times; alignment is not of this machine."""

    def run(cost, ratio=None, proto=None, **options):
        monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", partial(Recorded, cost=cost))
        if "plan" not in options:
            options = {"budget": "latency", "align": 1} | options
        return compress(proto or cnn(), ratio, input_shape=SHAPE, **options)

    return run


def rewritten(result):
    return {choice.layer for choice in result.plan.choices if choice.option is not None}


@pytest.fixture
def planned(monkeypatch):
    """The plans that are made on the way, by what they rewrite."""
    made = []
    make = settling.planning.make

    def recorded(*arguments):
        plan = make(*arguments)
        made.append(settling.options(plan))
        return plan

    monkeypatch.setattr(settling.planning, "make", recorded)
    return made


@pytest.mark.parametrize("ratio", [0.95, 0.9, 0.75, 0.6, 0.45, 0.3])
def test_a_prediction_that_holds_is_taken_at_once(run, planned, ratio):
    result = run(by_weights, ratio)
    assert result.report.reached <= ratio
    assert result.report.totals.amount("time").after == by_weights(result.proto)
    assert len(planned) == 1 or ratio - result.report.reached > settling._UNUSED
    assert result.report.warnings == ()


@pytest.mark.parametrize("recipe", ["schatten", "alds", "svd"])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("ratio", [0.9, 0.8])
def test_where_less_is_saved_the_ratio_is_kept_nevertheless(run, planned, share, ratio, recipe):
    result = run(saving(share), ratio, recipe=recipe)
    assert result.report.reached <= ratio + HELD
    assert len(planned) > 1 or share == 0.9
    assert not any("above" in warning for warning in result.report.warnings)


@pytest.mark.parametrize("share", [0.6, 0.8, 1.0, 1.2, 1.4])
@pytest.mark.parametrize("ratio", [0.9, 0.8])
def test_what_was_measured_of_a_plan_is_its_prediction(run, share, ratio):
    timing = run(saving(share), ratio).report.timing
    assert timing.predicted == pytest.approx(timing.after, rel=2e-3)
    layers = timing.layers.values()
    saved = sum(layer.before - layer.predicted for layer in layers)
    assert saved == pytest.approx(timing.before - timing.predicted, rel=2e-2)


@pytest.mark.parametrize("share", [1.1, 1.3, 1.5])
@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.7])
def test_where_more_is_saved_less_is_given_up(run, share, ratio):
    plain, more = run(by_weights, ratio), run(saving(share), ratio)
    assert more.report.reached <= ratio + HELD
    assert more.plan.solver.objective <= plain.plan.solver.objective
    assert by_weights(more.proto) >= by_weights(plain.proto)


@pytest.mark.parametrize(("loser", "ratio"), [("conv1", 0.7), ("conv2", 0.9)])
@pytest.mark.parametrize("loss", [0, 3000])
def test_a_kind_of_layer_that_loses_in_the_model_is_kept(run, loser, ratio, loss):
    def cost(proto):
        return by_weights(proto) + (loss + DENSE if is_rewritten(proto, loser) else 0)

    result = run(inside(cost), ratio)
    assert result.report.reached <= ratio + HELD
    assert rewritten(result)
    assert loser not in rewritten(result)
    (row,) = (row for row in result.report.layers if row.id == loser)
    assert row.reason == "no option of the recipe, at ranks in multiples of --align, is clearly faster"


@pytest.mark.parametrize("share", [0.0, -0.2, -3.0])
def test_a_model_that_does_not_become_faster_cannot_be_made(run, share):
    with pytest.raises(BudgetError, match=r"^The ratio 0\.9 of latency cannot be reached") as caught:
        run(saving(share), 0.9)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(
        "The ratio 0.9 of latency cannot be reached for model on ONNX Runtime CPUExecutionProvider, "
        "all threads: the fastest that was measured is "
    )
    assert caught.value.smallest_ratio == 1


@pytest.mark.parametrize("ratio", [0.6, 0.5])
def test_an_unreachable_ratio_is_told_with_the_fastest_that_was_measured(run, ratio):
    with pytest.raises(BudgetError) as caught:
        run(saving(0.4), ratio)
    assert caught.value.exit_code == 3
    fastest = caught.value.smallest_ratio
    assert ratio < fastest < 1
    assert str(caught.value).endswith(
        f"the fastest that was measured is {fastest:.3f}, so raise the ratio or choose another --budget."
    )


@pytest.mark.parametrize("ratio", [0.01, 0.001])
def test_a_ratio_that_not_even_the_layers_reach_is_told_with_the_fastest(run, ratio):
    with pytest.raises(BudgetError, match=r"cannot be reached.*the fastest that was measured is") as caught:
        run(by_weights, ratio)
    assert caught.value.exit_code == 3
    result = run(by_weights, caught.value.smallest_ratio)
    assert result.report.reached <= caught.value.smallest_ratio


@pytest.mark.parametrize("share", [1.2, 1.4])
def test_a_ratio_that_the_layers_alone_do_not_reach_may_be_reached_in_the_model(run, share):
    with pytest.raises(BudgetError) as caught:
        run(by_weights, 0.01, include=["conv2"])
    smallest = caught.value.smallest_ratio
    ratio = 1 - share * (1 - smallest) + 0.001
    assert 0 < ratio < smallest
    assert run(saving(share), ratio, include=["conv2"]).report.reached <= ratio + HELD


def test_a_model_that_fails_with_random_factors_is_taken_as_predicted(run, monkeypatch):
    class Failing(Recorded):
        def times(self, models, pace):
            if any(not alone(model.proto) and is_random(model.proto) for model, _ in models):
                raise RejectedError("no")
            return super().times(models, pace)

    monkeypatch.setattr("test_stages_settling.Recorded", Failing)
    result = run(by_weights, 0.6)
    assert result.report.reached <= 0.6
    assert result.report.timing.after == by_weights(result.proto)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_ratio_1_rewrites_nothing(run, share):
    result = run(saving(share), 1.0)
    assert not rewritten(result)
    assert result.report.reached == 1


def test_a_dry_run_settles_the_same_plan(run):
    one, other = (run(saving(0.7), 0.8, dry_run=dry) for dry in (False, True))
    assert one.plan == other.plan
    assert other.report.timing.after is None
    assert other.report.reached == pytest.approx(one.report.reached, abs=0.03)


def test_layers_are_timed_in_one_stage_for_all_plans(run, planned):
    class Stages(Silent):
        names = []  # noqa: RUF012

        def stage(self, name, total=None):
            self.names.append(name)
            return super().stage(name, total)

    run(saving(0.5), 0.8, progress=Stages())
    assert len(planned) > 1
    assert Stages.names.count("time layers") == 1
    assert Stages.names.count("time the plan") == len(planned) + 1  # the one that is taken, once more


def test_settling_gives_the_same_plan_every_time(run):
    assert run(saving(0.7), 0.8).plan == run(saving(0.7), 0.8).plan


def test_a_plan_that_other_work_has_slowed_down_is_measured_again(run, planned):
    """The first time that a plan is timed it seems too slow; after others it comes again."""
    seen = []

    def cost(proto):
        time = by_weights(proto)
        if alone(proto) or time == DENSE:
            return time
        seen.append(time)
        return round(1.1 * time) if len(seen) == 1 else time

    plain = run(by_weights, 0.8)
    disturbed = run(inside(cost), 0.8)
    assert disturbed.report.reached <= 0.8 + HELD
    assert disturbed.plan.solver.objective <= 1.2 * plain.plan.solver.objective


def test_a_plan_that_held_by_luck_is_not_taken(run):
    """The first look at a plan shows it faster than it is."""
    seen = []

    def cost(proto):
        time = DENSE - 0.7 * (DENSE - by_weights(proto))
        if alone(proto) or by_weights(proto) == DENSE:
            return by_weights(proto)
        seen.append(time)
        return 0.9 * time if len(seen) == 1 else time

    result = run(inside(cost), 0.8)
    assert result.report.reached <= 0.8 + HELD
    assert not any("above" in warning for warning in result.report.warnings)


def test_a_plan_that_holds_is_taken_although_no_layer_gains_alone(run):
    """Measured alone, either layer loses in the model; together they keep within the ratio."""

    def cost(proto):
        both = is_rewritten(proto, "conv1") and is_rewritten(proto, "conv2")
        return 0.8 * by_weights(proto) if both else by_weights(proto) + DENSE * (by_weights(proto) != DENSE)

    result = run(inside(cost), 0.4, include=["conv1", "conv2"])
    assert rewritten(result) == {"conv1", "conv2"}
    assert result.report.reached <= 0.4 + HELD


def test_only_a_plan_for_the_ratio_itself_is_called_optimal(run):
    with pytest.raises(BudgetError) as caught:
        run(by_weights, 0.01, include=["conv2"])
    ratio = 1 - 1.2 * (1 - caught.value.smallest_ratio) + 0.001
    assert run(saving(1.2), ratio, include=["conv2"]).plan.solver is None
    assert run(by_weights, 0.8).plan.solver.gap == 0


# --- what loses in the finished model -----------------------------------------------------------------


def is_finished(proto):
    """Whether a model is compressed, with the factors that it is written with."""
    return not alone(proto) and by_weights(proto) != DENSE and not is_random(proto)


@pytest.mark.parametrize(("loser", "ratio"), [("conv2", 0.9), ("conv1", 0.7)])
@pytest.mark.parametrize("calibration", [None, {"x": np.ones((8, 8, 6, 6), np.float32)}])
def test_a_layer_that_loses_in_the_finished_model_alone_is_put_back(run, loser, ratio, calibration):
    def cost(proto):
        return by_weights(proto) + (2 * DENSE if is_finished(proto) and is_rewritten(proto, loser) else 0)

    plain = run(by_weights, ratio, calibration=calibration, recipe="schatten")
    assert loser in rewritten(plain)
    result = run(inside(cost), ratio, calibration=calibration, recipe="schatten")
    assert rewritten(result)
    assert loser not in rewritten(result)
    assert result.report.reached <= ratio + HELD
    assert not any("times as long" in warning for warning in result.report.warnings)


def test_where_every_layer_loses_in_the_finished_model_none_is_made(run):
    with pytest.raises(BudgetError) as caught:
        run(inside(lambda proto: 2 * DENSE if is_finished(proto) else by_weights(proto)), 0.9)
    assert caught.value.exit_code == 3
    assert caught.value.smallest_ratio > 0.9


def test_a_model_that_is_slower_for_no_layer_s_sake_is_told_with_its_fastest_time(run):
    def cost(proto):
        is_whole = is_rewritten(proto, "conv1") and is_rewritten(proto, "conv2")
        return by_weights(proto) + (2 * DENSE if is_finished(proto) and is_whole else 0)

    with pytest.raises(BudgetError, match=r"^The compressed model takes .* of the time of model") as caught:
        run(inside(cost), 0.4)
    assert caught.value.smallest_ratio == 1


# --- merging ------------------------------------------------------------------------------------------

ROWS = """
<ir_version: 8, opset_import: ["": 17]>
g (float[4, 32] x) => (float[4, 32] y) { h = MatMul (x, one)  y = MatMul (h, two) }
"""


def is_merged(proto):
    return any("_merged" in tensor.name for tensor in proto.graph.initializer)


def pair():
    return built(ROWS, {name: decaying(seed, 32, 32) for seed, name in enumerate(("one", "two"))})


@pytest.fixture
def merged(monkeypatch):
    """Compress a model of two adjacent matrices, in which their product takes some time more."""

    def merged(more=0, ratio=0.8, proto=None, **options):
        def cost(proto):
            return by_weights(proto) + (more if is_merged(proto) else 0)

        monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", partial(Recorded, cost=cost))
        return compress(proto or pair(), ratio, **options)

    return merged


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5])
@pytest.mark.parametrize(("more", "multiplied"), [(0, True), (1000, False)])
def test_adjacent_operators_are_multiplied_where_that_is_faster(merged, ratio, more, multiplied):
    result = merged(more, ratio, budget="latency", align=1)
    assert result.report.reached <= ratio + HELD
    assert result.plan.merge == multiplied
    assert bool(result.report.merges) == is_merged(result.proto) == multiplied


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_budgets_that_count_always_multiply(merged, budget):
    result = merged(5000, 0.5, budget=budget)
    assert result.plan.merge
    assert result.report.merges


@pytest.mark.parametrize(("more", "multiplied"), [(0, True), (1000, False)])
def test_a_replayed_plan_multiplies_where_it_was_faster_when_it_was_made(merged, tmp_path, more, multiplied):
    result = merged(more, 0.6, budget="latency", align=1)
    result.save_plan(tmp_path / "plan.json")
    replayed = merged(1000 - more, None, plan=tmp_path / "plan.json")
    assert bool(replayed.report.merges) == multiplied
    assert replayed.proto == result.proto


def test_a_tie_is_multiplied_as_the_model_is_smaller(merged):
    apart = merged(1000, 0.7, budget="latency", align=1)
    gap = by_weights(apart.proto) - by_weights(merged(0, None, plan=replace(apart.plan, merge=True)).proto)
    assert gap > 0
    tied = merged(gap, 0.7, budget="latency", align=1)
    assert tied.plan.merge
    assert tied.report.merges
