import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from onnx_lowrank.core.factors import Certificate, Fit, LayerFit
from onnx_lowrank.core.layer import Skipped
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.outcome import Calibrated, LayerTime, OutputError, Timing, Trial, Validation
from onnx_lowrank.core.plan import Aggregate, Solver
from onnx_lowrank.report import words
from onnx_lowrank.report.content import Figure, LayerRow, Total, Totals
from onnx_lowrank.report.report import Report

OPEN = "MACs need the shapes that the model leaves open: pass --input-shape x=1,16."


def row(index: int, kept: bool = False, certificate: float = 0.12341) -> LayerRow:
    return LayerRow(
        id=f"stage{index}.conv.weight",
        name=f"stage{index}.conv.weight",
        op="Conv",
        shape=(1, 64, 32, 3, 3),
        dtype="float32",
        nodes=(f"conv{index}",),
        option=None if kept else Option(Fold.ROWS, 2, 7 + index),
        full_rank=None if kept else 48,
        params=Total(18432, 18432 if kept else 9000 + index),
        macs=Total(None, None),
        error=None if kept else 0.25,
        certificate=None if kept else Certificate((0.1, certificate), (0.2, 0.3)),
        reason="no option is cheaper" if kept else "",
    )


def totals(time):
    return Totals(
        (
            Figure("params", Total(123456, 61234), "parameters"),
            Figure("macs", Total(None, None), "MACs", unknown=OPEN),
            Figure("bytes", Total(500000, 250000), "file bytes"),
            Figure("time", time),
        )
    )


def report(**changes: object) -> Report:
    base = Report(
        version="0.1.0",
        model="net",
        sha256="ab" * 32,
        recipe="power",
        measure="spectral",
        budget="params",
        asked=0.5,
        reached=0.4987,
        solver=Solver(Aggregate.SUM, 4, 0.0321, 0.0),
        layers=(row(0), row(1, kept=True), row(2)),
        skipped=(
            *(Skipped("", f"m{i}", "MatMul", "", "no constant operand") for i in range(5)),
            Skipped("", "d", "Conv", "w", "depthwise"),
        ),
        removed_inputs=("w1", "w2"),
        totals=totals(None),
    )
    return replace(base, **changes)


