"""The errors that substitutes cause at a model's outputs, against the formula on models in NumPy."""
# ruff: noqa: E501 - models, one a line

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from onnx_lowrank.calibrate import data, sensitivity
from onnx_lowrank.calibrate.sensitivity import LOST, Sensitivities, measure, probe
from onnx_lowrank.calibrate.shares import Batch
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import read
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.probe.segments import Substitute
from onnx_lowrank.work.executor import Threads
from rewriting import Found, constants, found, model, tensors

ENGINE = runtime("CPUExecutionProvider")
TWO = "g (float[N,8] x) => (float[N,5] y) { a = MatMul (x, w) r = Relu (a) y = Gemm (r, u, c) }"
WEIGHTS: dict[str, Any] = {"w": (8, 7), "u": (7, 5), "c": (5,)}


@dataclass
class Rows:
    """Samples that are the rows of one input; those in `held` are held out."""

    x: np.ndarray
    held: Iterable[int] = ()
    unit: int | None = None
    name: str = "x"

    @property
    def count(self) -> int:
        return len(self.x)

    def batches(self, size: int) -> Iterator[Batch]:
        out = np.isin(np.arange(self.count), list(self.held))
        for share in (False, True):
            own = self.x[out == share]
            for start in range(0, len(own), self.unit or size):
                yield Batch({self.name: own[start : start + (self.unit or size)]}, share)


@dataclass
class Recorder:
    """An engine that notes what runs on what."""

    feeds: list[dict[str, np.ndarray]] = field(default_factory=list)
    opened: int = 0
    name: str = "Recorder"

    @contextmanager
    def open(self, proto: Any) -> Iterator[Any]:
        self.opened += 1
        with ENGINE.open(proto) as run:

            def noted(feed: Any) -> Any:
                self.feeds.append(dict(feed))
                return run(feed)

            yield noted


@dataclass
class Failing:
    """An engine that fails on opening a model, or on running it with a weight of some size."""

    error: type[Exception]
    models: tuple[int, ...] = ()
    weight: int = 0
    name: str = "Failing"
    opened: int = 0

    @contextmanager
    def open(self, proto: Any) -> Iterator[Any]:
        self.opened += 1
        if self.opened in self.models:
            raise self.error("no such kernel")
        with ENGINE.open(proto) as run:

            def checked(feed: Any) -> Any:
                if any(array.size == self.weight for array in feed.values()):
                    raise self.error("no such kernel")
                return run(feed)

            yield checked


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def samples(number: int = 8, width: int = 8, seed: int = 1, **more: Any) -> Rows:
    return Rows(drawn(seed, number, width).astype(np.float32), **more)


def weights(proto: ModelProto) -> dict[str, np.ndarray]:
    seen = found(proto)
    return {b.layer.id: read(seen.model, seen.walk, b)[0].T.astype(np.float64) for b in seen.bindings}


def near(seen: Found, amounts: Iterable[float], seed: int = 9) -> Any:
    """For every layer, substitutes that are its weight plus so much noise."""

    def substitutes(binding: Binding) -> Iterator[Substitute]:
        weight = read(seen.model, seen.walk, binding).astype(np.float64)
        for amount in amounts:
            yield Substitute(weight + amount * drawn(seed, *weight.shape))

    return substitutes


def measured(
    proto: ModelProto, rows: Any, amounts: Iterable[float] = (0.1, 1.0), **more: Any
) -> Sensitivities:
    seen = found(proto)
    engine = more.pop("engine", ENGINE)
    return measure(seen.model, seen.walk, seen.bindings, near(seen, amounts), rows, engine, **more)


def relative(y: np.ndarray, changed: np.ndarray) -> float:
    return float(np.sum((y - changed) ** 2) / np.sum((y - y.mean(axis=0)) ** 2))


def test_substitutes_tried_at_the_same_time_have_the_same_errors():
    proto, amounts = model(TWO, **(WEIGHTS | {"c": drawn(4, 5).astype(np.float32)})), (0.1, 0.5, 1.0)
    expected = measured(proto, samples(), amounts)
    with Threads(resolve("cpu"), number=2) as threads:
        result = measured(proto, samples(), amounts, threads=threads)
    assert list(result) == list(expected) == ["w", "u"]
    for layer, errors in expected.items():
        np.testing.assert_array_equal(result[layer], errors)


