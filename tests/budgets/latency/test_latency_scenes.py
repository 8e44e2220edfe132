"""Times on several sets of shapes: weighted means of the times on each."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from rich.console import Console

from calibrating import seen
from decoders import decoder
from onnx_lowrank import InputError, cli, compress
from onnx_lowrank.allocate.cost import Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets.budget import Tools
from onnx_lowrank.budgets.latency import BUDGET
from onnx_lowrank.budgets.latency.measured import Latency
from onnx_lowrank.budgets.latency.scene import Scene, scenes, weighed
from onnx_lowrank.budgets.latency.whole import Call, start
from onnx_lowrank.budgets.macs import known_macs
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.probe.micro import placeholder
from onnx_lowrank.rewrite.replace import rewrite
from onnx_lowrank.shape_sets import weights
from rewriting import model
from timing import Recorded, by_weights
from tiny import decaying

ENGINE = runtime("CPUExecutionProvider")
TEXT = "g (float[N, 24] x) => (float[N, 16] y) { h = MatMul (x, w) y = MatMul (h, v) }"
ROWS, WEIGHTS = (8, 1), (0.25, 0.75)
FIXED = 1000


def two():
    return model(TEXT, w=decaying(1, 24, 24), v=decaying(2, 24, 16))


class ByRows(Recorded):
    """Every row of the inputs takes the time of the weights; a run takes a fixed time beside."""

    def times(self, models, pace):
        return [FIXED + by_weights(one.proto) * len(next(iter(feed.values()))) for one, feed in models]


def tools(watch, **more):
    shapes = [{"x": (rows, 24)} for rows in ROWS]
    return Tools(watch, {}, shapes[0], further=tuple(shapes[1:]), weights=WEIGHTS, **more)


@pytest.fixture
def latency():
    return BUDGET.on(found(), tools(ByRows(ENGINE)))


def found():
    return find_layers(seen(two()).model, {"x": (ROWS[0], 24)}, (), ())


def mean(times):
    return sum(weight * time for weight, time in zip(WEIGHTS, times, strict=True))


def of(proto):
    """The weighted mean of a model's times."""
    return mean(FIXED + by_weights(proto) * rows for rows in ROWS)


def made(layers, options):
    """The model with some layers rewritten."""
    bindings = [binding for binding in layers.bindings if binding.layer.id in options]
    replacements = [placeholder(b, options[b.layer.id], np.dtype(np.float32)) for b in bindings]
    return rewrite(layers.model, layers.walk, replacements).model


def test_the_time_of_the_model_is_the_weighted_mean(latency):
    assert latency.total == round(of(two()))


def test_the_time_of_a_layer_is_the_weighted_mean_of_its_uses_in_all_sets(latency):
    layers = found().layers
    for layer, size in zip(layers, (24 * 24, 24 * 16), strict=True):
        assert latency.tariff(layer).keep == round(mean(FIXED + (10 + size) * rows for rows in ROWS))


def test_the_time_of_an_option_is_the_weighted_mean_too(latency):
    layers = found()
    errors = [
        {
            (fold, k): np.linspace(1, 0, layer.full_rank(fold, k) + 1)
            for fold in layer.folds
            for k in layer.slices
        }
        for layer in layers.layers
    ]
    latency.measure(errors, Grid(Linear(known_macs)), lambda share: None)
    times = latency.tariff(layers.layers[0])
    assert times.curves
    for j in times.curves[Fold.ENCODE, 1].ratios:
        expected = mean(FIXED + (20 + 2 * 24 * j) * rows for rows in ROWS)
        assert times.cost(Option(Fold.ENCODE, 1, j)) == pytest.approx(expected, abs=1)


def test_a_ratio_is_that_of_the_weighted_sums(latency):
    layers = found()
    other = made(layers, {"w": Option(Fold.ENCODE, 1, 2)})
    assert latency.ratio(other) == pytest.approx(round(of(other.proto)) / round(of(two())), rel=1e-12)


def test_the_report_has_the_times_of_every_set(latency):
    layers = found()
    options = {"w": Option(Fold.ENCODE, 1, 2)}
    other = made(layers, options)
    dry = latency.timing(options, None)
    assert [call.after for call in dry.calls] == [None, None]
    timing = latency.timing(options, other)
    assert timing.inputs == "0.25 × (x float32 8×24) + 0.75 × (x float32 1×24)"
    assert [(call.inputs, call.weight) for call in timing.calls] == [
        ("x float32 8×24", 0.25),
        ("x float32 1×24", 0.75),
    ]
    assert [call.before for call in timing.calls] == [FIXED + by_weights(two()) * rows for rows in ROWS]
    assert [call.after for call in timing.calls] == [FIXED + by_weights(other.proto) * rows for rows in ROWS]
    assert timing.before == round(mean(call.before for call in timing.calls))
    assert timing.after == round(mean(call.after for call in timing.calls))
    assert timing.spread == 1.0


