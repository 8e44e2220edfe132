"""The file of a sweep, and its best points."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_lowrank.documents import sweeps
from onnx_lowrank.documents.sweeps import Point, Sweep

shares = st.one_of(st.none(), st.integers(0, 8).map(lambda n: n / 8))
budgets = st.sampled_from(["params", "macs", "bytes", "latency"])


@st.composite
def points(draw: st.DrawFn) -> tuple[Point, ...]:
    """Points whose amounts often coincide, some unknown."""
    found = []
    for number in range(draw(st.integers(0, 7))):
        budget = draw(budgets)
        amounts = {key: draw(shares) for key in ("params", "macs", "bytes", "time", "error")}
        reached = amounts["time" if budget == "latency" else budget]
        found.append(Point(name=f"p{number}", budget=budget, asked=0.5, reached=reached, **amounts))
    return tuple(found)


def sweep_of(found: tuple[Point, ...]) -> Sweep:
    return Sweep(version="1", model="m", sha256="0", options="", points=found)


@given(points())
@settings(max_examples=200, derandomize=True, deadline=None)
def test_the_front_is_that_of_the_definition(found: tuple[Point, ...]) -> None:
    columns = {"params": "params", "macs": "macs", "bytes": "bytes", "latency": "time"}
    best = set()
    for point in found:
        cost = columns[point.budget]
        known = [p for p in found if getattr(p, cost) is not None and p.error is not None]
        beaten = [
            p
            for p in known
            if point in known
            and getattr(p, cost) <= getattr(point, cost)
            and p.error <= point.error
            and (getattr(p, cost), p.error) != (getattr(point, cost), point.error)
        ]
        if point in known and not beaten:
            best.add(point.name)
    assert sweep_of(found).front() == best


@given(points())
@settings(max_examples=50, derandomize=True, deadline=None)
def test_a_file_is_read_as_it_was_written(found: tuple[Point, ...]) -> None:
    text = sweeps.to_json(sweep_of(found))
    assert sweeps._DOCUMENT.from_json(text, "sweep.json") == sweep_of(found)
