"""What a first reader of a report sees: the verdict, few lines, and what to try next."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from onnx_lowrank import BudgetError, compress
from onnx_lowrank.core.layer import Skipped
from onnx_lowrank.core.outcome import OutputError, Timing, Validation
from onnx_lowrank.inspection import inspect
from onnx_lowrank.layers.withheld import withheld
from onnx_lowrank.operators.left_alone import LEFT_ALONE
from onnx_lowrank.report import inspection
from onnx_lowrank.report.content import Figure, Total, Totals
from onnx_lowrank.report.next_steps import next_steps
from onnx_lowrank.report.report import Report
from tiny import DIGITS, built, decaying

QUANTIZED = """
<ir_version: 8, opset_import: ["": 17]>
g (uint8[N, 3, 8, 8] x) => (int32[N, 4, 8, 8] y) { y = ConvInteger <pads = [1, 1, 1, 1]> (x, w) }
"""


@pytest.fixture(scope="module")
def digits() -> Report:
    return compress(DIGITS, 0.5, device="cpu").report


def lines(report: Report, width: int = 80, *, every: bool = False) -> list[str]:
    out = io.StringIO()
    report.table(Console(file=out, width=width), every=every)
    return out.getvalue().splitlines()


def outputs(*errors: float) -> Validation:
    many = tuple(OutputError(f"present.{n}.{'deep.' * 20}key", e, 1.0, None) for n, e in enumerate(errors))
    return Validation("engine", "made", many, ())


def test_the_first_line_is_the_verdict(digits: Report) -> None:
    first, second, *_ = lines(digits)
    assert first.startswith("digits: 0.496 of the parameters, 0.630 of the MACs, output error 0.")
    assert second == "3 of 9 layers rewritten with recipe schatten"


def test_the_verdict_has_times_where_they_are_known(digits: Report) -> None:
    measured = replace(digits, timing=Timing("engine", "made", 100, 70, 80))
    assert "0.800 of the time, output error" in lines(measured, 100)[0]
    predicted = replace(digits, timing=Timing("engine", "made", 100, 70, None))
    assert "0.700 of the predicted time, output error" in lines(predicted, 100)[0]


def test_the_verdict_names_the_quantization(digits: Report) -> None:
    planned = replace(digits, then="int8", totals=Totals((Figure("bytes", Total(100, None)),)))
    assert lines(planned)[0].startswith("digits: then int8, output error")
    made = compress(DIGITS, 0.5, then="fp16", device="cpu").report
    assert f", {made.totals.amount('bytes').ratio:.3f} of the bytes with fp16," in lines(made, 120)[0]


def test_rewritten_layers_stand_alone_until_all_are_asked_for(digits: Report) -> None:
    short, whole = lines(digits), lines(digits, every=True)
    assert sum(" Conv " in line or " Gemm " in line for line in short) == 3
    listed = [line for line in whole if " Conv " in line or " Gemm " in line]
    assert ["keep" in line for line in listed] == [False] * 3 + [True] * 6
    assert "Kept: 6 layers (-v lists all)" in short
    assert max(map(len, short)) <= 80


def test_many_layers_that_are_kept_take_no_room(digits: Report) -> None:
    kept = [row for row in digits.layers if row.option is None]
    many = tuple(replace(kept[n % len(kept)], id=f"l{n}", name=f"layer{n}.weight") for n in range(208))
    report = replace(digits, layers=(*many, *(row for row in digits.layers if row.option is not None)))
    assert len(lines(report)) == len(lines(digits))


def test_outputs_are_shortened_and_only_the_worst_are_listed(digits: Report) -> None:
    report = replace(digits, validation=outputs(0.1, 0.5, 0.2, 0.3, 0.4, 0.01))
    listed = [line for line in lines(report) if "relative error" in line]
    assert ["0.5" in line for line in listed] == [True, False, False, False]
    assert len(listed) == 4
    assert "  2 more outputs err less; --report has all" in lines(report)
    assert len([line for line in lines(report, every=True) if "relative error" in line]) == 6
    assert len({line.partition(":")[0] for line in listed}) == 4
    assert all(len(line.partition(":")[0]) <= 34 for line in listed)


def test_what_to_try_next_is_told_at_the_end(digits: Report) -> None:
    last = lines(digits)
    assert last[last.index("Next:") + 1 :] == [f"  {step}" for step in next_steps(digits)]
    assert [step.split()[0] for step in next_steps(digits)] == ["--calibration", "--time", "onnx-lowrank"]
    assert next_steps(replace(digits, validation=None))[0].startswith("without --dry-run")


@pytest.mark.parametrize("reason", sorted({r for r in LEFT_ALONE.values() if "deformable" not in r}))
def test_every_reason_of_a_quantizer_or_a_runtime_is_known(reason: str) -> None:
    (fact, advice) = withheld([Skipped("", "n", "QLinearConv", "w", reason)], 0) or ("", "")
    assert fact.startswith("its 1 convolution is ")
    assert advice.startswith("compress the ")


@pytest.mark.parametrize(
    ("ops", "layers", "fact"),
    [
        (["QLinearConv"] * 119, 1, "its 119 convolutions are quantized"),
        (["QLinearConv", "QGemm", "QGemm"], 0, "its 1 convolution and 2 operators are quantized"),
        (["QGemm"], 1, None),
        ([], 0, None),
    ],
)
def test_a_model_is_quantized_if_more_operators_are_than_are_not(
    ops: list[str], layers: int, fact: str | None
) -> None:
    skipped = [Skipped("", "n", op, "w", "it is quantized: compress before quantizing") for op in ops]
    found = withheld([*skipped, Skipped("", "n", "MatMul", "", "it is computed")], layers)
    assert (None if found is None else found[0]) == fact


def test_a_quantized_model_says_so_first(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(built(QUANTIZED, {"w": decaying(1, 4, 3, 3, 3).astype("int8")}), path)
    said = "its 1 convolution is quantized: compress the float model, then quantize."
    for budget in ("params", "latency"):
        with pytest.raises(BudgetError, match=f"net.onnx cannot get smaller than a ratio of 1, as {said}"):
            compress(path, 0.5, budget=budget)
    out = io.StringIO()
    inspection.show(inspect(path), Console(file=out, width=100))
    assert out.getvalue().startswith(f"net: {said}\n")
    assert lines(compress(path, 1.0).report, 100)[0] == f"net: {said}"
