"""The walk from layer to layer against the whole model, as it is and with all substitutes in it."""

from __future__ import annotations

import tempfile
from collections import namedtuple
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
from onnx import ModelProto, numpy_helper

from onnx_lowrank.calibrate import shelf
from onnx_lowrank.calibrate.prefix import Prefix
from onnx_lowrank.calibrate.shares import Batch
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.layers.find import read
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.probe.segments import Segments
from onnx_lowrank.work.executor import Threads
from rewriting import difference, feed_of, found, model, run

ENGINE = runtime("CPUExecutionProvider")
NORM = {"n1": np.full(8, 0.9, np.float32), "n2": np.full(8, 0.1, np.float32)}
NORM |= {"n3": np.linspace(-1, 1, 8, dtype=np.float32), "n4": np.linspace(0.5, 2, 8, dtype=np.float32)}
TRUE = np.array(True)

# Layers read w1, w2, ... and add b1, b2, ...
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "residual": (
        """g (float[N,4,6,6] x) => (float[N,3] y) {
          a = Conv <pads = [1,1,1,1]> (x, w1, b1)
          r = Relu (a)
          c = Conv <pads = [1,1,1,1], group = 2> (r, w2)
          s = Add (c, a)
          p = GlobalAveragePool (s)
          f = Flatten (p)
          y = Gemm <transB = 1, beta = 0.5> (f, w3, b3)
        }""",
        {"w1": (8, 4, 3, 3), "b1": (8,), "w2": (8, 4, 3, 3), "w3": (3, 8), "b3": (3,)},
    ),
    "norms": (
        """g (float[N,4,6,6] x) => (float[N,8,3,3] y) {
          a = Conv <pads = [1,1,1,1]> (x, w1, b1)
          c = Conv <strides = [2,2], pads = [1,1,1,1]> (x, w2)
          m = BatchNormalization (a, n1, n2, n3, n4)
          i = Identity (n1)
          n = BatchNormalization (c, i, n2, n3, n4)
          r = Relu (m)
          d = Conv <strides = [2,2], pads = [1,1,1,1]> (r, w3, b3)
          y = Add (d, n)
        }""",
        {"w1": (8, 4, 3, 3), "b1": (8,), "w2": (8, 4, 3, 3), "w3": (8, 8, 3, 3), "b3": (8,)} | NORM,
    ),
    "parallel": (
        """g (float[N,8] x, float[N,8] z) => (float[N,7] y) {
          late = Relu (z)
          a = MatMul (x, w1)
          c = MatMul (late, w2)
          d = Add (a, c)
          e = MatMul (late, w3)
          f = Mul (d, e)
          y = MatMul (f, w4)
        }""",
        {"w1": (8, 9), "w2": (8, 9), "w3": (8, 9), "w4": (9, 7)},
    ),
    "branches": (
        """g (float[N,8] x, bool k) => (float[N,7] y) {
          t = MatMul (x, w1)
          h = Relu (t)
          a = MatMul (h, w2)
          i = If (k) <
            then_branch = yes () => (float[N,9] p) { q = Mul (h, u)  p = Add (q, a) },
            else_branch = no () => (float[N,9] o) { o = MatMul (h, v) }
          >
          y = MatMul (i, w3)
        }""",
        {"w1": (8, 9), "w2": (9, 9), "w3": (9, 7), "u": (9,), "v": (9, 9)},
    ),
    "loop": (
        """g (float[N,8] x, int64 trips) => (float[N,7] y) {
          h = MatMul (x, w1)
          a = MatMul (h, w2)
          l = Loop (trips, true, a) <
            body = b (int64 n, bool c, float[N,9] s) => (bool o, float[N,9] z) {
              o = Identity (c)
              m = MatMul (h, v)
              z0 = Tanh (m)
              z = Add (s, z0)
            }
          >
          y = MatMul (l, w3)
        }""",
        {"w1": (8, 9), "w2": (9, 9), "w3": (9, 7), "v": (9, 9), "true": TRUE},
    ),
    "shared": (
        """g (float[N,8] x) => (float[N,6] y) {
          a = MatMul (x, w1)
          r = Add (a, k)
          c = MatMul (r, v)
          e = MatMul (c, w2)
          h = MatMul (e, v)
          m = Mul (h, k)
          y = MatMul (m, w3)
        }""",
        {"w1": (8, 8), "w2": (8, 8), "w3": (8, 6), "v": (8, 8), "k": (8,)},
    ),
    "matrices": (
        """g (float[N,8] x) => (float[6,N] y) {
          a = Gemm <alpha = 0.5, beta = 2.0> (x, w1, b1)
          t = Transpose (w2)
          c = Gemm <transB = 1> (a, t, b2)
          e = Gemm <transA = 1, transB = 1> (w3, c, b3)
          y = MatMul (w4, e)
        }""",
        {"w1": (8, 9), "b1": (9,), "w2": (9, 8), "b2": (1, 8), "w3": (8, 7), "b3": (7, 1), "w4": (6, 7)},
    ),
    "transposed convolutions": (
        """g (float[N,4,5] x) => (float[N,6,22] y) {
          a = ConvTranspose <strides = [2], group = 2> (x, w1, b1)
          r = Relu (a)
          c = ConvTranspose (r, w2)
          y = Conv <pads = [4, 4]> (c, w3)
        }""",
        {"w1": (4, 4, 3), "b1": (8,), "w2": (8, 6, 2), "w3": (6, 6, 1)},
    ),
    "table": (
        """g (int64[N,4] x) => (float[N,4,6] y) {
          a = Gather (w1, x)
          n = Shape (a)
          one = Constant <value = float {1.5}> ()
          e = Expand (one, n)
          c = Add (a, e)
          h = MatMul (c, w2)
          y = MatMul (h, w3)
        }""",
        {"w1": (11, 8), "w2": (8, 8), "w3": (8, 6)},
    ),
    "batch of matrices": (
        """g (float[N,2,5,8] x) => (float[N,2,5,6] y) {
          a = MatMul (x, w1)
          r = Softmax (a)
          y = MatMul (r, w2)
        }""",
        {"w1": (2, 8, 9), "w2": (2, 9, 6)},
    ),
    "constant activation": (
        """g (float[N,9] x) => (float[N,7] y) {
          a = MatMul (x, w1)
          c = MatMul (seed, w2)
          d = Add (a, c)
          y = MatMul (d, w3)
        }""",
        {"w1": (9, 8), "seed": (1, 9), "w2": (9, 8), "w3": (8, 7)},
    ),
    "function": (
        """g (float[N,8] x) => (float[N,7] y) {
          a = MatMul (x, w1)
          r = local.squash (a, v)
          y = MatMul (r, w2)
        }""",
        {"w1": (8, 9), "w2": (9, 7), "v": (9, 9)},
    ),
}
SQUASH = '<opset_import: ["" : 17], domain: "local"> squash (p, q) => (s) { t = MatMul (p, q) s = Tanh (t) }'
SAME = 2e-6