def printed(shown: Report, width: int = 120, encoding: str = "utf-8", *, every: bool = False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    shown.table(Console(file=file, width=width), every=every)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_terminal_shows_every_layer_with_its_option(width):
    lines = printed(report(), width, every=True).splitlines()
    found = [line for line in lines if "of 48" in line]
    assert len(found) == 2
    assert all("rows" in line and "0.25" in line and "64×32×3×3" in line for line in found)
    assert "7 of 48" in found[0]
    assert "9 of 48" in found[1]
    assert sum("keep" in line for line in lines) == 1


@pytest.mark.parametrize("width", [40, 50, 60, 72, 80, 120, 160])
@pytest.mark.parametrize("count", [1, 3, 54])
def test_terminal_fits_the_width_and_never_cuts_a_number(width, count):
    text = printed(report(layers=tuple(row(i) for i in range(count))), width)
    assert max(map(len, text.splitlines())) <= width
    for index in range(count):
        assert f"{7 + index} of 48" in text
    assert "123,456" in text
    assert "61,234" in text


def test_terminal_totals_ratio_and_proof():
    text = printed(report())
    assert "unknown" in text  # MACs.
    assert "MACs need the shapes that the model leaves open: pass --input-shape" in " ".join(text.split())
    assert "0.496" in text  # 61234 / 123456
    assert "0.500" in text
    assert "0.4987, asked for 0.5" in text
    assert "proven optimal" in text
    assert "within 0.01 of the optimum" in printed(report(solver=Solver(Aggregate.MAX, 1, 1.0, 0.01)))
    assert "Objective" not in printed(report(solver=None))


def test_terminal_groups_reasons_with_counts():
    text = printed(report())
    assert "Skipped: 6 operators" in text
    assert "5 × no constant operand (m0, m1, m2 and 2 more)" in text
    assert "1 × depthwise (d)" in text
    assert text.index("no constant operand") < text.index("depthwise")
    assert "Kept: 1 layer (-v lists all)\n" in text
    assert "Kept: 1 layer\n" in printed(report(), every=True)
    assert "w1, w2" in text


def test_terminal_warnings_and_validation():
    validation = Validation(
        "ONNX Runtime CPUExecutionProvider",
        "given: x float32 1×3",
        (OutputError("y", 0.0123, 0.5, 0.975), OutputError("z", None, None, 1.0, "odd")),
        ("branch/w",),
        ("a note",),
    )
    text = printed(report(validation=validation, warnings=("be careful",)))
    for part in ("CPUExecutionProvider", "relative error 0.0123", "97.5%", "odd", "branch/w", "a note"):
        assert part in text
    assert "Warning: be careful" in text
    assert "unknown" in printed(report(validation=replace(validation, never_ran=None)))
    alone = replace(validation, outputs=(), alone=(OutputError("layer w", 0.25, 0.5, None),))
    assert "layer w: relative error 0.25" in printed(report(validation=alone))


def test_an_embedding_is_shown_by_its_directions():
    output = OutputError("y", 0.15, 0.5, None, cosine=0.9888, neighbours=0.858)
    validation = Validation("engine", "inputs", (output,), ())
    text = printed(report(validation=validation), 160)
    shown = "relative error 0.15, largest difference 0.5, cosine 0.989, nearest neighbour kept 85.8%"
    assert f"  y: {shown}\n" in text
    loaded = json.loads(report(validation=validation).to_json())["validation"]["outputs"][0]
    assert (loaded["agreement"], loaded["cosine"], loaded["neighbours"]) == (None, 0.9888, 0.858)
    alone = replace(output, neighbours=None)
    assert "neighbour" not in printed(report(validation=replace(validation, outputs=(alone,))), 160)


@pytest.mark.parametrize(
    ("bound", "shown"), [(0.12341, "0.124"), (0.1, "0.1"), (1.23e-5, "1.3e-05"), (0.0, "0")]
)
def test_terminal_never_rounds_a_certified_bound_down(bound, shown):
    one = row(0)
    one = replace(one, certificate=Certificate((bound,), (bound,)))
    line = next(line for line in printed(report(layers=(one,))).splitlines() if "of 48" in line)
    assert line.split()[-1] == shown


def test_terminal_takes_names_as_text():
    hostile = replace(row(0), name="[bold]x[/bold]\x1b[31m\nred")
    text = printed(report(layers=(hostile,)))
    assert "[bold]x[/bold]?[31m?red" in text
    assert "\x1b" not in text


def test_terminal_without_unicode_and_colour():
    long = [replace(row(i), name=f"a/very/long/{i}/" + "x" * 100) for i in range(2)]
    text = printed(report(layers=tuple(long)), 80, "ascii")
    assert "64x32x3x3" in text
    assert "\x1b" not in text


def test_long_ids_stay_distinct():
    ids = [f"backbone.stages.{i}.block.conv.weight_quantized_export" for i in range(12)]
    text = printed(report(layers=tuple(replace(row(0), name=name) for name in ids)), 80)
    shown = [line.split()[0] for line in text.splitlines() if "of 48" in line]
    assert len(set(shown)) == 12


def test_layers_are_shown_by_their_names_and_known_by_their_ids():
    rows = tuple(replace(row(i, kept=i > 0), id=f"onnx::Conv_{i}", name=f"/conv{i}/Conv") for i in range(3))
    validation = Validation(
        "layers alone",
        "made",
        (OutputError("onnx::Conv_0", 0.5, 0.5, None),),
        ("onnx::Conv_1",),
        alone=(OutputError("layer onnx::Conv_0", 0.25, 0.5, None),),
    )
    source = Calibrated("x: 9 samples, 1 held out", 9, 1, (("onnx::Conv_2", "it never ran"),))
    shown = report(layers=rows, validation=validation, calibration=source)
    text = printed(shown, 160, every=True)
    assert [line.split()[0] for line in text.splitlines() if "64×32×3×3" in line] == [r.name for r in rows]
    assert "2 × no option is cheaper (/conv1/Conv, /conv2/Conv)" in text
    assert "1 × it never ran (/conv2/Conv)" in text
    assert "never ran: /conv1/Conv" in text
    assert "layer /conv0/Conv: relative error 0.25" in text
    assert "  onnx::Conv_0: relative error 0.5" in text, "an output is no layer"
    assert text.count("onnx::") == 1
    loaded = json.loads(shown.to_json())
    assert [(r["id"], r["name"]) for r in loaded["layers"]] == [(r.id, r.name) for r in rows]
    assert loaded["validation"]["never_ran"] == ["onnx::Conv_1"]
    assert loaded["validation"]["alone"][0]["name"] == "layer onnx::Conv_0"


def test_terminal_without_layers():
    text = printed(report(layers=(), skipped=()))
    assert "0 of 0 layers" in text
    assert "123,456" in text


def test_json_holds_everything():
    validation = Validation("engine", "inputs", (OutputError("y", float("inf"), 0.5, None),), None)
    loaded = json.loads(report(validation=validation, warnings=("w",)).to_json())
    assert list(loaded) == [
        "schema", "version", "model", "recipe", "ratio", "solver", "totals", "layers", "skipped",
        "removed_inputs", "merges", "validation", "warnings", "target", "calibration", "timing", "trials",
        "graph",
        "counted",
        "then",
    ]  # fmt: skip
    assert loaded["schema"] == 1
    assert (loaded["target"], loaded["calibration"], loaded["trials"]) == (None, None, [])
    assert loaded["model"] == {"name": "net", "sha256": "ab" * 32}
    assert loaded["ratio"] == {"budget": "params", "asked": 0.5, "reached": 0.4987}
    assert loaded["totals"]["params"] == {"before": 123456, "after": 61234, "ratio": 61234 / 123456}
    assert loaded["totals"]["macs"] == {"before": None, "after": None, "ratio": None}
    first, kept, _ = loaded["layers"]
    assert (first["fold"], first["k"], first["j"], first["full_rank"]) == ("rows", 2, 7, 48)
    assert first["shape"] == [1, 64, 32, 3, 3]
    assert first["certificate"] == {"spectral": [0.1, 0.12341], "frobenius": [0.2, 0.3]}
    assert (kept["fold"], kept["error"], kept["reason"]) == (None, None, "no option is cheaper")
    assert [first["fit"], kept["fit"]] == [None, None]
    assert len(loaded["skipped"]) == 6
    assert loaded["validation"]["outputs"][0]["relative"] is None  # Inf is no JSON number.
    assert loaded["validation"]["worst"] is None
    assert loaded["validation"]["never_ran"] is None
    assert loaded["validation"]["alone"] == []
    alone = (OutputError("layer w", 0.25, 0.5, None),)
    loaded = json.loads(report(validation=replace(validation, outputs=(), alone=alone)).to_json())[
        "validation"
    ]
    assert (loaded["worst"], loaded["outputs"]) == (None, [])
    assert [error["name"] for error in loaded["alone"]] == ["layer w"]


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (0, ""),
        (2, "summed: one decoder for all of layer0, layer1."),
        (8, "layer0, layer1; layer2, layer3; layer4, layer5; and 1 more."),
    ],
)
def test_the_legend_names_the_layers_that_share_a_factor(number, told):
    option = Option(Fold.ENCODE, 1, 7, Lowering.SUMMED)
    rows = [replace(row(i), id=f"w{i}", name=f"layer{i}") for i in range(9)]
    for i in range(number):
        group = (f"w{i // 2 * 2}", f"w{i // 2 * 2 + 1}")
        rows[i] = replace(rows[i], option=option, joined=group)
    text = " ".join(printed(report(layers=tuple(rows)), 200).split())
    assert told in text
    assert ("summed:" in text) == (number > 0)


