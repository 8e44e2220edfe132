"""The table of a sweep."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from onnx_lowrank.documents.sweeps import Point, Sweep
from onnx_lowrank.report import curve


def point(ratio: float, error: float | None, **amounts: Any) -> Point:
    amounts = {"reached": ratio, "params": ratio, "error": error, "name": f"params-{ratio}", **amounts}
    return Point(budget="params", asked=ratio, recipe="svd", **amounts)


def shown(*points: Point, width: int = 80, **circumstances: Any) -> list[str]:
    found = Sweep(version="1", model="m", sha256="0", options="", points=points, **circumstances)
    text = StringIO()
    curve.show(found, Console(file=text, width=width), "points")
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_a_row_for_every_point_with_the_best_ones_marked() -> None:
    lines = shown(point(0.9, 0.1), point(0.7, 0.05), point(0.5, 0.4))
    assert lines[0].split() == ["point", "params", "error"]
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["params-0.9", "0.900", "0.1"],
        ["●", "params-0.7", "0.700"],
        ["●", "params-0.5", "0.500"],
    ]
    assert lines[-1] == "3 models, with their plans and reports, are in points."


def test_columns_of_known_amounts_alone() -> None:
    header, _, row, *_ = shown(point(0.5, 0.1, macs=0.25, time=0.75, agreement=0.875))
    assert header.split() == ["point", "params", "MACs", "time", "error", "agree"]
    assert row.split()[2:] == ["0.500", "0.250", "0.750", "0.1", "████████████", "87.5%"]


def test_bars_are_as_long_as_errors_and_noise_has_the_longest() -> None:
    lines = shown(point(0.9, 0.5), point(0.7, 1.0), point(0.5, 8.0), point(0.3, None))
    assert [line.count("█") for line in lines[2:6]] == [6, 12, 12, 0]
    assert lines[5].split() == ["params-0.3", "0.300", "–"]


def test_the_score_of_the_input_model_stands_below() -> None:
    lines = shown(point(0.5, 0.1, score=0.9), evaluator="mine:top1", score=0.95)
    assert lines[2].endswith("0.9")
    assert "Score of the input model by mine:top1: 0.95." in lines


def test_points_without_a_model_have_their_reasons() -> None:
    lost = Point(name="params-0.1", budget="params", asked=0.1, note="The ratio cannot be reached.")
    assert "params-0.1 has no model: The ratio cannot be reached." in shown(point(0.5, 0.1), lost)
    assert shown(lost)[-1] == "0 models, with their plans and reports, are in points."


@pytest.mark.parametrize("width", [80, 100])
def test_all_columns_fit_a_terminal(width: int) -> None:
    amounts = {"macs": 0.123, "bytes": 0.123, "time": 0.123, "agreement": 1.0, "score": 0.123}
    lines = shown(point(0.55, 0.123, **amounts), width=width, evaluator="mine:top1", score=1.0)
    assert lines[2].split()[-2:] == ["100.0%", "0.123"]
    assert max(map(len, lines)) <= width
    named = [point(r, 0.3, **amounts, name=f"params-activation-{r}") for r in (0.35, 0.7)]
    lines = shown(*named, width=width, evaluator="mine:top1", score=1.0)
    assert [line.split()[-1] for line in lines[2:4]] == ["0.123"] * 2
    assert all(f"params-activation-{r} " in line for r, line in zip((0.35, 0.7), lines[2:4], strict=True))
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize(("time", "is_told"), [(1.3, True), (1.0, True), (0.9, False)])
def test_a_sweep_that_makes_nothing_faster_says_so(time: float, is_told: bool) -> None:
    text = " ".join(shown(point(0.5, 0.1, time=1.2), point(0.4, 0.2, time=time)))
    assert ("No point is faster than the input model: --budget latency" in text) == is_told
