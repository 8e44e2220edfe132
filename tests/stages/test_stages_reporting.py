"""What a report warns of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onnx_lowrank import compress
from onnx_lowrank.budgets.budget import Run
from onnx_lowrank.core.outcome import Calibrated, OutputError, Quantized, Timing, Undecomposed, Validation
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.report.content import Total
from onnx_lowrank.stages import reporting
from onnx_lowrank.stages.search import Target
from tiny import CNN, built, cnn, weights

RATIO = "choose a larger ratio or another recipe"
CALIBRATE = f"{RATIO}, or pass inputs to fit to as --calibration"
TARGET = "set a stricter target or choose another recipe"
ROWS = "of the rows of 'logits' have the same largest element"


@pytest.fixture(scope="module")
def planned():
    """A model with its layers, and a plan of which there is nothing to warn."""
    proto = cnn()
    result = compress(proto, 0.6, dry_run=True)
    assert result.report.warnings == ()
    return find_layers(load(proto), {}, (), ()), result.plan


@pytest.fixture
def warned(planned):
    def warned(*outputs, given=True, calibrated=True, **targets):
        report = reporting.assemble(
            Run(*planned),
            validation=Validation("engine", "inputs", outputs, ()),
            given=given,
            calibration=Calibrated("source", 100, 20) if calibrated else None,
            target=Target(**targets),
        )
        return report.warnings

    return warned


def output(agreement, relative=0.1, name="logits", is_exact=False):
    return OutputError(name, relative, None, agreement, is_exact=is_exact)


@pytest.mark.parametrize(
    ("agreement", "shown"),
    [(0.8999, "90.0%"), (0.57, "57.0%"), (0.025, "2.50%"), (0.0, "0.00%")],
)
def test_low_agreement_is_a_warning(warned, agreement, shown):
    assert warned(output(agreement)) == (f"Only {shown} {ROWS}: {RATIO}.",)
    assert warned(output(agreement), calibrated=False) == (f"Only {shown} {ROWS}: {CALIBRATE}.",)


@pytest.mark.parametrize("relative", [None, 0.2])
def test_integers_booleans_and_texts_are_equal_or_not(warned, relative):
    labels = output(0.57, relative, "labels", is_exact=True)
    assert warned(labels) == (f"Only 57.0% of the elements of 'labels' are equal: {RATIO}.",)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [(0.09, 0.2, True), (0.1, 0.2, False), (0.01, 0.09, False), (0.0, 0.11, True)],
)
@pytest.mark.parametrize("given", [True, False])
def test_a_quantization_that_loses_more_than_the_decomposition(planned, before, after, told, given):
    done = Quantized("int8", "method", "", 1, (10, 1), (40, 10), (output(1.0, before),))
    validation = Validation("engine", "inputs", (output(1.0, after),), (), quantized=done)
    report = reporting.assemble(Run(*planned), validation=validation, given=given)
    wanted = (
        f"The quantization to int8 raises the relative error of an output from {before:.3g} to {after:.3g}: "
        "compare with --then int4 or --then fp16, or with a smaller ratio alone."
    )
    assert report.warnings == ((wanted,) if told and given else ())


@pytest.mark.parametrize(
    ("alone", "error", "low", "told"),
    [
        (20, 0.2, 40, "int8 alone"),
        (20, 0.21, 40, ""),
        (21, 0.1, 40, ""),
        (None, 0.1, 40, ""),
        (30, 0.1, 20, "The low-rank model"),
    ],
    ids=["as good", "errs more", "larger", "not made", "low-rank"],
)
def test_a_pair_that_is_worse_than_one_of_both_alone(planned, alone, error, low, told):
    outputs = (output(1.0, error),) if alone else ()
    done = Quantized(
        "int8", "method", "", 1, (10, 1), (low, 20), (output(1.0, 0.15),), Undecomposed(alone, outputs)
    )
    validation = Validation("engine", "inputs", (output(1.0, 0.2),), (), quantized=done)
    (warning,) = reporting.assemble(Run(*planned), validation=validation).warnings or ("",)
    assert warning.startswith(told)
    assert warning.endswith(
        {
            "": "",
            "int8 alone": "of 0.2, the result 20 with 0.2: take --budget params --ratio 1 --then int8.",
            "The low-rank model": "of 0.15, the result 20 with 0.2: leave out --then int8.",
        }[told]
    )


@pytest.mark.parametrize("more", [0, 1])
def test_a_quantization_alone_may_take_all_bytes_that_were_asked_for(planned, more):
    found, plan, *others = planned
    before = reporting.assemble(Run(*planned)).totals.amount("bytes").before
    plan = replace(plan, budget="bytes", ratio=(before - 1) / before)
    alone = Undecomposed(before - 1 + more, (output(1.0, 0.1),))
    done = Quantized("int8", "method", "", 1, (10, 1), (before, 20), (output(1.0, 0.15),), alone)
    validation = Validation("engine", "inputs", (output(1.0, 0.2),), (), quantized=done)
    report = reporting.assemble(Run(found, plan, *others), validation=validation)
    assert sum(text.startswith("int8 alone is better") for text in report.warnings) == 1 - more


@pytest.mark.parametrize("agreement", [None, 0.9, 1.0])
def test_agreement_that_is_high_or_unknown_is_none(warned, agreement):
    assert warned(output(agreement)) == ()


def test_no_outputs_are_no_warning(warned):
    assert warned() == ()


def test_the_output_that_agrees_least_is_told_alone(warned):
    outputs = (output(0.8, name="a"), output(None, name="b"), output(0.57), output(0.7, name="c"))
    assert warned(*outputs) == (f"Only 57.0% {ROWS}: {RATIO}.",)


def test_a_large_error_and_low_agreement_are_one_warning(warned):
    assert warned(output(0.57, 0.8312), output(0.95, 0.2, "other")) == (
        f"The largest relative error of an output is 0.831, and only 57.0% {ROWS}: {RATIO}.",
    )


@pytest.mark.parametrize(("agreement", "relative"), [(0.9, 0.51), (None, 0.51)])
def test_a_large_error_alone(warned, agreement, relative):
    large = "The largest relative error of an output is 0.51"
    assert warned(output(agreement, relative)) == (f"{large}: {RATIO}.",)
    assert warned(output(agreement, relative), calibrated=False) == (f"{large}: {CALIBRATE}.",)


@pytest.mark.parametrize(("relative", "number"), [(0.5, 0), (0.51, 1)])
def test_agreement_on_inputs_made_from_the_graph_says_nothing(warned, relative, number):
    told = "The largest relative error of an output is 0.51 on inputs made from the graph, which say little"
    warnings = warned(output(0.1, relative), given=False, calibrated=False)
    assert warnings == (f"{told}: pass real ones as --inputs.",) * number


@pytest.mark.parametrize(
    ("agreement", "targets", "warns"),
    [
        (0.8, {"agreement": 0.8}, False),
        (0.7, {"agreement": 0.8}, True),
        (0.91, {"agreement": 0.99}, False),
        (0.8, {"agreement": 0.99}, True),
        (0.8, {"error": 0.3}, True),
        (0.9, {"error": 0.3}, False),
    ],
)
def test_a_target_is_no_ratio_to_enlarge_and_what_was_asked_for_no_surprise(
    warned, agreement, targets, warns
):
    told = f"Only {agreement:.1%} {ROWS}: {TARGET}."
    assert warned(output(agreement), **targets) == ((told,) if warns else ())


def embedding(neighbours, cosine=0.99, name="sentence", relative=0.1):
    return OutputError(name, relative, None, None, cosine=cosine, neighbours=neighbours)


NEIGHBOURS = "of the rows of 'sentence' keep their nearest neighbour"


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        ((embedding(0.858),), f"Only 85.8% {NEIGHBOURS}"),
        ((embedding(0.9),), ""),
        ((embedding(None),), ""),
        ((embedding(0.8), output(0.95)), f"Only 80.0% {NEIGHBOURS}"),
        ((embedding(0.8), output(0.57)), f"Only 57.0% {ROWS}"),
        ((embedding(0.95, 0.8999),), "Only a cosine similarity of 0.900 is left to the rows of 'sentence'"),
        (
            (embedding(None, 0.7), embedding(0.9, 0.8, "b")),
            "Only a cosine similarity of 0.700 is left to the rows of 'sentence'",
        ),
        ((embedding(0.95, 0.9),), ""),
        ((embedding(0.85, 0.7),), f"Only 85.0% {NEIGHBOURS}"),
        (
            (embedding(0.85, 0.7, relative=0.75),),
            f"The largest relative error of an output is 0.75, and only 85.0% {NEIGHBOURS}",
        ),
    ],
)
def test_rows_of_an_embedding_that_turn_away_are_a_warning(warned, outputs, told):
    assert warned(*outputs) == ((f"{told}: {RATIO}.",) if told else ())
    if told.startswith("Only"):
        assert warned(*outputs, given=False) == ()


def test_a_target_says_how_few_neighbours_are_no_surprise(warned):
    assert warned(embedding(0.8), agreement=0.8) == ()
    assert warned(embedding(0.79), agreement=0.8) == (f"Only 79.0% {NEIGHBOURS}: {TARGET}.",)


# --- names ----------------------------------------------------------------------------------------------


def test_weights_that_an_exporter_counted_are_shown_as_their_nodes():
    text = CNN.replace("conv1", "onnx__Conv_12").replace("conv2", "val_3")
    arrays = weights()
    proto = built(text, {"onnx__Conv_12": arrays["conv1"], "val_3": arrays["conv2"], "fc": arrays["fc"]})
    proto.graph.initializer[0].name = proto.graph.node[0].input[1] = "onnx::Conv_12"
    ids = ["onnx::Conv_12", "val_3", "fc"]
    result = compress(proto, 0.6, dry_run=True)
    assert [(row.id, row.name) for row in result.report.layers] == [
        *zip(ids, ["n.a", "n.c", "fc"], strict=True)
    ]
    assert [choice.layer for choice in result.plan.choices] == ids
    for glob in ("n.c", "val_3"):
        assert [row.id for row in compress(proto, 0.95, include=glob, dry_run=True).report.layers] == [
            "val_3"
        ]


# --- times ------------------------------------------------------------------------------------------


def timing(after, before=1000, predicted=None):
    return Timing("ONNX Runtime X, 1 thread", "inputs", before, predicted, after)


@pytest.mark.parametrize(("spread", "shown"), [(1.0, False), (1.3, False), (1.31, True), (3.0, True)])
def test_times_that_vary_are_a_warning(planned, spread, shown):
    found, plan = planned
    unsteady = replace(timing(900), spread=spread)
    report = reporting.assemble(Run(found, replace(plan, budget="latency", ratio=1.0), timing=unsteady))
    told = [warning for warning in report.warnings if "disturbs the times" in warning]
    assert bool(told) == shown


@pytest.mark.parametrize(
    ("after", "shown"),
    [(None, ""), (10, ""), (1000, ""), (1050, ""), (1051, "1.05"), (1500, "1.50"), (20_000, "20.00")],
)
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_a_slower_model_is_a_warning_where_time_is_not_the_budget(planned, budget, after, shown):
    found, plan = planned
    report = reporting.assemble(Run(found, replace(plan, budget=budget, ratio=1.0), timing=timing(after)))
    slower = [warning for warning in report.warnings if "as long" in warning]
    told = (
        f"The compressed model takes {shown} times as long as the input model on ONNX Runtime X, 1 thread: "
        "--budget latency makes models that are faster."
    )
    assert slower == ([told] if shown else [])
    assert report.timing == timing(after)
    assert report.totals.amount("time") == Total(1000, after)


@pytest.mark.parametrize(
    ("given", "after", "reached"),
    [
        (timing(700, predicted=500), 700, 0.7),
        (timing(None, predicted=500), 500, 0.5),
        (timing(700), 700, 0.7),
        (timing(1050, predicted=500), 1050, 1.05),
    ],
)
def test_where_it_is_the_budget_times_are_totals(planned, given, after, reached):
    found, plan = planned
    report = reporting.assemble(Run(found, replace(plan, budget="latency", ratio=reached), timing=given))
    assert (report.totals.amount("time").before, report.totals.amount("time").after) == (1000, after)
    assert report.reached == reached
    assert report.timing == given
    assert not any("as long" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (600, ""),
        (618, ""),
        (619, "The plan reaches the ratio 0.619, above the 0.6 for which it was made."),
        (551, ""),
        (549, "The ratio is 0.549 where 0.6 was asked for, as the options are coarse"),
    ],
)
def test_a_time_may_miss_its_ratio_by_what_measurements_differ(planned, after, told):
    found, plan = planned
    report = reporting.assemble(Run(found, replace(plan, budget="latency", ratio=0.6), timing=timing(after)))
    assert len(report.warnings) == bool(told)
    assert all(warning.startswith(told) for warning in report.warnings)


def test_a_quantization_that_alone_misses_the_ratio_is_a_warning(planned):
    found, plan = planned
    kept = replace(plan, choices=tuple(replace(choice, option=None) for choice in plan.choices))
    for then, told in (("int8", 2), ("", 1)):
        run = Run(found, replace(kept, then=then), None)
        assert len(list(reporting._ratio_warnings(run, 3.2, targeted=False))) == told
