"""Any set of layers with one input may share an encoder: plans find the best partition, and write it."""

from __future__ import annotations

import json
from io import StringIO
from itertools import product

import numpy as np
import onnx
import pytest
import scipy
from onnx import numpy_helper
from rich.console import Console

from calibrating import measured, run, seen
from onnx_lowrank import BudgetError, PlanError, compress
from onnx_lowrank.linalg.quadratic import INPUT_RIDGE, shrinkage
from onnx_lowrank.report.terminal import show
from rewriting import model

CHANNELS, FEATURES, RANK = 32, 24, 6

ONE_SLICE = """
summary = "One slice, so that a reference can try all plans."
folds = ["encode"]
groups = [1]
measure = "activation"
aggregate = "sum"
factors = "activations"
share = true
"""


def siblings(number, c=CHANNELS, f=FEATURES):
    """Layers a, b, … that read x; the output is the sum of their sigmoids, so none of them can be merged."""
    names = "abcdefgh"[:number]
    nodes = " ".join(f"{n}0 = MatMul (x, {n}) {n}1 = Sigmoid ({n}0)" for n in names)
    ends = ", ".join(f"{n}1" for n in names)
    return names, f"g (float[N,{c}] x) => (float[N,{f}] y) {{ {nodes} y = Sum ({ends}) }}"


def planted(rng, spaces, c=CHANNELS, f=FEATURES):
    """Weights of which those with the same letter have one row space of dimension RANK."""
    rows = {space: rng.standard_normal((c, RANK)) / c**0.5 for space in sorted(set(spaces))}
    return [rows[space] @ rng.standard_normal((RANK, f)) for space in spaces]


def source(c=CHANNELS, number=2000, seed=1):
    return {"x": np.random.default_rng(seed).standard_normal((number, c)).astype(np.float32)}


def sets(plan):
    """The layers that share, by the layer with their encoder."""
    found = {}
    for choice in plan.choices:
        if choice.option is not None and choice.option.lowering == "shared":
            found.setdefault(choice.option.encoder, []).append(choice.layer)
    return {first: "".join(names) for first, names in found.items()}


def partitions(names):
    """All ways to split names into sets."""
    if not names:
        yield []
        return
    first, *rest = names
    for split in partitions(rest):
        yield [[first], *split]
        for index, each in enumerate(split):
            yield [*split[:index], [first, *each], *split[index + 1 :]]


def test_all_partitions_are_tried_by_the_reference():
    assert [sum(1 for _ in partitions("abcd"[:n])) for n in range(1, 5)] == [1, 2, 5, 15]


def curves(weights, whitener):
    """The relative errors of layers with one encoder at the ranks 0, 1, …, in float64 by Eckart and Young."""
    white = [weight.T.astype(np.float64) @ whitener for weight in weights]
    norms = [np.linalg.norm(each) for each in white]
    stack = np.concatenate([each / norm for each, norm in zip(white, norms, strict=True)])
    _, _, right = np.linalg.svd(stack, full_matrices=True)
    parts = [np.sum((each @ right.T) ** 2, axis=0) / norm**2 for each, norm in zip(white, norms, strict=True)]
    return [np.concatenate([[1.0], 1 - np.cumsum(part)]) for part in parts]


def best(weights, whitener, budget):
    """The least sum of errors of all partitions and ranks; a set of one layer may be kept."""
    c, f = weights["a"].shape
    least = np.inf
    for split in partitions(sorted(weights)):
        choices = []
        for names in split:
            errors = sum(curves([weights[name] for name in names], whitener))
            keep = c * f * len(names)
            made = [(j * (c + f * len(names)), errors[j]) for j in range(1, c)]
            choices.append([(keep, 0.0), *((cost, error) for cost, error in made if cost < keep)])
        for taken in product(*choices):
            if sum(cost for cost, _ in taken) <= budget:
                least = min(least, sum(error for _, error in taken))
    return least


