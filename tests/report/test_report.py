import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from onnx_lowrank.report import LayerRow, Report, Solver, Total, Totals
from onnx_lowrank.report.progress import Silent, Terminal
from onnx_lowrank.types import (
    Aggregate,
    Budget,
    Certificate,
    Fold,
    Measure,
    Option,
    OutputError,
    Skipped,
    Validation,
)


def row(index: int, kept: bool = False, certificate: float = 0.12341) -> LayerRow:
    return LayerRow(
        id=f"stage{index}.conv.weight",
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


def report(**changes: object) -> Report:
    base = Report(
        version="0.1.0",
        model="net",
        sha256="ab" * 32,
        recipe="power",
        measure=Measure.SPECTRAL,
        budget=Budget.PARAMS,
        asked=0.5,
        reached=0.4987,
        solver=Solver(Aggregate.SUM, 4, 0.0321, 0.0),
        layers=(row(0), row(1, kept=True), row(2)),
        skipped=(
            *(Skipped("", f"m{i}", "MatMul", "", "no constant operand") for i in range(5)),
            Skipped("", "d", "Conv", "w", "depthwise"),
        ),
        removed_inputs=("w1", "w2"),
        totals=Totals(Total(123456, 61234), Total(None, None), Total(500000, 250000)),
    )
    return replace(base, **changes)


def printed(shown: Report, width: int = 120, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    shown.table(Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_terminal_shows_every_layer_with_its_option(width):
    lines = printed(report(), width).splitlines()
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
    assert "MACs need the shapes that the model leaves open: --input-shape" in " ".join(text.split())
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
    assert "Kept: 1 layer\n" in text
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


@pytest.mark.parametrize(
    ("bound", "shown"), [(0.12341, "0.124"), (0.1, "0.1"), (1.23e-5, "1.3e-05"), (0.0, "0")]
)
def test_terminal_never_rounds_a_certified_bound_down(bound, shown):
    one = row(0)
    one = replace(one, certificate=Certificate((bound,), (bound,)))
    line = next(line for line in printed(report(layers=(one,))).splitlines() if "of 48" in line)
    assert line.split()[-1] == shown


def test_terminal_takes_names_as_text():
    hostile = replace(row(0), id="[bold]x[/bold]\x1b[31m\nred")
    text = printed(report(layers=(hostile,)))
    assert "[bold]x[/bold]?[31m?red" in text
    assert "\x1b" not in text


def test_terminal_without_unicode_and_colour():
    long = [replace(row(i), id=f"a/very/long/{i}/" + "x" * 100) for i in range(2)]
    text = printed(report(layers=tuple(long)), 80, "ascii")
    assert "64x32x3x3" in text
    assert "\x1b" not in text


def test_long_ids_stay_distinct():
    ids = [f"backbone.stages.{i}.block.conv.weight_quantized_export" for i in range(12)]
    text = printed(report(layers=tuple(replace(row(0), id=name) for name in ids)), 80)
    shown = [line.split()[0] for line in text.splitlines() if "of 48" in line]
    assert len(set(shown)) == 12


def test_terminal_without_layers():
    text = printed(report(layers=(), skipped=()))
    assert "0 of 0 layers" in text
    assert "123,456" in text


def test_json_holds_everything():
    validation = Validation("engine", "inputs", (OutputError("y", float("inf"), 0.5, None),), None)
    loaded = json.loads(report(validation=validation, warnings=("w",)).to_json())
    assert list(loaded) == [
        "schema", "version", "model", "recipe", "ratio", "solver", "totals", "layers", "skipped",
        "removed_inputs", "validation", "warnings",
    ]  # fmt: skip
    assert loaded["schema"] == 1
    assert loaded["model"] == {"name": "net", "sha256": "ab" * 32}
    assert loaded["ratio"] == {"budget": "params", "asked": 0.5, "reached": 0.4987}
    assert loaded["totals"]["params"] == {"before": 123456, "after": 61234, "ratio": 61234 / 123456}
    assert loaded["totals"]["macs"] == {"before": None, "after": None, "ratio": None}
    first, kept, _ = loaded["layers"]
    assert (first["fold"], first["k"], first["j"], first["full_rank"]) == ("rows", 2, 7, 48)
    assert first["shape"] == [1, 64, 32, 3, 3]
    assert first["certificate"] == {"spectral": [0.1, 0.12341], "frobenius": [0.2, 0.3]}
    assert (kept["fold"], kept["error"], kept["reason"]) == (None, None, "no option is cheaper")
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


def test_json_is_stable_and_ends_with_a_newline():
    text = report().to_json()
    assert text == report().to_json()
    assert text.endswith("}\n")
    assert "NaN" not in text
    assert "Infinity" not in text


def test_table_prints_on_stdout_by_default(capsys):
    report().table()
    captured = capsys.readouterr()
    assert "power" in captured.out
    assert captured.err == ""


def test_silent_progress(capsys):
    with Silent().stage("spectra", total=2) as step:
        step()
        step()
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_pipe_is_one_line_for_each_stage():
    file = io.StringIO()
    progress = Terminal(Console(file=file))
    with progress.stage("spectra", total=3) as step:
        step()
    with progress.stage("[plan]"):
        pass
    assert file.getvalue() == "spectra (3)\n[plan]\n"


@pytest.mark.parametrize(("total", "shown"), [(3, "3/3"), (None, "plan")])
def test_progress_in_a_terminal_reaches_the_end(total, shown):
    file = io.StringIO()
    with Terminal(Console(file=file, force_terminal=True, width=80, color_system=None)).stage(
        "plan", total
    ) as step:
        for _ in range(total or 0):
            step()
    assert shown in file.getvalue()


def test_progress_hands_on_errors():
    with pytest.raises(ZeroDivisionError), Terminal(Console(file=io.StringIO())).stage("x", 2):
        raise ZeroDivisionError


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