def built(name: str) -> ModelProto:
    body, weights = MODELS[name]
    return model(body, functions=SQUASH if name == "function" else "", **weights)


def batches(proto: ModelProto, n: int = 3) -> list[Batch]:
    """Batches of 3 samples, the second held out; scalars are alike in all."""
    made = [Batch(feed_of(proto, seed), seed == 1) for seed in range(n)]
    return [Batch({k: v if v.ndim else np.array(2 if k == "trips" else 1).astype(v.dtype)
                   for k, v in b.feed.items()}, b.held) for b in made]  # fmt: skip


def with_other(proto: ModelProto, names: set[str]) -> ModelProto:
    """A copy in which the initializers of these names have other values."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    for number, tensor in enumerate(copy.graph.initializer):
        if tensor.name in names:
            old = numpy_helper.to_array(tensor)
            noise = np.random.default_rng(number).standard_normal(old.shape)
            other = (old + 0.5 * old.std() * noise).astype(old.dtype)
            tensor.CopyFrom(numpy_helper.from_array(other, tensor.name))
    return copy


Weights = namedtuple("Weights", "weight bias")


def computed(proto: ModelProto, biases: bool) -> dict[str, Weights]:
    """What every layer computes: its canonical weight and its bias, with a BatchNorm in both."""
    seen = found(proto)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    result = {}
    for binding in seen.bindings:
        layer, weight = binding.layer, read(seen.model, seen.walk, binding)
        bias = stored.get(f"b{layer.id[1:]}") if biases else None
        if layer.batchnorm is not None:
            weight = weight * layer.batchnorm.scale.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
            bias = layer.batchnorm.bias if biases else None
        elif bias is not None:
            node = proto.graph.node[layer.uses[0].node]
            bias = bias.ravel() * next((a.f for a in node.attribute if a.name == "beta"), 1.0)
        result[layer.id] = Weights(weight, bias)
    return result


def tapped(proto: ModelProto, names: list[str], feed: dict[str, Any]) -> dict[str, np.ndarray]:
    """The values of some tensors of the main graph, from a run of the whole model."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    computed = {output for node in proto.graph.node for output in node.output}
    wanted = [name for name in dict.fromkeys(names) if name in computed]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    return stored | feed | dict(zip(wanted, run(copy, feed), strict=True))


