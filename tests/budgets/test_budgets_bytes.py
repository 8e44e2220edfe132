"""What the files weigh: no more than the plan says, and the plan says little more than they weigh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank import BudgetError, compress
from onnx_lowrank.budgets.bytes import BUDGET
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Option
from onnx_lowrank.core.plan import Choice
from onnx_lowrank.documents import plans
from onnx_lowrank.files.load import load, stored_bytes
from onnx_lowrank.layers.found import find_layers
from rewriting import constants, model, named_bodies
from tiny import DIGITS, decaying

TEXTS = {
    "matrices": (
        "g (float[3, 96] x) => (float[3, 96] y) { h = MatMul (x, w) r = Relu (h) y = Gemm (r, v, b) }",
        {"w": (96, 96), "v": (96, 96), "b": (96,)},
    ),
    "convolutions": (
        """g (float[1, 24, 8, 8] x) => (float[1, 24, 8, 8] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w) n = BatchNormalization (a, scale, shift, mean, var)
            r = Relu (n) y = ConvTranspose <pads = [1, 1, 1, 1]> (r, v, b) }""",
        {"w": (24, 24, 3, 3), "v": (24, 24, 3, 3), "b": (24,)}
        | {"scale": (24,), "shift": (24,), "mean": (24,), "var": np.ones(24, np.float32)},
    ),
    "a table and its transpose": (
        """g (float[4, 200] x) => (float[4, 200] y) {
            h = MatMul (x, table) r = Relu (h) t = Transpose <perm = [1, 0]> (table) y = MatMul (r, t) }""",
        {"table": (200, 64)},
    ),
    "bodies": (
        """g (bool c, float[3, 64] x) => (float[3, 64] y) { h = MatMul (x, w) y = If (c) <
            then_branch = t () => (float[3, 64] p) { p = MatMul (h, a) },
            else_branch = e () => (float[3, 64] q) { q = MatMul (h, b) }> }""",
        {"w": (64, 64), "a": (64, 64), "b": (64, 64)},
    ),
    "casts": (
        "g (float[3, 96] x) => (float[3, 96] y) { c = Cast <to = 1> (w) h = MatMul (x, c) y = Add (h, b) }",
        {"w": np.float16(decaying(1, 96, 96)), "b": (96,)},
    ),
    "operators that merge": (
        "g (float[3, 96] x) => (float[3, 96] y) { h = MatMul (x, w) y = MatMul (h, v) }",
        {"w": (96, 96), "v": (96, 96)},
    ),
}


def made(name, **options):
    text, weights = TEXTS[name]
    drawn = {key: decaying(7, *w) if isinstance(w, tuple) and len(w) > 1 else w for key, w in weights.items()}
    return named_bodies(model(text, **options, **drawn))


def seen(proto):
    return find_layers(load(proto), {}, (), ())


def written(result, folder):
    """The bytes of all files that are saved."""
    folder.mkdir(exist_ok=True)
    result.save(folder / "out.onnx")
    return sum(path.stat().st_size for path in folder.iterdir())


def held(source, ratio, tmp_path, **options):
    """Compress, and see that the files keep to the ratio and to what a dry run says; returns the result."""
    options |= {"budget": "bytes", "device": "cpu"}
    planned = compress(source, ratio, dry_run=True, **options).report
    before = planned.totals.amount("bytes").before
    if isinstance(source, Path):
        assert before <= sum(path.stat().st_size for path in source.parent.iterdir())
    else:
        assert before == len(source.SerializeToString())
    with compress(source, ratio, **options) as result:
        size = written(result, tmp_path / "out")
        total, promised = result.report.totals.amount("bytes"), planned.totals.amount("bytes").after
        assert size <= total.after <= promised <= ratio * before
        assert result.report.reached == total.after / before
        assert any(choice.option for choice in result.plan.choices)
    return result


@pytest.mark.parametrize("ir", [3, 8, 10])
@pytest.mark.parametrize("ratio", [0.8, 0.5])
@pytest.mark.parametrize("name", TEXTS)
def test_files_keep_to_the_ratio(name, ratio, ir, tmp_path):
    if ir == 3:  # initializers are inputs there, and Constant nodes take their place
        proto = made(name)
        held_in = list(proto.graph.initializer)
        del proto.graph.initializer[:]
        constants(proto.graph, *held_in)
        proto.ir_version = 3
    else:
        proto = made(name, ir=ir)
    result = held(proto, ratio, tmp_path)
    # Digits of certificates, lengths that may be longer, and the recipe's name.
    rewritten = sum(choice.option is not None for choice in result.plan.choices)
    if not result.report.merges:
        promised = BUDGET.on(seen(proto)).of_model(result.plan.choices)
        assert promised - result.report.totals.amount("bytes").after <= 300 + 160 * rewritten


@pytest.mark.parametrize("recipe", ["alds", "svd", "l-rank", "svd-energy"])
def test_every_rule_of_a_recipe_keeps_to_the_ratio(recipe, tmp_path):
    held(DIGITS, 0.6, tmp_path, recipe=recipe, input_shape={"image": (1, 1, 8, 8)})


@pytest.mark.parametrize("ratio", [0.8, 0.5, 0.3])
def test_external_data_counts_with_its_padding(ratio, tmp_path):
    path = tmp_path / "in" / "digits.onnx"
    path.parent.mkdir()
    onnx.save(onnx.load(DIGITS), path, save_as_external_data=True, location="w.bin", size_threshold=2000)
    held(path, ratio, tmp_path)


@pytest.mark.parametrize(("long", "merges"), [(0, 1), (200, 0)])
def test_operators_that_are_lighter_apart_stay_apart(long, merges, tmp_path):
    """What is said of a product has its names in it, and may weigh more than the product saves."""
    text = "g (float[3, 900] x) => (float[3, 2] y) { h = MatMul (x, w) y = MatMul (h, v) }"
    proto = named_bodies(model(text, ir=10, w=decaying(1, 900, 3), v=decaying(2, 3, 2)))
    proto.graph.node[0].name, proto.graph.node[1].name = "h", "y" + long * "y"
    result = held(proto, 0.85, tmp_path)
    assert len(result.report.merges) == merges
    assert result.plan.merge == bool(merges)
    again = compress(proto, plan=result.plan, device="cpu")
    assert again.proto == result.proto


def test_new_biases_count(tmp_path):
    x = np.random.default_rng(0).standard_normal((64, 1, 8, 8)).astype(np.float32)
    for recipe in ("activation", "output"):
        result = held(DIGITS, 0.5, tmp_path, calibration={"image": x}, recipe=recipe)
        assert result.plan.factors is Fit.ACTIVATIONS


@pytest.mark.parametrize("name", TEXTS)
def test_the_line_of_an_option_is_what_the_model_of_it_weighs(name):
    """Within the lengths of numbers and of messages, at all ranks and slices."""
    found = seen(made(name, ir=10))
    meter = BUDGET.on(found)
    for layer in found.layers:
        for fold in layer.folds:
            for k in layer.slices[:: max(1, len(layer.slices) // 3)]:
                line = meter.line(layer, fold, k)
                for j in (1, layer.full_rank(fold, k) // 2 or 1, layer.full_rank(fold, k)):
                    option = Option(fold, k, j)
                    cost = line.constant + j * line.slope
                    assert meter.tariff(layer).cost(option) == cost
                    whole = meter.of_model([Choice(layer.id, option, 0, 0.0)])
                    linear = meter.total - line.keep + cost + meter._shared
                    assert whole - 16 <= linear <= whole + 64


def test_dtypes_count_as_they_are():
    """Half floats weigh half; BatchNorm and bias weigh what they are stored in."""
    found = seen(made("casts"))
    (layer,) = found.layers
    line = BUDGET.on(found).line(layer, layer.folds[0], 1)
    assert (line.keep, line.slope) == (2 * 96 * 96, 2 * (96 + 96))
    found = seen(made("convolutions"))
    norm, biased = (BUDGET.on(found).tariff(layer).keep for layer in found.layers)
    assert (norm, biased) == (4 * (24 * 24 * 9 + 4 * 24), 4 * 24 * 24 * 9)


def test_ratio_one_changes_nothing(tmp_path):
    path = tmp_path / "in" / "digits.onnx"
    path.parent.mkdir()
    onnx.save(onnx.load(DIGITS), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    result = compress(path, 1.0, budget="bytes", device="cpu")
    assert not any(choice.option for choice in result.plan.choices)
    assert result.report.reached == 1


def test_a_layer_whose_nodes_weigh_more_than_it_saves_is_kept():
    """Of 12 × 12 floats rank 1 saves 480 bytes, and takes more for names, metadata and a node."""
    proto = model(
        "g (float[3, 12] x) => (float[3, 12] y) { y = MatMul (x, w) }", ir=10, w=decaying(1, 12, 12)
    )
    with pytest.raises(BudgetError) as caught:
        compress(proto, 0.9, budget="bytes", device="cpu")
    assert caught.value.smallest_ratio == 1
    assert compress(proto, 0.9, device="cpu", dry_run=True).report.reached < 0.9


@pytest.mark.parametrize("weight", [decaying(1, 14, 14), np.ones((14, 14), np.float32)], ids=["full", "one"])
def test_ratio_one_is_reached_where_any_rewritten_model_is_larger(weight):
    """A matrix 14 × 14 saves more than its nodes take, and less than the notes of the run do.

    Of rank one, it can be rewritten without error.
    """
    proto = model("g (float[3, 14] x) => (float[3, 14] y) { y = MatMul (x, w) }", ir=10, w=weight)
    with pytest.raises(BudgetError, match=r": raise it to 1, the smallest with") as caught:
        compress(proto, 0.9, budget="bytes", device="cpu")
    assert caught.value.smallest_ratio == 1
    assert compress(proto, 1, budget="bytes", device="cpu").proto == proto


@pytest.mark.parametrize("recipe", ["schatten", "alds", "svd"])
@pytest.mark.parametrize("name", ["matrices", "convolutions", "bodies"])
def test_the_smallest_ratio_is_reached(name, recipe, tmp_path):
    proto = made(name)
    with pytest.raises(BudgetError) as caught:
        compress(proto, 0.01, budget="bytes", recipe=recipe, device="cpu")
    held(proto, caught.value.smallest_ratio, tmp_path, recipe=recipe)


def test_an_edited_plan_is_priced_anew():
    found = seen(DIGITS)
    plan = compress(DIGITS, 0.5, budget="bytes", device="cpu", dry_run=True).plan
    again = compress(DIGITS, plan=plan, device="cpu", dry_run=True)
    assert again.plan == plan
    first = next(choice for choice in plan.choices if choice.option is not None)
    edited = replace(first, option=replace(first.option, j=1))
    choices = tuple(edited if choice is first else choice for choice in plan.choices)
    result = compress(DIGITS, plan=replace(plan, choices=choices), device="cpu", dry_run=True)
    (cost,) = (choice.cost for choice in result.plan.choices if choice.layer == first.layer)
    assert cost < first.cost
    assert plans.is_edited(replace(plan, choices=choices))
    assert result.report.totals.amount("bytes").after == BUDGET.on(found).of_model(choices)


def test_other_budgets_report_the_file_as_before():
    dry = compress(DIGITS, 0.5, device="cpu", dry_run=True).report.totals.amount("bytes")
    assert (dry.before, dry.after) == (DIGITS.stat().st_size, None)
    result = compress(DIGITS, 0.5, device="cpu")
    assert result.report.totals.amount("bytes").after == stored_bytes(result.model)


@pytest.mark.parametrize("is_external", [False, True], ids=["inline", "external"])
@pytest.mark.parametrize("budget", ["params", "macs", "bytes"])
def test_every_budget_reports_the_bytes_of_the_files(budget, is_external, tmp_path):
    path = tmp_path / "in" / "digits.onnx"
    path.parent.mkdir()
    stored = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 64}
    onnx.save(onnx.load(DIGITS), path, **stored if is_external else {})
    with compress(path, 0.7, budget=budget, device="cpu", input_shape={"image": (1, 1, 8, 8)}) as result:
        size, total = written(result, tmp_path / "out"), result.report.totals.amount("bytes")
        assert total.before == sum(file.stat().st_size for file in path.parent.iterdir())
        # The longest name of a data file, and the length of each reference to it.
        named = 270 * len(result.proto.graph.initializer) if is_external else 0
        assert size <= total.after <= size + named


def test_bytes_can_be_a_price(tmp_path):
    recipe = tmp_path / "priced.toml"
    recipe.write_text(
        'summary = "For the tests."\nfolds = ["encode"]\ngroups = [1]\nmeasure = "frobenius"\n'
        'aggregate = "sum"\nprice = "bytes"\n'
    )
    assert compress(DIGITS, 0.5, recipe=recipe, device="cpu", dry_run=True).report.reached <= 0.5


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.8, 0.5])
@pytest.mark.parametrize(
    "name", ["resnet20_cifar10", "magika_v3_3", "silero_vad", "silero_vad_half", "ultraface_rfb320"]
)
def test_real_models_keep_to_the_ratio(shared, name, ratio, tmp_path):
    path = shared / "models" / f"{name}.onnx"
    planned = compress(path, ratio, budget="bytes", device="cpu", dry_run=True).report.totals.amount("bytes")
    with compress(path, ratio, budget="bytes", device="cpu") as result:
        size = written(result, tmp_path / "out")
        assert size == result.report.totals.amount("bytes").after
        assert size <= planned.after <= ratio * path.stat().st_size
        assert planned.after - size <= 0.005 * path.stat().st_size
