"""The moments of whole models against those of patches that NumPy cuts out of every activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank.calibrate import jobs, tasks
from onnx_lowrank.calibrate import measurement as module
from onnx_lowrank.calibrate.measurement import measure
from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.find import read
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.work.executor import Threads
from rewriting import constants, draw, found, model, tensors

ENGINE = runtime("CPUExecutionProvider")
THREADS = Threads(resolve("cpu"))
RNG = np.random.default_rng(21)


@dataclasses.dataclass(frozen=True)
class Batch:
    feed: Mapping[str, Any]
    held: bool = False


class Samples:
    """Arrays with samples on their first axes; every fifth sample is held out."""

    def __init__(self, **arrays):
        self.arrays = arrays
        self.count = len(next(iter(arrays.values())))
        self.sizes = []

    def batches(self, size):
        self.sizes.append(size)
        numbers = np.arange(self.count)
        for held in (False, True):
            share = numbers[(numbers % 5 == 4) == held]
            for start in range(0, len(share), size):
                chosen = share[start : start + size]
                yield Batch({name: array[chosen] for name, array in self.arrays.items()}, held)


class Feeds:
    """Feeds that are given as they are."""

    def __init__(self, *feeds, held=()):
        self.feeds, self.held, self.count = feeds, held, len(feeds)

    def batches(self, size):
        for index, feed in enumerate(self.feeds):
            yield Batch(feed, index in self.held)


def measured(proto, samples, threads=THREADS, **options):
    seen = found(proto)
    with measure(seen.model, seen.walk, seen.bindings, samples, ENGINE, threads, **options) as statistics:
        return {layer: statistics[layer] for layer in statistics}


def batch_of(proto, samples, **options):
    """How many samples are run at a time from then on."""
    seen = found(proto)
    with measure(seen.model, seen.walk, seen.bindings, samples, ENGINE, THREADS, **options) as statistics:
        return statistics.batch


def reference(rows):
    rows = rows.astype(np.float64)
    centred = rows - rows.mean(axis=0)
    return len(rows), rows.mean(axis=0), np.einsum("rgi,rgj->gij", centred, centred) / len(rows)


def assert_moments(found, rows):
    count, mean, second = reference(rows)
    assert found.count == count
    scale = np.sqrt(np.abs(second).max())
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(found.second, second, rtol=1e-4, atol=1e-5 * scale**2)


def shares(array):
    held = np.arange(len(array)) % 5 == 4
    return array[~held], array[held]


def rows_of(x):
    """Rows of a matrix product's input, as one group."""
    return x.reshape(-1, 1, x.shape[-1])


def im2col(x, kernel=3):
    """Patches of a padded 3×3 convolution, taken one by one."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    n, _, h, w = x.shape
    cut = [
        padded[i, :, a : a + kernel, b : b + kernel].ravel()
        for i in range(n)
        for a in range(h)
        for b in range(w)
    ]
    return np.array(cut)[:, None]


CNN = """g (float[N,4,6,6] x) => (float[] y) {
    a = Conv <pads = [1,1,1,1]> (x, first) b = BatchNormalization (a, s, t, m, v) c = Relu (b)
    p = GlobalAveragePool (c) f = Flatten (p) y = Gemm <transB = 1, alpha = 0.5> (f, last, q)
}"""
WEIGHTS = {
    name: draw(RNG, shape)
    for name, shape in {
        "first": (8, 4, 3, 3),
        "s": (8,),
        "t": (8,),
        "m": (8,),
        "last": (5, 8),
        "q": (5,),
    }.items()
} | {"v": np.linspace(0.5, 2, 8).astype(np.float32)}
IMAGES = draw(np.random.default_rng(22), (23, 4, 6, 6))


def inner(proto, name, feed):
    """A tensor of a model, in the reference implementation."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return onnx.reference.ReferenceEvaluator(copy).run([name], feed)[0]


ONE = 4 * (4 * 36 + 8 + 5)
"""Bytes that the instrumented network returns for one sample: both layers' inputs, and its output."""


