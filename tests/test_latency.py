"""Times as the budget and as a warning, through compress(): recorded times, and a few real ones."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from onnx_lowrank import BudgetError, InputError, compress
from onnx_lowrank.allocate.times import WORTHWHILE
from onnx_lowrank.budgets.latency import isolated, whole
from onnx_lowrank.budgets.latency.clock import Pace
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.documents import plans
from onnx_lowrank.engines.engine import UnsupportedError
from rewriting import LOOP, model, named_bodies
from timing import Recorded, by_weights
from tiny import CNN, built, cnn, decaying

SHAPE = {"x": (2, 8, 6, 6)}
NOT_TIMED = "it did not run when the model was timed, or cannot be timed on its own"
LATENCY = {"budget": "latency", "align": 1}


class Watched(Recorded):
    """Remembers how it was made, and how many chains it has timed."""

    made: list = []  # noqa: RUF012

    def __init__(self, engine, threads=0, **options):
        super().__init__(engine, threads, **options)
        type(self).made.append((self, options))
        self.chains_timed = 0

    def chains(self, layer, options, pace):
        wanted = list(options)
        self.chains_timed += len(wanted)
        return super().chains(layer, wanted, pace)


@pytest.fixture
def watches(monkeypatch):
    """The stopwatches that are made, each with its settings."""
    monkeypatch.setattr(Watched, "made", [])
    monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", Watched)
    return Watched.made


@pytest.fixture
def costing(monkeypatch):
    """Lets whole models take the times of a rule; layers alone always take those of their weights."""

    def costing(rule):
        def cost(proto):
            return by_weights(proto) if proto.graph.name == "layer" else max(1, round(rule(proto)))

        monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", partial(Recorded, cost=cost))

    return costing


def half(proto=None, ratio=0.6, **options):
    return compress(proto or cnn(), ratio, **LATENCY, **({"input_shape": SHAPE} | options))


def kept(result):
    return {row.id: row.reason for row in result.report.layers if row.option is None}


def rewritten(result):
    return {row.id: row.option for row in result.report.layers if row.option is not None}


# --- the budget -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["schatten", "power", "alds", "alds-plus", "svd", "svd-energy", "l-rank"])
@pytest.mark.parametrize("ratio", [0.9, 0.6, 0.4])
def test_every_recipe_keeps_the_ratio_of_the_time(recipe, ratio):
    result = half(ratio=ratio, recipe=recipe)
    time = result.report.totals.amount("time")
    assert (time.before, time.after) == (by_weights(cnn()), by_weights(result.proto))
    assert result.report.reached == time.ratio <= ratio + 0.005
    assert result.report.budget == result.plan.budget == "latency"
    assert result.plan.ratio == ratio


@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_every_rewritten_layer_is_clearly_faster(ratio):
    result = half(ratio=ratio)
    layers = result.report.timing.layers
    assert layers.keys() == rewritten(result).keys()
    for time in layers.values():
        assert time.predicted < WORTHWHILE * time.before
        # Where every option is measured that is chosen, it takes what was predicted, else about that.
        assert time.after == pytest.approx(time.predicted, rel=0.02)
    costs = {choice.layer: choice.cost for choice in result.plan.choices}
    assert {layer: time.predicted for layer, time in layers.items()}.items() <= costs.items()


def test_the_times_of_the_whole_model():
    timing = half().report.timing
    saved = sum(time.before - time.predicted for time in timing.layers.values())
    assert timing.before == by_weights(cnn())
    assert timing.predicted == timing.before - saved
    assert timing.engine == "ONNX Runtime CPUExecutionProvider, all threads"
    assert timing.inputs == "x float32 2×8×6×6"


def test_it_is_deterministic():
    one, other = half(), half()
    assert one.plan == other.plan
    assert one.proto.SerializeToString(deterministic=True) == other.proto.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_other_budgets_measure_nothing_unasked(watches, budget):
    result = compress(cnn(), 0.6, budget=budget, input_shape=SHAPE)
    assert watches == []
    assert result.report.timing is None
    table = json.loads(result.report.to_json())
    assert table["totals"]["time"] is table["timing"] is None


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_other_budgets_measure_both_models_where_that_is_asked_for(budget):
    plain = compress(cnn(), 0.6, budget=budget, input_shape=SHAPE)
    timed = compress(cnn(), 0.6, budget=budget, input_shape=SHAPE, time=True, threads=2)
    assert timed.plan == plain.plan
    assert timed.proto == plain.proto
    timing, total = timed.report.timing, timed.report.totals.amount("time")
    assert (timing.before, timing.after) == (by_weights(cnn()), by_weights(timed.proto))
    assert (total.before, total.after) == (timing.before, timing.after)
    assert (timing.predicted, timing.layers, timing.spread) == (None, {}, 1.0)
    assert timing.engine == "ONNX Runtime CPUExecutionProvider, 2 threads"
    assert timing.inputs == "x float32 2×8×6×6"
    assert timed.report.reached == plain.report.reached


def test_a_model_in_which_nothing_changed_is_timed_where_that_is_asked_for():
    timing = compress(cnn(), 1.0, input_shape=SHAPE, time=True).report.timing
    assert timing.before == timing.after == by_weights(cnn())


@pytest.mark.parametrize(("align", "block"), [(1, 1), (4, 4), (8, 8)])
def test_alignment_is_kept(align, block):
    result = compress(cnn(), 0.8, budget="latency", align=align, input_shape=SHAPE)
    assert all(option.j % block == 0 for option in rewritten(result).values())


@pytest.mark.parametrize("block", [4, 8])
def test_by_default_ranks_fill_the_providers_blocks(monkeypatch, block):
    monkeypatch.setattr("onnx_lowrank.request.block", lambda provider: block)
    result = compress(cnn(), 0.8, budget="latency", input_shape=SHAPE)
    assert rewritten(result)
    assert all(option.j % block == 0 for option in rewritten(result).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"proto": cnn(CNN.replace("8, 6, 6]", "8, H, 6]")), "input_shape": {}},
            "Times can be measured for known shapes only, and the inputs x have open dimensions",
        ),
        ({"recipe": "auto"}, "--pass auto chooses by held-out calibration inputs"),
        ({"provider": "NoProvider"}, "no execution provider 'NoProvider'"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_measured(watches, options, message):
    with pytest.raises(InputError, match=message):
        half(**options)
    assert watches == []


def test_inputs_tell_the_shapes():
    x = np.random.default_rng(3).standard_normal((3, 8, 6, 6)).astype(np.float32)
    result = half(inputs={"x": x}, input_shape={})
    assert result.report.timing.inputs == "x float32 3×8×6×6"


def test_times_of_an_open_batch_are_those_of_one_sample():
    report = half(input_shape={}).report
    assert report.timing.inputs == "x float32 1×8×6×6"
    assert report.counted == "one sample (x 1×8×6×6)"


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_a_model_that_the_runtime_cannot_run_cannot_be_timed(share):
    """ONNX Runtime has no convolution for double."""
    text = CNN.replace("float[", "double[")
    wide = {
        "conv1": decaying(1, 16, 8, 3, 3).astype(np.float64),
        "conv2": decaying(2, 16, 16, 3, 3).astype(np.float64),
        "fc": decaying(3, 4, 16).astype(np.float64),
    }
    with pytest.raises(InputError, match=r"^To measure times the model has to run, and ONNX Runtime CPU"):
        half(built(text, wide), share)


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "words"), [(0, "all threads"), (1, "1 thread"), (4, "4 threads")])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("budget", ["latency", "params"])
def test_threads_and_cache_go_to_the_stopwatch(watches, threads, words, cache, budget):
    settings = {"input_shape": SHAPE, "threads": threads, "cache": cache, "align": 1}
    result = compress(cnn(), 0.6, budget=budget, time=budget == "params", **settings)
    ((watch, options),) = watches
    assert (watch.threads, options["caching"]) == (threads, cache)
    assert result.report.timing.engine.endswith(f", {words}")


def test_the_folder_of_the_cache_goes_to_the_stopwatch(watches, tmp_path):
    compress(cnn(), 0.6, time=True, input_shape=SHAPE, cache=tmp_path)
    ((_, options),) = watches
    assert options["caching"] == tmp_path


@pytest.mark.parametrize(("size", "warm"), [(10**9, True), (14_000, False)])
def test_small_models_find_their_weights_in_the_caches(watches, monkeypatch, size, warm):
    monkeypatch.setattr("onnx_lowrank.budgets.timing.cache_bytes", lambda: size)
    half(dry_run=True)
    assert watches[0][1]["warm"] == warm


def test_a_dry_run_of_another_budget_has_nothing_to_time(watches):
    compress(cnn(), 0.6, dry_run=True)
    with pytest.raises(
        InputError, match=r"^--time times the finished model, and --dry-run makes none: leave"
    ):
        compress(cnn(), 0.6, dry_run=True, time=True)
    assert watches == []


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_latency_budget_times_in_any_case(dry_run):
    one, other = (half(time=time, dry_run=dry_run).report.to_json() for time in (False, True))
    assert one == other


def repeated(blocks, different=0):
    """A model of blocks that are alike, the last some of another shape."""
    names = [f"w{index}" for index in range(blocks)]
    lines = [f"x{n + 1} = MatMul (x{n}, {name})" for n, name in enumerate(names)]
    last = f"y = MatMul (x{blocks}, v)" if different else f"y = Identity (x{blocks})"
    weights = {name: decaying(index, 24, 24) for index, name in enumerate(names)}
    more = {"v": decaying(99, 24, 12)} if different else {}
    out = 12 if different else 24
    return model(
        f"g (float[5, 24] x0) => (float[5, {out}] y) {{ {' '.join(lines)} {last} }}", **weights, **more
    )


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_layers_that_are_alike_are_measured_once(watches, blocks):
    """All layers have the same spectra, so that the same options are worth measuring."""
    compress(repeated(blocks), 0.8, budget="latency", align=1, dry_run=True, cache=False)
    compress(repeated(1), 0.8, budget="latency", align=1, dry_run=True, cache=False)
    (many, _), (one, _) = watches
    assert 0 < many.chains_timed == one.chains_timed


# --- dry runs and replays ---------------------------------------------------------------------------


def test_a_dry_run_predicts():
    dry, real = half(dry_run=True), half()
    assert dry.plan == real.plan
    timing = dry.report.timing
    assert (timing.after, timing.layers) == (None, {})
    assert timing.predicted == dry.report.totals.amount("time").after == real.report.timing.predicted
    assert dry.report.reached == timing.predicted / timing.before <= 0.6
    assert dry.report.warnings == ()


def test_a_saved_plan_gives_the_same_bytes(tmp_path):
    made = half()
    made.save_plan(tmp_path / "plan.json")
    assert plans.read(tmp_path / "plan.json") == made.plan
    again = compress(cnn(), plan=tmp_path / "plan.json", input_shape=SHAPE)
    assert again.plan == made.plan
    assert again.proto == made.proto
    assert again.report.reached == made.report.reached
    assert again.report.solver == made.report.solver
    timing = again.report.timing
    assert timing.predicted is None
    assert (timing.before, timing.after) == (made.report.timing.before, made.report.timing.after)
    assert [time.predicted for time in timing.layers.values()] == [None] * len(rewritten(made))
    assert {layer: time.after for layer, time in timing.layers.items()} == {
        layer: time.after for layer, time in made.report.timing.layers.items()
    }


def test_an_edited_plan_is_timed_anew_and_nothing_is_proven_of_it(tmp_path):
    made = half()
    table = json.loads(plans.to_json(made.plan))
    (row,) = (row for row in table["layers"] if row["id"] == "conv2")
    row |= {"fold": "rows", "k": 1, "j": 6, "lowering": "native"}
    (tmp_path / "plan.json").write_text(json.dumps(table))
    again = compress(cnn(), plan=tmp_path / "plan.json", input_shape=SHAPE)
    assert rewritten(again)["conv2"] == Option(Fold.ROWS, 1, 6)
    assert again.report.solver is None
    assert again.report.totals.amount("time").after == by_weights(again.proto)
    assert {row.error for row in again.report.layers if row.option} == {None}
    assert all(row["error"] is None for row in json.loads(again.report.to_json())["layers"] if row["fold"])


def test_an_edited_plan_that_keeps_more_says_that_it_misses_its_ratio(tmp_path):
    made = half()
    table = json.loads(plans.to_json(made.plan))
    for row in table["layers"][1:]:
        row |= {"fold": None, "k": None, "j": None, "lowering": None}
    (tmp_path / "plan.json").write_text(json.dumps(table))
    again = compress(cnn(), plan=tmp_path / "plan.json", input_shape=SHAPE)
    assert kept(again) == dict.fromkeys(("conv2", "fc"), "the replayed plan keeps it")
    assert again.report.warnings == (
        f"The plan reaches the ratio {again.report.reached:.4g}, above the 0.6 for which it was made.",
    )


@pytest.mark.parametrize("lowering", [Lowering.NATIVE, Lowering.CONV])
def test_the_operators_of_a_plan_are_replayed(lowering):
    proto = repeated(1)
    plan = half(proto, 0.9, input_shape=None).plan
    option = Option(Fold.ENCODE, 4, 2, lowering)
    again = compress(proto, plan=replace(plan, choices=(replace(plan.choices[0], option=option),)))
    operators = {node.op_type for node in again.proto.graph.node}
    assert ("Conv" in operators) == (lowering is Lowering.CONV)
    assert again.report.layers[0].option == option


# --- the report -------------------------------------------------------------------------------------


def test_the_json_has_all_times():
    result = half()
    timing = result.report.timing
    table = json.loads(result.report.to_json())
    assert table["timing"] == {
        "engine": timing.engine,
        "inputs": timing.inputs,
        "before": timing.before,
        "predicted": timing.predicted,
        "after": timing.after,
        "spread": 1.0,
        "layers": [
            {"layer": layer, "before": time.before, "predicted": time.predicted, "after": time.after}
            for layer, time in timing.layers.items()
        ],
        "calls": [],
    }
    assert table["totals"]["time"] == {
        "before": timing.before,
        "after": timing.after,
        "ratio": timing.after / timing.before,
    }
    assert table["ratio"] == {"budget": "latency", "asked": 0.6, "reached": result.report.reached}


def table(report):
    out = StringIO()
    report.table(Console(file=out, width=120))
    return out.getvalue()


def test_the_table_has_all_times():
    text = table(half().report)
    for words in ("time alone", "predicted time", "Ratio of latency", "interleaved runs on ONNX Runtime"):
        assert words in text


def test_the_report_of_another_budget_has_the_times_of_both_models():
    report = compress(cnn(), 0.6, input_shape=SHAPE, time=True, align=1).report
    text = table(report)
    (row,) = (line for line in text.splitlines() if line.startswith("time  "))
    ratio = report.totals.amount("time").ratio
    assert row.split()[1:] == ["3.58", "µs", "2.17", "µs", f"{ratio:.3f}"]
    assert "interleaved runs on ONNX Runtime" in text
    assert not any(words in text for words in ("time alone", "predicted time"))
    written = json.loads(report.to_json())
    timing = report.timing
    assert written["totals"]["time"]["before"] == written["timing"]["before"] == timing.before
    assert written["totals"]["time"]["after"] == written["timing"]["after"] == timing.after
    assert (written["timing"]["predicted"], written["timing"]["layers"]) == (None, [])
    assert "\ntime" not in table(compress(cnn(), 0.6, input_shape=SHAPE).report)


# --- models that become slower ----------------------------------------------------------------------


def is_dense(proto):
    return {"conv1", "conv2"} <= {tensor.name for tensor in proto.graph.initializer}


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize(
    ("slower", "shown"), [(0.5, ""), (1.0, ""), (1.05, ""), (1.06, "1.06"), (1.5, "1.50"), (20, "20.00")]
)
def test_other_budgets_warn_of_models_that_are_slower(costing, budget, slower, shown):
    costing(lambda proto: 1000 if is_dense(proto) else 1000 * slower)
    warnings = compress(cnn(), 0.6, budget=budget, input_shape=SHAPE, threads=2, time=True).report.warnings
    told = (
        f"The compressed model takes {shown} times as long as the input model on ONNX Runtime "
        "CPUExecutionProvider, 2 threads: --budget latency makes models that are faster."
    )
    assert [warning for warning in warnings if "as long" in warning] == ([told] if shown else [])


def turns(monkeypatch, pairs):
    """Let the input model and the compressed one take these times, session by session."""
    left = iter(pairs)

    class InTurns(Recorded):
        def __init__(self, engine, threads=0, **options):
            super().__init__(engine, threads, **options)
            self.warm = True

        def times(self, models, pace):
            return list(next(left))

    monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", InTurns)


@pytest.mark.parametrize(("ratio", "told"), [(1.0, False), (0.6, True)])
def test_the_input_model_is_never_called_slower_than_itself(monkeypatch, ratio, told):
    turns(monkeypatch, [(1000, 1200)] * 3)
    warnings = compress(cnn(), ratio, time=True).report.warnings
    assert any("1.20 times as long" in warning for warning in warnings) == told


@pytest.mark.parametrize(("longest", "told"), [(1300, ""), (1400, "1.4")])
def test_other_budgets_warn_of_times_that_other_work_disturbed(monkeypatch, longest, told):
    turns(monkeypatch, [(1000, 900), (longest, 700), (1000, 300)])
    report = compress(cnn(), 0.6, time=True).report
    assert (report.timing.before, report.timing.after) == (longest, 700)
    assert report.timing.spread == longest / 1000
    words = f"The times of the input model differ by a factor of {told}: other work on this machine"
    found = [warning for warning in report.warnings if warning.startswith(words)]
    assert [warning.endswith("so time it again when it is idle.") for warning in found] == [True] * bool(told)


def test_a_model_that_does_not_run_cannot_be_timed_and_is_told_before_the_work(monkeypatch):
    """ONNX Runtime has no convolution for double."""
    text = CNN.replace("float[", "double[")
    wide = {
        "conv1": decaying(1, 16, 8, 3, 3).astype(np.float64),
        "conv2": decaying(2, 16, 16, 3, 3).astype(np.float64),
        "fc": decaying(3, 4, 16).astype(np.float64),
    }
    assert rewritten(compress(built(text, wide), 0.6))
    monkeypatch.setattr("onnx_lowrank.session.build", None)
    with pytest.raises(InputError, match=r"^To measure times the model has to run, .*: leave --time out, or"):
        compress(built(text, wide), 0.6, time=True)


@pytest.mark.parametrize(("slower", "written"), [(1.0, True), (1.02, True), (1.021, False), (2.0, False)])
def test_under_latency_a_model_that_is_slower_is_not_made(costing, slower, written):
    times = []

    def cost(proto):
        """As fast as was asked for while it is planned, in two looks, then slower."""
        times.append(1000 if is_dense(proto) else 1000 * slower if times.count(600) == 2 else 600)
        return times[-1]

    costing(cost)
    if written:
        assert half().report.reached == slower
        return
    with pytest.raises(
        BudgetError, match=r"^The ratio 0\.6 of latency .* that was measured is 1\.000, so raise the ratio"
    ) as caught:
        half()
    assert caught.value.exit_code == 3
    assert caught.value.smallest_ratio == 1


@pytest.mark.parametrize(("slower", "told"), [(1.02, False), (1.2, True), (2.0, True)])
def test_a_replayed_plan_that_is_slower_here_is_made_with_a_warning(costing, slower, told):
    plan = half().plan
    costing(lambda proto: 1000 if is_dense(proto) else 1000 * slower)
    report = compress(cnn(), plan=plan, input_shape=SHAPE).report
    assert report.reached == slower
    warned = [text for text in report.warnings if "a machine or a setting where it is faster" in text]
    assert bool(warned) == told


def test_a_replayed_plan_of_times_needs_shapes():
    proto = cnn(CNN.replace("8, 6, 6]", "8, H, 6]"))
    plan = half(proto).plan
    with pytest.raises(InputError, match="Times can be measured for known shapes only"):
        compress(proto, plan=plan)


def test_an_edited_plan_may_have_its_layers_in_any_order():
    plan = half().plan
    turned = replace(plan, choices=plan.choices[::-1])
    one, other = (compress(cnn(), plan=p, input_shape=SHAPE) for p in (plan, turned))
    assert [row.id for row in other.report.layers] == [row.id for row in one.report.layers]
    assert [row.option for row in other.report.layers] == [row.option for row in one.report.layers]
    assert [choice.layer for choice in other.plan.choices] == [choice.layer for choice in plan.choices]


# --- what is kept -----------------------------------------------------------------------------------

BRANCHES = """g (bool c, float[5, 24] x) => (float[5, 24] y) {
  h = MatMul (x, w)
  y = If (c) <
    then_branch = t () => (float[5, 24] p) { p = MatMul (h, then) },
    else_branch = e () => (float[5, 24] q) { q = MatMul (h, other) }
  >
}"""


@pytest.mark.parametrize(("taken", "ran", "idle"), [(True, "then", "other"), (False, "other", "then")])
def test_layers_in_a_branch_that_does_not_run_are_kept(taken, ran, idle):
    weights = {name: decaying(seed, 24, 24) for seed, name in enumerate(("w", "then", "other"))}
    proto = named_bodies(model(BRANCHES, **weights))
    inputs = {"c": np.array(taken), "x": np.ones((5, 24), np.float32)}
    result = half(proto, 0.7, inputs=inputs, input_shape=None)
    assert kept(result)[idle] == NOT_TIMED
    assert ran in rewritten(result)
    assert result.report.timing.layers.keys() == rewritten(result).keys()


@pytest.mark.parametrize(("count", "runs"), [(0, False), (1, True), (3, True)])
def test_layers_in_a_loop_are_kept_where_it_does_not_run(count, runs):
    proto = named_bodies(model(LOOP.replace("COUNT", str(count)), w=decaying(1, 24, 24)))
    if runs:
        result = half(proto, 0.9, input_shape=None)
        assert rewritten(result)
        return
    with pytest.raises(BudgetError) as caught:
        half(proto, 0.9, input_shape=None)
    assert caught.value.exit_code == 3
    assert list(kept(half(proto, 1.0, input_shape=None)).values()) == [NOT_TIMED]


def has_conv2(proto):
    return any(list(tensor.dims) == [16, 16, 3, 3] for tensor in proto.graph.initializer)


def test_what_the_runtime_does_not_run_alone_is_kept(monkeypatch):
    class Picky(Recorded):
        def times(self, models, pace):
            if any(model.proto.graph.name == "layer" and has_conv2(model.proto) for model, _ in models):
                raise UnsupportedError("It does not know it")
            return super().times(models, pace)

    monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", Picky)
    result = half(ratio=0.9)
    assert kept(result)["conv2"] == NOT_TIMED
    assert "conv1" in rewritten(result)


def test_batches_of_matrices_and_embeddings_are_kept():
    proto = model(
        "g (int64[2, 5] i) => (float[2, 5, 8] y) "
        "{ e = Gather (table, i) h = MatMul (e, w) y = MatMul (h, v) }",
        table=decaying(1, 30, 24),
        w=decaying(2, 24, 24),
        v=np.stack([decaying(3, 24, 8), decaying(4, 24, 8)]),
    )
    result = half(proto, 0.8, input_shape=None)
    assert kept(result) == {"table": NOT_TIMED, "v": NOT_TIMED}
    assert rewritten(result).keys() == {"w"}


@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_a_model_without_layers_is_kept_or_told(ratio):
    proto = model("g (float[5, 24] x) => (float[5, 24] y) { y = Relu (x) }")
    if ratio == 1:
        assert kept(half(proto, ratio, input_shape=None)) == {}
        return
    with pytest.raises(BudgetError, match="no layer that can be decomposed"):
        half(proto, ratio, input_shape=None)


def test_a_weight_with_two_uses_takes_the_time_of_both():
    proto = model(
        "g (float[5, 24] x, float[9, 24] z) => (float[5, 24] y, float[9, 24] u) "
        "{ y = MatMul (x, w) u = MatMul (z, w) }",
        w=decaying(1, 24, 24),
    )
    result = half(proto, 0.8, input_shape=None)
    ((_, time),) = result.report.timing.layers.items()
    assert time.before == result.report.timing.before == by_weights(proto)


# --- calibration ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples():
    scale = np.linspace(0.1, 2, 8)[:, None, None]
    return (np.random.default_rng(5).standard_normal((40, 8, 6, 6)) * scale + scale).astype(np.float32)


@pytest.mark.parametrize("recipe", ["auto", "output", "activation", "pca"])
@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_calibrated_plans_keep_the_ratio_of_the_time(samples, recipe, ratio):
    result = half(ratio=ratio, recipe=recipe, calibration={"x": samples}, input_shape=None)
    assert result.report.totals.amount("time").after == by_weights(result.proto)
    assert result.report.reached <= ratio + 0.005
    assert result.report.timing.inputs == "x float32 1×8×6×6"
    if recipe == "auto":
        assert {trial.recipe for trial in result.report.trials} >= {"output", "activation", "schatten"}
        assert sum(trial.chosen for trial in result.report.trials) == 1


@pytest.mark.parametrize("target", [{"target_error": 0.2}, {"target_agreement": 0.9}])
def test_targets_find_the_fastest_model(samples, target):
    result = half(ratio=None, calibration={"x": samples}, input_shape=None, **target)
    assert result.report.reached < 0.8
    assert result.report.totals.amount("time").ratio == result.report.reached
    (chosen,) = (trial for trial in result.report.trials if trial.chosen)
    if "target_error" in target:
        assert chosen.error <= 0.2
    else:
        assert chosen.agreement >= 0.9


def test_a_calibrated_plan_is_replayed_to_the_byte(samples):
    options = {"calibration": {"x": samples}}
    made = half(recipe="output", input_shape=None, **options)
    again = compress(cnn(), plan=made.plan, **options)
    assert again.proto == made.proto


# --- real times -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's cache folder; what is measured is not measured long."""
    monkeypatch.setattr(whole, "_PACE", Pace(seconds=0.0))
    for name in ("_LAYERS", "_CHAINS"):
        monkeypatch.setattr(isolated, name, Pace(seconds=0.0))
    monkeypatch.setattr("onnx_lowrank.budgets.latency.cache.user_cache_path", lambda name: tmp_path / name)
    return tmp_path


@pytest.mark.clock
@pytest.mark.parametrize("cache", [True, False])
def test_real_times_are_measured_and_kept_where_that_is_wanted(folder, cache):
    result = half(ratio=1.0, threads=1, cache=cache)
    assert kept(result).keys() == {"conv1", "conv2", "fc"}
    timing = result.report.timing
    assert timing.before > 0
    assert timing.after is not None
    assert timing.layers == {}
    assert [path.name for path in folder.rglob("*.*")] == ["times.sqlite"] * cache


@pytest.mark.clock
def test_a_real_plan_keeps_its_promise_or_says_that_it_cannot(folder):
    proto = model("g (float[64, 256] x) => (float[64, 256] y) { y = MatMul (x, w) }", w=decaying(1, 256, 256))
    with suppress(BudgetError):
        result = half(proto, 0.9, input_shape=None, threads=1)
        assert result.report.timing.after <= 1.02 * result.report.timing.before
        assert rewritten(result).keys() == {"w"}


@pytest.mark.clock
def test_real_times_of_other_budgets(folder):
    timing = compress(cnn(), 0.6, threads=1, time=True).report.timing
    assert min(timing.before, timing.after) >= 1
    assert list(folder.iterdir()) == []