# --- the formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_the_errors_are_those_of_the_formula(seed):
    proto = model(TWO, **(WEIGHTS | {"c": drawn(seed, 5).astype(np.float32)}))
    rows = samples(seed=seed)
    (w, u), c = weights(proto).values(), drawn(seed, 5).astype(np.float32)
    x = rows.x.astype(np.float64)

    def forward(w: np.ndarray, u: np.ndarray) -> np.ndarray:
        return np.maximum(x @ w, 0) @ u + c

    result = measured(proto, rows)
    assert list(result) == ["w", "u"]
    for number, amount in enumerate((0.1, 1.0)):
        noise_w, noise_u = (amount * drawn(9, 1, *m.T.shape)[0].T for m in (w, u))
        y = forward(w, u)
        np.testing.assert_allclose(result["w"][number], relative(y, forward(w + noise_w, u)), rtol=1e-4)
        np.testing.assert_allclose(result["u"][number], relative(y, forward(w, u + noise_u)), rtol=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_a_bias_that_is_substituted_counts(seed):
    proto = model(TWO, **WEIGHTS)
    seen = found(proto)
    shift = drawn(seed, 5)

    def substitutes(binding: Binding) -> list[Substitute]:
        weight = read(seen.model, seen.walk, binding)
        if binding.layer.id == "w":
            return [Substitute(weight)]
        (c,) = [np.frombuffer(t.raw_data, np.float32) for t in proto.graph.initializer if t.name == "c"]
        return [Substitute(weight), Substitute(weight, c), Substitute(weight, c + shift)]

    rows = samples()
    result = measure(seen.model, seen.walk, seen.bindings, substitutes, rows, ENGINE)
    w, u = weights(proto).values()
    y = np.maximum(rows.x @ w, 0) @ u
    wanted = 8 * np.sum(shift**2) / np.sum((y - y.mean(axis=0)) ** 2)
    assert result["w"].tolist() == [0.0]
    assert result["u"][:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(result["u"][2], wanted, rtol=1e-4)


def test_the_layers_own_weights_cause_no_error():
    result = measured(model(TWO, **WEIGHTS), samples(), amounts=(0.0, 0.0, 0.0))
    assert {layer: found.tolist() for layer, found in result.items()} == {"w": [0.0] * 3, "u": [0.0] * 3}


@pytest.mark.parametrize("number", [1, 4, 5, 9])
def test_many_layers(number):
    nodes = " ".join(f"x{n + 1} = MatMul (x{n}, w{n})" for n in range(number))
    proto = model(
        f"g (float[N,6] x0) => (float[N,6] x{number}) {{ {nodes} }}",
        **{f"w{n}": (6, 6) for n in range(number)},
    )
    rows = Rows(drawn(1, 8, 6).astype(np.float32), name="x0")
    seen = found(proto)
    told: list[float] = []
    result = measure(seen.model, seen.walk, seen.bindings, near(seen, (0.5,)), rows, ENGINE, step=told.append)
    matrices = weights(proto)
    wanted = {}
    for layer in matrices:
        noisy = matrices | {layer: matrices[layer] + 0.5 * drawn(9, 1, 6, 6)[0].T}
        y, changed = (np.linalg.multi_dot([rows.x.astype(float), *m.values()]) for m in (matrices, noisy))
        wanted[layer] = relative(y, changed)
    assert list(result) == list(wanted)
    np.testing.assert_allclose(np.concatenate(list(result.values())), list(wanted.values()), rtol=1e-4)
    np.testing.assert_allclose(told, np.arange(1, number + 1) / number)


def deep(number: int) -> ModelProto:
    """Layers in a row, with a further output behind the first one."""
    nodes = [f"x{n + 1} = MatMul (x{n}, w{n})" for n in range(number)]
    nodes.insert(1, "e = Relu (x1)")
    text = f"g (float[N,6] x0) => (float[N,6] e, float[N,6] x{number}) {{ {' '.join(nodes)} }}"
    return model(text, **{f"w{n}": (6, 6) for n in range(number)})


def test_only_the_rest_of_the_model_runs_for_a_late_layer():
    engine = Recorder()
    rows = Rows(drawn(1, 8, 6).astype(np.float32), name="x0")
    measured(deep(10), rows, (0.5,), engine=engine)
    inputs = [sorted(name for name in feed if name.startswith("x")) for feed in engine.feeds if len(feed) > 1]
    assert inputs == [["x0"]] * 4 + [["x4"]] * 4 + [["x8"]] * 2


def test_without_memory_for_what_enters_the_rest_the_whole_model_runs(monkeypatch):
    rows = Rows(drawn(1, 8, 6).astype(np.float32), name="x0")
    rows = Rows(rows.x[:1], name="x0")
    monkeypatch.setattr(sensitivity, "MEMORY", 40)  # what enters two tails takes 48 bytes
    engine = Recorder()
    assert len(measured(deep(10), rows, (0.5,), engine=engine)) == 10
    assert all("x0" in feed for feed in engine.feeds)


def test_outputs_before_the_layer_have_no_error():
    """The mean goes over both outputs, though a late layer changes only one."""
    rows = Rows(drawn(1, 8, 6).astype(np.float32), name="x0")
    result = measured(deep(6), rows, (0.5,))
    proto = deep(6)
    matrices = weights(proto)
    noisy = matrices | {"w5": matrices["w5"] + 0.5 * drawn(9, 1, 6, 6)[0].T}
    y, changed = (np.linalg.multi_dot([rows.x.astype(float), *m.values()]) for m in (matrices, noisy))
    np.testing.assert_allclose(result["w5"], [relative(y, changed) / 2], rtol=1e-4)


def test_the_same_data_gives_the_same_bits():
    proto = model(TWO, **WEIGHTS)
    one, other = (measured(proto, samples(40)) for _ in range(2))
    assert all(np.array_equal(one[layer], other[layer]) for layer in ("w", "u"))


# --- outputs --------------------------------------------------------------------------------------

OUTPUTS = {
    # nodes behind y = MatMul (x, w), outputs beside it, the factor on the error of y alone
    "another": ("z = Mul (y, two)", "float[N,5] z", 1.0),
    "whole numbers": ("z = ArgMax (y)", "int64[M,K] z", 1.0),
    "zeros": ("z = Mul (y, zero)", "float[N,5] z", 1.0),
    "one that no layer changes": ("z = Relu (x)", "float[N,8] z", 0.5),
    "one that does not vary": ("o = Mul (x, zero8) z = Exp (o)", "float[N,8] z", 0.5),
    "never finite": ("o = Mul (y, zero) z = Div (o, zero)", "float[N,5] z", 1.0),
    "a shape that could change": ("n = NonZero (y) z = Cast <to = 1> (n)", "float[A,B] z", 0.5),
    "a shape that changes": ("p = Greater (y, zero) n = NonZero (p) z = Cast <to = 1> (n)", "float[A,B] z", 1.0),
    "a sequence": ("z = SequenceConstruct (y, y)", "seq(float[N,5]) z", 1.0),
    "half precision": ("z = Cast <to = 10> (y)", "float16[N,5] z", 1.0),
}  # fmt: skip


def with_output(nodes: str, output: str) -> ModelProto:
    return model(
        f"g (float[N,8] x) => (float[N,5] y, {output}) {{ y = MatMul (x, w) {nodes} }}",
        w=(8, 5),
        two=np.float32(2),
        zero=np.float32(0),
        zero8=np.zeros(8, np.float32),
    )


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_mean_goes_over_the_outputs_that_can_be_compared(name):
    nodes, output, share = OUTPUTS[name]
    alone = measured(model("g (float[N,8] x) => (float[N,5] y) { y = MatMul (x, w) }", w=(8, 5)), samples())
    both = measured(with_output(nodes, output), samples())
    assert alone["w"][0] > 1e-3
    np.testing.assert_allclose(both["w"], share * alone["w"], rtol=1e-2 if "half" in name else 1e-5)


def test_the_caches_of_a_decoder_do_not_count():
    """A layer that changes them alone has no effect; one that changes the scores has that on the scores."""
    text = "g (float[N,8] x) => (float[N,5] y, float[A,B,C,D] present.0.key) { y = MatMul (x, w) k = MatMul (x, u) present.0.key = Unsqueeze (k, axes) }"
    alone = measured(model("g (float[N,8] x) => (float[N,5] y) { y = MatMul (x, w) }", w=(8, 5)), samples())
    text = text.replace("present.0.key", "present_0")
    both = measured(model(text, w=(8, 5), u=(8, 6), axes=np.array([1, 2])), samples())
    np.testing.assert_allclose(both["w"], alone["w"], rtol=1e-6)
    assert both["u"].tolist() == [0.0, 0.0]


def test_scores_of_tokens_are_compared_as_distributions():
    """A change of all scores of a position by one number has no effect; the squares would be large."""
    text = (
        "g (int64[N,L] ids) => (float[N,L,20] scores) { x = Gather (words, ids) scores = MatMul (x, head) }"
    )
    rng = np.random.default_rng(0)
    proto = model(text, words=(20, 6), head=(6, 20))
    seen = found(proto)
    rows = Rows(rng.integers(0, 20, (8, 5)), name="ids")

    def substitutes(binding: Binding) -> Iterator[Substitute]:
        weight = read(seen.model, seen.walk, binding).astype(np.float64)
        if binding.layer.id == "head":
            yield Substitute(weight + drawn(1, 1, 1, 6))
        yield Substitute(weight + 0.1 * drawn(2, *weight.shape))

    errors = measure(seen.model, seen.walk, seen.bindings, substitutes, rows, ENGINE)
    assert not errors.reasons
    assert errors["head"][0] < 1e-5
    assert errors["head"][1] > 1e-4
    assert errors["words"][0] > 1e-4


@pytest.mark.parametrize(
    ("nodes", "output"),
    [
        ("z = ArgMax (y)", "int64[M,K] z"),
        ("z = Mul (y, zero)", "float[N,5] z"),
        ("z = SequenceConstruct (y, y)", "seq(float[N,5]) z"),
    ],
)
def test_a_model_without_an_output_to_compare(nodes, output):
    proto = with_output(nodes, output)
    del proto.graph.output[0]
    result = measured(proto, samples())
    assert not result
    assert result.reasons == {"w": "the model has no output of floats that differ from zero"}


def test_a_model_whose_only_output_changes_its_shape():
    proto = with_output(*OUTPUTS["a shape that changes"][:2])
    del proto.graph.output[0]
    result = measured(proto, samples())
    assert result.reasons == {"w": "its substitutes change the shapes of the model's outputs"}
    assert not result


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_what_is_not_finite_counts_as_a_large_error(bad):
    proto = model(TWO, **WEIGHTS)
    seen = found(proto)

    def substitutes(binding: Binding) -> Iterator[Substitute]:
        weight = read(seen.model, seen.walk, binding).astype(np.float64)
        yield Substitute(weight)
        yield Substitute(weight + np.full(weight.shape, bad))

    result = measure(seen.model, seen.walk, seen.bindings, substitutes, samples(), ENGINE)
    assert result["w"].tolist() == [0.0, LOST]
    assert result["u"].tolist() == [0.0, LOST]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_the_model_itself_does_not_finish_is_left_out(value):
    body = "g (float[N,8] x) => (float[N,5] y) { a = MatMul (x, w) y = Add (a, c) }"
    gap = np.array([0, value, 0, 0, 0], np.float32)
    plain = measured(model(body, w=(8, 5), c=np.zeros(5, np.float32)), samples())
    result = measured(model(body, w=(8, 5), c=gap), samples())
    w, noise = weights(model(body, w=(8, 5), c=gap))["w"], drawn(9, 1, 5, 8)[0].T
    kept = [0, 2, 3, 4]
    y, changed = (samples().x.astype(float) @ m[:, kept] for m in (w, w + noise))
    np.testing.assert_allclose(result["w"][1], relative(y, changed), rtol=1e-5)
    assert result["w"][1] != plain["w"][1]


def test_an_output_that_does_not_vary_is_compared_with_its_size():
    proto = model("g (float[N,8] x) => (float[N,5] y) { y = MatMul (x, w) }", w=(8, 5))
    rows = Rows(np.repeat(drawn(2, 1, 8).astype(np.float32), 8, axis=0))
    w, noise = weights(proto)["w"], 0.1 * drawn(9, 1, 5, 8)[0].T
    wanted = np.sum((rows.x[0] @ noise) ** 2) / np.sum((rows.x[0] @ w) ** 2)
    np.testing.assert_allclose(measured(proto, rows, (0.1,))["w"], [wanted], rtol=1e-4)


def test_outputs_without_a_batch_axis_vary_over_the_batches():
    proto = model("g (float[8] x) => (float[5] y) { y = MatMul (x, w) }", w=(8, 5))
    x = drawn(3, 10, 8).astype(np.float32)
    with data.open_samples({"x": x}, specs(proto)) as rows:
        result = measured(proto, rows, (0.1,))
    fit = x[[n for n in range(10) if n % 5 != 4]].astype(float)
    w, noise = weights(proto)["w"], 0.1 * drawn(9, 1, 5, 8)[0].T
    np.testing.assert_allclose(result["w"], [relative(fit @ w, fit @ (w + noise))], rtol=1e-4)


def test_outputs_of_other_sizes_in_every_batch_are_compared_with_their_size():
    proto = model("g (float[N,8] x) => (float[5,M] y) { a = MatMul (x, w) y = Transpose (a) }", w=(8, 5))
    rows = samples(17)
    result = measured(proto, rows, (0.1,), trials=1)
    w, noise = weights(proto)["w"], 0.1 * drawn(9, 1, 5, 8)[0].T
    wanted = np.sum((rows.x @ noise) ** 2) / np.sum((rows.x @ w) ** 2)
    np.testing.assert_allclose(result["w"], [wanted], rtol=1e-4)


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "layers", "trials", "rows", "wanted"),
    [
        (2600, 20, 3, 1, 128),
        (500, 20, 3, 1, 25),
        (2000, 50, 5, 1, 24),
        (2000, 5, 5, 1, 128),
        (100, 20, 5, 1, 8),
        (1, 1, 1, 1, 8),
        (10**6, 1000, 5, 1, 128),
        (1600, 5, 5, 1, 128),
        (1000, 0, 5, 1, 128),
        (1000, 5, 0, 1, 128),
        (64, 210, 3, 128, 2),
        (64, 210, 3, 3, 3),
        (64, 210, 3, 0, 8),
        (2600, 20, 3, 128, 128),
    ],
)
def test_how_many_samples_are_probed(count, layers, trials, rows, wanted):
    assert probe(count, layers, trials, rows) == wanted