@pytest.mark.parametrize("tapped", [1, 2000, 2**28])
def test_a_network(monkeypatch, tapped):
    monkeypatch.setattr(module, "_TAPPED", tapped)
    monkeypatch.setattr(module, "_GROWTH", 0)
    proto = model(CNN, **WEIGHTS)
    samples = Samples(x=IMAGES)
    result = measured(proto, samples)
    features = inner(proto, "f", {"x": IMAGES})
    for found_, rows in (
        (result["first"], [im2col(part) for part in shares(IMAGES)]),
        (result["last"], [0.5 * rows_of(part) for part in shares(features)]),
    ):
        assert_moments(found_.inputs, rows[0])
        assert_moments(found_.held, rows[1])
        assert found_.outputs is found_.held_outputs is None
        assert found_.reason == ""
    assert samples.sizes[0] == 1
    assert samples.sizes[1] == max(1, tapped // ONE)


@pytest.mark.parametrize("growth", [4, 32, 400])
def test_what_is_not_tapped_takes_memory_too(monkeypatch, growth):
    monkeypatch.setattr(module, "_TAPPED", 100_000)
    monkeypatch.setattr(module, "_GROWTH", growth)
    samples = Samples(x=IMAGES)
    batch = batch_of(model(CNN, **WEIGHTS), samples)
    wanted = 100_000 // max(ONE, IMAGES[0].nbytes * growth // module._SHARE)
    assert samples.sizes[1] == batch == wanted


def test_rows_that_are_looked_up_take_memory_though_they_are_not_tapped(monkeypatch):
    monkeypatch.setattr(module, "_TAPPED", 20_000)
    proto = model(
        """g (int64[N,16] x) => (float[N,4] y) {
            e = Gather (w, x) r = ReduceMax <axes = [1], keepdims = 0> (e) y = MatMul (r, v) }""",
        opset=13, w=(50, 32), v=(32, 4),
    )  # fmt: skip
    samples = Samples(x=np.random.default_rng(0).integers(0, 50, (40, 16)))
    tapped, rows = 4 * 32, 4 * 16 * 32
    assert batch_of(proto, samples) == 20_000 // (tapped + rows)


def test_several_passes_share_one_batch(monkeypatch):
    """A pass starts from tensors of the pass before it; the first one taps the large inputs."""
    monkeypatch.setattr(module, "_TAPPED", 50_000)
    monkeypatch.setattr(module, "_GROWTH", 0)
    samples = Samples(x=IMAGES)
    batch = batch_of(model(CNN, **WEIGHTS), samples, memory=jobs.moments_bytes((1, 36)))
    sizes = [size for size in samples.sizes if size > 1]
    assert len(sizes) == 2
    assert set(sizes) == {batch}


def test_outputs_stand_in_where_inputs_do_not_fit(monkeypatch):
    monkeypatch.setattr(jobs, "CHUNK", 1)
    proto = model(CNN, **WEIGHTS)
    result = measured(proto, Samples(x=IMAGES), memory=jobs.moments_bytes((1, 8)))
    assert result["first"].inputs is None
    given = inner(proto, "b", {"x": IMAGES})  # behind the BatchNorm
    parts = [np.moveaxis(part, 1, -1).reshape(-1, 1, 8) for part in shares(given)]
    assert_moments(result["first"].outputs, parts[0])
    assert_moments(result["first"].held_outputs, parts[1])
    assert_moments(result["last"].inputs, 0.5 * rows_of(shares(inner(proto, "f", {"x": IMAGES}))[0]))


def test_neither_fits():
    result = measured(model(CNN, **WEIGHTS), Samples(x=IMAGES), memory=100)
    assert {found_.reason.split(" do not fit")[0] for found_ in result.values()} == {
        "the moments of its 8 features",
        "the moments of its 5 features",
    }
    assert all(found_.inputs is found_.outputs is None for found_ in result.values())


def chain(count):
    names = [f"w{index}" for index in range(count)]
    nodes = " ".join(f"h{i + 1} = MatMul (h{i}, w{i})" for i in range(count))
    proto = model(
        f"g (float[N,6] h0) => (float[] y) {{ {nodes} y = Relu (h{count}) }}",
        **{name: draw(RNG, (6, 6)) / 2 for name in names},
    )
    return proto, names


def test_passes_share_one_run_of_a_model_with_late_inputs(monkeypatch):
    """A part gets only the inputs that it takes, and the activations are those of the whole model."""
    body = "g (float[N,6] x, float[N,6] z) => (float[N,6] y) { a = MatMul (x, w0) r = Relu (a) "
    body += "b = MatMul (r, w1) s = Add (b, z) t = Add (s, r) c = MatMul (t, w2) y = MatMul (c, w3) }"
    proto = model(body, **{f"w{n}": draw(RNG, (6, 6)) / 2 for n in range(4)})
    arrays = {"x": draw(RNG, (40, 6)), "z": draw(RNG, (40, 6))}
    passes: list[int] = []
    part = module.Relay.part
    monkeypatch.setattr(module.Relay, "part", lambda self, n, *a: passes.append(n) or part(self, n, *a))
    result = measured(proto, Samples(**arrays), memory=jobs.moments_bytes((1, 6)))
    assert passes == [0, 1, 2, 3]
    whole = measured(proto, Samples(**arrays))
    for name, found_ in result.items():
        np.testing.assert_allclose(found_.inputs.second, whole[name].inputs.second, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("together", "passes"), [(1, 5), (2, 3), (4, 2), (5, 1)])
def test_groups_that_fit_into_memory(together, passes):
    proto, names = chain(5)
    samples, shown = Samples(h0=draw(RNG, (40, 6))), []
    result = measured(proto, samples, memory=together * jobs.moments_bytes((1, 6)), step=shown.append)
    whole = measured(proto, Samples(**samples.arrays))
    assert len(samples.sizes) == 1 + passes  # the first pass looks at one sample to size its batches
    assert list(result) == names
    for name in names:
        for share in ("inputs", "held"):
            one, other = getattr(result[name], share), getattr(whole[name], share)
            np.testing.assert_array_equal(one.second, other.second)
            np.testing.assert_array_equal(one.mean, other.mean)
    assert shown == sorted(shown)
    assert len(set(shown)) == len(shown)
    assert shown[-1] == 1.0


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_same_bits_whatever_the_threads(workers):
    proto = model(CNN, **WEIGHTS)
    expected = measured(proto, Samples(x=IMAGES))
    with Threads(resolve("cpu"), number=workers) as threads:
        result = measured(proto, Samples(x=IMAGES), threads)
    for layer, moments in result.items():
        np.testing.assert_array_equal(moments.inputs.second, expected[layer].inputs.second)
        np.testing.assert_array_equal(moments.inputs.mean, expected[layer].inputs.mean)


def test_layers_that_read_the_same_are_measured_once(monkeypatch):
    made = []
    original = tasks.Accumulator
    monkeypatch.setattr(tasks, "Accumulator", lambda *a: made.append(a) or original(*a))
    proto = model(
        "g (float[N,6] x) => (float[] a, float[] b, float[] c) { a = MatMul (x, q) b = MatMul (x, k) c = Gemm <alpha = 2.0> (x, v) }",  # noqa: E501
        q=(6, 4), k=(6, 5), v=(6, 6),
    )  # fmt: skip
    x = draw(RNG, (20, 6))
    result = measured(proto, Samples(x=x))
    assert len(made) == 4  # two shares of x, two of 2 x
    for name, scale in (("q", 1), ("k", 1), ("v", 2)):
        assert_moments(result[name].inputs, scale * rows_of(shares(x)[0]))


def test_uses_are_merged():
    proto = model("g (float[N,6] x) => (float[] y) { h = MatMul (x, w) y = MatMul (h, w) }", w=(6, 6))
    x = draw(RNG, (20, 6))
    weight = found(proto).model.proto.graph.initializer[0]
    product = x @ onnx.numpy_helper.to_array(weight)
    (result,) = measured(proto, Samples(x=x)).values()
    assert_moments(result.inputs, np.concatenate([rows_of(shares(x)[0]), rows_of(shares(product)[0])]))


def test_a_table_is_measured_by_what_it_gives():
    table = draw(RNG, (30, 6))
    proto = model("g (int64[N,3] i) => (float[] y) { y = Gather (w, i) }", w=table)
    indices = np.random.default_rng(23).integers(0, 30, (25, 3))
    (result,) = measured(proto, Samples(i=indices)).values()
    assert result.inputs is result.held is None
    assert_moments(result.outputs, rows_of(table[shares(indices)[0]]))
    assert_moments(result.held_outputs, rows_of(table[shares(indices)[1]]))


class Idle:
    """An engine that runs nothing."""

    def open(self, model):
        raise AssertionError("the model ran")


VIEWED = "t = Transpose (i) s = Reshape (t, n) c = Cast <to = 6> (s)"


@pytest.mark.parametrize("nodes", ["c = Identity (i)", VIEWED])
def test_a_table_is_looked_up_without_a_run(nodes):
    table = draw(RNG, (30, 6))
    proto = model(f"g (int64[N,3] i) => (float[] y) {{ {nodes} y = Gather (w, c) }}", w=table, n=[3, -1])
    seen, indices = found(proto), np.random.default_rng(23).integers(-30, 30, (25, 3))
    with measure(seen.model, seen.walk, seen.bindings, Samples(i=indices), Idle(), THREADS) as statistics:
        known = statistics["w"]
    assert_moments(known.outputs, rows_of(table[shares(indices)[0]]))
    assert_moments(known.held_outputs, rows_of(table[shares(indices)[1]]))


@pytest.mark.parametrize("nodes", ["c = Mul (i, two)", "f = Cast <to = 1> (i) c = Cast <to = 7> (f)"])
def test_a_table_with_computed_indices_is_measured_in_a_run(nodes):
    table = draw(RNG, (30, 6))
    proto = model(
        f"g (int64[N,3] i) => (float[] y) {{ {nodes} y = Gather (w, c) }}", w=table, two=np.int64(1)
    )
    indices = np.random.default_rng(23).integers(0, 30, (25, 3))
    (result,) = measured(proto, Samples(i=indices)).values()
    assert_moments(result.outputs, rows_of(table[shares(indices)[0]]))
    assert result.counts is None


def test_groups_of_an_operator():
    proto = model(
        "g (float[N,4,5,5] x) => (float[] y) { y = Conv <group = 2, pads = [1,1,1,1]> (x, w) }",
        w=(6, 2, 3, 3),
    )
    x = draw(RNG, (7, 4, 5, 5))
    (result,) = measured(proto, Samples(x=x)).values()
    both = np.concatenate([im2col(shares(x)[0][:, :2]), im2col(shares(x)[0][:, 2:])], axis=1)
    assert_moments(result.inputs, both)


def test_moments_give_the_power_of_the_outputs():
    proto = model(
        "g (float[N,4,5,5] x) => (float[] y) { y = Conv <strides = [2,2]> (x, w, b) }", w=(6, 4, 3, 3), b=(6,)
    )
    x = draw(RNG, (10, 4, 5, 5))
    seen = found(proto)
    (result,) = measured(proto, Samples(x=x)).values()
    weight = read(seen.model, seen.walk, seen.bindings[0]).reshape(6, -1).astype(np.float64)
    y = np.moveaxis(inner(proto, "y", {"x": shares(x)[0]}), 1, -1).reshape(-1, 6)
    np.testing.assert_allclose(
        weight @ result.inputs.second[0] @ weight.T, np.cov(y.T, bias=True), rtol=1e-4, atol=1e-4
    )


LOOKED_UP = ("e = Gather (w, i)", "t = Transpose <perm = [1,0]> (w) y = MatMul (x, t)")


@pytest.mark.parametrize("first", [0, 1], ids=["the table first", "the head first"])
def test_a_tied_table_is_measured_by_the_features_of_both_uses(first):
    nodes = " ".join(LOOKED_UP if first == 0 else reversed(LOOKED_UP))
    table = draw(RNG, (9, 6))
    proto = model(f"g (int64[N] i, float[N,6] x) => (float[] e, float[] y) {{ {nodes} }}", w=table)
    indices, x = np.random.default_rng(24).integers(0, 9, 20), draw(RNG, (20, 6))
    (result,) = measured(proto, Samples(i=indices, x=x)).values()
    rows, read = (result, result.transposed) if first == 0 else (result.transposed, result)
    assert rows.inputs is read.outputs is None
    assert_moments(rows.outputs, rows_of(table[shares(indices)[0]]))
    assert_moments(rows.held_outputs, rows_of(table[shares(indices)[1]]))
    assert_moments(read.inputs, rows_of(shares(x)[0]))
    assert_moments(read.held, rows_of(shares(x)[1]))


def test_one_part_without_moments_leaves_a_tied_table_without_any():
    proto = model(
        "g (int64[N] i, float[N,K,6] x) => (float[] e, float[] y)"
        "{ e = Gather (w, i) t = Transpose <perm = [1,0]> (w) y = MatMul (x, t) }",
        w=(9, 6),
    )
    (result,) = measured(proto, Samples(i=np.arange(8), x=np.empty((8, 0, 6), np.float32))).values()
    assert "does not run" in result.reason
    assert result.outputs is result.transposed is None


def test_matrices_that_are_applied_transposed_without_a_table_are_listed():
    proto = model(
        "g (float[N,6] x, float[N,9] z) => (float[] e, float[] y)"
        "{ e = MatMul (x, w) t = Transpose <perm = [1,0]> (w) y = MatMul (z, t) }",
        w=(6, 9),
    )
    (result,) = measured(proto, Samples(x=draw(RNG, (8, 6)), z=draw(RNG, (8, 9)))).values()
    assert "transposed" in result.reason


@pytest.mark.parametrize("held", [(), (0,), (0, 1)])
def test_few_feeds(held):
    proto = model("g (float[N,6] x) => (float[] y) { y = MatMul (x, w) }", w=(6, 6))
    feeds = [{"x": draw(RNG, (size, 6))} for size in (3, 5)]
    (result,) = measured(proto, Feeds(*feeds, held=held)).values()
    parts = {
        share: [rows_of(feed["x"]) for index, feed in enumerate(feeds) if (index in held) == share]
        for share in (False, True)
    }
    if not parts[False]:
        assert "does not run" in result.reason
        return
    assert_moments(result.inputs, np.concatenate(parts[False]))
    assert result.held is None if not parts[True] else result.held.count == 3


def branch(nodes, name):
    graph = onnx.parser.parse_graph(f"{name} () => (float[N,6] out) {{ {nodes} }}")
    graph.output[0].type.tensor_type.ClearField("shape")
    return graph


def test_only_the_branch_that_runs_has_moments():
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (bool c, float[N,6] x) => (float[N,6] y) { y = If (c) }'
    )
    weights = {"then_branch": draw(RNG, (6, 6)), "else_branch": draw(RNG, (6, 6))}
    for name, weight in weights.items():
        graph = branch(f"out = MatMul (x, w_{name})", name)
        constants(graph, *tensors(**{f"w_{name}": weight}))
        proto.graph.node[0].attribute.add(name=name, type=onnx.AttributeProto.GRAPH).g.CopyFrom(graph)
    feeds = [{"x": draw(RNG, (4, 6)), "c": np.array(True)} for _ in range(3)]
    result = measured(proto, Feeds(*feeds))
    taken, other = (next(m for n, m in result.items() if key in n.split("/")[-1]) for key in ("then", "else"))
    assert_moments(taken.inputs, np.concatenate([rows_of(feed["x"]) for feed in feeds]))
    assert "does not run" in other.reason


