"""The times of nodes from profiles: made ones, and one of the real runtime."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.engines.node_times import Runs, runs_of
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.load import load
from rewriting import LOOP, model, named_bodies
from tiny import decaying

ENGINE = runtime("CPUExecutionProvider")


def node(start, time, op):
    name = f"{op.lower()}_kernel_time"
    return {"cat": "Node", "name": name, "ts": start, "dur": time, "args": {"op_name": op}}


def run(start, time):
    return {"cat": "Session", "name": "model_run", "ts": start, "dur": time, "args": {}}


LOADED = {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 5, "args": {}}


def test_runs_have_the_times_of_their_nodes_in_order():
    events = [LOADED, node(14, 6, "Relu"), node(11, 3, "Conv"), run(10, 11)]
    events += [node(31, 2, "Conv"), node(33, 5, "Relu"), run(30, 9)]
    found = runs_of(events)
    assert found == Runs(("Conv", "Relu"), ((3, 6), (2, 5)), (2, 2))
    assert found.every(1, 2) == Runs(("Conv", "Relu"), ((2, 5),), (2,))


def test_the_time_of_a_node_is_the_mean_of_its_fastest_quarter():
    times = tuple((n,) for n in (90, 10, 12, 80, 70, 60, 50, 40))
    found = Runs(("Conv",), times, (5, 9, 9, 3, 9, 9, 9, 9))
    assert found.nodes == (("Conv", 11_000.0),)
    assert found.whole == 11_000 + 4_000


@pytest.mark.parametrize(
    "events",
    [
        [node(1, 9, "Loop"), node(2, 3, "MatMul"), run(0, 12)],  # one inside another
        [node(1, 9, "Conv"), run(0, 12), node(21, 9, "Conv"), node(30, 1, "Relu"), run(20, 12)],
        [run(0, 12)],
    ],
)
def test_nodes_that_cannot_be_told_apart_count_as_one(events):
    found = runs_of(events)
    assert found.ops == ("",)
    assert set(found.times) == {(12,)}
    assert found.whole == 12_000


TWO = "g (float[5, 24] x) => (float[5, 16] y) { h = MatMul (x, w) r = Relu (h) y = MatMul (r, v) }"


def test_the_real_runtime_notes_its_nodes():
    proto = model(TWO, w=decaying(1, 24, 24), v=decaying(2, 24, 16))
    with ENGINE.profiled(load(proto), {"x": np.ones((5, 24), np.float32)}, 1) as session:
        for _ in range(3):
            session.run()
        found = session.finish()
    assert found.ops == ("MatMul", "Relu", "MatMul")
    assert len(found.times) == len(found.beside) == 3


def test_the_real_runtime_counts_a_loop_once():
    proto = named_bodies(model(LOOP.replace("COUNT", "4"), w=decaying(1, 24, 24)))
    feed = {value.name: np.ones((5, 24), np.float32) for value in proto.graph.input}
    with ENGINE.profiled(load(proto), feed, 1) as session:
        session.run()
        found = session.finish()
    assert len(found.times) == 1
    assert found.whole >= 1000 * sum(found.times[0])


def test_what_the_runtime_refuses_is_told():
    with (
        pytest.raises(UnsupportedError),
        ENGINE.profiled(load(model("g (float[2] x) => (float[2] y) { y = Nothing (x) }")), {}, 1),
    ):
        pass
    proto = model(TWO, w=decaying(1, 24, 24), v=decaying(2, 24, 16))
    with (
        pytest.raises(RejectedError),
        ENGINE.profiled(load(proto), {"x": np.ones((5, 8), np.float32)}, 1) as session,
    ):
        session.run()


@pytest.mark.parametrize(("provider", "is_known"), [("CPUExecutionProvider", True), ("CUDA", False)])
def test_only_one_provider_notes_how_long_nodes_take(provider, is_known):
    made = type(ENGINE)(ENGINE.module, provider)
    assert made.times_nodes == is_known