def check_walk(proto: ModelProto, layers: set[str], biases: bool, data: list[Batch]) -> int:
    """Substitute these layers, and compare all that is seen with both whole models."""
    changed = with_other(proto, layers | ({f"b{layer[1:]}" for layer in layers} if biases else set()))
    theirs, seen = computed(changed, biases), found(proto)
    segments = Segments(seen.model, seen.walk, seen.bindings)
    ends = {
        binding.layer.id: (segments.entering(i), segments.leaving(i))
        for i, binding in enumerate(segments.bindings)
    }
    names = [name for pair in ends.values() for name in pair]
    before, after = ([tapped(p, names, b.feed) for b in data] for p in (proto, changed))
    with Prefix(seen.model, seen.walk, seen.bindings, iter(data), ENGINE) as walk:
        for step in walk.steps():
            layer = step.binding.layer.id
            entering, leaving = ends.pop(layer)
            sights = list(step.batches(original=True))
            assert [sight.held for sight in sights] == [batch.held for batch in data]
            for sight, one, other in zip(sights, before, after, strict=True):
                pairs = ((sight.x, one[entering]), (sight.x_hat, other[entering]), (sight.y, one[leaving]))
                for got, wanted in pairs:
                    assert got.dtype == wanted.dtype
                    assert difference([wanted], [got]) < SAME
                if np.array_equal(one[entering], other[entering]):
                    assert np.array_equal(sight.x, sight.x_hat)
            if layer in layers:
                step.substitute(*theirs[layer])
    assert set(ends) == set()
    return len(segments.bindings)


SUBSETS = {
    "none": (),
    "first": ("w1",),
    "second": ("w2",),
    "odd": ("w1", "w3"),
    "all": ("w1", "w2", "w3", "w4"),
}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("layers", SUBSETS.values(), ids=SUBSETS)
@pytest.mark.parametrize("name", MODELS)
def test_layers_see_what_the_whole_models_give_them(name, layers, biases):
    proto = built(name)
    seen = check_walk(proto, set(layers), biases, batches(proto))
    assert seen == sum(tensor.name.startswith("w") for tensor in proto.graph.initializer)


@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_a_residual_network_of_the_zoo(batchnorm, every):
    proto = zoo.build("resnet18", scale=0.25, batchnorm=batchnorm)
    layers = [binding.layer.id for binding in found(proto).bindings]
    assert (
        check_walk(proto, set(layers[1::every]), False, [Batch(feed_of(proto), False)]) == len(layers) == 21
    )