def test_iterations_of_a_loop_are_runs_of_their_own():
    body = onnx.parser.parse_graph(
        "body (int64 i, bool keep, float[6] h) => (bool again, float[6] out)"
        "{ again = Identity (keep) k = MatMul (w, h) out = Relu (k) }"
    )
    weight = draw(RNG, (6, 6))
    constants(body, *tensors(w=weight))
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[6] x) => (float[6] y)'
        "{ n = Constant <value_int = 4> () y = Loop (n, , x) }"
    )
    proto.graph.node[1].attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.CopyFrom(body)
    feeds = [{"x": draw(RNG, (6,))} for _ in range(3)]
    (result,) = measured(proto, Feeds(*feeds)).values()
    columns = []
    for state in (feed["x"] for feed in feeds):
        for _ in range(4):
            columns.append(rows_of(state))
            state = np.maximum(weight @ state, 0)
    assert_moments(result.inputs, np.concatenate(columns))


def growing(weight):
    """A Loop whose state grows by a row in every iteration, so that a scan output cannot stack it."""
    body = onnx.parser.parse_graph(
        "body (int64 i, bool keep, float[M,6] h) => (bool again, float[K,6] out)"
        "{ again = Identity (keep) k = MatMul (h, w) out = Concat <axis = 0> (k, row) }"
    )
    constants(body, *tensors(w=weight))
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N,6] x) => (float[P,6] y)'
        "{ n = Constant <value_int = 3> () row = Constant <value = float[1,6] {1, 2, 3, 4, 5, 6}> ()"
        " a = MatMul (x, v) y = Loop (n, , a) }"
    )
    proto.graph.node[3].attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.CopyFrom(body)
    proto.graph.initializer.extend(tensors(v=draw(RNG, (6, 6))))
    return proto