def test_a_comparison_without_the_budget_has_them_too():
    watch = ByRows(ENGINE)
    other = made(found(), {"w": Option(Fold.ENCODE, 1, 2)})
    timing = start(found().model, tools(watch), watch).timing(other)
    assert [call.after for call in timing.calls] == [FIXED + by_weights(other.proto) * rows for rows in ROWS]
    assert timing.after == round(of(other.proto))


def test_layers_that_are_alike_in_two_sets_are_measured_once():
    watch = Recorded(ENGINE)
    layers = found()
    same = [Scene(layers, Call({"x": np.ones((8, 24), np.float32)}, weight)) for weight in WEIGHTS]
    latency = Latency(BUDGET, same, watch)
    assert watch.timed == 3 + 1  # the model and two layers, then only the model
    assert latency.tariff(layers.layers[0]).keep == 10 + 24 * 24


@pytest.mark.parametrize("missing", ["cut", "timed", "layer"])
def test_a_layer_that_cannot_be_timed_in_one_set_is_kept(missing):
    layers = found()
    uses = Scene(layers, Call({})).uses(ENGINE)
    timed = {part.key: part for each in uses.values() for part, _ in each}
    assert weighed("w", [(0.5, uses), (0.5, {**uses, "w": []})], timed) == {uses["w"][0][0].key: 0.5}
    other = {"cut": {**uses, "w": None}, "timed": uses, "layer": {"v": uses["v"]}}[missing]
    known = {} if missing == "timed" else timed
    assert weighed("w", [(0.5, uses), (0.5, other)], known) == {}


def test_every_set_needs_all_shapes():
    open_ = model("g (float[N, 24, M] x) => (float[N, 16, M] y) { y = MatMul (v, x) }", v=decaying(2, 16, 24))
    layers = find_layers(seen(open_).model, {"x": (1, 24, 3)}, (), ())
    refused = r"^--input-shape names 'z', but the model's inputs are x: name one of them\.$"
    with pytest.raises(InputError, match=refused):
        list(scenes(layers, Tools(further=({"z": (1,)},), weights=WEIGHTS), Recorded(ENGINE), BUDGET.check))
    with pytest.raises(InputError, match="Times can be measured for known shapes only, and the inputs x"):
        list(
            scenes(
                layers,
                Tools(shapes={"x": (1, 24, 3)}, further=({},), weights=WEIGHTS),
                Recorded(ENGINE),
                BUDGET.check,
            )
        )


# --- a decoder: prefill and one token ------------------------------------------------------------------


PREFILL = {"input_ids": (1, 12), "past_key_values_0_key": (1, 2, 0, 8)}
DECODE = {"input_ids": (1, 1), "past_key_values_0_key": (1, 2, 11, 8)}
SETS = [
    argument
    for shapes in (PREFILL, DECODE)
    for name, shape in shapes.items()
    for argument in ("--input-shape", f"{name}={','.join(map(str, shape))}")
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", ByTokens)
    onnx.save(decoder(), "in.onnx")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["in.onnx", "out.onnx", "--ratio", "0.8", *arguments])
        return ended.value.code, *capsys.readouterr()

    return run


class ByTokens(Recorded):
    """The time of a model on so many tokens: that of its weights for each, and a fixed one."""

    def times(self, models, pace):
        return [100 + by_weights(one.proto) * tokens(feed) for one, feed in models]


def tokens(feed):
    array = feed.get("input_ids", next(iter(feed.values())))
    return array.shape[1] if array.ndim > 1 else 1


@pytest.mark.parametrize("budget", ["latency", "params"])
def test_the_command_times_prefill_and_one_token(run, budget):
    timing = () if budget == "latency" else ("--time",)
    more = ("--budget", budget, *timing, "--align", "1", "--weights", "1,3", "--report", "-")
    code, out, err = run(*SETS, *more)
    assert code == 0, err
    report = json.loads(out)
    first, second = report["timing"]["calls"]
    assert (first["weight"], second["weight"]) == (0.25, 0.75)
    assert "input_ids int64 1×12" in first["inputs"]
    assert "past_key_values_0_value float32 1×2×0×8" in first["inputs"]
    assert "input_ids int64 1×1, attention_mask int64 1×12" in second["inputs"]
    assert "past_key_values_0_value float32 1×2×11×8" in second["inputs"]
    assert first["before"] == 100 + 12 * by_weights(decoder())
    assert second["before"] == 100 + by_weights(decoder())
    assert report["timing"]["before"] == round(0.25 * first["before"] + 0.75 * second["before"])
    assert report["timing"]["after"] == round(0.25 * first["after"] + 0.75 * second["after"])
    if budget == "latency":
        assert report["ratio"]["reached"] == report["timing"]["after"] / report["timing"]["before"] <= 0.81
    assert report["totals"]["macs"]["before"] == 12 * (32 * 96 + 32 * 24) + 2 * 4 * 12 * 12 * 8
    assert "input_ids int64 1×12" in report["validation"]["inputs"]
    rows = [line.split() for line in err.splitlines()]
    assert [row[0:2] for row in rows if row[:1] == ["set"]][:2] == [["set", "1"], ["set", "2"]]
    assert "set 2, weight 0.75: input_ids int64 1×1," in " ".join(err.split())