def test_json_is_stable_and_ends_with_a_newline():
    text = report().to_json()
    assert text == report().to_json()
    assert text.endswith("}\n")
    assert "NaN" not in text
    assert "Infinity" not in text


def test_json_takes_the_floats_of_numpy_for_floats():
    rows = tuple(replace(row, error=row.error and np.float64(row.error)) for row in report().layers)
    assert report(layers=rows).to_json() == report().to_json()


def test_table_prints_on_stdout_by_default(capsys):
    report().table()
    captured = capsys.readouterr()
    assert "power" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_of_text_ends_in_blanks(width):
    warning = "This is a sentence that is long enough to be wrapped on any console that this test opens."
    text = printed(report(warnings=(warning,) * 3), width)
    wrapped = [
        line for line in text.splitlines() if "sentence" in line or "wrapped" in line or "opens" in line
    ]
    assert len(wrapped) >= 3
    assert all(line == line.rstrip() for line in wrapped)


def test_nothing_is_called_optimal_where_nothing_was_done():
    rows = tuple(replace(row, option=None) for row in report().layers)
    assert "proven optimal" in printed(report())
    assert "Objective" not in printed(report(layers=rows))


# --- calibration --------------------------------------------------------------------------------------

FITS = (
    LayerFit(Fit.ACTIVATIONS, recovered=True, error=0.0123),
    None,
    LayerFit(Fit.ACTIVATIONS, error=0.5),
    LayerFit(Fit.WEIGHTS),
)
TRIALS = (
    Trial("output", 0.5, False, (OutputError("y", 0.0321, 1.0, 0.975), OutputError("z", 0.01, 1.0, None))),
    Trial(
        "schatten",
        0.5,
        False,
        (OutputError("y", 0.0123, 1.0, 0.9875), OutputError("z", 0.002, 1.0, 1.0)),
        True,
    ),
    Trial("svd", 0.5, note="The ratio 0.5 cannot be reached: the smallest is 0.625."),
)