def test_a_loop_of_changing_shapes_leaves_the_others_measured():
    proto = growing(draw(RNG, (6, 6)))
    x = draw(RNG, (20, 6))
    result = measured(proto, Samples(x=x))
    (inside,) = (found_ for layer, found_ in result.items() if layer != "v")
    assert "does not run the model with its activations as outputs" in inside.reason
    assert_moments(result["v"].inputs, rows_of(shares(x)[0]))


def test_a_model_that_fails_on_the_data():
    proto = model(
        "g (float[N,6] x, int64[2] s) => (float[] y) { h = Reshape (x, s) y = MatMul (h, w) }", w=(6, 6)
    )
    feed = {"x": np.ones((2, 6), np.float32), "s": np.array([5, 5])}
    with pytest.raises(InputError, match="The model fails on the calibration inputs"):
        measured(proto, Feeds(feed))


def test_a_model_that_the_runtime_does_not_know():
    proto = model("g (bfloat16[N,6] x) => (bfloat16[] y) { y = MatMul (x, w) }", w=draw(RNG, (6, 6)))
    proto.graph.initializer[0].data_type = onnx.TensorProto.BFLOAT16
    proto.graph.initializer[0].raw_data = draw(RNG, (6, 6), np.float16).tobytes()
    (result,) = measured(proto, Feeds({"x": np.zeros((2, 6), np.float32)})).values()
    assert result.reason.startswith("ONNX Runtime CPUExecutionProvider does not run the model")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_names_the_layer(value):
    proto = model("g (float[N,6] x) => (float[] y) { h = Relu (x) y = MatMul (h, w) }", w=(6, 6))
    x = draw(RNG, (20, 6))
    x[7, 2] = value
    with pytest.raises(InputError, match="activations of layer 'w' hold NaN, Inf"):
        measured(proto, Samples(x=x))


