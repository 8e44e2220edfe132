"""Layers that change together under a latency budget: narrower pairs, smaller heads, shared encoders."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import attending
import test_narrow
import test_share
from calibrating import run, seen
from onnx_lowrank import BudgetError, PlanError, compress
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets.budget import Tools
from onnx_lowrank.budgets.latency import BUDGET
from onnx_lowrank.budgets.latency.scene import Scene
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.engines.engine import RejectedError
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.stages.settling import _NOISE
from packing import packed
from rewriting import model
from timing import Recorded, by_weights


def shape(kind, features):
    shapes = {"conv": (4, 8, 6, 6), "left": (features, 4), "turned": (features, 4)}
    return {"x": shapes.get(kind, (4, features))}


def narrowed(kind, ratio=0.5, **options):
    return test_narrow.narrowed(
        kind, ratio, budget="latency", align=1, input_shape=shape(kind, 24), recover=False, **options
    )


def shared(kind, ratio=None, **options):
    return test_share.shared(
        kind, ratio, budget="latency", align=1, input_shape=shape(kind, 32), recover=False, **options
    )


def chosen(result):
    return {choice.layer: choice.option for choice in result.plan.choices if choice.option is not None}


@pytest.mark.parametrize("kind", test_narrow.BODIES)
def test_a_pair_is_narrowed_and_keeps_the_ratio_of_the_time(kind):
    proto, result = narrowed(kind)
    assert chosen(result)["down"].lowering is Lowering.NARROW
    assert result.report.reached <= 0.5
    time = result.report.totals.amount("time")
    assert (time.before, time.after) == (by_weights(proto), by_weights(result.proto))
    x = test_narrow.inputs(kind, seed=2)
    wanted, given = run(proto, x=x), run(result.proto, x=x)
    assert np.linalg.norm(given - wanted) < 3e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", ["mlp", "gated", "gemm", "left"])
def test_the_time_of_a_narrow_layer_has_the_savings_of_its_partners(kind):
    """Biases between the layers get smaller, too, but stand apart and count as they are."""
    proto, result = narrowed(kind)
    option = chosen(result)["down"]
    partners = 2 if kind == "gated" else 1
    saved = (partners + 1) * test_narrow.FEATURES * (test_narrow.COPIES - option.j)
    # The micro model of a Gemm holds its bias.
    saved += (test_narrow.COPIES - option.j) if kind == "gemm" else 0
    (time,) = (time for layer, time in result.report.timing.layers.items() if layer == "down")
    assert time.before - time.after == pytest.approx(saved, abs=2)
    whole = by_weights(proto) - by_weights(result.proto)
    others = [time for layer, time in result.report.timing.layers.items() if layer != "down"]
    beside = sum(time.before - time.after for time in others)
    biases = (test_narrow.COPIES - option.j) if kind in ("mlp", "left") else 0
    assert whole == pytest.approx(saved + beside + biases, abs=4)


@pytest.mark.parametrize("kind", test_share.BODIES)
def test_siblings_share_an_encoder_and_keep_the_ratio_of_the_time(kind):
    ratio = 0.55 if kind != "conv" else 0.33
    proto, result = shared(kind, ratio)
    assert {option.lowering for option in chosen(result).values()} == {Lowering.SHARED}
    assert result.report.reached <= ratio
    x = test_share.inputs(kind, seed=2)
    assert test_share.distance(run(proto, x=x), run(result.proto, x=x)) < 1e-5
    timing = result.report.timing
    saved = sum(time.before - time.after for time in timing.layers.values())
    assert saved == pytest.approx(timing.before - timing.after, abs=4)


@pytest.mark.parametrize("name", ["values", "scores"])
def test_heads_get_smaller(name):
    include = {"values": ("wv", "wo"), "scores": ("wq", "wk")}[name]
    proto = attending.bert()
    result = compress(
        proto,
        0.85,
        recipe="activation",
        calibration=attending.inputs(),
        budget="latency",
        align=1,
        include=include,
        input_shape={"x": (2, 6, 24), "mask": (2, 1, 1, 6)},
        recover=False,
    )
    (option,) = chosen(result).values()
    assert option.lowering is Lowering.NARROW
    assert result.report.reached <= 0.85


# --- what is learned ----------------------------------------------------------------------------------


@pytest.fixture
def inside(monkeypatch):
    """Let whole models take other times than their layers do alone."""

    def inside(rule):
        def cost(proto):
            return by_weights(proto) if proto.graph.name == "layer" else max(1, round(rule(proto)))

        monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", partial(Recorded, cost=cost))

    return inside


def sizes(proto):
    return {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}


@pytest.mark.parametrize("share", [0.6, 0.8, 1.2])
def test_the_ratio_is_kept_where_a_pair_saves_something_else_in_the_model(inside, share):
    dense = by_weights(model(test_narrow.MLP, **test_narrow.weights("mlp")))
    inside(lambda proto: dense - share * (dense - by_weights(proto)))
    _, result = narrowed("mlp", 0.7)
    assert result.report.reached <= 0.7 + _NOISE


def test_a_pair_that_loses_time_in_the_model_is_put_back(inside):
    """Its layers get chains of their own, which keep the names of their weights' widths."""
    proto = model(test_narrow.MLP, **test_narrow.weights("mlp"))
    dense = by_weights(proto)

    def cost(made):
        is_narrow = any("narrow" in name for name in sizes(made))
        return by_weights(made) + (dense if is_narrow else 0)

    inside(cost)
    _, result = narrowed("mlp", 0.9)
    assert chosen(result)
    assert Lowering.NARROW not in {option.lowering for option in chosen(result).values()}