def calibrated(**changes: object) -> Report:
    rows = tuple(replace(row(i, kept=fit is None), fit=fit) for i, fit in enumerate(FITS))
    source = Calibrated("data.npz: 400 samples, 80 held out", 400, 80, (("stage3.conv.weight", "it is odd"),))
    base = report(layers=rows, measure="activation", calibration=source, trials=TRIALS)
    return replace(base, **changes)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_terminal_tells_how_every_layer_was_fitted():
    lines = printed(calibrated(), 160, every=True).splitlines()
    header = next(line for line in lines if line.startswith("layer"))
    assert header.split()[-2:] == ["fit", "held-out"]
    ends = [line.split()[-2:] for line in lines if line.startswith("stage")]
    assert ends == [["recovered", "1.23%"], ["activations", "50.0%"], ["weights", "–"], ["–", "–"]]


def test_terminal_has_no_columns_for_what_was_not_calibrated():
    assert "held-out" not in printed(calibrated(calibration=None, trials=()), 160)
    assert "activations" not in printed(calibrated(calibration=None, trials=()), 160)
    weights = tuple(replace(row(i), fit=LayerFit(Fit.WEIGHTS)) for i in range(2))
    header = next(line for line in printed(calibrated(layers=weights), 160).splitlines() if "rank" in line)
    assert header.split()[-1] == "fit"
    header = next(
        line
        for line in printed(calibrated(layers=(row(0), row(1, kept=True))), 160).splitlines()
        if "rank" in line
    )
    assert header.split()[-1] == "bound"


def test_an_error_on_the_fitted_inputs_is_not_called_held_out():
    text = printed(calibrated(calibration=Calibrated("x: 4 samples, 0 held out", 4, 0)), 160)
    assert "held-out" not in text
    assert "output error" in text
    assert "measured: ‖y − ŷ‖²/‖y‖² of the layer's output y on the calibration inputs;" in text
    assert "output error: ‖y − ŷ‖/‖y − ȳ‖ of the model's output y, ȳ its mean (0 if y is " in text
    assert "constant), on calibration inputs; the largest of several." in text


@pytest.mark.parametrize("width", [40, 50, 60, 72, 80, 90, 100, 110, 120, 160])
@pytest.mark.parametrize("count", [1, 3, 54])
def test_a_calibrated_report_fits_the_width_and_never_cuts_a_number(width, count):
    rows = tuple(replace(row(i), fit=FITS[0]) for i in range(count))
    text = printed(calibrated(layers=rows), width)
    assert max(map(len, text.splitlines())) <= width
    for index in range(count):
        assert f"{7 + index} of 48" in text
    for number in ("0.0321", "0.0123", "97.50%", "98.75%", "123,456"):
        assert number in text
    assert ("1.23%" in text) == ("held-out: " in text)
    assert "1.23%" in text or width < 60


