"""Factors from activations, through the models that they make: judged by what these give on new inputs."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from calibrating import CPU, made, measured, plan_of, run, seen
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.stages import targets
from onnx_lowrank.stages import walked as module
from onnx_lowrank.work.fitting import activation_factors
from onnx_lowrank.work.weights import reference
from rewriting import constants, model, tensors

NORM = {"s": np.linspace(0.5, 2, 8), "t": np.linspace(-1, 1, 8), "m": np.full(8, 0.1), "v": np.full(8, 0.8)}
NORM = {name: values.astype(np.float32) for name, values in NORM.items()}
BIAS = np.linspace(-2, 2, 8).astype(np.float32)

# One layer each, which reads x; with its weights and the shape of a sample.
LAYERS = {
    "conv": ("y = Conv <pads = [1,1,1,1]> (x, w, b)", {"w": (8, 8, 3, 3), "b": BIAS}, (8, 6, 6)),
    "strided": ("y = Conv <strides = [2,2], dilations = [1,2]> (x, w)", {"w": (8, 8, 3, 3)}, (8, 7, 7)),
    "pointwise": ("y = Conv (x, w, b)", {"w": (8, 8, 1, 1), "b": BIAS}, (8, 5, 5)),
    "grouped": ("y = Conv <group = 2> (x, w, b)", {"w": (8, 4, 3, 3), "b": BIAS}, (8, 6, 6)),
    "1-D": ("y = Conv <auto_pad = \"SAME_UPPER\"> (x, w, b)", {"w": (8, 8, 3), "b": BIAS}, (8, 12)),
    "deconv": ("y = ConvTranspose <strides = [2,2]> (x, w, b)", {"w": (8, 8, 3, 3), "b": BIAS}, (8, 4, 4)),
    "batchnorm": (
        "h = Conv <pads = [1,1,1,1]> (x, w) y = BatchNormalization (h, s, t, m, v)",
        {"w": (8, 8, 3, 3), **NORM},
        (8, 6, 6),
    ),
    "gemm": ("y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)", {"w": (8, 8), "b": BIAS}, (8,)),
    "matmul-add": ("h = MatMul (x, w) y = Add (h, b)", {"w": (8, 8), "b": BIAS}, (5, 8)),
    "no-bias": ("y = Conv <pads = [1,1,1,1]> (x, w)", {"w": (8, 8, 3, 3)}, (8, 6, 6)),
    "matmul": ("y = MatMul (x, w)", {"w": (8, 8)}, (5, 8)),
}  # fmt: skip
WITH_BIAS = [name for name in LAYERS if name not in ("strided", "no-bias", "matmul")]


def one_layer(name):
    nodes, weights, shape = LAYERS[name]
    sizes = ",".join(map(str, shape))
    return model(f"g (float[N,{sizes}] x) => (float[] y) {{ {nodes} }}", **weights), shape


def drawn(seed, shape, number=50):
    """Samples that lie along few directions, which others do not share, and far from zero."""
    mix = np.random.default_rng(99).standard_normal((8, 8)) * 0.35 ** np.arange(8)
    rng = np.random.default_rng(seed)
    axis = -1 if len(shape) < 3 and shape[-1] == 8 else 1
    values = np.moveaxis(rng.standard_normal((number, *shape)), axis, -1) @ mix.T + 1.5
    return np.moveaxis(values, -1, axis).astype(np.float32)


def held_out(x):
    return x[np.arange(len(x)) % 5 == 4], x[np.arange(len(x)) % 5 != 4]


def features(y, shape):
    """Outputs as rows of features."""
    axis = -1 if len(shape) < 3 and shape[-1] == 8 else 1
    return np.moveaxis(y, axis, -1).reshape(-1, y.shape[axis])


def options(name):
    (layer,) = seen(one_layer(name)[0]).layers
    for fold in layer.folds:
        for k in layer.slices[:2]:
            full = layer.full_rank(fold, k)
            yield Option(fold, k, max(1, full // 3))


CASES = [(name, option) for name in LAYERS for option in sorted(options(name))]


def both_fits(proto, x, option):
    found = seen(proto)
    with measured(found, x) as calibration:
        return [
            made(found, plan_of(found, [option], fit), calibration) for fit in (Fit.WEIGHTS, Fit.ACTIVATIONS)
        ]


@pytest.mark.parametrize(
    ("name", "option"), CASES, ids=lambda v: v if isinstance(v, str) else f"{v.fold}-{v.k}-{v.j}"
)
def test_on_new_inputs_activations_beat_weights(name, option):
    proto, shape = one_layer(name)
    of_weights, of_activations = both_fits(proto, drawn(1, shape), option)
    new = drawn(2, shape)
    wanted = run(proto, x=new)
    lost = [
        np.linalg.norm(run(b.rewritten.model.proto, x=new) - wanted) for b in (of_weights, of_activations)
    ]
    assert 0 < lost[1] < lost[0]
    ((layer, fit),) = of_activations.fits.items()
    assert (fit.fit, fit.recovered) == (Fit.ACTIVATIONS, False)
    assert of_weights.fits[layer].fit is Fit.WEIGHTS
    assert of_weights.fits[layer].error is None


@pytest.mark.parametrize(("name", "option"), [case for case in CASES if case[0] in WITH_BIAS])
def test_the_bias_keeps_the_mean_of_what_was_fitted_to(name, option):
    proto, shape = one_layer(name)
    x = drawn(1, shape)
    _, share = held_out(x)
    wanted = features(run(proto, x=share), shape)
    of_weights, of_activations = (
        features(run(b.rewritten.model.proto, x=share), shape) for b in both_fits(proto, x, option)
    )
    assert np.abs((of_activations - wanted).mean(axis=0)).max() < 1e-4 * wanted.std()
    assert np.abs((of_weights - wanted).mean(axis=0)).max() > 1e-3 * wanted.std()


@pytest.mark.parametrize(("name", "option"), CASES)
def test_the_error_told_is_that_of_the_held_out_inputs(name, option):
    proto, shape = one_layer(name)
    x = drawn(3, shape)
    share, _ = held_out(x)
    built = both_fits(proto, x, option)[1]
    wanted = features(run(proto, x=share), shape)
    lost = features(run(built.rewritten.model.proto, x=share), shape) - wanted
    if name in WITH_BIAS:
        lost, wanted = lost - lost.mean(axis=0), wanted - wanted.mean(axis=0)
    (fit,) = built.fits.values()
    assert fit.error == pytest.approx(np.sum(lost**2) / np.sum(wanted**2), rel=2e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_full_rank_gives_the_layer_back(name):
    proto, shape = one_layer(name)
    found = seen(proto)
    (layer,) = found.layers
    x = drawn(4, shape)
    for fold in layer.folds:
        built = both_fits(proto, x, Option(fold, 1, layer.full_rank(fold, 1)))[1]
        wanted = run(proto, x=x)
        np.testing.assert_allclose(
            run(built.rewritten.model.proto, x=x), wanted, atol=1e-4 * np.abs(wanted).max()
        )
        (fit,) = built.fits.values()
        assert fit.error < 1e-8


@pytest.mark.parametrize("number", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("recover", [False, True])
def test_few_samples_give_finite_factors(number, recover):
    proto, shape = one_layer("conv")
    found = seen(proto)
    with measured(found, drawn(5, shape, number)) as calibration:
        built = made(found, plan_of(found, [Option(Fold.ENCODE, 1, 4)], recover=recover), calibration)
    (fit,) = built.fits.values()
    assert fit.fit is Fit.ACTIVATIONS
    assert 0 < fit.error < 1
    assert np.isfinite(run(built.rewritten.model.proto, x=drawn(6, shape))).all()


@pytest.mark.parametrize("recover", [False, True])
def test_inputs_of_zeros_leave_factors_of_the_weight(recover):
    proto, shape = one_layer("conv")
    found = seen(proto)
    x = np.zeros((10, *shape), np.float32)
    with measured(found, x) as calibration:
        built = made(found, plan_of(found, [Option(Fold.ENCODE, 1, 4)], recover=recover), calibration)
    assert np.isfinite(run(built.rewritten.model.proto, x=drawn(6, shape))).all()
    np.testing.assert_allclose(run(built.rewritten.model.proto, x=x), run(proto, x=x), atol=1e-6)


# --- where only results are measured ------------------------------------------------------------------


def test_a_table_is_fitted_to_the_rows_that_are_read():
    table = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    proto = model("g (int64[N,5] x) => (float[] y) { y = Gather (w, x) }", w=table)
    found = seen(proto)
    (layer,) = found.layers
    x = np.random.default_rng(1).integers(0, 4, (50, 5))
    built = both_fits(proto, x, Option(layer.folds[0], 1, 4))
    lost = [np.abs(run(b.rewritten.model.proto, x=x) - run(proto, x=x)).max() for b in built]
    assert lost[1] < 0.05 < 0.5 < lost[0], "four rows are read, which rank 4 holds but for the floor"


@pytest.mark.parametrize("name", ["conv", "batchnorm", "gemm", "matmul-add"])
def test_moments_of_outputs_stand_in_for_those_of_inputs(name, monkeypatch):
    proto, shape = one_layer(name)
    found, x = seen(proto), drawn(1, shape)
    (binding,) = found.bindings
    weight = reference(found.model, found.walk, binding).read()
    option, share = Option(binding.layer.folds[0], 1, 3), held_out(x)[1]
    monkeypatch.setattr(
        "onnx_lowrank.calibrate.measurement.takes_outputs", lambda part, memory, is_looked_up: True
    )
    with measured(found, x) as calibration:
        moments = calibration.statistics[binding.layer.id]
        assert moments.inputs is None
        sliced = Option(Fold.ENCODE, 2, 1)
        assert activation_factors(weight, sliced, moments, CPU, centred=True, steps=0) is None
        built = made(found, plan_of(found, [option]), calibration)
        fallen = made(found, plan_of(found, [sliced]), calibration) if 2 in binding.layer.slices else None
    (fit,) = built.fits.values()
    assert fit.fit is Fit.ACTIVATIONS
    assert fallen is None or next(iter(fallen.fits.values())).fit is Fit.WEIGHTS
    wanted, given = (features(run(p, x=share), shape) for p in (proto, built.rewritten.model.proto))
    y, z = (features(run(p, x=held_out(x)[0]), shape) for p in (proto, built.rewritten.model.proto))
    lost = np.linalg.norm(z - y - (z - y).mean(axis=0)) / np.linalg.norm(y - y.mean(axis=0))
    assert fit.error == pytest.approx(lost**2, rel=1e-3)
    of_weights = both_fits(proto, x, option)[0].rewritten.model.proto
    assert np.linalg.norm(given - wanted) < np.linalg.norm(features(run(of_weights, x=share), shape) - wanted)
    assert np.abs((given - wanted).mean(axis=0)).max() < 1e-4 * wanted.std()


# --- recovery -----------------------------------------------------------------------------------------

CHAIN = """g (float[N,8] x) => (float[] y) {
    a = Gemm <transB = 1> (x, w1, b1) r = Relu (a) c = Gemm <transB = 1> (r, w2, b2) s = Relu (c)
    d = MatMul (s, w3) y = Add (d, b3) }"""


def chain():
    rng = np.random.default_rng(3)
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("w1", "w2", "w3")}
    return model(CHAIN, b1=BIAS / 4, b2=BIAS / 4, b3=BIAS / 4, **weights)


def wide(seed, number=400):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((number, 8)).astype(np.float32)


def without_and_with(proto, x, ranks):
    """What is made without recovery, and with it."""
    found = seen(proto)
    picks = [None if j is None else Option(Fold.ENCODE, 1, j) for j in ranks]
    with measured(found, x) as calibration:
        return [made(found, plan_of(found, picks, recover=flag), calibration) for flag in (False, True)]


def arrays(proto):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [(5, 5, 5), (4, 6, 6), (3, None, 6), (6, 4, 4)])
def test_recovery_lowers_the_error_of_the_model(ranks, seed):
    proto, x = chain(), wide(seed, 2000)
    plain, walked = without_and_with(proto, x, ranks)
    # Some inputs were held out, and many were never seen.
    for inputs in (held_out(x)[0], wide(seed + 100, 2000)):
        wanted = run(proto, x=inputs)
        lost = [np.linalg.norm(run(b.rewritten.model.proto, x=inputs) - wanted) for b in (plain, walked)]
        assert 0 < lost[1] < 0.995 * lost[0]
    assert not any(fit.recovered for fit in plain.fits.values())
    assert any(fit.recovered for fit in walked.fits.values())


@pytest.mark.parametrize("ranks", [(5, 5, 5), (4, None, 6), (None, None, 4)])
def test_recovery_keeps_the_means_that_the_original_gives(ranks):
    proto, x = chain(), wide(1)
    _, share = held_out(x)
    plain, walked = without_and_with(proto, x, ranks)
    wanted = run(proto, x=share)
    assert np.abs((run(walked.rewritten.model.proto, x=share) - wanted).mean(axis=0)).max() < 1e-4
    if ranks[0] is not None:
        assert np.abs((run(plain.rewritten.model.proto, x=share) - wanted).mean(axis=0)).max() > 1e-3


def test_a_step_that_raises_the_held_out_error_is_undone(monkeypatch):
    """The problem that is fitted has a ridge, the one that judges has none: only the first is poisoned."""
    of_targets = targets.of_targets

    def poisoned(weight, inputs, targets, *, centred, ridge):
        found = of_targets(weight, inputs, targets, centred=centred, ridge=ridge)
        return type(found)(found.second, -found.cross, found.power) if ridge else found

    monkeypatch.setattr(module, "best_ridge", lambda *args, **kwargs: 1e-6)
    monkeypatch.setattr(targets, "of_targets", poisoned)
    plain, walked = without_and_with(chain(), wide(2), (5, 5, 5))
    assert [fit.recovered for fit in walked.fits.values()] == [False] * 3
    ours, theirs = arrays(walked.rewritten.model.proto), arrays(plain.rewritten.model.proto)
    matrices = [name for name, array in theirs.items() if array.ndim == 2]
    assert len(matrices) == 6
    for name in matrices:
        np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize(("name", "change"), [("Sigmoid", 1e-4), ("Relu", 1e-2)])
def test_the_first_layer_has_nothing_to_recover_from(name, change):
    """Before a Relu, what does not pass it may err, so that the linear error may give a little."""
    weights = arrays(chain())
    proto = model(CHAIN.replace("Relu", name), **weights)
    plain, walked = without_and_with(proto, wide(3), (4, None, None))
    ((layer, fit),) = plain.fits.items()
    assert walked.fits[layer].error == pytest.approx(fit.error, rel=change)


# --- layers that the plan keeps --------------------------------------------------------------------------

NUMBERS = ",".join(str(number) for number in np.random.default_rng(5).standard_normal(64).round(3))
BEHIND = {
    "gemm": ("d = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (r, k, b2)", {"k": (8, 8), "b2": BIAS}),
    "matmul": ("d = MatMul (r, k)", {"k": (8, 8)}),
    "matmul-add": ("c = MatMul (r, k) d = Add (c, b2)", {"k": (8, 8), "b2": BIAS}),
    "residual": ("c = MatMul (r, k) e = Add (c, b2) d = Add (e, x)", {"k": (8, 8), "b2": BIAS}),
    "einsum": ('d = Einsum <equation = "nc,fc->nf"> (r, k)', {"k": (8, 8)}),
    "constant": (f"k = Constant <value = float[8,8] {{{NUMBERS}}}> () d = MatMul (r, k)", {}),
}  # fmt: skip
FRONT = "a = MatMul (x, w) h = Add (a, b) r = Relu (h)"


def stored(proto):
    """The values of initializers and Constant nodes, by name."""
    made = {
        n.output[0]: numpy_helper.to_array(n.attribute[0].t)
        for n in proto.graph.node
        if n.op_type == "Constant"
    }
    return arrays(proto) | made


def kept_behind(nodes, weights):
    """A layer to compress, and one behind it to keep."""
    rng = np.random.default_rng(8)
    drawn = {
        name: rng.standard_normal(value).astype(np.float32) / 3 if isinstance(value, tuple) else value
        for name, value in {"w": (8, 8), "b": BIAS / 4, **weights}.items()
    }
    return model(f"g (float[N,8] x) => (float[] y) {{ {FRONT} {nodes} y = Sigmoid (d) }}", **drawn)


@pytest.mark.parametrize("name", BEHIND)
def test_a_kept_layer_makes_up_for_the_layers_before_it(name):
    proto, x = kept_behind(*BEHIND[name]), wide(1, 2000)
    plain, walked = without_and_with(proto, x, (3, None))
    kept = next(layer for layer in walked.fits if layer not in plain.fits)
    assert walked.fits[kept].recovered
    assert 0 < max(walked.certificates[kept].spectral) < 1
    new = wide(50, 2000)
    wanted = run(proto, x=new)
    lost = [np.linalg.norm(run(b.rewritten.model.proto, x=new) - wanted) for b in (plain, walked)]
    assert 0 < lost[1] < 0.99 * lost[0]
    assert [node.op_type for node in walked.rewritten.model.proto.graph.node] == [
        node.op_type for node in plain.rewritten.model.proto.graph.node
    ]
    ours, theirs = (stored(b.rewritten.model.proto) for b in (plain, walked))
    assert ours.keys() == theirs.keys()
    assert all(ours[tensor].shape == theirs[tensor].shape for tensor in ours)


def test_the_error_told_of_a_kept_layer_is_that_of_the_held_out_inputs():
    proto, x = kept_behind(*BEHIND["matmul-add"]), wide(2, 2000)
    share, _ = held_out(x)
    plain, walked = without_and_with(proto, x, (3, None))
    kept = next(layer for layer in walked.fits if layer not in plain.fits)
    wanted, given = (np.log(1 / run(p, x=share) - 1) for p in (proto, walked.rewritten.model.proto))
    lost, whole = (values - values.mean(axis=0) for values in (given - wanted, wanted))
    assert walked.fits[kept].error == pytest.approx(np.sum(lost**2) / np.sum(whole**2), rel=2e-3)


def test_the_batchnorm_of_a_kept_layer_stays():
    proto = model(
        """g (float[N,8,6,6] x) => (float[] y) {
            h = Conv <pads = [1,1,1,1]> (x, w, b) r = Relu (h) c = Conv <pads = [1,1,1,1]> (r, k)
            d = BatchNormalization (c, s, t, m, v) y = Relu (d) }""",
        w=(8, 8, 3, 3), k=(8, 8, 3, 3), b=BIAS, **(NORM | {"s": np.float32([0, 1, -1, 2, 1, 1, 0.5, 1])}),
    )  # fmt: skip
    plain, walked = without_and_with(proto, drawn(1, (8, 6, 6), 200), (6, None))
    before, after = stored(plain.rewritten.model.proto), stored(walked.rewritten.model.proto)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed >= {"k", "t"}
    assert not changed & {"s", "m", "v"}
    np.testing.assert_array_equal(before["k"][0], after["k"][0])  # its scale is zero
    new = drawn(2, (8, 6, 6), 200)
    wanted = run(proto, x=new)
    lost = [np.linalg.norm(run(b.rewritten.model.proto, x=new) - wanted) for b in (plain, walked)]
    assert 0 < lost[1] < 0.99 * lost[0]


def erasing(scale):
    """A kept convolution with a BatchNorm whose first feature has a scale of its own."""
    scales = np.ones(8, np.float32)
    scales[0] = scale
    proto = model(
        """g (float[N,8,6,6] x) => (float[N,8,6,6] y) {
            h = Conv <pads = [1,1,1,1]> (x, w, b) r = Relu (h) c = Conv (r, k)
            d = BatchNormalization (c, s, t, m, v) e = Add (d, r) f = Relu (e) y = Conv (f, l) }""",
        w=(8, 8, 3, 3), k=(8, 8, 1, 1), l=(8, 8, 1, 1), b=BIAS, **(NORM | {"s": scales}),
    )  # fmt: skip
    return proto, drawn(1, (8, 6, 6), 200)


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-20, -1e-6])
def test_features_that_a_batchnorm_erases_keep_their_numbers(scale):
    proto, x = erasing(scale)
    plain, walked = without_and_with(proto, x, (3, None, None))
    before, after = stored(plain.rewritten.model.proto), stored(walked.rewritten.model.proto)
    np.testing.assert_array_equal(after["k"][0], before["k"][0])
    assert after["t"][0] == before["t"][0]
    assert not np.array_equal(after["k"][1:], before["k"][1:])
    assert np.abs(after["k"]).max() < 100
    new = drawn(2, (8, 6, 6), 200)
    wanted = run(proto, x=new)
    lost = [np.linalg.norm(run(b.rewritten.model.proto, x=new) - wanted) for b in (plain, walked)]
    assert 0 < lost[1] < 0.99 * lost[0]


def test_new_numbers_that_the_type_cannot_hold_change_nothing(monkeypatch):
    proto, x = erasing(1.0)
    monkeypatch.setattr(module, "operands", lambda *_: None)
    walked = without_and_with(proto, x, (3, None, None))[1]
    assert len(walked.fits) == 1
    np.testing.assert_array_equal(stored(walked.rewritten.model.proto)["k"], arrays(proto)["k"])


def test_a_weight_of_zeros_stays():
    proto = model("g (float[N,8] x) => (float[] y) { h = MatMul (x, w) e = MatMul (h, k) y = Add (e, h) }",
                  w=(8, 8), k=np.zeros((8, 8), np.float32))  # fmt: skip
    assert len(without_and_with(proto, wide(1), (3, None))[1].fits) == 1


def test_a_partner_of_a_narrow_layer_that_is_not_recovered_stays():
    proto = model(
        """g (float[N,8] x) => (float[] y, float[] z) {
            a = MatMul (x, w) h = LpNormalization (a) c = Gemm (h, k, b2) r = Tanh (c)
            y = Gemm (r, o, b3) q = LpNormalization (y) z = Gemm (q, p, b3) }""",
        w=(8, 8), k=(8, 8), b2=BIAS / 8, o=(8, 8), b3=BIAS, p=(8, 8),
    )  # fmt: skip
    found = seen(proto)
    narrow = Option(found.layers[2].narrow_fold, 1, 5, Lowering.NARROW)
    with measured(found, wide(1, 2000)) as calibration:
        plan = plan_of(found, [Option(Fold.ENCODE, 1, 4), None, narrow, None], recover=True)
        built = made(found, plan, calibration)
    assert "k" not in built.fits
    narrowed = stored(built.rewritten.model.proto)["k_narrow"]
    assert {tuple(column) for column in narrowed.T} <= {tuple(column) for column in arrays(proto)["k"].T}


UNTOUCHED = {
    "shared": ("c = MatMul (r, k) e = Relu (c) d = MatMul (e, k)", {"k": (8, 8)}),
    "viewed": ("t = Transpose <perm = [1,0]> (k) d = MatMul (r, t)", {"k": (8, 8)}),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_a_kept_layer_that_would_need_other_nodes_stays_as_it_is(name):
    plain, walked = without_and_with(kept_behind(*UNTOUCHED[name]), wide(1), (3, None))
    assert walked.fits.keys() == plain.fits.keys()
    np.testing.assert_array_equal(
        stored(walked.rewritten.model.proto)["k"], stored(plain.rewritten.model.proto)["k"]
    )


def test_layers_before_the_first_compressed_one_stay_as_they_are():
    proto = chain()
    walked = without_and_with(proto, wide(3), (None, 4, None))[1]
    np.testing.assert_array_equal(stored(walked.rewritten.model.proto)["w1"], arrays(proto)["w1"])
    assert len(walked.fits) == 2


def test_a_kept_layer_with_larger_moments_than_all_others_stays_as_it_is():
    proto = model(
        "g (float[N,8] x) => (float[] y) { h = MatMul (x, w) y = MatMul (h, k) }", w=(8, 8), k=(8, 64)
    )
    walked = without_and_with(proto, wide(3), (4, None))[1]
    assert len(walked.fits) == 1


def test_a_kept_layer_whose_fit_does_worse_stays_as_it_is(monkeypatch):
    proto = kept_behind(*BEHIND["matmul"])
    monkeypatch.setattr(module.Refit, "_fitted", lambda self, *_: -self._weight)
    walked = without_and_with(proto, wide(1), (3, None))[1]
    assert len(walked.fits) == 1
    np.testing.assert_array_equal(stored(walked.rewritten.model.proto)["k"], arrays(proto)["k"])


@pytest.mark.parametrize("hidden", [4, 6])
def test_a_partner_is_refitted_before_it_is_narrowed(hidden):
    proto = model(
        """g (float[N,8] x) => (float[] y) {
            a = MatMul (x, w) h = LpNormalization (a) c = MatMul (h, k) d = Add (c, b2) r = Tanh (d)
            y = MatMul (r, o) }""",
        w=(8, 8), k=(8, 8), b2=BIAS / 8, o=(8, 8),
    )  # fmt: skip
    found = seen(proto)
    narrow = Option(found.layers[2].narrow_fold, 1, hidden, Lowering.NARROW)
    with measured(found, wide(1, 2000)) as calibration:
        plans = [
            plan_of(found, [Option(Fold.ENCODE, 1, 5), None, narrow], recover=flag) for flag in (False, True)
        ]
        plain, walked = (made(found, plan, calibration) for plan in plans)
    assert len(walked.fits) == 3
    new = wide(60, 2000)
    wanted = run(proto, x=new)
    lost = [np.linalg.norm(run(b.rewritten.model.proto, x=new) - wanted) for b in (plain, walked)]
    assert 0 < lost[1] < 0.98 * lost[0]
    assert stored(walked.rewritten.model.proto).keys() == stored(plain.rewritten.model.proto).keys()
    assert sum(v.size for v in stored(walked.rewritten.model.proto).values()) == sum(
        v.size for v in stored(plain.rewritten.model.proto).values()
    )


# --- what cannot be measured, or not recovered --------------------------------------------------------


def test_an_untaken_branch_is_fitted_to_its_weight():
    proto = model(
        """g (bool k, float[N,8] x) => (float[] y) { y = If (k) <
            then_branch = t () => (float[] p) { p = MatMul (x, w1) },
            else_branch = e () => (float[] q) { q = MatMul (x, w2) }> }""",
        w1=(8, 8), w2=(8, 8),
    )  # fmt: skip
    found = seen(proto)
    source = {"x": wide(4), "k": np.array(True)}
    with measured(found, source) as calibration:
        (layer,) = calibration.statistics.reasons
        assert "does not run on the calibration inputs" in calibration.statistics.reasons[layer]
        picks = [Option(Fold.ENCODE, 1, 4)] * 2
        built = made(found, plan_of(found, picks, recover=True), calibration)
    assert {name: (fit.fit, fit.recovered) for name, fit in built.fits.items()} == {
        other: (Fit.WEIGHTS if other == layer else Fit.ACTIVATIONS, False) for other in built.fits
    }
    assert len(built.fits) == 2


def test_shared_weights_are_fitted_once_and_not_recovered():
    proto = model(
        "g (float[N,8] x) => (float[] y) { a = MatMul (x, w) r = Relu (a) y = MatMul (r, w) }", w=(8, 8)
    )
    built = without_and_with(proto, wide(5), (4,))[1]
    (fit,) = built.fits.values()
    assert (fit.fit, fit.recovered) == (Fit.ACTIVATIONS, False)
    assert len(arrays(built.rewritten.model.proto)) == 2


def test_a_bias_that_cannot_change_is_not_fitted_by_the_weight():
    nodes = "a = Gemm (x, w1, b) r = Relu (a) c = Gemm (r, w2, b) y = Relu (c)"
    text = f"g (float[N,8] x) => (float[] y) {{ {nodes} }}"
    built = without_and_with(model(text, w1=(8, 8), w2=(8, 8), b=BIAS), wide(6), (4, 4))[1]
    assert [(fit.fit, fit.recovered) for fit in built.fits.values()] == [(Fit.ACTIVATIONS, False)] * 2


@pytest.mark.parametrize("recover", [False, True])
def test_every_layer_of_the_plan_comes_once(recover):
    """Recovered, plain and unmeasured layers in one model."""
    proto = model(
        """g (bool k, float[N,8] x) => (float[] y) { a = MatMul (x, w1) h = MatMul (a, w3) i = Relu (h)
          y = If (k) < then_branch = t () => (float[] p) { p = MatMul (i, w2) },
                       else_branch = e () => (float[] q) { u = MatMul (i, w4) q = MatMul (u, w3) }> }""",
        w1=(8, 8), w2=(8, 8), w3=(8, 8), w4=(8, 8),
    )  # fmt: skip
    found = seen(proto)
    picks = [Option(Fold.ENCODE, 1, 5)] * len(found.layers)
    with measured(found, {"x": wide(7), "k": np.array(True)}) as calibration:
        built = made(found, plan_of(found, picks, recover=recover), calibration)
    assert sorted(built.fits) == sorted(layer.id for layer in found.layers) == sorted(built.certificates)
    for k in (True, False):
        assert np.isfinite(run(built.rewritten.model.proto, k=np.array(k), x=wide(8))).all()


def test_weights_in_constants_and_loop_bodies_are_reached():
    proto = model(
        """g (int64 n, float[4,8] x) => (float[] y) { c = Constant <value = bool {1}> ()
          y = Loop (n, c, x) <body = l (int64 i, bool p, float[4,8] h) => (bool o, float[4,8] z) {
            o = Identity (p) m = MatMul (h, w) z = Tanh (m) }> }"""
    )
    constants(proto.graph, *tensors(w=(8, 8)))
    found = seen(proto)
    feeds = [{"n": np.array(3), "x": wide(seed, 4)} for seed in range(10)]
    with measured(found, feeds) as calibration:
        assert not calibration.statistics.reasons
        built = made(found, plan_of(found, [Option(Fold.ENCODE, 1, 5)], recover=True), calibration)
    (fit,) = built.fits.values()
    assert (fit.fit, fit.recovered) == (Fit.ACTIVATIONS, False)
    assert 0 < fit.error < 1