@pytest.mark.parametrize("count", [8, 9, 40, 100, 333, 1000])
def test_the_cost_of_all_trials_is_bounded(count):
    engine = Recorder()
    measured(model(TWO, **WEIGHTS), samples(count), (0.1,) * 5, engine=engine)
    trials = [feed for feed in engine.feeds if len(feed) > 1]
    rows = sum(len(feed["x"]) for feed in trials)
    # At least 8 samples are used, at most 128, and batches of 16 are not cut.
    assert rows <= 10 * max(8, min(128, count // 2) + 16)
    assert rows >= 10 * min(8, count)
    assert max(len(feed["x"]) for feed in engine.feeds) <= 16
    assert engine.opened == 2


def test_samples_are_spread_over_the_data():
    engine = Recorder()
    x = np.repeat(np.arange(1000, dtype=np.float32)[:, None], 8, axis=1)
    measured(model(TWO, **WEIGHTS), Rows(x), (0.1,) * 5, engine=engine)
    starts = sorted({int(feed["x"][0, 0]) for feed in engine.feeds if len(feed) > 1})
    assert starts == [16 * n for n in (0, 7, 15, 23, 31, 39, 47, 55)]


def test_held_out_samples_are_not_used():
    x = drawn(1, 10, 8).astype(np.float32)
    x[[4, 9]] = 1e30
    result = measured(model(TWO, **WEIGHTS), Rows(x, held=(4, 9)))
    without = measured(model(TWO, **WEIGHTS), Rows(np.delete(x, [4, 9], axis=0)))
    assert all(np.array_equal(result[layer], without[layer]) for layer in ("w", "u"))


@pytest.mark.parametrize(("unit", "batches"), [(64, 2), (128, 1), (1, 128), (16, 8), (640, 1)])
def test_models_that_fix_the_batch(unit, batches):
    engine = Recorder()
    measured(model(TWO, **WEIGHTS), samples(640, unit=unit), (0.1,), engine=engine, trials=5)
    assert probe(640, 2, 5) == 128
    assert sum(len(feed) > 1 for feed in engine.feeds) == 2 * batches


@pytest.mark.parametrize(
    ("memory", "rows"), [(1, 1), (52 * 3, 3), (52 * 16, 16), (52 * 50, 48), (2**28, 128)]
)
def test_memory_is_bounded(memory, rows, monkeypatch):
    """A sample takes 52 bytes: 8 inputs and 5 outputs."""
    monkeypatch.setattr(sensitivity, "MEMORY", memory)
    engine = Recorder()
    measured(model(TWO, **WEIGHTS), samples(1000), (0.1,), engine=engine, trials=1)
    assert sum(len(feed["x"]) for feed in engine.feeds if len(feed) > 1) == 2 * rows


def test_substitutes_are_taken_one_by_one():
    proto = model(TWO, **WEIGHTS)
    seen = found(proto)
    engine = Recorder()
    runs: list[int] = []

    def substitutes(binding: Binding) -> Iterator[Substitute]:
        for _ in range(3):
            runs.append(len(engine.feeds))
            yield Substitute(read(seen.model, seen.walk, binding))

    measure(seen.model, seen.walk, seen.bindings, substitutes, samples(), engine)
    assert np.diff(runs).tolist() == [1] * 5


def test_a_layer_without_substitutes_has_no_errors():
    result = measured(model(TWO, **WEIGHTS), samples(), ())
    assert {layer: found.shape for layer, found in result.items()} == {"w": (0,), "u": (0,)}


# --- what cannot be measured ----------------------------------------------------------------------


@pytest.mark.parametrize("error", [UnsupportedError, RejectedError])
def test_a_model_that_does_not_run(error):
    result = measured(model(TWO, **WEIGHTS), samples(), engine=Failing(error, models=(1,)))
    assert not result
    assert result.reasons == dict.fromkeys(("w", "u"), "Failing does not run the model (no such kernel)")


@pytest.mark.parametrize("error", [UnsupportedError, RejectedError])
def test_a_model_that_does_not_run_with_weights_as_inputs(error):
    result = measured(model(TWO, **WEIGHTS), samples(), engine=Failing(error, models=(2,)))
    reason = "Failing does not run the model with its weights as inputs (no such kernel)"
    assert (dict(result), result.reasons) == ({}, dict.fromkeys(("w", "u"), reason))


def test_layers_that_were_measured_before_a_failure_stay():
    engine = Failing(RejectedError, weight=35)
    result = measured(model(TWO, **WEIGHTS), samples(), engine=engine)
    whole = measured(model(TWO, **WEIGHTS), samples())
    assert list(result) == ["w"]
    assert np.array_equal(result["w"], whole["w"])
    assert list(result.reasons) == ["u"]


def test_layers_that_cannot_be_overridden_have_reasons(monkeypatch):
    monkeypatch.setattr("onnx_lowrank.probe.override.LARGEST", 4 * 8 * 9)
    body = "g (int64[N] i, float[N,8] x) => (float[N,9] y) { e = Gather (t, i) a = MatMul (x, w) y = Add (e, a) }"
    proto = model(body, t=(40, 9), w=(8, 9))
    feed = {"i": np.arange(10) % 7, "x": drawn(1, 10, 8).astype(np.float32)}
    with data.open_samples(feed, specs(proto)) as rows:
        result = measured(proto, rows)
    assert list(result) == ["w"]
    assert list(result.reasons) == ["t"]
    assert "too large to be fed" in result.reasons["t"]


def test_the_effect_of_a_table_is_that_of_the_rows_that_are_read():
    table, read_ = drawn(3, 40, 9).astype(np.float32), np.arange(10) % 7
    proto = model("g (int64[N] i) => (float[N,9] y) { y = Gather (t, i) }", t=table)
    result = measured(proto, Rows(read_, name="i"), amounts=(0.5,))
    noise = 0.5 * drawn(9, 1, 9, 40)[0].T
    assert result["t"].tolist() == pytest.approx([relative(table[read_], (table + noise)[read_])], rel=1e-5)


def test_both_uses_of_a_tied_table_change_together():
    table = drawn(3, 12, 6).astype(np.float32)
    body = "g (int64[N] i) => (float[N,12] y) { e = Gather (t, i) h = Transpose <perm = [1,0]> (t) y = MatMul (e, h) }"
    read_ = np.arange(10) % 7
    result = measured(model(body, t=table), Rows(read_, name="i"), amounts=(0.5,))
    changed = table + 0.5 * drawn(9, 1, 6, 12)[0].T
    wanted = relative(table[read_] @ table.T, changed[read_] @ changed.T)
    assert result["t"].tolist() == pytest.approx([wanted], rel=1e-5)


def test_a_layer_that_never_runs_causes_no_error():
    body = "g (float[N,8] x, bool k) => (float[N,6] y) { y = If (k) <then_branch = t () => (float[N,6] o) { o = MatMul (x, w) }, else_branch = e () => (float[N,6] p) { p = MatMul (x, v) }> }"
    proto = model(body)
    constants(proto.graph, *tensors(w=(8, 6), v=(8, 6)))
    with data.open_samples(
        {"x": drawn(1, 20, 8).astype(np.float32), "k": np.array(True)}, specs(proto)
    ) as rows:
        result = measured(proto, rows)
    assert (result["w"] > 1e-3).all()
    assert result["v"].tolist() == [0.0, 0.0]


def test_the_reference_engine_measures_the_same():
    proto = model(TWO, **WEIGHTS)
    one, other = (measured(proto, samples(), engine=engine) for engine in (ENGINE, Reference()))
    for layer in ("w", "u"):
        np.testing.assert_allclose(one[layer], other[layer], rtol=1e-4)


def test_bfloat16_is_measured_by_the_reference_engine():
    body = "g (bfloat16[N,8] x) => (bfloat16[N,5] y) { y = MatMul (x, w) }"
    kind = np.dtype("bfloat16")
    proto = model(body, w=drawn(4, 8, 5).astype(kind))
    rows = Rows(drawn(1, 8, 8).astype(kind))
    (error,) = measured(proto, rows, (1.0,), engine=Reference())["w"]
    w, noise = weights(proto)["w"], drawn(9, 1, 5, 8)[0].T
    x = rows.x.astype(np.float64)
    np.testing.assert_allclose(error, relative(x @ w, x @ (w + noise)), rtol=0.05)


@pytest.mark.parametrize(("wanted", "expected"), [(42, 42), (64, 64), (128, 128)])
def test_batches_of_several_sizes_give_the_number_of_samples_that_is_wanted(wanted, expected):
    """A batch of texts and one of copies of some of them take turns."""

    class Samples:
        count = 2000

        def batches(self, size):
            for number in range(250):
                rows = min(size, 16 if number % 2 else 6)
                yield Batch({"x": np.zeros((rows, 4), np.float32)}, number % 5 == 4)

    proto = model("g (float[N,4] x) => (float[N,6] y) { y = MatMul (x, w) }", w=(4, 6))
    chosen = sensitivity._chosen(lambda feed: {"y": feed["x"]}, Samples(), specs(proto), lambda rows: wanted)
    assert sum(len(feed["x"]) for feed in chosen) == pytest.approx(expected, rel=0.3)
