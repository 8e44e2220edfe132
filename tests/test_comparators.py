"""The recipes of other methods, from the command's own function to the written model."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibrating import measured, run, seen
from onnx_lowrank import compress
from onnx_lowrank.calibrate.shares import held_out
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.documents import recipes
from onnx_lowrank.errors import BudgetError, InputError
from onnx_lowrank.stages.search import AUTO
from rewriting import model

COMPARATORS = ("svd-llm", "asvd", "balf", "modegpt")
WORDS, WIDTH, HIDDEN, STEPS = 40, 16, 48, 6

NET = """g (int64[N,S] ids) => (float[N,S,5] y) {
    x = Gather (table, ids)
    u = MatMul (x, up1) r = Relu (u) d = MatMul (r, down1) e = Add (d, bias) h = Add (x, e)
    v = MatMul (h, up2) t = Relu (v) f = MatMul (t, down2) k = Add (f, h)
    y = MatMul (k, head) }"""


def drawn(seed, *shape):
    """A matrix of full rank whose singular values fall."""
    rng = np.random.default_rng(seed)
    rank = min(shape)
    left = rng.standard_normal((shape[0], rank)) * 0.8 ** np.arange(rank)
    return (left @ rng.standard_normal((rank, shape[-1])) / np.sqrt(shape[0])).astype(np.float32)


def weights():
    made = {"table": drawn(1, WORDS, WIDTH), "bias": drawn(2, 1, WIDTH)[0], "head": drawn(7, WIDTH, 5)}
    made |= {"up1": drawn(3, WIDTH, HIDDEN), "down1": drawn(4, HIDDEN, WIDTH)}
    return made | {"up2": drawn(5, WIDTH, HIDDEN), "down2": 3 * drawn(6, HIDDEN, WIDTH)}


def net():
    return model(NET, **weights())


def ids(number=60, seed=0):
    return {"ids": np.random.default_rng(seed).integers(0, WORDS, (number, STEPS))}


def made(recipe, ratio=0.8, **options):
    return compress(net(), ratio, recipe=recipe, calibration=ids(), **options)


def chosen(result):
    return {choice.layer: choice.option for choice in result.plan.choices}


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("recipe", COMPARATORS)
def test_a_model_keeps_the_ratio_and_most_of_its_outputs(recipe, budget):
    result = made(recipe, budget=budget, input_shape={"ids": (1, STEPS)})
    assert 0.7 < result.report.reached <= 0.8
    onnx.checker.check_model(result.model.proto, full_check=True)
    wanted, given = (run(proto, **ids(seed=1)) for proto in (net(), result.model.proto))
    assert 0 < np.linalg.norm(given - wanted) < 0.7 * np.linalg.norm(wanted)
    options = chosen(result)
    assert options["table"] is None
    kinds = {option.lowering for option in options.values() if option is not None}
    assert kinds == {Lowering.NARROW if recipe == "modegpt" else Lowering.NATIVE}


@pytest.mark.parametrize("recipe", COMPARATORS)
def test_it_is_refused_without_calibration(recipe):
    with pytest.raises(InputError) as caught:
        compress(net(), 0.8, recipe=recipe)
    assert str(caught.value) == (
        f"The recipe '{recipe}' needs calibration inputs: pass some with --calibration, or choose a recipe "
        "that needs none (--list-passes)."
    )


@pytest.mark.parametrize("recipe", COMPARATORS)
def test_its_plan_is_replayed_to_the_same_bytes(recipe, tmp_path):
    first = made(recipe)
    first.save_plan(tmp_path / "plan.json")
    again = compress(net(), plan=tmp_path / "plan.json", calibration=ids())
    assert again.plan == first.plan
    assert again.model.proto.SerializeToString() == first.model.proto.SerializeToString()
    with pytest.raises(InputError, match="factors are fitted to calibration inputs: pass them with"):
        compress(net(), plan=tmp_path / "plan.json")


def test_none_recovers_and_auto_tries_none():
    assert not any(recipes.load(name).recover for name in COMPARATORS)
    assert not set(AUTO) & set(COMPARATORS)
    assert all(recipes.load(name).calibrated for name in COMPARATORS)


def test_one_ratio_for_all_layers():
    """A rank more in any layer would exceed the largest ratio that a layer keeps."""
    result = made("svd-llm", 0.75)
    kept = {}
    for layer, option in chosen(result).items():
        if option is not None:
            f, c = weights()[layer].shape
            kept[layer] = option.j * (f + c) / (f * c), (f + c) / (f * c)
    assert set(kept) == {"up1", "down1", "up2", "down2", "head"}
    largest = max(share for share, _ in kept.values())
    assert all(share <= largest < share + step for share, step in kept.values())
    reasons = {choice.layer: choice.reason for choice in result.plan.choices}
    assert reasons["table"] == "the recipe leaves tables as they are"


def test_the_factors_of_asvd_are_a_scaled_decomposition():
    """Of the samples to fit to; the bias takes up the change of the mean."""
    result = made("asvd", 0.75)
    assert {row.fit.fit for row in result.report.layers if row.fit} == {Fit.SCALED}
    stored = {t.name: numpy_helper.to_array(t).astype(float) for t in result.model.proto.graph.initializer}
    known = {name: value.astype(float) for name, value in weights().items()}
    x = known["table"][ids()["ids"][~held_out(60)]].reshape(-1, WIDTH)
    scaling = np.sqrt(np.sqrt(np.mean(x**2, axis=0)))
    j = chosen(result)["up1"].j
    u, s, vt = np.linalg.svd(known["up1"].T * scaling)
    wanted = (u[:, :j] * s[:j] @ vt[:j] / scaling).T
    encoder = next(v for v in stored.values() if v.shape == (WIDTH, j))
    decoders = [v for v in stored.values() if v.shape == (j, HIDDEN)]
    assert min(np.abs(encoder @ decoder - wanted).max() for decoder in decoders) < 1e-4


def test_asvd_minimizes_the_largest_error_of_the_outputs():
    result = made("asvd", 0.75)
    assert (result.plan.measure, result.plan.solver.aggregate, result.plan.solver.gap) == ("output", "max", 0)
    assert result.plan.solver.objective == max(choice.error for choice in result.plan.choices)


def test_only_layers_with_moments_of_inputs_are_scaled():
    with measured(seen(net()), ids()) as calibration:
        scaled = calibration.statistics.scaled()
        assert set(scaled.reasons) == {"table"}
        assert scaled.reference("table") is None
        assert scaled.reference("up1").fit is Fit.SCALED
        assert calibration.statistics.reference("up1").fit is Fit.ACTIVATIONS
        assert not calibration.statistics.reasons


TINY = """g (float[N,4] x) => (float[N,3] y) {
    a = MatMul (x, a0) b = Relu (a) c = MatMul (b, a1) d = Relu (c) y = MatMul (d, a2) }"""


@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.6])
def test_the_plan_of_balf_is_the_best_of_all(ratio):
    """Over all ranks of three layers, with the errors of whitened decompositions in float64."""
    arrays = {f"a{n}": drawn(n + 10, *shape) for n, shape in enumerate([(4, 9), (9, 8), (8, 3)])}
    x = np.random.default_rng(3).standard_normal((400, 4)).astype(np.float32)
    result = compress(model(TINY, **arrays), ratio, recipe="balf", calibration={"x": x})
    sizes = {name: value.size for name, value in arrays.items()}
    tables = []
    for name, value in arrays.items():
        row = [(sizes[name], 0.0)]
        top = min(value.shape)
        for j in range(1, top):
            cost = j * sum(value.shape)
            if cost < sizes[name]:
                row.append((cost, error_of(arrays, x[~held_out(400)], name, j)))
        tables.append(row)
    budget = int(ratio * sum(sizes.values()))
    best = min(
        (sum(error for _, error in plan), plan)
        for plan in product(*tables)
        if sum(cost for cost, _ in plan) <= budget
    )
    costs = tuple(choice.cost for choice in result.plan.choices)
    assert costs == tuple(cost for cost, _ in best[1])
    assert result.plan.solver.objective == pytest.approx(best[0], rel=1e-3)


def error_of(arrays, x, name, rank):
    """The relative error of a layer's best weight of a rank on its own inputs, with the ridge of 0.1."""
    value = x.astype(float)
    for other in ("a0", "a1", "a2"):
        if other == name:
            break
        value = np.maximum(value @ arrays[other].astype(float), 0)
    second = value.T @ value / len(value)
    ridged = second + 0.1 * np.trace(second) / len(second) * np.eye(len(second))
    s = np.linalg.svd(arrays[name].astype(float).T @ np.linalg.cholesky(ridged), compute_uv=False)
    return float(np.sum(s[rank:] ** 2) / np.sum(s**2))