@pytest.mark.parametrize("width", [40, 60, 72, 80, 90, 120, 160])
@pytest.mark.parametrize("fitted", [False, True])
def test_the_legend_explains_the_columns_that_are_shown(width, fitted):
    lines = printed(calibrated() if fitted else report(), width).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("layer "))
    header = lines[start].split()
    explained = {line.split(":")[0] for line in lines if line.split(":")[0] in ("bound", "fit", "held-out")}
    assert explained == {"bound", "fit", "held-out"} & set(header)


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ("spectral", "error: spectral, as the recipe scores it."),
        ("activation", "error: activation, ‖y − ŷ‖²/‖y‖² of the layer's output y, predicted from"),
        (
            "output",
            "error: output, the predicted contribution of this layer to the squared output error",
        ),
    ],
)
def test_the_legend_says_what_the_error_is(measure, words):
    assert words in flat(printed(calibrated(measure=measure)))


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (0.0, "0.00%"),
        (1e-12, "<0.01%"),
        (0.0001, "0.01%"),
        (0.01234, "1.23%"),
        (0.1234, "12.3%"),
        (1.0, "100.0%"),
        (12345.0, "1e+06%"),
        (float("inf"), "inf%"),
        (None, "–"),
    ],
)
def test_a_held_out_error_is_shown_in_per_cent(error, shown):
    rows = (replace(row(0), fit=LayerFit(Fit.ACTIVATIONS, error=error)), replace(row(1), fit=FITS[0]))
    line = next(line for line in printed(calibrated(layers=rows), 160).splitlines() if "7 of 48" in line)
    assert line.split()[-1] == shown


def test_terminal_compares_what_was_tried():
    lines = printed(calibrated(), 160).splitlines()
    assert "Calibration on data.npz: 400 samples, 80 held out" in lines
    start = next(n for n, line in enumerate(lines) if line.startswith("  recipe"))
    assert lines[start].split() == ["recipe", "ratio", "output", "error", "agreement"]
    assert [line.split() for line in lines[start + 2 : start + 5]] == [
        ["output", "0.5", "0.0321", "97.50%"],
        ["→", "schatten", "0.5", "0.0123", "98.75%"],
        ["svd", "0.5", "–", "–"],
    ]
    assert lines[start + 5].startswith("output error: ")
    assert "on held-out calibration inputs" in lines[start + 5]
    assert lines[start + 6] == "  svd at 0.5: The ratio 0.5 cannot be reached: the smallest is 0.625."


def test_the_agreement_of_an_embedding_is_explained():
    told = "agreement: for an embedding, the share of rows that keep their nearest neighbour."
    assert told not in flat(printed(calibrated()))
    tried = (Trial("svd", 0.5, False, (OutputError("y", 0.1, 1.0, None, cosine=0.99, neighbours=0.8125),)),)
    text = flat(printed(calibrated(trials=tried)))
    assert told in text
    assert "svd 0.5 0.1 81.25%" in text


def test_ratios_that_were_tried_stand_in_their_order():
    tried = tuple(
        Trial("output", ratio, False, (OutputError("y", 1 - ratio, 1.0, None),), chosen=ratio == 0.375)
        for ratio in (0.5, 0.25, 0.375, 0.3125)
    )
    lines = printed(calibrated(trials=tried)).splitlines()
    lines = [line for line in lines if re.match(r"[ →] output ", line)]
    assert [line.split()[-2:] for line in lines[-4:]] == [
        ["0.5", "0.5"],
        ["0.375", "0.625"],
        ["0.3125", "0.688"],
        ["0.25", "0.75"],
    ]
    assert [line.startswith("→") for line in lines[-4:]] == [False, True, False, False]
    assert "agreement" not in "".join(lines)


def test_a_long_name_of_a_recipe_is_cut_and_its_numbers_are_not():
    tried = tuple(replace(trial, recipe=f"my_own_recipe_{'x' * 60}_{i}") for i, trial in enumerate(TRIALS))
    lines = printed(calibrated(trials=tried), 60).splitlines()
    assert len([line for line in lines if "97.50%" in line or "98.75%" in line]) == 2


def test_terminal_groups_the_layers_that_were_not_calibrated():
    unmeasured = (*((f"w{i}", "they never run") for i in range(5)), ("v", "they are too large"))
    text = printed(calibrated(calibration=Calibrated("x: 9 samples, 1 held out", 9, 1, unmeasured)))
    assert "Not calibrated: 6 layers" in text
    assert "5 × they never run (w0, w1, w2 and 2 more)" in text
    assert "1 × they are too large (v)" in text