def measured(proto, narrow=(), siblings=()):
    """The budget on a model some of whose layers were measured together."""
    shapes = {"x": (4, seen(proto).layers[0].c)}
    found = find_layers(load(proto), shapes, (), ())
    latency = BUDGET.on(found, Tools(Recorded(runtime("CPUExecutionProvider")), shapes=shapes))
    layers = {layer.id: layer for layer in found.layers}
    grid = Grid(latency, 1)
    latency.measure_together([layers[n] for n in narrow], [layers[n] for n in siblings], grid, lambda _: None)
    return layers, latency


def correct(latency, options, share):
    """Correct predictions by models that save a share of the predicted; returns the parts that were asked."""
    asked = []

    def ratio(part):
        asked.append(set(part))
        return 1 - share * (1 - latency.predicted(part) / latency.total)

    latency.correct(options, ratio(options), ratio, lambda _: None)
    return asked[1:]


def test_layers_that_share_an_encoder_are_judged_together():
    proto = model(test_share.ATTENTION, **test_share.weights("attention"))
    layers, latency = measured(proto, siblings=test_share.WEIGHTS)
    options = {name: Option(Fold.ENCODE, 1, 8, Lowering.SHARED, "wq") for name in layers}
    before = latency.predicted(options)
    assert correct(latency, options, 0.5) == [set(test_share.WEIGHTS)]
    assert latency.total - latency.predicted(options) == pytest.approx((latency.total - before) / 2, rel=0.05)
    chain = {"wq": Option(Fold.ENCODE, 1, 8)}
    assert latency.predicted(chain) == latency.total - (32 * 24 - 8 * (32 + 24) - 10)


def test_a_pair_and_the_chains_of_its_layers_are_judged_apart():
    proto = model(test_narrow.MLP, **test_narrow.weights("mlp"))
    layers, latency = measured(proto, narrow=["down"])
    pair = {"down": Option(Fold.ENCODE, 1, 30, Lowering.NARROW)}
    assert latency.predicted(pair) == latency.total - 2 * 24 * 30
    assert latency.kinds(pair).isdisjoint(latency.kinds({name: Option(Fold.ENCODE, 1, 4) for name in layers}))
    correct(latency, pair, 0.5)
    assert latency.total - latency.predicted(pair) == pytest.approx(24 * 30, rel=0.05)
    assert latency.tariff(layers["down"]).gain == 1.0


