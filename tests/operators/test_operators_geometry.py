"""Patches times the weight are the layer's outputs: checked in integers, which float32 adds exactly."""

from __future__ import annotations

from itertools import product

import ml_dtypes
import numpy as np
import onnxruntime
import pytest

from onnx_lowrank.layers.find import geometry, read
from onnx_lowrank.operators import geometry as geometry_module
from onnx_lowrank.operators import window as window_module
from onnx_lowrank.operators.geometry import Vectors, outputs, patches
from onnx_lowrank.operators.window import Window
from rewriting import found, model


def integers(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def ran(proto, value):
    """What ONNX Runtime makes of the input x."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    (result,) = session.run(["y"], {"x": value})
    return result


def joined(chunks):
    return np.concatenate(list(chunks))


def products(weight, rows):
    flat = weight.reshape(*weight.shape[:2], -1).astype(np.float64)
    return np.einsum("gfp,rgp->rgf", flat, rows.astype(np.float64))


def check(node, shape, weight, use=0):
    """The identity for the node that reads x and w, on an x of this shape."""
    axes = ",".join(map(str, shape))
    proto = model(f"g (float[{axes}] x) => (float[] y) {{ y = {node} }}", w=integers(1, *weight))
    value = integers(2, *shape)
    result = ran(proto, value)
    assert np.any(result)
    seen = found(proto)
    (binding,) = seen.bindings
    form = geometry(seen.walk, binding, use)
    rows, results = joined(patches(form, value)), joined(outputs(form, result))
    assert rows.dtype == results.dtype == np.float32
    assert results.size == result.size
    dense = read(seen.model, seen.walk, binding)
    np.testing.assert_array_equal(products(dense, rows), results)
    for needed in (1, 3):
        fewer = form.thinned(needed)
        rows, results = joined(patches(fewer, value)), joined(outputs(fewer, result))
        assert rows.dtype == results.dtype == np.float32
        assert len(rows) >= min(needed * len(value), len(results))
        np.testing.assert_array_equal(products(dense, rows), results)


def attributes(**values):
    inside = ", ".join(
        f"{name} = {list(value) if isinstance(value, tuple) else value}"
        for name, value in values.items()
        if value
    )
    return f"<{inside}>" if inside else ""


KERNELS = ((1,), (4,), (3, 3), (1, 1), (2, 5), (1, 3), (3, 2, 2))
GROUPS = (1, 2, 3)
SIZE = 8


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("pads", "dilation"), [(0, 1), (1, 1), (2, 2), (0, 3)])
def test_conv(groups, kernel, stride, pads, dilation):
    n = len(kernel)
    size = SIZE + 2 * (dilation > 1)
    uneven = tuple(min(pads + (axis % 2), 2) * (pads > 0) for axis in range(2 * n))
    text = attributes(
        group=groups,
        strides=tuple(stride + axis % 2 for axis in range(n)),
        dilations=(dilation,) * n,
        pads=uneven,
    )
    spatial = tuple(max(size, (k - 1) * dilation + 2) - axis for axis, k in enumerate(kernel))
    check(f"Conv {text} (x, w)", (2, 6, *spatial), (12, 6 // groups, *kernel))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [7, 8, 9])
def test_conv_auto_pad(kernel, stride, mode, size):
    text = attributes(strides=(stride,) * len(kernel), auto_pad=f'"{mode}"')
    check(f"Conv {text} (x, w)", (2, 4, *[size] * len(kernel)), (6, 4, *kernel))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("pads", "dilation", "extra"), [(0, 1, 0), (1, 1, 1), (2, 2, 0), (0, 2, 1)])
def test_conv_transpose(groups, kernel, stride, pads, dilation, extra):
    n = len(kernel)
    strides = tuple(stride + axis % 2 for axis in range(n))
    text = attributes(
        group=groups,
        strides=strides,
        dilations=(dilation,) * n,
        pads=tuple(min(pads, axis % n + 1) for axis in range(2 * n)) if pads else (),
        output_padding=tuple(extra * (s > 1) for s in strides),
    )
    check(f"ConvTranspose {text} (x, w)", (2, 6, *[5, 4, 4][:n]), (6, 12 // groups, *kernel))


@pytest.mark.parametrize("kernel", [(3,), (4, 3), (3, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("mode", ["", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("shape", [None, 0, 1, 2, -1])
def test_conv_transpose_shapes(kernel, stride, mode, shape):
    n = len(kernel)
    sizes = None if shape is None else tuple(5 * stride + shape for _ in range(n))
    if sizes is None and not mode:
        mode = "VALID"
    text = attributes(strides=(stride,) * n, auto_pad=mode and f'"{mode}"', output_shape=sizes)
    check(f"ConvTranspose {text} (x, w)", (2, 3, *[5] * n), (3, 4, *kernel))


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("kernel", [(1,), (2, 2), (1, 2)], ids=str)
def test_conv_transpose_of_strides_above_its_kernel(kernel, mode):
    n = len(kernel)
    text = attributes(strides=(3,) * n, auto_pad=f'"{mode}"')
    check(f"ConvTranspose {text} (x, w)", (2, 6, *[5] * n), (6, 12, *kernel))


MATMULS = {
    "matrix": ("MatMul (x, w)", (5, 6), (6, 7)),
    "batch": ("MatMul (x, w)", (2, 3, 5, 6), (6, 7)),
    "vector": ("MatMul (x, w)", (6,), (6, 7)),
    "left": ("MatMul (w, x)", (6, 5), (7, 6)),
    "left batch": ("MatMul (w, x)", (2, 3, 6, 5), (7, 6)),
    "left vector": ("MatMul (w, x)", (6,), (7, 6)),
    "batched weight": ("MatMul (x, w)", (3, 5, 6), (3, 6, 7)),
    "batched weight, more axes": ("MatMul (x, w)", (2, 3, 5, 6), (3, 6, 7)),
    "batched weight, fewer axes": ("MatMul (x, w)", (5, 6), (3, 6, 7)),
    "batched weight, broadcast input": ("MatMul (x, w)", (2, 1, 5, 6), (3, 6, 7)),
    "batched weight, broadcast": ("MatMul (x, w)", (2, 3, 5, 6), (2, 1, 6, 7)),
    "batched weight, two axes": ("MatMul (x, w)", (4, 2, 3, 5, 6), (2, 3, 6, 7)),
    "batched weight, outer": ("MatMul (x, w)", (4, 3, 5, 6), (2, 1, 1, 6, 7)),
    "batch of one": ("MatMul (x, w)", (2, 5, 6), (1, 6, 7)),
    "batch of one, matrix": ("MatMul (x, w)", (5, 6), (1, 6, 7)),
    "left batched weight": ("MatMul (w, x)", (2, 3, 6, 5), (3, 7, 6)),
    "left batched weight, broadcast": ("MatMul (w, x)", (6, 5), (2, 3, 7, 6)),
}


@pytest.mark.parametrize("name", MATMULS)
def test_matmul(name):
    check(*MATMULS[name])


@pytest.mark.parametrize(("left", "flip_x", "flip_w"), list(product([False, True], repeat=3)))
@pytest.mark.parametrize("alpha", [1.0, 0.5, -2.0])
def test_gemm(left, flip_x, flip_w, alpha):
    flips = (flip_w, flip_x) if left else (flip_x, flip_w)
    text = f"<transA = {int(flips[0])}, transB = {int(flips[1])}, alpha = {alpha}>"
    x = (5, 6) if left == flip_x else (6, 5)
    w = (7, 6) if left != flip_w else (6, 7)
    check(f"Gemm {text} ({'w, x' if left else 'x, w'})", x, w)


def uses(proto, **inputs):
    """The only layer of a model, its weight, and the geometry of each of its uses."""
    seen = found(proto)
    (binding,) = seen.bindings
    forms = [geometry(seen.walk, binding, index) for index in range(len(binding.layer.uses))]
    return binding.layer, read(seen.model, seen.walk, binding), forms


def test_tied_embedding():
    proto = model(
        "g (int64[3] i, float[4,6] x) => (float[] e, float[] y)"
        "{ e = Gather (w, i) t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t) }",
        w=integers(1, 9, 6),
    )
    layer, weight, (gather, transposed) = uses(proto)
    assert [use.transposed for use in layer.uses] == [False, True]
    x, table = integers(2, 4, 6), integers(1, 9, 6)
    rows = joined(patches(transposed, x))
    np.testing.assert_array_equal(rows[:, 0] @ weight[0], x @ table.T)
    looked_up = table[[[1, 2, 5], [0, 8, 8]]]
    np.testing.assert_array_equal(joined(outputs(gather, looked_up)), looked_up.reshape(6, 1, 6))


FORMS = {
    "window": (Window(2, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), "NOTSET", False, (0, 0), ()), (5, 4, 6, 7)),
    "transposed": (Window(2, (3, 2), (2, 2), (1, 1), (1, 0, 1, 0), "NOTSET", True, (0, 0), ()), (5, 4, 6, 7)),
    "matrix": (Vectors(()), (3, 5, 8)),
    "columns": (Vectors((), True, True), (3, 8, 5)),
    "groups": (Vectors((3,)), (4, 3, 5, 8)),
    "broadcast": (Vectors((2, 3)), (7, 8)),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("limit", [1, 200, 2000, 20000])
@pytest.mark.parametrize("function", [patches, outputs])
def test_chunks_join_to_the_whole(monkeypatch, name, limit, function):
    form, shape = FORMS[name]
    value = integers(3, *shape)
    whole = joined(function(form, value))
    for module in (geometry_module, window_module):
        monkeypatch.setattr(module, "CHUNK", limit)
    chunks = list(function(form, value))
    line = max(whole[:1].nbytes, limit)
    assert len(chunks) > 1 or whole.nbytes <= limit
    assert all(chunk.nbytes <= line for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("function", [patches, outputs])
def test_stacked_runs_follow_each_other(name, depth, function):
    form, shape = FORMS[name]
    runs = [integers(seed, *shape) for seed in range(4)]
    stacked = np.stack(runs).reshape(*((4,), (2, 2))[depth - 1], *shape)
    expected = np.concatenate([joined(function(form, run)) for run in runs])
    np.testing.assert_array_equal(joined(function(form, stacked, depth)), expected)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("function", [patches, outputs])
@pytest.mark.parametrize(("shape", "depth"), [((0,), 0), ((0,), 1), ((3, 0), 1), ((0, 2, 4, 6, 7), 1)])
def test_what_did_not_run_has_no_rows(name, function, shape, depth):
    form, _ = FORMS[name]
    assert list(function(form, np.empty(shape, np.float32), depth)) == []


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("function", [patches, outputs])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", "float32"), (ml_dtypes.bfloat16, "float32"), ("float32", "float32"), ("float64", "float64")],
    ids=str,
)
def test_dtypes(name, function, dtype, expected):
    form, shape = FORMS[name]
    value = integers(3, *shape)
    chunks = list(function(form, value.astype(dtype)))
    assert {chunk.dtype.name for chunk in chunks} == {expected}
    np.testing.assert_array_equal(np.concatenate(chunks), joined(function(form, value)))


PICTURES = Window(1, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), "NOTSET", False, (0, 0), ())


@pytest.mark.parametrize(
    ("needed", "every"), [(0, 1), (1, 8), (7, 5), (15, 4), (16, 4), (17, 3), (256, 1), (10**9, 1)]
)
def test_a_picture_gives_at_least_as_many_rows_as_are_needed(needed, every):
    given = len(joined(outputs(PICTURES.thinned(needed), integers(3, 5, 2, 16, 16))))
    assert given == 5 * (16 // every) ** 2
    assert given >= 5 * min(needed, 256)


def test_samples_keep_their_order_and_have_other_positions():
    places = np.arange(40 * 6 * 6, dtype=np.float32).reshape(40, 1, 6, 6)
    form = PICTURES.thinned(4)
    given = joined(outputs(form, places)).ravel().reshape(40, 4)
    number, place = np.divmod(given, 36)
    np.testing.assert_array_equal(number, np.arange(40)[:, None].repeat(4, 1))
    row, column = np.divmod(place, 6)
    assert set(row.ravel()) == set(column.ravel()) == set(range(6))
    assert ((row[:, :2] < 3) & (row[:, 2:] >= 3)).all()  # one from each half of an axis
    assert ((column[:, ::2] < 3) & (column[:, 1::2] >= 3)).all()
    again = joined(outputs(form, places[:7])).ravel()
    np.testing.assert_array_equal(given.ravel()[: again.size], again)


@pytest.mark.parametrize("limit", [1, 3000, 10**9])
@pytest.mark.parametrize("function", [patches, outputs])
def test_chunks_of_fewer_positions_join_to_the_same(monkeypatch, limit, function):
    for name in ("window", "transposed"):
        form = FORMS[name][0].thinned(3)
        value = integers(3, 37, 4, 9, 8)
        whole = joined(function(form, value))
        for module in (geometry_module, window_module):
            monkeypatch.setattr(module, "CHUNK", limit)
        np.testing.assert_array_equal(joined(function(form, value)), whole)
        monkeypatch.undo()


def _second(rows):
    flat = rows[:, 0].astype(np.float64)
    return flat.T @ flat / len(flat)


PERIODIC = {
    "deconvolution": Window(1, (2, 2), (2, 2), (1, 1), (0, 0, 0, 0), "NOTSET", True, (0, 0), ()),
    "convolution": PICTURES,
}


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("name", PERIODIC)
@pytest.mark.parametrize("needed", [30, 200])
def test_fewer_positions_see_all_phases_and_borders(name, batch, needed):
    """Each tap of a stride-2 deconvolution meets a number at a quarter of the positions."""
    value = np.random.default_rng(5).standard_normal((64, 3, 32, 32)).astype(np.float32)
    form, runs = PERIODIC[name], np.split(value, 64 // batch)
    whole, part = (
        _second(np.concatenate([joined(patches(each, run)) for run in runs]))
        for each in (form, form.thinned(needed))
    )
    np.testing.assert_allclose(np.diag(part), np.diag(whole), rtol=0.35)
    assert np.linalg.norm(part - whole) < 0.35 * np.linalg.norm(whole)


def test_few_rows_are_enough_for_short_ones():
    value = integers(3, 64, 2, 32, 32)
    assert len(joined(outputs(geometry_module.thinned(PICTURES, 18, 64), value))) == 64 * (32 // 3) ** 2
    assert len(joined(outputs(geometry_module.thinned(PICTURES, 180, 64), value))) == 64 * 32**2


def test_all_tokens_of_a_sequence_count():
    form = Window(1, (3,), (1,), (1,), (1, 1), "NOTSET", False, (0,), ())
    assert form.thinned(1) == form
    assert Vectors().thinned(1) == Vectors()


@pytest.mark.parametrize("scale", [-2.0, 0.5])
def test_the_scale_is_in_the_rows_of_the_input_only(scale):
    value = integers(3, 5, 8)
    plain, scaled = Vectors(()), Vectors((), scale=scale)
    np.testing.assert_array_equal(joined(patches(scaled, value)), scale * joined(patches(plain, value)))
    np.testing.assert_array_equal(joined(outputs(scaled, value)), joined(outputs(plain, value)))


@pytest.mark.parametrize("name", FORMS)
def test_the_activation_is_not_changed(name):
    form, shape = FORMS[name]
    value = integers(3, *shape)
    copy = value.copy()
    for chunk in patches(form, value):
        assert np.isfinite(chunk).all()
    np.testing.assert_array_equal(value, copy)


def test_a_kernel_larger_than_its_input_has_no_rows():
    form = Window(1, (5,), (1,), (1,), (0, 0), "NOTSET", False, (0,), ())
    assert list(patches(form, integers(1, 2, 3, 4))) == []