@pytest.mark.parametrize("take", [0, 1, 2])
def test_a_step_is_finished_however_much_of_it_was_consumed(take):
    proto = built("residual")
    seen, data = found(proto), batches(proto)
    with Prefix(seen.model, seen.walk, seen.bindings, data, ENGINE) as walk:
        steps = walk.steps()
        for _, step in zip(range(2), steps, strict=False):
            sights = step.batches() if take else iter(())
            assert [next(sights).x for _ in range(take)] == [None] * take
        last = next(steps)
        assert [sight.y.shape for sight in last.batches()] == [(3, 3)] * 3


def test_batches_are_handed_out_once():
    proto = built("residual")
    seen = found(proto)
    with Prefix(seen.model, seen.walk, seen.bindings, batches(proto), ENGINE) as walk:
        step = next(walk.steps())
        step.batches()
        with pytest.raises(RuntimeError, match="w1"):
            step.batches()


@pytest.mark.parametrize("name", MODELS)
def test_the_disk_holds_no_more_than_what_is_still_needed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shelf, "MEMORY", 0)
    proto = built(name)
    seen, data, theirs = found(proto), batches(proto), computed(built(name), False)
    segments = Segments(seen.model, seen.walk, seen.bindings)
    changed = frozenset()
    left = len(data) * len(segments.cut(0))
    with Prefix(seen.model, seen.walk, seen.bindings, data, ENGINE) as walk:
        for index, step in enumerate(walk.steps()):
            assert len(list(tmp_path.rglob("*.npy"))) == left
            changed = segments.changed(index, changed, index > 0)
            assert list(step.batches())
            kept = {*segments.cut(index + 1), *(set(segments.cut(index)) - changed)}
            left = len(data) * (len(kept) + len(changed))
            step.substitute(theirs[step.binding.layer.id].weight)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory", [0, 4000, 2**29])
def test_a_walk_has_the_same_bits_every_time(memory, monkeypatch):
    proto = built("norms")
    seen, theirs = found(proto), computed(with_other(proto, {"w1", "w2"}), True)

    def walked(threads=None):
        with Prefix(seen.model, seen.walk, seen.bindings, batches(proto), ENGINE, threads=threads) as walk:
            for step in walk.steps():
                for sight in step.batches():
                    yield sight.x_hat.tobytes() + sight.y.tobytes()
                step.substitute(*theirs[step.binding.layer.id])

    expected = list(walked())
    monkeypatch.setattr(shelf, "MEMORY", memory)
    with Threads(resolve("cpu"), number=2) as threads:
        assert list(walked()) == list(walked(threads)) == expected


def test_shapes_may_differ_between_batches():
    proto = built("residual")
    rng = np.random.default_rng(5)
    data = [Batch({"x": rng.standard_normal((n, 4, 6, 6)).astype(np.float32)}, False) for n in (3, 1, 2)]
    assert check_walk(proto, {"w1", "w2"}, True, data) == 3


def test_no_layers_no_steps():
    seen = found(model("g (float[N,3] x) => (float[N,3] y) { y = Relu (x) }"))
    with Prefix(seen.model, seen.walk, (), [], ENGINE) as walk:
        assert list(walk.steps()) == []


def test_no_batches_are_an_error():
    seen = found(built("residual"))
    with (
        Prefix(seen.model, seen.walk, seen.bindings, [], ENGINE) as walk,
        pytest.raises(InputError, match="There are no calibration inputs"),
    ):
        next(walk.steps())


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "steps"), [(0, 0), (5_000, 0), (6_000, 1), (14_000, 1), (22000, 3)])
def test_too_little_room_is_an_error_that_says_what_to_do(free, steps, monkeypatch):
    # The inputs take 1,856 bytes a batch, and what crosses the next two cuts 7,168 more.
    monkeypatch.setattr(shelf, "MEMORY", 0)
    monkeypatch.setattr(shelf.shutil, "disk_usage", lambda path: Usage(0, 0, free))
    proto = built("residual")
    seen, begun, failure = found(proto), 0, ""
    with Prefix(seen.model, seen.walk, seen.bindings, batches(proto), ENGINE) as walk:
        try:
            for begun, step in enumerate(walk.steps(), 1):  # noqa: B007
                step.finish()
        except InputError as error:
            failure = str(error)
    assert begun == steps
    assert ("0.0 GiB free" in failure and "--calibration-samples" in failure) == (free < 22000)