def test_the_reference_implementation_serves_too():
    proto = model("g (float[N,6] x) => (float[] y) { y = MatMul (x, w) }", w=(6, 6))
    x = draw(RNG, (20, 6))
    seen = found(proto)
    with measure(seen.model, seen.walk, seen.bindings, Samples(x=x), Reference(), THREADS) as statistics:
        assert_moments(statistics["w"].inputs, rows_of(shares(x)[0]))


def test_what_lies_on_disk_is_deleted():
    proto, _ = chain(2)
    seen = found(proto)
    samples = Samples(h0=draw(RNG, (10, 6)))
    with measure(seen.model, seen.walk, seen.bindings, samples, ENGINE, THREADS) as statistics:
        folder = statistics.reference("w0").folder
        assert len(list(folder.iterdir())) == 2 * 2 * 4
    assert not folder.exists()


def test_a_failure_leaves_nothing_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    proto = model("g (float[N,6] x) => (float[] y) { y = MatMul (x, w) }", w=(6, 6))
    with pytest.raises(InputError, match="hold NaN"):
        measured(proto, Samples(x=np.full((20, 6), np.nan, np.float32)))
    assert list(tmp_path.iterdir()) == []


def test_no_layers():
    proto = model("g (float[N,6] x) => (float[] y) { y = Relu (x) }")
    assert measured(proto, Samples(x=draw(RNG, (5, 6)))) == {}


