from itertools import product

import numpy as np
import pytest

from evaluated import evaluated
from onnx_lowrank.allocate.cost import Linear, allowed
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.options import candidates
from onnx_lowrank.budgets.macs import known_macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import InputError
from onnx_lowrank.measures import Evidence, named

PARAMS, MACS = Linear(parameters), Linear(known_macs)

ALL = tuple(Fold)
STRIDED = Positions(1, (9, 9), (5, 5))


def layer(f=12, c=8, kernel=(3, 3), groups=1, positions=STRIDED, **fields):
    use = Use("", 0, "node", "Conv", 1, positions=positions)
    slices = tuple(k for k in range(1, c // groups + 1) if c // groups % k == 0)
    folds = ALL if kernel == (3, 3) else (Fold.ENCODE,)
    return evaluated(Layer("w", "Conv", f, c, kernel, groups, "float32", folds, slices, (use,), **fields))


def recipe(folds=ALL, groups=None, **fields):
    return Recipe("test", "A test.", folds, groups, **fields)


def spectra_of(weight, of, wanted):
    """Slice along input channels, fold, SVD: the definition."""
    axes = {
        Fold.ENCODE: ((0,), (1, 2, 3)),
        Fold.ROWS: ((0, 2), (1, 3)),
        Fold.COLS: ((0, 3), (1, 2)),
        Fold.DECODE: ((0, 2, 3), (1,)),
    }
    out = {}
    for fold, ks in wanted.items():
        left, right = axes[fold]
        for k in ks:
            out[fold, k] = np.array(
                [
                    [
                        np.linalg.svd(
                            part.transpose(*left, *right).reshape(of.matrix(fold, k)), compute_uv=False
                        )
                        for part in np.split(group, k, axis=1)
                    ]
                    for group in weight
                ]
            )
    return out


def error_of(spectra, option, measure, relative):
    """The error by the definition of the measure, one value at a time."""
    values = spectra[option.fold, option.k]
    tails = [slice_[option.j :] for group in values for slice_ in group]
    if measure in ("spectral", "spectral-bound"):
        error = max(tail[0] for tail in tails)
        norm = max(group[0][0] for group in spectra[option.fold, 1])
        error *= option.k**0.5 if measure == "spectral-bound" else 1
    elif measure == "schatten":
        error = sum(value**4 for tail in tails for value in tail) ** 0.25
        norm = (spectra[option.fold, 1] ** 4).sum() ** 0.25
    else:
        power = 2 if measure == "frobenius" else 1
        error = sum(value**power for tail in tails for value in tail)
        norm = (values**power).sum()
    return error / norm if relative else error


def table_of(of, spectra, how, budget):
    """The candidates by the recipe's measure of the weight."""
    errors = named(how.measure).errors(Evidence(spectra), relative=how.relative)
    return candidates(of, errors, how, Grid(budget), MACS if how.price == "macs" else None)


OF_WEIGHTS = ("spectral", "spectral-bound", "frobenius", "nuclear", "schatten")
CASES = [
    (measure, relative, groups, seed)
    for measure, relative in product(OF_WEIGHTS, (True, False))
    for groups in (1, 2)
    for seed in range(3)
]


@pytest.mark.parametrize(("measure", "relative", "groups", "seed"), CASES)
def test_every_option_is_listed_with_its_cost_and_error(measure, relative, groups, seed):
    rng = np.random.default_rng(seed)
    of = layer(groups=groups, added=3, freed=5)
    how = recipe(measure=measure, relative=relative, aggregate=Aggregate.UNIFORM)
    wanted = Grid(PARAMS).wanted_spectra(of, how)
    spectra = spectra_of(rng.standard_normal(of.shape), of, wanted)
    table = table_of(of, spectra, how, PARAMS)
    kept = parameters(of)
    expected = [
        option
        for fold, ks in allowed(of, how).items()
        for k in ks
        for option in (Option(fold, k, j) for j in range(1, of.full_rank(fold, k)))
        if parameters(of, option) < kept
    ]
    assert (table.layer, table.option(0), table.cost[0], table.error[0]) == ("w", None, kept, 0)
    assert [table.option(n) for n in range(1, table.cost.size)] == expected
    assert len(expected) > 20
    assert table.cost[1:].tolist() == [parameters(of, option) for option in expected]
    assert table.full[1:].tolist() == [of.full_rank(option.fold, option.k) for option in expected]
    errors = [error_of(spectra, option, measure, relative) for option in expected]
    np.testing.assert_allclose(table.error[1:], errors, rtol=6e-9, atol=0)
    assert table.error.tolist() == [float(f"{error:.8e}") for error in table.error]
    assert table.cost.dtype == np.int64
    assert table.error.dtype == np.float64
    assert table.price is None


@pytest.mark.parametrize("seed", range(40))
def test_the_front_is_what_nothing_beats(seed):
    rng = np.random.default_rng(seed)
    of = layer(c=[8, 6, 12][seed % 3])
    how, every = recipe(), recipe(aggregate=Aggregate.UNIFORM)
    # Few distinct values make ties in cost and in error.
    spectra = {
        (fold, k): -np.sort(-rng.integers(1, 9, (1, k, of.full_rank(fold, k))) / 8.0, axis=-1)
        for fold, ks in Grid(PARAMS).wanted_spectra(of, how).items()
        for k in ks
    }
    full = table_of(of, spectra, every, PARAMS)
    rows = sorted(
        (int(full.cost[n]), float(full.error[n]), ALL.index(option.fold), option.k, option.j)
        for n in range(1, full.cost.size)
        if (option := full.option(n))
    )
    expected = [row for n, row in enumerate(rows) if all(row[1] < other[1] for other in rows[:n])]
    table = table_of(of, spectra, how, PARAMS)
    found = [
        (int(table.cost[n]), float(table.error[n]), ALL.index(option.fold), option.k, option.j)
        for n in range(1, table.cost.size)
        if (option := table.option(n))
    ]
    assert found == expected
    assert table.option(0) is None


def test_differences_beyond_nine_digits_decide_nothing():
    of = layer(kernel=(1, 1), f=16, c=16)
    values = np.linspace(1, 0.5, 16)[None, None]
    how = recipe(groups=(1,))
    noise = np.random.default_rng(0).uniform(1 - 1e-13, 1 + 1e-13, values.shape)
    one = table_of(of, {(Fold.ENCODE, 1): values}, how, PARAMS)
    two = table_of(of, {(Fold.ENCODE, 1): values * noise}, how, PARAMS)
    assert one.error.tolist() == two.error.tolist()
    assert one.error[1] == float(f"{values[0, 0, 1]:.8e}")


@pytest.mark.parametrize("scale", [1e-160, 1e-30, 1.0, 1e30, 1e160])
def test_absolute_errors_of_any_size_are_rounded_to_nine_digits(scale):
    of = layer(kernel=(1, 1), f=16, c=16)
    values = scale * np.linspace(1, 1 / 3, 16)[None, None]
    table = table_of(of, {(Fold.ENCODE, 1): values}, recipe(groups=(1,), relative=False), PARAMS)
    np.testing.assert_allclose(table.error[1:], values[0, 0, table.j[1:]], rtol=5e-9, atol=0)


@pytest.mark.parametrize("measure", OF_WEIGHTS)
@pytest.mark.parametrize("relative", [True, False])
def test_an_all_zero_weight_loses_nothing_at_rank_one(measure, relative):
    of = layer()
    how = recipe(measure=measure, relative=relative)
    wanted = Grid(PARAMS).wanted_spectra(of, how)
    table = table_of(of, spectra_of(np.zeros(of.shape), of, wanted), how, PARAMS)
    assert table.error.tolist() == [0, 0]
    # rows: 1·(12·3 + 8·3) is the cheapest of all.
    assert table.option(1) == Option(Fold.ROWS, 1, 1)


def test_a_planted_rank_shows_in_the_tail():
    of = layer(kernel=(1, 1), f=16, c=16)
    values = np.concatenate([[4.0, 3.0, 2.0, 1.0], np.full(12, 1e-12)])[None, None]
    for measure, before, behind in (
        ("spectral", 1 / 4, 2.5e-13),
        ("nuclear", 1 / 10, 1.2e-12),
        ("frobenius", 1 / 30, 12e-24 / 30),
        ("schatten", 354**-0.25, 12**0.25 * 1e-12 / 354**0.25),
    ):
        how = recipe(groups=(1,), measure=measure, aggregate=Aggregate.UNIFORM)
        table = table_of(of, {(Fold.ENCODE, 1): values}, how, PARAMS)
        assert table.error[3] == pytest.approx(before, rel=1e-8)
        assert table.error[4] == pytest.approx(behind, rel=1e-8, abs=0)


def test_groups_without_one_use_its_spectrum_for_the_norm_only():
    of = layer(kernel=(1, 1), f=16, c=16)
    spectra = {(Fold.ENCODE, 1): np.full((1, 1, 16), 10.0), (Fold.ENCODE, 2): np.full((1, 2, 8), 4.0)}
    table = table_of(of, spectra, recipe(groups=(2,), aggregate=Aggregate.UNIFORM), PARAMS)
    assert set(table.k[1:].tolist()) == {2}
    assert table.error[1] == 0.4


def test_a_layer_without_options_is_kept():
    of = layer(f=1, c=8, kernel=(1, 1))
    table = table_of(of, {}, recipe(), PARAMS)
    assert (table.cost.tolist(), table.error.tolist(), table.option(0)) == ([8], [0], None)


def test_prices_are_the_costs_of_the_other_budget_and_decide_the_front():
    of = layer()
    how = recipe(price="macs", aggregate=Aggregate.SUM, measure="frobenius")
    rng = np.random.default_rng(0)
    spectra = spectra_of(rng.standard_normal(of.shape), of, Grid(PARAMS).wanted_spectra(of, how))
    table = table_of(of, spectra, how, PARAMS)
    choices = [table.option(n) for n in range(table.cost.size)]
    assert table.cost.tolist() == [parameters(of, choice) for choice in choices]
    assert table.price.tolist() == [known_macs(of, choice) for choice in choices]
    assert (np.diff(table.price[1:]) > 0).all()
    assert (np.diff(table.error[1:]) < 0).all()


def test_unknown_macs_are_an_error_where_they_are_needed():
    of = layer(kernel=(1, 1), positions=None)
    spectra = {(Fold.ENCODE, k): np.ones((1, k, 8 // k)) for k in of.slices}
    assert table_of(of, spectra, recipe(), PARAMS).cost[0] == 96
    with pytest.raises(InputError, match="--input-shape"):
        table_of(of, spectra, recipe(), MACS)
    with pytest.raises(InputError, match="--input-shape"):
        table_of(of, spectra, recipe(price="macs"), PARAMS)
