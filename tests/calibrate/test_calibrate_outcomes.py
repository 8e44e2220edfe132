"""Outcomes of probes that an earlier run has measured: the others come out as if all were measured."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from test_calibrate_measurement import Samples

from onnx_lowrank.calibrate import sensitivity
from onnx_lowrank.calibrate.outcomes import Outcomes
from onnx_lowrank.calibrate.sensitivity import Outcome, measure, unknown
from onnx_lowrank.engines.engine import RejectedError
from onnx_lowrank.engines.runtime import Runtime, runtime
from onnx_lowrank.files.keeping import Keeper, digest
from onnx_lowrank.files.store import Store
from onnx_lowrank.layers.find import read
from onnx_lowrank.probe.segments import Substitute
from rewriting import draw, found, model

ENGINE = runtime("CPUExecutionProvider")
LAYERS = 7
NAMES = [f"w{n}" for n in range(LAYERS)]
BODY = " ".join(f"a{n} = MatMul (h{n}, w{n}) h{n + 1} = Tanh (a{n})" for n in range(LAYERS))
PROTO = model(
    f"g (float[N,6] h0) => (float[] y) {{ {BODY} y = Identity (h{LAYERS}) }}",
    **{name: draw(np.random.default_rng(n), (6, 6)) for n, name in enumerate(NAMES)},
)
SAMPLES = Samples(h0=draw(np.random.default_rng(9), (40, 6)))
SEEN = found(PROTO)


class Probing:
    """Notes the layers whose substitutes are asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, binding):
        self.asked.append(binding.layer.id)
        weight = read(SEEN.model, SEEN.walk, binding).astype(np.float64)
        return [Substitute(weight * (1 + amount)) for amount in (0.01, 0.1)]


def outcomes(folder, probing, engine=ENGINE):
    """The digests of all errors and reasons."""
    keeper = Keeper(Store(folder), "test")
    memory = Outcomes(keeper, {name: keeper.key(name) for name in NAMES})
    wanted = [binding.layer.id for binding in unknown(SEEN.bindings, memory)]
    made = measure(SEEN.model, SEEN.walk, SEEN.bindings, probing, SAMPLES, engine, memory=memory)
    assert probing.asked == [name for name in wanted if name in probing.asked]
    return {name: digest(made[name]) for name in made} | dict(made.reasons)


def drop(folder, names):
    """Lose the outcomes of layers."""
    keeper = Keeper(Store(folder), "test")
    for name in names:
        (folder / f"{keeper.key(name)}.entry").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def alone():
    made = measure(SEEN.model, SEEN.walk, SEEN.bindings, Probing(), SAMPLES, ENGINE)
    return {name: digest(made[name]) for name in made}


def test_nothing_runs_if_all_outcomes_are_known(tmp_path, alone, monkeypatch):
    first, second = Probing(), Probing()
    assert outcomes(tmp_path, first) == alone
    assert first.asked == NAMES
    monkeypatch.setattr(Runtime, "open", None)
    assert outcomes(tmp_path, second) == alone
    assert second.asked == []


@pytest.mark.parametrize("lost", [*combinations(range(LAYERS), 1), (0, 1, 2, 3), (4, 5, 6), (0, 4), (3, 6)])
def test_lost_outcomes_alone_are_measured(tmp_path, alone, lost):
    names = [NAMES[number] for number in lost]
    outcomes(tmp_path, Probing())
    drop(tmp_path, names)
    probing = Probing()
    assert outcomes(tmp_path, probing) == alone
    assert probing.asked == names


class Refusing:
    """An engine that fails when the weight of one layer is overridden."""

    name = "Refusing"

    def __init__(self, layer):
        self.layer = layer

    def open(self, proto):
        refusing = self

        class Opened:
            def __enter__(self):
                self.inner = ENGINE.open(proto)
                run = self.inner.__enter__()

                def checked(feed):
                    if any(refusing.layer in name for name in feed):
                        raise RejectedError("no")
                    return run(feed)

                return checked

            def __exit__(self, *error):
                return self.inner.__exit__(*error)

        return Opened()


@pytest.mark.parametrize("lost", range(LAYERS))
def test_a_session_that_fails_fails_as_a_whole(tmp_path, lost):
    engine = Refusing("w1")
    whole = outcomes(tmp_path, Probing(), engine)
    reasons = {name for name in NAMES if "does not run" in str(whole[name])}
    assert reasons == {"w1", "w2", "w3"}
    drop(tmp_path, [NAMES[lost]])
    assert outcomes(tmp_path, Probing(), engine) == whole


def test_a_failure_is_not_kept(tmp_path, alone):
    assert outcomes(tmp_path, Probing(), Refusing("w1")) != alone
    assert outcomes(tmp_path, Probing()) == alone


def test_an_outcome_comes_back(tmp_path):
    keeper = Keeper(Store(tmp_path), "test")
    keys = {name: keeper.key(name) for name in ("a", "b")}
    first = Outcomes(keeper, keys)
    made = {"a": Outcome(np.arange(3.0), frozenset("yx")), "b": Outcome("no", frozenset())}
    for layer, outcome in made.items():
        first.put(layer, outcome)
    second = Outcomes(keeper, keys)
    assert {layer: digest(second.get(layer)) for layer in made} == {n: digest(o) for n, o in made.items()}
    assert sensitivity.NOTHING.get("a") is None