@pytest.mark.parametrize(
    ("error", "agreement", "words"),
    [
        (None, None, "asked for 0.5"),
        (0.05, None, "the smallest tried with held-out output error at most 0.05"),
        (None, 0.99, "the smallest tried with held-out agreement at least 0.99"),
        (
            0.05,
            0.99,
            "the smallest tried with held-out output error at most 0.05 and agreement at least 0.99",
        ),
    ],
)
def test_the_ratio_is_told_by_what_was_asked_for(error, agreement, words):
    shown = calibrated(target_error=error, target_agreement=agreement)
    assert f"Ratio of params: 0.4987, {words}. " in flat(printed(shown, 160)) + " "
    target = json.loads(shown.to_json())["target"]
    assert target == (None if error is agreement is None else {"error": error, "agreement": agreement})


def test_json_holds_calibration_and_trials():
    nan = Trial("alds", 0.5, False, (OutputError("y", float("nan"), None, None),))
    loaded = json.loads(calibrated(trials=(*TRIALS, nan)).to_json())
    assert loaded["calibration"] == {
        "source": "data.npz: 400 samples, 80 held out",
        "samples": 400,
        "held": 80,
        "unmeasured": [{"layer": "stage3.conv.weight", "reason": "it is odd"}],
    }
    assert [row["fit"] for row in loaded["layers"]] == [
        {"factors": "activations", "recovered": True, "error": 0.0123},
        None,
        {"factors": "activations", "recovered": False, "error": 0.5},
        {"factors": "weights", "recovered": False, "error": None},
    ]
    output, schatten, svd, alds = loaded["trials"]
    fields = ["recipe", "ratio", "recovered", "error", "agreement", "chosen", "note", "outputs", "caches"]
    assert list(output) == fields
    assert [output[key] for key in ("recipe", "ratio", "error", "agreement")] == [
        "output",
        0.5,
        0.0321,
        0.975,
    ]
    assert [trial["chosen"] for trial in loaded["trials"]] == [False, True, False, False]
    assert schatten["outputs"][1] == {
        "name": "z",
        "relative": 0.002,
        "largest": 1.0,
        "agreement": 1.0,
        "note": "",
        "centred": None,
        "is_exact": False,
        "cosine": None,
        "neighbours": None,
        "noise": None,
    }
    assert (svd["error"], svd["agreement"], svd["outputs"]) == (None, None, [])
    assert svd["note"] == "The ratio 0.5 cannot be reached: the smallest is 0.625."
    assert (alds["error"], alds["outputs"][0]["relative"]) == (None, None)


def test_a_calibrated_report_needs_no_unicode():
    text = printed(calibrated(), 160, "ascii")
    assert "> schatten" in text
    assert "|y - y'|^2/|y|^2" in text
    assert "?" not in text


# --- times ------------------------------------------------------------------------------------------

TIMES = {"stage0.conv.weight": LayerTime(2_000_000, 800_000, 900_000)}
TIMING = Timing("ONNX Runtime X, 2 threads", "x float32 1×3", 5_000_000, 2_500_000, 2_750_000, TIMES)


def timed(timing=TIMING, **changes):
    time = Total(timing.before, timing.predicted if timing.after is None else timing.after)
    return report(timing=timing, totals=totals(time), budget="latency", reached=0.55, **changes)


@pytest.mark.parametrize(
    ("nanoseconds", "shown"),
    [
        (None, "unknown"),
        (0, "0 µs"),
        (1, "0.001 µs"),
        (1234, "1.23 µs"),
        (999_000, "999 µs"),
        (999_400, "999 µs"),
        (999_500, "1 ms"),
        (1_000_000, "1 ms"),
        (12_345_678, "12.3 ms"),
        (999_499_999, "999 ms"),
        (999_500_000, "1 s"),
        (1_500_000_000, "1.5 s"),
        (90_000_000_000, "90 s"),
        (990_000_000_000, "990 s"),
    ],
)
def test_times_have_three_digits(nanoseconds, shown):
    assert words.time(nanoseconds) == shown


