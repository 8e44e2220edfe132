"""The input model in turns with others."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.budgets.budget import Tools
from onnx_lowrank.budgets.latency.whole import Call, Whole, middle, start
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import load
from rewriting import model
from timing import Recorded, by_weights
from tiny import decaying

ENGINE = runtime("CPUExecutionProvider")
X = {"x": np.ones((5, 24), np.float32)}


def single(width):
    text = f"g (float[N, 24] x) => (float[N, {width}] y) {{ y = MatMul (x, w) }}"
    return load(model(text, w=decaying(1, 24, width)))


def begun(proto, feed, shapes=None, **more):
    watch = Recorded(ENGINE)
    return start(proto, Tools(watch, feed, shapes or {}, **more), watch)


class InTurns(Recorded):
    """Gives these pairs of times."""

    def __init__(self, pairs, *, warm):
        super().__init__(ENGINE)
        self.pairs, self.warm, self.paces = iter(pairs), warm, []

    def times(self, models, pace):
        self.paces.append(pace.seconds)
        return list(next(self.pairs))


def test_two_models_are_timed():
    before, after = single(24), single(6)
    timing = begun(before, X).timing(after)
    assert (timing.before, timing.after) == (by_weights(before.proto), by_weights(after.proto))
    assert (timing.predicted, timing.layers, timing.spread) == (None, {}, 1.0)
    assert timing.inputs == "x float32 5×24"


@pytest.mark.parametrize(("warm", "pair", "spread"), [(True, (1200, 600), 1.5), (False, (1000, 900), 1.0)])
def test_models_that_run_from_the_caches_are_timed_in_several_sessions(warm, pair, spread):
    watch = InTurns([(1000, 900), (1200, 600), (800, 80)], warm=warm)
    timing = Whole(single(24), (Call(X),), watch).timing(single(6))
    assert (timing.before, timing.after) == pair
    assert timing.spread == spread
    assert len(watch.paces) == (3 if warm else 1)
    assert sum(watch.paces) == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [([(2, 1)], (2, 1)), ([(2, 2), (9, 1), (4, 3)], (4, 3)), ([(1, 1), (10, 9)], (1, 1))],
)
def test_the_median_is_that_of_the_ratios(pairs, expected):
    assert middle(pairs) == expected


@pytest.mark.parametrize(("shapes", "rows"), [({}, 5), ({"x": (5, 24)}, 5), ({"x": (7, 24)}, 7)])
def test_inputs_of_the_user_are_taken_where_they_have_the_shape_that_is_asked_for(shapes, rows):
    assert begun(single(24), X, shapes).calls[0].feed["x"].shape == (rows, 24)


def test_a_model_that_does_not_run_is_told():
    broken = load(model("g (float[5, 24] x) => (float[5, 24] y) { y = MatMul (x, x) }"))
    with pytest.raises(InputError, match=r"^To measure times the model .*: leave --time out, or choose"):
        begun(broken, X)