ADDED = """g (float[N,6] x) => (float[] y) { t = Tanh (x)
    a = Gemm (x, first, p) b0 = Gemm (t, second) b = Add (b0, q) c = Add (a, t) s = Add (c, b)
    r = Relu (s) y = MatMul (r, last) }"""


@pytest.mark.parametrize("memory", [2**30, jobs.moments_bytes((1, 6)), jobs.moments_bytes((1, 6)) - 1])
def test_the_sum_of_results_without_what_is_added_behind(memory):
    """Also where every pass runs a part of the model; not where the moments of the sum do not fit."""
    shapes = {"first": (6, 6), "second": (6, 6), "last": (6, 3), "p": (6,), "q": (6,)}
    known = {name: draw(RNG, shape) for name, shape in shapes.items()}
    proto, x = model(ADDED, **known), draw(RNG, (50, 6))
    seen = find_layers(load(proto), {}, (), ())
    with measure(
        seen.model, seen.walk, seen.bindings, Samples(x=x), ENGINE, THREADS, memory=memory
    ) as statistics:
        found = statistics.summed_outputs(("first", "second"))
        assert set(statistics) == {"first", "second", "last"}
        assert set(statistics.reasons) <= set(statistics)
        if memory < jobs.moments_bytes((1, 6)):
            assert found is None
            return
        rows = x @ known["first"] + known["p"] + np.tanh(x) @ known["second"]
        moments = found.read()
        for taken, expected in zip((moments.outputs, moments.held_outputs), shares(rows), strict=True):
            assert_moments(taken, rows_of(expected))