def test_the_table_shows_measured_and_predicted_times():
    text = printed(timed(), 160)
    lines = text.splitlines()
    (layer,) = (line for line in lines if "stage0" in line)
    assert "2 ms→900 µs" in layer
    assert "800 µs" in layer
    (other,) = (line for line in lines if "stage2" in line)
    assert "ms" not in other
    (measured,) = (line for line in lines if line.startswith("time ") and "5 ms" in line)
    (predicted,) = (line for line in lines if line.startswith("predicted time"))
    assert "2.75 ms" in measured
    assert measured.rstrip().endswith("0.550")
    assert "2.5 ms" in predicted
    assert predicted.rstrip().endswith("0.500")
    assert "time: medians of interleaved runs on ONNX Runtime X, 2 threads;" in text
    assert "inputs x float32 1×3." in text
    assert "Ratio of latency: 0.5500, asked for 0.5" in text
    assert "time alone: times of the layer" in text


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({}, ["time", "predicted time"]),
        ({"after": None, "layers": {}}, ["predicted time"]),
        ({"predicted": None}, ["time"]),
        ({"predicted": None, "after": None, "layers": {}}, []),
    ],
)
def test_totals_have_the_times_that_are_known(change, rows):
    text = printed(timed(replace(TIMING, **change)), 160)
    found = [name for name in ("time", "predicted time") if re.search(rf"^{name} +[0-9]", text, re.MULTILINE)]
    assert found == rows
    assert ("time alone" in text) == bool(replace(TIMING, **change).layers)


def test_without_timing_there_are_no_times():
    text, _, _ = printed(report(), 160).partition("Next:")
    assert "time" not in text
    assert "predicted" not in text


def test_a_replayed_layer_has_no_prediction():
    layers = {name: replace(time, predicted=None) for name, time in TIMES.items()}
    (line,) = (
        line for line in printed(timed(replace(TIMING, layers=layers)), 160).splitlines() if "stage0" in line
    )
    assert "→900 µs" in line
    assert "800 µs" not in line


@pytest.mark.parametrize("width", [40, 50, 60, 72, 80, 120, 160])
@pytest.mark.parametrize("count", [1, 3, 54])
def test_times_fit_the_width_too(width, count):
    rows = tuple(row(index) for index in range(count))
    layers = {one.id: LayerTime(2_000_000, 800_000, 900_000) for one in rows}
    text = printed(timed(replace(TIMING, layers=layers), layers=rows), width)
    assert max(map(len, text.splitlines())) <= width
    for index in range(count):
        assert f"{7 + index} of 48" in text
    assert "2.75 ms" in text


def test_json_has_the_times():
    table = json.loads(timed().to_json())
    assert table["timing"] == {
        "engine": "ONNX Runtime X, 2 threads",
        "inputs": "x float32 1×3",
        "before": 5_000_000,
        "predicted": 2_500_000,
        "after": 2_750_000,
        "spread": 1.0,
        "layers": [
            {"layer": "stage0.conv.weight", "before": 2_000_000, "predicted": 800_000, "after": 900_000}
        ],
        "calls": [],
    }
    keys = ["engine", "inputs", "before", "predicted", "after", "spread", "layers", "calls"]
    assert list(table["timing"]) == keys
    assert table["totals"]["time"] == {"before": 5_000_000, "after": 2_750_000, "ratio": 0.55}
    assert table["ratio"]["budget"] == "latency"


def test_json_without_times_has_null():
    table = json.loads(report().to_json())
    assert table["timing"] is None
    assert table["totals"]["time"] is None
    assert table["layers"][0]["lowering"] == "native"
    assert table["layers"][1]["lowering"] is None


@pytest.mark.parametrize(("key", "total"), [("params", Total(1, 2)), ("time", Total(7, 8))])
def test_a_total_has_its_key(key, total):
    assert Totals((Figure("params", Total(1, 2)), Figure("time", Total(7, 8)))).amount(key) == total


@pytest.mark.parametrize("figures", [(), (Figure("time", None),)])
def test_a_total_that_is_unknown_has_no_ratio(figures):
    assert Totals(figures).amount("time").ratio is None


@pytest.mark.parametrize(("relative", "told"), [(0.5, False), (0.51, True), (1.12, True)])
@pytest.mark.parametrize("data", [False, True])
def test_outputs_that_are_mostly_noise_are_told_first_in_one_line(relative, told, data):
    outputs = (OutputError("y", relative, 0.1, None),)
    shown = report(validation=Validation("engine", "made", outputs, ()))
    if data:
        shown = replace(shown, calibration=Calibrated("x: 9 samples, 1 held out", 9, 1, ()))
    first, second, *_ = printed(shown, width=80).splitlines()
    if not told:
        assert first.startswith("net: ")
        return
    advice = "raise the ratio" if data else "give --calibration"
    assert first == f"Likely worthless: relative output error {relative:.3g}; {advice}."
    assert second.startswith("net: ")
