"""The errors of all options against those of the factors that they make."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from calibrating import CPU, THREADS, measured, seen
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets import registry
from onnx_lowrank.calibrate.sensitivity import Sensitivities
from onnx_lowrank.documents import recipes
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import error, of_weight
from onnx_lowrank.measures.output import predicted
from onnx_lowrank.progress import Silent
from onnx_lowrank.stages import effects as probing
from onnx_lowrank.stages.score import Scores
from onnx_lowrank.work import scoring as module
from onnx_lowrank.work.fitting import activation_factors
from onnx_lowrank.work.weights import reference
from rewriting import model
from tiny import cnn

CALIBRATED = [r for r in recipes.load_all() if r.calibrated and r.price is None and r.folds]
ACTIVATION, OUTPUT = recipes.load("activation"), recipes.load("output")
FOUND = seen(cnn())
X = (np.random.default_rng(0).standard_normal((30, 8, 6, 6)) * np.linspace(0.2, 2, 8)[:, None, None]).astype(
    np.float32
)


@pytest.fixture(scope="module")
def calibration():
    with measured(FOUND, X) as taken:
        yield taken


def scores(calibration, found=FOUND):
    grid = Grid(registry.named("params").on(found))
    return Scores(found.model, found.walk, found.bindings, grid, THREADS, Silent(), calibration)


def test_the_activation_errors_are_those_of_the_factors(calibration, monkeypatch):
    """On the inputs that are fitted to, with the ridge left out of both."""
    monkeypatch.setattr("onnx_lowrank.work.moments.shrinkage", lambda moments, least=0.0: 0.0)
    checked = 0
    for binding, table in zip(FOUND.bindings, scores(calibration).candidates(ACTIVATION), strict=True):
        moments = replace(calibration.statistics[binding.layer.id], held=None)
        weight = reference(FOUND.model, FOUND.walk, binding).read()
        centred = bias(FOUND.model, FOUND.walk, binding) is not None
        judge = of_weight(weight, moments.inputs, centred=centred, ridge=0.0)
        assert np.all((table.error >= 0) & (table.error <= 1))
        for pick in range(1, table.cost.size, 3):
            option = table.option(pick)
            factors = activation_factors(weight, option, moments, CPU, centred=centred, steps=0)
            assert table.error[pick] == pytest.approx(error(judge, compose(factors)), rel=1e-3, abs=1e-7)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("recipe", CALIBRATED, ids=lambda recipe: recipe.name)
def test_a_dearer_option_has_a_smaller_error(calibration, recipe):
    for table in scores(calibration).candidates(recipe):
        order = np.argsort(table.cost[1:], kind="stable")
        assert np.all(np.diff(table.error[1:][order]) < 0), "the others are no candidates"
        assert table.error[0] == 0


def test_absolute_errors_are_relative_ones_times_the_power_of_the_outputs(calibration):
    made = scores(calibration)
    relative, absolute = (made.candidates(replace(ACTIVATION, relative=flag)) for flag in (True, False))
    powers = []
    for binding, one, other in zip(FOUND.bindings, relative, absolute, strict=True):
        inputs = calibration.statistics[binding.layer.id].inputs
        weight = reference(FOUND.model, FOUND.walk, binding).read()
        centred = bias(FOUND.model, FOUND.walk, binding) is not None
        power = of_weight(weight, inputs, centred=centred, ridge=0.0).power.sum()
        np.testing.assert_allclose(other.error[1:], one.error[1:] * power, rtol=0.2)
        powers.append(power)
    assert max(powers) > 2 * min(powers)


def test_nothing_is_computed_twice(calibration, monkeypatch):
    made, calls = scores(calibration), []
    for name in ("errors", "spectra"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, real=real, name=name, **kw: (calls.append(name), real(*args, **kw))[1]
        )
    measure = probing.sensitivity.measure
    monkeypatch.setattr(
        probing.sensitivity, "measure", lambda *args, **kw: (calls.append("measure"), measure(*args, **kw))[1]
    )
    first = [made.candidates(recipe) for recipe in (OUTPUT, ACTIVATION, recipes.load("schatten"))]
    assert {"errors", "spectra", "measure"} == set(calls)
    assert calls.count("measure") == 1
    number = len(calls)
    again = [made.candidates(recipe) for recipe in (OUTPUT, ACTIVATION, recipes.load("power"))]
    assert len(calls) == number
    for one, other in zip(first[:2], again[:2], strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a.error, b.error)


def test_layers_measured_by_their_outputs_are_computed_once(monkeypatch):
    """Moments of outputs serve one decomposition; the others stay without errors, however often one asks."""
    with measured(FOUND, X, memory=200_000) as taken:
        kinds = [taken.statistics[layer.id].outputs is not None for layer in FOUND.layers]
        assert sum(kinds) == 2
        assert not taken.statistics.reasons
        made, calls, real = scores(taken), [], module.output_errors
        monkeypatch.setattr(
            module, "output_errors", lambda *args, **kw: (calls.append(0), real(*args, **kw))[1]
        )
        first = made.candidates(ACTIVATION)
        assert len(calls) == 2
        again = made.candidates(ACTIVATION)
        assert len(calls) == 2
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.error, other.error)


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes.load_all() if not recipe.calibrated])
def test_calibration_does_not_change_what_weights_say(calibration, name):
    recipe = replace(recipes.load(name), price=None)
    for one, other in zip(
        scores(None).candidates(recipe), scores(calibration).candidates(recipe), strict=True
    ):
        np.testing.assert_array_equal(one.error, other.error)
        np.testing.assert_array_equal(one.cost, other.cost)


def test_a_measure_of_activations_without_inputs_is_a_fault_of_the_caller():
    with pytest.raises(RuntimeError, match="needs calibration inputs"):
        scores(None).candidates(ACTIVATION)


def test_output_errors_follow_the_effects_that_were_measured(calibration, monkeypatch):
    effects = {"conv1": 5.0, "conv2": 0.5}

    def measure(
        model, walk, bindings, substitutes, samples, engine, *, padding, trials, memory, step, **others
    ):
        """Every layer's own error times a factor; the last layer cannot be measured."""
        assert trials == len(probing.PROBED)
        measured = {}
        for binding in bindings:
            number = len(list(substitutes(binding)))
            # Narrow options come after those of chains; the consumer of a pair has both.
            chains = own[binding.layer.id].size
            assert 1 <= chains <= number <= 2 * len(probing.PROBED)
            measured[binding.layer.id] = "it is too far away"
            if binding.layer.id in effects:
                measured[binding.layer.id] = np.concatenate(
                    [effects[binding.layer.id] * own[binding.layer.id], np.full(number - chains, 0.5)]
                )
        return Sensitivities(measured)

    plain = {table.layer: table for table in scores(calibration).candidates(ACTIVATION)}
    own = {layer: np.array([error for _, error in probing._probes(table)]) for layer, table in plain.items()}
    monkeypatch.setattr(probing, "sensitivity", SimpleNamespace(measure=measure))
    unknown = 0
    for table in scores(calibration).candidates(OUTPUT):
        if table.layer not in effects:
            unknown += 1
            assert table.cost.size == 1
            assert table.reason == "its effect is unknown: it is too far away"
            continue
        other = plain[table.layer]
        known = {(f, k, j): e for f, k, j, e in zip(other.fold, other.k, other.j, other.error, strict=True)}
        wanted = [
            known.get(key, np.nan) for key in zip(table.fold[1:], table.k[1:], table.j[1:], strict=True)
        ]
        points = [(e, effects[table.layer] * e) for e in own[table.layer]]
        shared = ~np.isnan(wanted)
        assert shared.sum() > 3
        np.testing.assert_allclose(
            table.error[1:][shared], predicted(np.array(wanted)[shared], points), rtol=1e-6
        )
    assert unknown == len(FOUND.layers) - len(effects)


