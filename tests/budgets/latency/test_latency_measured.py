"""What is measured of a model's layers, and what is made of it: with recorded times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibrating import seen
from onnx_lowrank.allocate.cost import Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets.budget import Tools
from onnx_lowrank.budgets.latency import BUDGET, measured
from onnx_lowrank.budgets.latency.cache import Cache
from onnx_lowrank.budgets.latency.measured import Latency
from onnx_lowrank.budgets.latency.scene import Scene
from onnx_lowrank.budgets.latency.whole import Call
from onnx_lowrank.budgets.macs import known_macs, macs
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.probe.micro import micro, placeholder
from onnx_lowrank.rewrite.replace import rewrite
from rewriting import LOOP, model, named_bodies
from timing import Recorded, by_weights
from tiny import decaying

ENGINE = runtime("CPUExecutionProvider")
GRID = Grid(Linear(known_macs))
TWO = "g (float[5, 24] x) => (float[5, 16] y) { h = MatMul (x, w) y = MatMul (h, v) }"
X = {"x": np.ones((5, 24), np.float32)}


def two():
    return model(TWO, w=decaying(1, 24, 24), v=decaying(2, 24, 16))


def chain(blocks):
    """A model of matrices that are alike."""
    names = [f"w{index}" for index in range(blocks)]
    lines = " ".join(f"x{n + 1} = MatMul (x{n}, {name})" for n, name in enumerate(names))
    return model(
        f"g (float[5, 24] x0) => (float[5, 24] y) {{ {lines} y = Identity (x{blocks}) }}",
        **{name: decaying(index, 24, 24) for index, name in enumerate(names)},
    )


def errors(found):
    """Errors of all options, which fall with the rank and are larger with more slices."""
    return [
        {
            (fold, k): k * np.linspace(1, 0, layer.full_rank(fold, k) + 1) ** 2
            for fold in layer.folds
            for k in layer.slices
        }
        for layer in found.layers
    ]


def timed(proto, feed=None, cost=by_weights):
    found = seen(proto)
    name = proto.graph.input[0].name
    watch = Recorded(ENGINE, cost=cost)
    return found, Latency(BUDGET, (Scene(found, Call(feed or {name: X["x"]})),), watch), watch


def measure(found, latency, grid=GRID):
    latency.measure(errors(found), grid, lambda share=1.0: None)
    return tuple(latency.tariff(layer) for layer in found.layers)


def own(found, index=0, use=0):
    """The recorded time of a layer alone."""
    return by_weights(micro(found.walk, found.bindings[index], use).dense().proto)


def made(found, options):
    """The model with some layers rewritten, and nothing multiplied."""
    bindings = [binding for binding in found.bindings if binding.layer.id in options]
    replacements = [placeholder(b, options[b.layer.id], np.dtype(np.float32)) for b in bindings]
    return rewrite(found.model, found.walk, replacements).model


# --- what is measured -------------------------------------------------------------------------------


def test_the_model_and_its_layers_have_their_times():
    found, latency, _ = timed(two())
    assert latency.whole == by_weights(two())
    times = measure(found, latency)
    assert [of.keep for of in times] == [own(found, 0), own(found, 1)]
    assert [of.gain for of in times] == [1.0, 1.0]


def test_measured_options_take_their_recorded_times():
    found, latency, _ = timed(two())
    for binding, times in zip(found.bindings, measure(found, latency), strict=True):
        part = micro(found.walk, binding, 0)
        assert times.curves
        for (fold, k), curve in times.curves.items():
            for j in curve.ratios:
                option = Option(fold, k, j, curve.lowering)
                ((_, alone),) = part.chains().decomposed([option])
                assert times.cost(option) == by_weights(alone.proto)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_only_ranks_of_the_grid_are_measured(block):
    found, latency, _ = timed(two())
    grid = Grid(Linear(known_macs), block)
    for layer, times in zip(found.layers, measure(found, latency, grid), strict=True):
        for (fold, k), curve in times.curves.items():
            assert set(curve.ratios) <= set(grid.ranks(layer, fold, k))
            assert all(macs(layer, Option(fold, k, j)) < macs(layer) for j in curve.ratios)


def test_the_faster_operators_are_taken():
    """Slices as a batched MatMul have more nodes here than as a grouped Conv, or fewer: whichever is less."""
    found, latency, _ = timed(two())
    (times, *_) = measure(found, latency)
    part = micro(found.walk, found.bindings[0], 0)
    for (fold, k), curve in times.curves.items():
        if k == 1:
            continue
        both = [
            Option(fold, k, next(iter(curve.ratios)), lowering) for lowering in found.layers[0].lowerings(k)
        ]
        costs = {option.lowering: by_weights(alone.proto) for option, alone in part.chains().decomposed(both)}
        assert costs[curve.lowering] == min(costs.values())


@pytest.mark.parametrize("blocks", [2, 3, 6])
def test_layers_that_are_alike_are_measured_once(blocks):
    one_found, one_latency, one = timed(chain(1))
    measure(one_found, one_latency)
    found, latency, many = timed(chain(blocks))
    times = measure(found, latency)
    assert many.timed == one.timed
    assert len(times) == blocks
    assert all(of == times[0] for of in times)


def test_what_is_known_is_not_measured_again():
    found, latency, watch = timed(two())
    first = measure(found, latency)
    before = watch.timed
    assert measure(found, latency) == first
    assert watch.timed == before


def test_progress_ends_at_all():
    shares = []
    found, latency, _ = timed(two())
    latency.measure(errors(found), GRID, lambda share=1.0: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_the_uses_of_a_weight_are_added():
    proto = model(
        "g (float[5, 24] x, float[9, 24] z) => (float[5, 24] y, float[9, 24] u) "
        "{ y = MatMul (x, w) u = MatMul (z, w) }",
        w=decaying(1, 24, 24),
    )
    feed = X | {"z": np.ones((9, 24), np.float32)}
    found, latency, _ = timed(proto, feed)
    (times,) = measure(found, latency)
    assert times.keep == own(found, use=0) + own(found, use=1) == by_weights(proto)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_use_in_a_loop_takes_its_time_whenever_it_runs(count):
    proto = named_bodies(model(LOOP.replace("COUNT", str(count)), w=decaying(1, 24, 24)))
    found, latency, _ = timed(proto)
    (times,) = measure(found, latency)
    assert times.keep == count * own(found)
    option = Option(Fold.ENCODE, 1, 4)
    alone = latency.layers(options(found))[found.layers[0].id]
    assert (alone.before, alone.predicted) == (times.keep, times.cost(option))
    assert latency.predicted(options(found)) == max(1, latency.whole - times.keep + times.cost(option))


# --- what cannot be measured ------------------------------------------------------------------------


class Picky(Recorded):
    """Refuses layers of a size, alone."""

    def __init__(self, error, size):
        super().__init__(ENGINE)
        self.error, self.size = error, size

    def times(self, models, pace):
        for one, _ in models:
            dims = [list(tensor.dims) for tensor in one.proto.graph.initializer]
            if one.proto.graph.name == "layer" and self.size in dims:
                raise self.error("no")
        return super().times(models, pace)


@pytest.mark.parametrize("error", [UnsupportedError, RejectedError])
def test_a_layer_that_does_not_run_alone_is_left_out(error):
    found = seen(two())
    latency = Latency(BUDGET, (Scene(found, Call(X)),), Picky(error, [24, 16]))
    first, second = measure(found, latency)
    assert (first.keep, second.keep) == (own(found), 0)
    assert (bool(first.curves), second.curves) == (True, {})


@pytest.mark.parametrize("error", [UnsupportedError, RejectedError])
def test_a_weight_of_which_one_use_does_not_run_alone_is_left_out(error):
    proto = model(
        "g (float[5, 24] x) => (float[5, 24] y) "
        "{ h = MatMul (x, w) t = Transpose <perm = [1, 0]> (w) y = MatMul (h, t) }",
        w=decaying(1, 24, 16),
    )
    found = seen(proto)
    latency = Latency(BUDGET, (Scene(found, Call(X)),), Picky(error, [16, 24]))
    assert [(of.keep, of.curves) for of in measure(found, latency)] == [(0, {})]


@pytest.mark.parametrize("error", [UnsupportedError, RejectedError])
def test_a_model_that_does_not_run_is_told(error):
    class Refusing(Recorded):
        def times(self, models, pace):
            raise error("no")

    with pytest.raises(
        InputError, match=r"^To measure times the model has to run, and ONNX Runtime .* \(no\)"
    ):
        BUDGET.on(seen(two()), Tools(Refusing(ENGINE), X))


def test_made_inputs_have_the_shapes_that_were_asked_for():
    proto = model("g (float[N, 24] x) => (float[N, 16] y) { y = MatMul (x, v) }", v=decaying(2, 24, 16))
    for shown in ({}, X):
        latency = BUDGET.on(seen(proto), Tools(Recorded(ENGINE), shown, {"x": (7, 24)}))
        assert latency.timing({}, None).inputs == "x float32 7×24"


# --- what is learned --------------------------------------------------------------------------------


def options(found, j=4):
    return {layer.id: Option(Fold.ENCODE, 1, j) for layer in found.layers}


def test_a_prediction_adds_what_layers_save():
    found, latency, _ = timed(two())
    times = measure(found, latency)
    chosen = options(found, min(set(times[0].curves[Fold.ENCODE, 1].ratios) & {1}))
    saved = sum(of.keep - of.cost(option) for of, option in zip(times, chosen.values(), strict=True))
    assert latency.predicted(chosen) == latency.whole - saved == by_weights(made(found, chosen).proto)
    assert latency.predicted({}) == latency.whole


@pytest.mark.parametrize("share", [1.2, 1.0, 0.5, 0.0, -0.5])
def test_what_was_saved_is_predicted_from_then_on(share):
    found, latency, _ = timed(two())
    measure(found, latency)
    chosen = options(found)
    saved = latency.whole - latency.predicted(chosen)
    latency.learn(chosen, 1 - share * saved / latency.whole)
    assert latency.predicted(chosen) == pytest.approx(latency.whole - share * saved, abs=2)
    assert [of.gain for of in measure(found, latency)] == pytest.approx([share, share])


@pytest.mark.parametrize(("ratio", "gain"), [(-9.0, 1.5), (9.0, -1.0)])
def test_what_is_learned_has_bounds(ratio, gain):
    found, latency, _ = timed(two())
    measure(found, latency)
    latency.learn(options(found), ratio)
    assert [of.gain for of in measure(found, latency)] == [gain, gain]


def test_nothing_is_learned_of_options_of_which_nothing_is_known():
    found, latency, _ = timed(two())
    latency.learn(options(found), 0.5)
    assert [of.gain for of in measure(found, latency)] == [1.0, 1.0]


def test_only_rewritten_layers_are_learned_of():
    found, latency, _ = timed(two())
    measure(found, latency)
    first = dict([next(iter(options(found).items()))])
    latency.learn(first, 1.0)
    assert [of.gain for of in measure(found, latency)] == [0.0, 1.0]


def test_every_kind_is_corrected_on_its_own():
    found, latency, _ = timed(two())
    measure(found, latency)
    chosen = options(found)
    asked = []

    def ratio(some):
        asked.append(set(some))
        saved = latency.whole - latency.predicted(some)
        return 1 - (0.5 if "w" in some else 0.25) * saved / latency.whole

    shares = []
    latency.correct(chosen, ratio(chosen), ratio, shares.append)
    assert sorted(map(sorted, asked)) == [["v"], ["v", "w"], ["w"]]
    assert shares == [0.5, 1.0]
    assert [of.gain for of in measure(found, latency)] == pytest.approx([0.5, 0.25], rel=0.02)


def test_a_kind_that_saves_less_than_measurements_differ_by_saves_what_all_do():
    found, latency, _ = timed(two(), cost=lambda proto: by_weights(proto) * (1 if is_layer(proto) else 1000))
    measure(found, latency)
    latency.correct(options(found), 1 - 0.7 * latency._saving(options(found)), never, lambda _: None)
    assert [of.gain for of in measure(found, latency)] == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize("most", [0, 1, 2])
def test_so_many_kinds_are_measured_those_that_save_most(monkeypatch, most):
    monkeypatch.setattr(measured, "_JUDGED", most)
    found, latency, _ = timed(two())
    measure(found, latency)
    chosen = options(found)
    ordered = sorted(chosen, key=lambda layer: -latency._saving({layer: chosen[layer]}))
    asked = []
    latency.correct(chosen, 0.9, lambda some: asked.append(*some) or 1.0, lambda _: None)
    assert asked == ordered[:most]


def never(_):
    raise AssertionError("it should not be measured")


def is_layer(proto):
    return proto.graph.name == "layer"


@pytest.mark.parametrize("blocks", [2, 4])
def test_layers_that_are_alike_are_corrected_together(blocks):
    found, latency, _ = timed(chain(blocks))
    measure(found, latency)
    asked = []
    latency.correct(options(found), 0.8, lambda some: asked.append(set(some)) or 0.8, lambda _: None)
    assert asked == [{layer.id for layer in found.layers}]


# --- models against each other ----------------------------------------------------------------------


def test_the_ratio_of_another_model():
    found, latency, _ = timed(two())
    other = made(found, options(found))
    assert latency.ratio(other) == by_weights(other.proto) / by_weights(two())
    assert latency.pair(other) == (by_weights(two()), by_weights(other.proto))


@pytest.mark.parametrize(("warm", "ratio"), [(True, 0.5), (False, 0.9)])
def test_models_that_run_from_the_caches_are_timed_in_several_sessions(warm, ratio):
    """The median of their ratios counts."""
    found, latency, watch = timed(two())
    watch.warm = warm
    turns = iter([900, 500, 100])
    watch.times = lambda models, pace: [1000, next(turns)]
    assert latency.ratio(found.model) == ratio


@pytest.mark.parametrize(("after", "kept"), [(1300, True), (1301, False)])
def test_times_of_a_machine_with_other_work_are_not_kept(tmp_path, after, kept):
    found, latency, watch = timed(two())
    watch.cache = Cache(tmp_path / "times.sqlite")
    chosen = options(found)
    measure(found, latency)
    other = made(found, chosen)
    latency._ranges = [(1000, 1000)]
    watch.times = lambda models, pace: [after] + [500] * (len(models) - 1)
    timing = latency.timing(chosen, other)
    assert timing.is_steady == kept
    part = micro(found.walk, found.bindings[0], 0)
    key = part.chains().digest(chosen[found.layers[0].id])
    assert (Cache(tmp_path / "times.sqlite").get(part.key, key) is not None) == kept


def test_the_timing_of_a_model():
    found, latency, _ = timed(two())
    times = measure(found, latency)
    chosen = options(found, 1)
    other = made(found, chosen)
    timing = latency.timing(chosen, other)
    assert (timing.before, timing.after) == latency.pair(other)
    assert timing.predicted == latency.predicted(chosen)
    assert timing.layers.keys() == chosen.keys()
    for of, (layer, option) in zip(times, chosen.items(), strict=True):
        assert timing.layers[layer].before == of.keep
        assert timing.layers[layer].predicted == timing.layers[layer].after == of.cost(option)


def test_a_prediction_is_of_the_ratio_where_the_machine_became_slower():
    found, latency, watch = timed(two())
    measure(found, latency)
    chosen = options(found, 1)
    before = latency.timing(chosen, made(found, chosen))
    watch.cost = lambda proto: 3 * by_weights(proto)
    after = latency.timing(chosen, made(found, chosen))
    assert (after.before, after.predicted, after.after) == tuple(
        3 * time for time in (before.before, before.predicted, before.after)
    )


def test_options_that_were_not_planned_have_no_prediction():
    found, latency, _ = timed(two())
    chosen = options(found, 3)
    timing = latency.timing(chosen, made(found, chosen))
    assert timing.predicted is None
    assert [time.predicted for time in timing.layers.values()] == [None, None]
    for index, time in enumerate(timing.layers.values()):
        part = micro(found.walk, found.bindings[index], 0)
        ((_, alone),) = part.chains().decomposed([Option(Fold.ENCODE, 1, 3)])
        assert time.after == by_weights(alone.proto)


def test_layers_that_cannot_be_timed_alone_leave_no_prediction():
    found = seen(two())
    latency = Latency(BUDGET, (Scene(found, Call(X)),), Picky(UnsupportedError, [24, 16]))
    measure(found, latency)
    chosen = options(found, 1)
    timing = latency.timing(chosen, made(found, chosen))
    assert timing.layers.keys() == {"w"}
    assert timing.predicted is None
    assert latency.timing({}, found.model).predicted == latency.whole


def test_of_layers_that_are_alike_none_has_a_prediction_either():
    found, latency, _ = timed(chain(3))
    times = latency.timing(options(found, 3), made(found, options(found, 3))).layers.values()
    assert [time.predicted for time in times] == [None] * 3
    assert len({time.after for time in times}) == 1


def test_measuring_at_the_ranks_of_a_plan_changes_no_prediction():
    found, latency, _ = timed(chain(2))
    (times, _) = measure(found, latency)
    ranks = sorted(times.curves[Fold.ENCODE, 1].ratios)
    between = [rank for rank in range(ranks[0], ranks[-1]) if rank not in ranks][:2]
    chosen = {
        layer.id: Option(Fold.ENCODE, 1, rank) for layer, rank in zip(found.layers, between, strict=True)
    }
    expected = [times.cost(option) for option in chosen.values()]
    assert [time.predicted for time in latency.layers(chosen).values()] == expected


def test_lowerings_are_measured_at_their_own_ranks():
    found, latency, _ = timed(two())
    chosen = {"w": Option(Fold.ENCODE, 4, 2, Lowering.CONV)}
    native = {"w": replace(chosen["w"], lowering=Lowering.NATIVE)}
    one, other = (latency.layers(some)["w"].after for some in (chosen, native))
    part = micro(found.walk, found.bindings[0], 0)
    (_, conv), (_, own_one) = part.chains().decomposed([chosen["w"], native["w"]])
    assert (one, other) == (by_weights(conv.proto), by_weights(own_one.proto))
