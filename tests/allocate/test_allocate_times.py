"""Times between the measured ranks, and what is worth measuring."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from evaluated import evaluated
from onnx_lowrank.allocate.cost import Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.options import candidates
from onnx_lowrank.allocate.times import (
    WORTHWHILE,
    Curve,
    Narrowed,
    Shared,
    Times,
    by_promise,
    faster,
    middle_rank,
    sampled,
    worth_measuring,
)
from onnx_lowrank.budgets.macs import known_macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe

KEY = (Fold.ENCODE, 1)
SEEDS = range(20)


def measured(seed, *, rising):
    """Ratios at some of the ranks up to 40."""
    rng = np.random.default_rng(seed)
    ranks = np.sort(rng.choice(np.arange(1, 41), int(rng.integers(1, 9)), replace=False))
    ratios = rng.uniform(0.1, 1.4, len(ranks))
    return dict(zip(ranks.tolist(), (np.sort(ratios) if rising else ratios).tolist(), strict=True))


def closest_rising(values):
    """The closest numbers that do not fall, by the formula of minima and maxima of means."""
    return [
        max(min(np.mean(values[a : b + 1]) for b in range(t, len(values))) for a in range(t + 1))
        for t in range(len(values))
    ]


# --- one curve --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_measured_ranks_have_the_measured_times(seed):
    ratios = measured(seed, rising=True)
    assert Curve(ratios).at(list(ratios)).tolist() == pytest.approx(list(ratios.values()), rel=1e-12)


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_times_never_fall_between_the_measured_ranks(seed, rising):
    ratios = measured(seed, rising=rising)
    at = Curve(ratios).at(range(min(ratios), max(ratios) + 1))
    assert (np.diff(at) >= -1e-12).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_measurements_that_fall_give_way_to_the_closest_that_rise(seed):
    ratios = measured(seed, rising=False)
    assert Curve(ratios).at(list(ratios)) == pytest.approx(closest_rising(list(ratios.values())))


@pytest.mark.parametrize(
    ("rank", "ratio"),
    [(0, 1.0), (3, 1.0), (4, 0.2), (5, 0.25), (6, 0.3), (8, 0.4), (10, 0.6), (12, 0.8), (13, 1.0)],
)
def test_between_them_they_are_linear_and_beyond_them_the_layers_own(rank, ratio):
    assert Curve({12: 0.8, 4: 0.2, 8: 0.4}).at([rank])[0] == pytest.approx(ratio)


def test_one_measurement_says_nothing_of_other_ranks():
    assert Curve({8: 0.5}).at([7, 8, 9]).tolist() == [1.0, 0.5, 1.0]


def test_ranks_may_be_an_array_or_none_at_all():
    curve = Curve({2: 0.2, 4: 0.4})
    assert curve.at(np.array([2, 3, 4])).tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert curve.at([]).shape == (0,)


# --- one layer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "cost"), [(1.0, 400), (0.5, 700), (0.0, 1000), (-0.5, 1300), (1.5, 100), (0.25, 850)]
)
def test_the_gain_scales_what_an_option_saves(gain, cost):
    times = Times(1000, {KEY: Curve({3: 0.4})}, gain)
    assert times.cost(Option(*KEY, 3)) == cost
    assert times.cost(None) == times.keep == 1000


@pytest.mark.parametrize("gain", [1.5, 1.0, 0.5, 0.0, -1.0])
def test_what_loses_alone_loses_as_much_in_the_model(gain):
    """Where options save less than they do alone, or lose, those that lose even alone do not save."""
    assert Times(1000, {KEY: Curve({3: 1.4})}, gain).cost(Option(*KEY, 3)) == 1400


@pytest.mark.parametrize("gain", [1.5, 1.0, 0.0, -1.0])
@pytest.mark.parametrize("ratio", [1e6, 1e9, 1e18, 1e300, np.inf, np.nan])
@pytest.mark.parametrize("keep", [1, 1000, 10**15, 2**62])
def test_what_is_slow_beyond_measure_never_looks_cheap(keep, ratio, gain):
    times = Times(keep, {KEY: Curve({3: 0.4, 8: ratio})}, gain)
    assert times.cost(Option(*KEY, 8)) == min(10**6 * keep, 2**62)
    assert times.cost(Option(*KEY, 3)) == Times(keep, {KEY: Curve({3: 0.4})}, gain).cost(Option(*KEY, 3))
    assert (np.diff(times.costs(*KEY, np.arange(3, 9))) >= 0).all()


@pytest.mark.parametrize("gain", [1.0, 0.5, -1.0])
@pytest.mark.parametrize(
    "option", [Option(Fold.ENCODE, 2, 3), Option(Fold.DECODE, 1, 3), Option(*KEY, 2), Option(*KEY, 9)]
)
def test_what_was_not_measured_takes_as_long_as_the_layer(option, gain):
    assert Times(1000, {KEY: Curve({3: 0.4, 8: 0.9})}, gain).cost(option) == 1000


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gain", [1.0, 0.6])
def test_one_option_costs_what_it_costs_among_others(seed, gain):
    times = Times(10**9, {KEY: Curve(measured(seed, rising=False))}, gain)
    ranks = np.arange(1, 45)
    costs = times.costs(*KEY, ranks)
    assert costs.dtype == np.int64
    assert [times.cost(Option(*KEY, int(rank))) for rank in ranks] == costs.tolist()


def test_a_layer_that_takes_no_time_saves_none():
    assert Times(0, {}).costs(*KEY, np.array([1, 2])).tolist() == [0, 0]


# --- two ways to write a chain ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("native", "other", "wins"),
    [
        ({1: 0.5}, {1: 0.4}, Lowering.MATMUL),
        ({1: 0.4}, {1: 0.5}, Lowering.NATIVE),
        ({1: 0.5}, {1: 0.5}, Lowering.NATIVE),
        ({1: 0.5}, {2: 0.1}, Lowering.NATIVE),
        ({1: 0.5, 2: 0.6, 9: 9.0}, {1: 0.4, 2: 0.8}, Lowering.NATIVE),
        ({1: 0.5, 2: 0.6}, {1: 0.6, 2: 0.4, 9: 9.0}, Lowering.MATMUL),
    ],
)
def test_the_faster_way_is_that_at_the_ranks_measured_for_both(native, other, wins):
    assert faster(Curve(native), Curve(other, Lowering.MATMUL)).lowering is wins


# --- which to measure -------------------------------------------------------------------------------


def field(seed):
    """Errors that fall with the rank, ranks, and the times of the middle ranks, of some decompositions."""
    rng = np.random.default_rng(seed)
    keys = [(fold, k) for fold in Fold for k in (1, 2, 4)]
    errors = {key: np.sort(rng.uniform(0, 1, 25))[::-1] for key in keys}
    ranks = {key: range(block, int(rng.integers(block + 1, 25)), block) for key in keys for block in (1, 2)}
    return errors, ranks, {key: float(rng.uniform(0.05, 1.5)) for key in keys}


def predicted(middle, ranks, key, rank):
    return middle[key] * (0.2 + 0.8 * rank / middle_rank(ranks[key]))


@pytest.mark.parametrize("slack", [1.0, 0.85, 0.5])
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_best_at_some_time_is_measured(seed, slack):
    errors, ranks, middle = field(seed)
    points = [(predicted(middle, ranks, key, j), errors[key][j], key) for key in ranks for j in ranks[key]]
    best = {
        key
        for time, error, key in points
        if time < 1 and not any(other < time and less < error for other, less, _ in points)
    }
    assert best <= set(worth_measuring(errors, ranks, middle, slack))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_best_at_no_time_even_if_it_were_faster_is_not(seed):
    errors, ranks, middle = field(seed)
    kept = worth_measuring(errors, ranks, middle, 0.85)
    points = [(predicted(middle, ranks, key, j), errors[key][j], key) for key in ranks for j in ranks[key]]
    for key in set(ranks) - set(kept):
        for time, error, own in points:
            if own == key:
                beaten = any(other < 0.85 * time and less < error for other, less, _ in points)
                assert beaten or 0.85 * time >= 1
    assert len(kept) == len(set(kept))


@pytest.mark.parametrize(
    ("points", "kept"),
    [
        ({"a": (0.5, 0.2), "b": (0.5, 0.3)}, "ab"),
        ({"a": (0.5, 0.2), "b": (0.58, 0.3)}, "ab"),  # within the slack
        ({"a": (0.5, 0.2), "b": (0.6, 0.3)}, "a"),
        ({"a": (0.5, 0.2), "b": (0.6, 0.1)}, "ab"),
        ({"a": (0.9, 0.3), "b": (0.1, 0.2)}, "b"),
        ({"a": (0.9, 0.2), "b": (0.1, 0.2)}, "b"),  # no better, and later
        ({"a": (3.0, 0.1), "b": (1.2, 0.1)}, ""),
        ({"a": (1.1, 0.2)}, "a"),
        ({"a": (0.5, 0.2)}, "a"),
        ({}, ""),
    ],
)
def test_the_dominated_are_dropped(points, kept):
    keys = {"a": (Fold.ENCODE, 1), "b": (Fold.DECODE, 1)}
    errors = {keys[name]: np.array([1.0, 0.5, error]) for name, (_, error) in points.items()}
    middle = {keys[name]: time for name, (time, _) in points.items()}
    found = worth_measuring(errors, dict.fromkeys(keys.values(), range(2, 3)), middle)
    assert {name for name, key in keys.items() if key in found} == set(kept)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_most_promising_have_the_least_error_at_half_the_time(seed):
    errors, ranks, middle = field(seed)

    def at_half(key):
        within = [j for j in ranks[key] if middle[key] * j / middle_rank(ranks[key]) <= 0.5 + 1e-12]
        return errors[key][max(within)] if within else np.inf

    order = by_promise(ranks, errors, ranks, middle)
    assert sorted(order) == sorted(ranks)
    assert [at_half(key) for key in order] == sorted(map(at_half, ranks))


def test_without_errors_nothing_is_measured():
    assert worth_measuring({}, {KEY: range(1, 3)}, {KEY: 0.1}) == []


@pytest.mark.parametrize(
    ("count", "few"), [(1, [8]), (2, [8, 16]), (3, [8, 16, 24]), (4, [8, 24, 32]), (400, [8, 1608, 3200])]
)
def test_sampled_ranks_span_all(count, few):
    ranks = range(8, 8 * count + 1, 8)
    assert sampled(ranks) == few
    assert middle_rank(ranks) in few


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_first_try_is_one_of_the_ranks(count):
    ranks = range(4, 4 * count + 1, 4)
    assert middle_rank(ranks) in ranks
    assert abs(ranks.index(middle_rank(ranks)) - (count - 1) / 2) <= 0.5


# --- candidates -------------------------------------------------------------------------------------


def layer():
    use = Use("", 0, "n", "Conv", 1, rank=4, positions=Positions(1, (6, 6), (6, 6)))
    return evaluated(Layer("w", "Conv", 24, 16, (3, 3), 1, "float32", tuple(Fold), (1, 2, 4), (use,)))


def recipe(aggregate=Aggregate.SUM, price=None):
    return Recipe("r", "For the tests.", tuple(Fold), None, aggregate=aggregate, price=price)


def random_times(of, seed, gain=1.0):
    rng = np.random.default_rng(seed)
    curves = {}
    for key in [(fold, k) for fold in of.folds for k in of.slices]:
        if rng.random() < 0.8:
            top = of.full_rank(*key)
            ranks = sorted({1, top, int(rng.integers(1, top + 1))})
            ratios = np.sort(rng.uniform(0.2, 1.5, len(ranks)))
            lowering = list(Lowering)[int(rng.integers(3))]
            curves[key] = Curve(dict(zip(ranks, ratios.tolist(), strict=True)), lowering)
    return Times(10_000, curves, gain)


@dataclass
class Timed:
    """Costs that are measured, of one layer."""

    times: Times

    def line(self, layer, fold, k):
        return Linear(known_macs).line(layer, fold, k)

    def tariff(self, layer):
        return self.times


def falling(of):
    return {
        (fold, k): np.linspace(1, 0, of.full_rank(fold, k) + 1) ** 2 for fold in of.folds for k in of.slices
    }


@pytest.mark.parametrize("gain", [1.0, 0.3, -0.5])
@pytest.mark.parametrize("aggregate", Aggregate)
@pytest.mark.parametrize("seed", range(5))
def test_no_candidate_takes_more_than_is_worthwhile(seed, aggregate, gain):
    of = layer()
    times = random_times(of, seed, gain)
    table = candidates(of, falling(of), recipe(aggregate), Grid(Timed(times)))
    assert table.cost[0] == times.keep
    assert table.option(0) is None
    assert (table.cost[1:] < WORTHWHILE * times.keep).all()
    if gain <= 0:
        assert table.cost.size == 1
    for index in range(1, table.cost.size):
        option = table.option(index)
        assert option.lowering is times.curves[option.fold, option.k].lowering
        assert times.cost(option) == table.cost[index]


@pytest.mark.parametrize("seed", range(5))
def test_no_candidate_is_missing(seed):
    """Uniform recipes look at all of them."""
    of = layer()
    times, grid = random_times(of, seed), Grid(Timed(random_times(of, seed)))
    table = candidates(of, falling(of), recipe(Aggregate.UNIFORM), grid)
    wanted = {
        (fold, k, j)
        for fold in of.folds
        for k in of.slices
        for j in grid.ranks(of, fold, k)
        if times.cost(Option(fold, k, j)) < WORTHWHILE * times.keep
    }
    found = {table.option(index) for index in range(1, table.cost.size)}
    assert {(option.fold, option.k, option.j) for option in found} == wanted


@pytest.mark.parametrize(("ratio", "count"), [(0.96, 1), (0.969, 1), (0.97, 0), (0.98, 0), (1.2, 0)])
def test_the_edge_of_what_is_worthwhile(ratio, count):
    of = layer()
    times = Times(1000, {KEY: Curve({3: ratio})})
    table = candidates(of, falling(of), recipe(), Grid(Timed(times)))
    assert table.cost.size == 1 + count


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_layer_of_which_nothing_is_measured_has_no_option(keep):
    of = layer()
    table = candidates(of, falling(of), recipe(), Grid(Timed(Times(keep, {}))))
    assert table.cost.tolist() == [keep]


@pytest.mark.parametrize("price", [Linear(parameters), Linear(known_macs)])
def test_a_price_is_counted_beside_the_time(price):
    of = layer()
    times = random_times(of, 3)
    table = candidates(of, falling(of), recipe(), Grid(Timed(times)), price)
    plain = candidates(of, falling(of), recipe(Aggregate.UNIFORM), Grid(price))
    prices = {plain.option(index): int(plain.cost[index]) for index in range(1, plain.cost.size)}
    assert table.price is not None
    for index in range(1, table.cost.size):
        option = table.option(index)
        assert table.price[index] == prices[Option(option.fold, option.k, option.j)]
        assert table.cost[index] == times.cost(option)


# --- layers that change together ----------------------------------------------------------------------


def narrowed(gain=1.0):
    """Two partners and a layer that take 100, 60 and 40 at their full width, 8."""
    curves = (Curve({2: 0.5, 8: 1.0}), Curve({2: 0.25, 8: 1.0}), Curve({2: 0.5, 8: 1.0}))
    return Narrowed((100, 60, 40), curves, gain)


WIDTHS = np.array([0, 1, 2, 5, 7])


@pytest.mark.parametrize(
    ("gain", "left"),
    [
        (1.0, [(100, 60, 40), (100, 60, 40), (50, 15, 20), (75, 38, 30), (92, 52, 37)]),
        (0.5, [(100, 60, 40), (100, 60, 40), (75, 38, 30), (88, 49, 35), (96, 56, 38)]),
    ],
)
def test_members_take_what_was_measured_and_a_line_between(gain, left):
    found = np.stack(narrowed(gain).members(WIDTHS), axis=1)
    assert np.abs(found - np.array(left)).max() <= 1


def test_a_pair_costs_what_its_layer_does_less_what_all_save():
    times = Times(40, {}, narrowed=narrowed())
    way = Option(Fold.ENCODE, 1, 1, Lowering.NARROW)
    members = np.sum(times.members(WIDTHS), axis=0)
    assert list(times.together(way, WIDTHS[2:])) == list(40 - (200 - members[2:]))
    assert times.cost(replace(way, j=2)) == 40 - (50 + 45 + 20)
    assert times.knows(way)


@pytest.mark.parametrize(("ratio", "saved"), [(0.98, 0), (0.96, 8)])
def test_a_pair_that_saves_little_saves_nothing(ratio, saved):
    curve = Curve({4: ratio, 8: 1.0})
    times = Times(100, {}, narrowed=Narrowed((100, 100), (curve, curve)))
    assert times.cost(Option(Fold.ENCODE, 1, 4, Lowering.NARROW)) == 100 - saved


def test_the_first_layer_that_shares_an_encoder_has_its_time():
    times = Times(100, {}, shared=Shared("a", Curve({2: 0.4, 4: 0.6}), Curve({2: 0.1, 4: 0.3}), 0.5))
    way = Option(Fold.ENCODE, 1, 2, Lowering.SHARED, "a")
    assert list(times.together(way, np.array([2, 3, 4]))) == [70, 75, 80]
    assert [times.cost(replace(way, j=j, encoder="b")) for j in (2, 3, 4)] == [55, 60, 65]
    assert times.knows(way)


@pytest.mark.parametrize("lowering", [Lowering.NARROW, Lowering.SHARED])
def test_layers_that_were_not_measured_together_save_nothing_so(lowering):
    times = Times(100, {})
    way = Option(Fold.ENCODE, 1, 2, lowering, "a" if lowering is Lowering.SHARED else "")
    assert times.cost(way) == 100
    assert not times.knows(way)


def test_several_layers_are_cheaper_if_all_together_are():
    times = Times(10, {})
    assert list(times.is_cheaper(np.array([95, 97, 98]), 100)) == [True, False, False]