def test_errors_of_outputs_stand_for_effects_if_none_can_be_measured(calibration, monkeypatch):
    def measure(
        model, walk, bindings, substitutes, samples, engine, *, padding, trials, memory, step, **others
    ):
        return Sensitivities({binding.layer.id: "no engine runs the model" for binding in bindings})

    monkeypatch.setattr(probing, "sensitivity", SimpleNamespace(measure=measure))
    plain, output = (scores(calibration).candidates(recipe) for recipe in (ACTIVATION, OUTPUT))
    for one, other in zip(plain, output, strict=True):
        np.testing.assert_allclose(one.error, other.error, rtol=1e-8)
        assert one.cost.size > 1


def test_an_effect_of_zero_counts_as_the_usual_one(calibration, monkeypatch):
    def measure(
        model, walk, bindings, substitutes, samples, engine, *, padding, trials, memory, step, **others
    ):
        return Sensitivities(
            {
                b.layer.id: np.full(len(list(substitutes(b))), 0.0 if b.layer.id == "conv1" else 0.5)
                for b in bindings
            }
        )

    monkeypatch.setattr(probing, "sensitivity", SimpleNamespace(measure=measure))
    idle = next(table for table in scores(calibration).candidates(OUTPUT) if table.layer == "conv1")
    assert (idle.error[1:] > 0).all()


@pytest.mark.parametrize("recipe", CALIBRATED, ids=lambda recipe: recipe.name)
def test_layers_that_do_not_run_are_kept(recipe):
    proto = model(
        """g (bool k, float[4,8] x) => (float[] y) { h = MatMul (x, w0) y = If (k) <
            then_branch = t () => (float[4,8] p) { p = MatMul (h, w1) },
            else_branch = e () => (float[4,8] q) { q = MatMul (h, w2) }> }""",
        w0=(8, 8), w1=(8, 8), w2=(8, 8),
    )  # fmt: skip
    found = seen(proto)
    feeds = [
        {"k": np.array(True), "x": np.random.default_rng(n).standard_normal((4, 8)).astype(np.float32)}
        for n in range(10)
    ]
    with measured(found, feeds) as taken:
        tables = scores(taken, found).candidates(recipe)
        ((idle, why),) = taken.statistics.reasons.items()
    for table in tables:
        assert (table.cost.size == 1) == (table.layer == idle)
        assert table.reason == (f"its effect is unknown: {why}" if table.layer == idle else "")