def test_sets_count_alike_without_weights():
    report = compress(decoder(), 0.8, time=True, input_shape=[PREFILL, DECODE]).report
    assert [call.weight for call in report.timing.calls] == [0.5, 0.5]
    one = compress(decoder(), 0.8, time=True, input_shape=[PREFILL]).report
    assert one.timing.calls == ()
    again = compress(decoder(), 0.8, time=True, input_shape=PREFILL).report
    assert one.to_json() == again.to_json()


@pytest.mark.parametrize(("given", "expected"), [((1e308, 1e308), (0.5, 0.5)), ((3, 1), (0.75, 0.25))])
def test_weights_of_any_size_are_scaled_to_one(given, expected):
    assert weights(given, 2) == expected


def test_the_terminal_shows_every_set():
    report = compress(decoder(), 0.8, time=True, input_shape=[PREFILL, DECODE]).report
    times = tuple(
        replace(call, before=before, after=after)
        for call, (before, after) in zip(
            report.timing.calls, [(4_000_000, 2_000_000), (900, 450)], strict=True
        )
    )
    file = io.StringIO()
    replace(report, timing=replace(report.timing, calls=times)).table(Console(file=file, width=100))
    rows = [line.split() for line in file.getvalue().splitlines()]
    assert ["set", "1", "4", "ms", "2", "ms", "0.500"] in rows
    assert ["set", "2", "0.9", "µs", "0.45", "µs", "0.500"] in rows


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--input-shape", "input_ids=1,6", *SETS[:4], "--time"],
            "--input-shape gives 'past_key_values_0_key' 1 and 'input_ids' 2 of 2 shapes: give every input "
            "that you name the same number of shapes, one for each set.",
        ),
        (
            [*SETS, "--time", "--weights", "1,2,3"],
            "--weights has 3 values, and --input-shape gives 2 sets of shapes: give every input two shapes",
        ),
        (
            [*SETS[:4], "--time", "--weights", "1"],
            "--weights has 1 value, and --input-shape gives 1 set of shapes: give every input two shapes",
        ),
        ([*SETS, "--time", "--weights", "1,0"], "--weights has the value 0: give values above 0."),
        ([*SETS, "--time", "--weights", "1,-2"], "--weights has the value -2: give values above 0."),
        ([*SETS, "--time", "--weights", "1,nan"], "--weights has the value nan: give values above 0."),
        ([*SETS, "--time", "--weights", "1,inf"], "--weights has the value inf: give values above 0."),
        (
            [*SETS, "--time", "--weights", "1;2"],
            "--weights: '1;2' is no number for each set of shapes: write it like 0.3,0.7.",
        ),
        (
            [*SETS],
            "a second --input-shape for an input would do nothing, as nothing is timed: pass --time or "
            "--budget latency, or leave it out.",
        ),
        (
            [*SETS, "--weights", "1,2"],
            "a second --input-shape for an input and --weights would do nothing, as nothing is timed",
        ),
    ],
)
def test_mistakes(run, arguments, sentence):
    code, _, err = run(*arguments)
    assert code == 2
    assert sentence.lower() in err.lower()
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"input_shape": [PREFILL, {"input_ids": (1, 1)}]},
            "gives 'past_key_values_0_key' 1 and 'input_ids' 2 of 2",
        ),
        (
            {"input_shape": [PREFILL, 3]},
            "input_shape is '3' of type int: give a mapping of input names to shapes",
        ),
        ({"input_shape": "x=1"}, "input_shape is 'x' of type str: give a mapping"),
        (
            {"input_shape": [PREFILL, DECODE], "weights": 0.5},
            "weights is '0.5' of type float: give a number for",
        ),
        (
            {"input_shape": [PREFILL, DECODE], "weights": [1, "2"]},
            "weights is '2' of type str: give a number for",
        ),
        (
            {"input_shape": [PREFILL, DECODE | {"input_ids": (1, 0, 1)}]},
            "which --input-shape 1×0×1 does not fit",
        ),
    ],
)
def test_mistakes_in_python(given, sentence):
    with pytest.raises(InputError, match=sentence):
        compress(decoder(), 0.8, time=True, **given)