def test_a_pair_of_which_a_layer_cannot_be_timed_keeps_its_width(monkeypatch):
    class Picky(Recorded):
        def times(self, models, pace):
            for one, _ in models:
                dims = [tuple(tensor.dims) for tensor in one.proto.graph.initializer]
                if one.proto.graph.name == "layer" and (24, 60) in dims:
                    raise RejectedError("no")
            return super().times(models, pace)

    monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", Picky)
    _, result = narrowed("mlp", 0.9)
    assert Lowering.NARROW not in {option.lowering for option in chosen(result).values()}


@pytest.mark.parametrize("layer", ["w", "wo"])
def test_pairs_of_a_packed_matrix_keep_their_width_where_one_cannot_be_timed(monkeypatch, layer):
    resized = Scene.resized

    def picky(scene, name, f, c):
        return iter(()) if name == layer else resized(scene, name, f, c)

    monkeypatch.setattr(Scene, "resized", picky)
    result = compress(
        packed("unbound"),
        0.9,
        recipe="activation",
        calibration=attending.inputs(),
        budget="latency",
        align=1,
        input_shape={"x": (2, 6, attending.D), "mask": (2, 1, 1, 6)},
        recover=False,
    )
    assert result.report.reached <= 0.9
    assert Lowering.NARROW not in {option.lowering for option in chosen(result).values()}


# --- plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [partial(narrowed, "mlp"), partial(shared, "attention", 0.55)])
def test_a_plan_is_replayed_to_the_byte(tmp_path, make):
    proto, result = make()
    result.save_plan(tmp_path / "plan.json")
    source = test_narrow if chosen(result).keys() & {"down"} else test_share
    kind = "mlp" if source is test_narrow else "attention"
    again = compress(
        proto,
        plan=tmp_path / "plan.json",
        calibration={"x": source.inputs(kind)},
        input_shape=shape(kind, 24 if kind == "mlp" else 32),
    )
    assert again.proto == result.proto
    times = {layer: time.after for layer, time in result.report.timing.layers.items()}
    assert {layer: time.after for layer, time in again.report.timing.layers.items()} == times


def test_a_budget_that_does_not_count_shared_encoders_refuses_them(tmp_path, monkeypatch):
    proto, result = shared("attention", 0.55)
    result.save_plan(tmp_path / "plan.json")
    monkeypatch.setattr(type(BUDGET), "shares", frozenset())
    with pytest.raises(PlanError, match="budget latency does not count them"):
        compress(proto, plan=tmp_path / "plan.json", calibration={"x": test_share.inputs("attention")})


def test_the_same_run_gives_the_same_plan():
    assert narrowed("gated")[1].plan == narrowed("gated")[1].plan
    assert shared("attention", 0.55)[1].plan == shared("attention", 0.55)[1].plan


def test_a_ratio_below_the_narrowest_is_told():
    with pytest.raises(BudgetError) as caught:
        narrowed("mlp", 0.01)
    assert caught.value.exit_code == 3
    assert 0.01 < caught.value.smallest_ratio < 0.5


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.1, 0.9)])
def test_several_sets_of_shapes_count_by_their_weights(weights):
    proto = model(test_narrow.MLP, **test_narrow.weights("mlp"))
    result = compress(
        proto,
        0.5,
        recipe="activation",
        calibration={"x": test_narrow.inputs("mlp")},
        budget="latency",
        align=1,
        input_shape=[{"x": (4, 24)}, {"x": (1, 24)}],
        weights=weights,
        recover=False,
    )
    assert chosen(result)["down"].lowering is Lowering.NARROW
    assert result.report.reached <= 0.5
    assert len(result.report.timing.calls) == 2