def test_a_full_disk_is_an_error_that_says_what_to_do(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shelf, "MEMORY", 0)
    monkeypatch.setattr(shelf.np, "save", full)
    proto = built("residual")
    seen = found(proto)
    with (
        Prefix(seen.model, seen.walk, seen.bindings, batches(proto), ENGINE) as walk,
        pytest.raises(InputError, match=r"No space left on device.* --calibration-samples"),
    ):
        next(walk.steps())


def test_what_crosses_a_cut_has_to_be_a_tensor():
    proto = model(
        """g (float[N,8] x) => (float[N,7] y) {
          s = SequenceConstruct (x)
          a = MatMul (x, w1)
          at = Constant <value = int64 {0}> ()
          e = SequenceAt (s, at)
          c = Add (a, e)
          y = MatMul (c, w2)
        }""",
        w1=(8, 8), w2=(8, 7),
    )  # fmt: skip
    seen = found(proto)
    with (
        Prefix(seen.model, seen.walk, seen.bindings, batches(proto), ENGINE) as walk,
        pytest.raises(UnsupportedError, match=r"'s'.* is no tensor of numbers"),
    ):
        next(walk.steps())


def test_a_batch_that_a_segment_rejects_is_an_error():
    proto = model(
        """g (float[N,8] x, int64[2] n) => (float[] y) {
          a = MatMul (x, w1)
          c = Reshape (a, n)
          y = MatMul (c, w2)
        }""",
        w1=(8, 8), w2=(8, 7),
    )  # fmt: skip
    seen = found(proto)
    data = [Batch({"x": np.ones((3, 8), np.float32), "n": np.array([5, 5])}, False)]
    with (
        Prefix(seen.model, seen.walk, seen.bindings, data, ENGINE) as walk,
        pytest.raises(RejectedError, match="reshape"),
    ):
        list(next(walk.steps()).batches())


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_dtypes_stay_what_they_are(dtype):
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    rng = np.random.default_rng(1)
    weights = {
        "w1": rng.standard_normal((8, 9)).astype(dtype),
        "w2": rng.standard_normal((9, 7)).astype(dtype),
    }
    proto = model(
        f"g ({kind}[N,8] x) => ({kind}[N,7] y) {{ a = MatMul (x, w1) r = Relu (a) y = MatMul (r, w2) }}",
        **weights,
    )
    seen = found(proto)
    with Prefix(seen.model, seen.walk, seen.bindings, batches(proto), ENGINE) as walk:
        first, second = 0, 0
        for step in walk.steps():
            for sight in step.batches(original=True):
                first += sight.x_hat.dtype == dtype
                second += not np.array_equal(sight.x, sight.x_hat)
            step.substitute(2 * weights["w1"].T[None].astype(np.float64))
    assert (first, second) == (6, 3)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_seen_can_be_seen_again(name):
    proto = built(name)
    seen, theirs = found(proto), computed(built(name), False)
    with Prefix(seen.model, seen.walk, seen.bindings, batches(proto), ENGINE) as walk:
        for step in walk.steps():
            first = list(step.batches())
            if not step.rectified:
                with pytest.raises(RuntimeError, match="are not kept"):
                    step.again()
            for _ in range(2 if step.rectified else 0):
                for one, other in zip(first, step.again(), strict=True):
                    assert other.held == one.held
                    np.testing.assert_array_equal(other.x_hat, one.x_hat)
                    np.testing.assert_array_equal(other.y, one.y)
                    assert (other.beside is None) == (one.beside is None)
                    for mine, same in zip(other.beside or (), one.beside or (), strict=True):
                        np.testing.assert_array_equal(mine, same)
            step.substitute(theirs[step.binding.layer.id].weight)