@pytest.mark.parametrize("number", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_no_partition_is_better_than_the_plan(number, seed, tmp_path):
    rng = np.random.default_rng(seed)
    names, body = siblings(number, c=6, f=5)
    near = rng.standard_normal((6, 5)) / 2
    weights = {n: near * rng.random() + rng.standard_normal((6, 5)) / 2 for n in names}
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    proto, data = model(body, **weights), source(6, 400, seed)
    (tmp_path / "one.toml").write_text(ONE_SLICE)
    with measured(seen(proto), data) as calibration:
        inputs = calibration.statistics["a"].inputs
        second = inputs.second[0] + np.outer(inputs.mean, inputs.mean)
        second += shrinkage(inputs, INPUT_RIDGE) * np.mean(np.diag(second)) * np.eye(6)
    whitener = scipy.linalg.sqrtm(second).real
    for ratio in (0.9, 0.75, 0.6, 0.5, 0.35):
        wanted = best(weights, whitener, int(ratio * 30 * number))
        plan = compress(proto, ratio, recipe=tmp_path / "one.toml", calibration=data, dry_run=True).plan
        assert plan.solver.objective == pytest.approx(wanted, rel=1e-6)
        assert plan.solver.gap == 0


@pytest.mark.parametrize("recover", [True, False])
@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize(
    ("spaces", "expected"),
    [
        ("xyy", {"b": "bc"}),
        ("xyxy", {"a": "ac", "b": "bd"}),
        ("xyyx", {"a": "ad", "b": "bc"}),
        ("xyyy", {"b": "bcd"}),
    ],
)
def test_layers_with_one_row_space_are_joined_and_others_are_not(spaces, expected, budget, recover, tmp_path):
    """Only this partition has no error: every other one needs a larger rank, or an encoder more."""
    names, body = siblings(len(spaces))
    weights = planted(np.random.default_rng(5), spaces)
    proto = model(body, **{n: w.astype(np.float32) for n, w in zip(names, weights, strict=True)})
    encoders = len(set(spaces))
    total = CHANNELS * FEATURES * len(spaces)
    ratio = (RANK * (CHANNELS * encoders + FEATURES * len(spaces)) + 1) / total
    given = {"calibration": source(), "input_shape": {"x": (4, CHANNELS)}}
    result = compress(proto, ratio, recipe="activation", recover=recover, budget=budget, **given)
    assert sets(result.plan) == expected
    assert {choice.option.j for choice in result.plan.choices} == {RANK}
    x = source(seed=2)["x"]
    np.testing.assert_allclose(run(result.model.proto, x=x), run(proto, x=x), atol=1e-4)
    onnx.checker.check_model(result.model.proto, full_check=True)
    stored = {t.name: numpy_helper.to_array(t) for t in result.model.proto.graph.initializer}
    assert sum("encoder" in name for name in stored) == encoders
    assert sum(value.size for value in stored.values()) == result.report.totals.amount("params").after
    result.save_plan(tmp_path / "plan.json")
    again = compress(proto, plan=tmp_path / "plan.json", **given)
    assert again.plan == result.plan
    assert again.model.proto.SerializeToString() == result.model.proto.SerializeToString()


def test_many_layers_are_joined_with_those_that_are_alike():
    """Of six layers, three pairs have a row space each, and the sets are those of their likeness."""
    spaces = "xyzzyx"
    names, body = siblings(6)
    weights = planted(np.random.default_rng(7), spaces)
    proto = model(body, **{n: w.astype(np.float32) for n, w in zip(names, weights, strict=True)})
    ratio = (RANK * (3 * CHANNELS + 6 * FEATURES) + 1) / (6 * CHANNELS * FEATURES)
    result = compress(proto, ratio, recipe="activation", calibration=source())
    assert sets(result.plan) == {"a": "af", "b": "be", "c": "cd"}
    x = source(seed=2)["x"]
    np.testing.assert_allclose(run(result.model.proto, x=x), run(proto, x=x), atol=1e-4)


def test_many_layers_name_the_smallest_ratio_after_calibration():
    names, body = siblings(6)
    weights = planted(np.random.default_rng(7), "xxyyzz")
    proto = model(body, **{n: w.astype(np.float32) for n, w in zip(names, weights, strict=True)})
    with pytest.raises(BudgetError) as caught:
        compress(proto, 0.01, recipe="activation", calibration=source())
    least = (CHANNELS + 6 * FEATURES) / (6 * CHANNELS * FEATURES)
    assert least <= caught.value.smallest_ratio < least + 0.001
    again = compress(proto, caught.value.smallest_ratio, recipe="activation", calibration=source())
    assert sets(again.plan) == {"a": "abcdef"}


def test_the_report_names_the_sets_of_one_input():
    names, body = siblings(4)
    weights = planted(np.random.default_rng(5), "xyxy")
    proto = model(body, **{n: w.astype(np.float32) for n, w in zip(names, weights, strict=True)})
    ratio = (RANK * (2 * CHANNELS + 4 * FEATURES) + 1) / (4 * CHANNELS * FEATURES)
    result = compress(proto, ratio, recipe="activation", calibration=source(), recover=False)
    console = Console(width=160, record=True, file=StringIO())
    show(result.report, console)
    assert "shared: one encoder for all of a, c; b, d." in console.export_text()
    assert [row.joined for row in result.report.layers] == [("a", "c"), ("b", "d")] * 2


def test_two_sets_of_one_rank_stay_two_when_a_layer_changes_its_set(tmp_path):
    names, body = siblings(4)
    weights = planted(np.random.default_rng(5), "xyxy")
    proto = model(body, **{n: w.astype(np.float32) for n, w in zip(names, weights, strict=True)})
    ratio = (RANK * (2 * CHANNELS + 4 * FEATURES) + 1) / (4 * CHANNELS * FEATURES)
    data = source()
    result = compress(proto, ratio, recipe="activation", calibration=data, recover=False)
    result.save_plan(tmp_path / "plan.json")
    table = json.loads((tmp_path / "plan.json").read_text())
    assert [row["encoder"] for row in table["layers"]] == ["a", "b", "a", "b"]
    table["layers"][3]["encoder"] = "a"
    (tmp_path / "plan.json").write_text(json.dumps(table))
    with pytest.raises(PlanError, match="'b' shares an encoder with no other layer"):
        compress(proto, plan=tmp_path / "plan.json", calibration=data)
    table["layers"][1] |= {"lowering": None}
    (tmp_path / "plan.json").write_text(json.dumps(table))
    edited = compress(proto, plan=tmp_path / "plan.json", calibration=data)
    assert sets(edited.plan) == {"a": "acd"}
    stored = {t.name for t in edited.model.proto.graph.initializer}
    assert {name for name in stored if "encoder" in name} == {"a_encoder", "b_encoder"}