def test_modegpt_takes_more_where_a_block_changes_less():
    """Widths follow softmax(−s / 0.1) of what the two blocks change, within one channel."""
    result = made("modegpt", 0.85)
    widths = {layer: option.j for layer, option in chosen(result).items() if option is not None}
    known = {name: value.astype(float) for name, value in weights().items()}
    x = known["table"][ids()["ids"][~held_out(60)]].reshape(-1, WIDTH)
    h = x + np.maximum(x @ known["up1"], 0) @ known["down1"] + known["bias"]
    k = h + np.maximum(h @ known["up2"], 0) @ known["down2"]

    def score(a, b):
        return 1 - np.mean(np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))

    share = np.exp(-np.array([score(x, h), score(h, k)]) / 0.1)
    gone = np.array([HIDDEN - widths.get("down1", HIDDEN), HIDDEN - widths.get("down2", HIDDEN)])
    wanted = share / share.sum() * gone.sum()
    assert gone[0] > gone[1]
    np.testing.assert_allclose(gone, wanted, atol=1)
    assert {choice.layer for choice in result.plan.choices if "narrows pairs" in choice.reason} == {
        "table",
        "head",
    } | {layer for layer in ("up2", "down2") if "down2" not in widths}


def test_modegpt_needs_pairs():
    proto = model("g (float[N,4] x) => (float[N,9] y) { y = MatMul (x, w) }", w=drawn(1, 4, 9))
    data = {"x": np.random.default_rng(3).standard_normal((40, 4)).astype(np.float32)}
    with pytest.raises(BudgetError, match="raise it to 1, the smallest with recipe 'modegpt'"):
        compress(proto, 0.8, recipe="modegpt", calibration=data)
