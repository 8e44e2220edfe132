"""Outputs whose rows are directions: which they are, and how well a compressed model keeps them."""

import numpy as np
import pytest

from onnx_lowrank.engines.compare import Comparison, compare


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def drawn(seed, *shape, noise=0.05):
    """Rows of unit norm, and the same with noise."""
    rng = np.random.default_rng(seed)
    y = unit(rng.standard_normal(shape))
    return y, unit(y + noise * rng.standard_normal(shape))


def compared(y, z):
    (error,) = compare({"y": y}, {"y": z}, {})
    return error


def wanted(y, z):
    """The definition."""
    y, z = (unit(rows.reshape(-1, rows.shape[-1])) for rows in (y, z))
    kept = []
    for i in range(len(y)):
        near = [max((row @ rows[i], j) for j, row in enumerate(rows) if j != i)[1] for rows in (y, z)]
        kept.append(near[0] == near[1])
    return np.mean([a @ b for a, b in zip(y, z, strict=True)]), np.mean(kept)


@pytest.mark.parametrize("shape", [(3, 2), (40, 5), (4, 9, 6), (300, 8)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_unit_norm_have_cosines_and_neighbours_and_no_classes(shape, dtype):
    y, z = (rows.astype(dtype) for rows in drawn(0, *shape, noise=0.3))
    error = compared(y, z)
    cosine, neighbours = wanted(y.astype(np.float64), z.astype(np.float64))
    assert error.agreement is None
    assert error.cosine == pytest.approx(cosine, rel=1e-12)
    assert error.neighbours == neighbours
    assert error.cosine < 0.99
    assert (neighbours < 1) == (shape != (3, 2))


def test_the_length_of_the_compressed_rows_is_nothing_to_their_direction():
    y, z = drawn(1, 50, 6)
    scaled = z * np.random.default_rng(2).uniform(0.1, 1e30, (50, 1))
    ours, theirs = compared(y, z), compared(y, scaled)
    assert theirs.cosine == pytest.approx(ours.cosine, rel=1e-12)
    assert theirs.neighbours == ours.neighbours


def test_a_row_that_becomes_zero_has_no_direction():
    y, z = drawn(3, 4, 6, noise=0.0)
    z[0] = 0
    assert compared(y, z).cosine == pytest.approx(0.75, rel=1e-12)


@pytest.mark.parametrize(
    ("norm", "is_embedding"), [(1.0, True), (1.0009, True), (0.9991, True), (1.0011, False), (0.9989, False)]
)
def test_one_row_of_another_norm_makes_them_classes(norm, is_embedding):
    y, z = drawn(4, 50, 6)
    y[49] *= norm
    error = compared(y, z)
    assert (error.agreement is None, error.cosine is None, error.neighbours is None) == (
        is_embedding,
        not is_embedding,
        not is_embedding,
    )


def softmax(logits):
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("certainty", [1, 30, 1000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_probabilities_are_classes_however_sure(certainty, dtype):
    rng = np.random.default_rng(5)
    y, z = (softmax(certainty * rng.standard_normal((60, 7))).astype(dtype) for _ in range(2))
    error = compared(y, z)
    assert error.agreement == np.mean(y.argmax(-1) == z.argmax(-1))
    assert (error.cosine, error.neighbours) == (None, None)


@pytest.mark.parametrize("rows", [1, 4, 200])
def test_logits_are_classes(rows):
    rng = np.random.default_rng(6)
    y, z = rng.standard_normal((2, rows, 10))
    error = compared(y, z)
    assert error.agreement == np.mean(y.argmax(-1) == z.argmax(-1))
    assert (error.cosine, error.neighbours) == (None, None)


@pytest.mark.parametrize("shape", [(4,), (3, 1), ()])
def test_what_has_no_rows_has_neither(shape):
    error = compared(np.ones(shape), np.ones(shape))
    assert (error.agreement, error.cosine, error.neighbours) == (None, None, None)


@pytest.mark.parametrize(("rows", "neighbours"), [(1, None), (2, None), (3, 1.0)])
def test_a_row_needs_two_others_to_have_a_nearest(rows, neighbours):
    y, z = drawn(7, rows, 6, noise=1e-6)
    error = compared(y, z)
    assert error.cosine == pytest.approx(1.0, abs=1e-9)
    assert error.neighbours == neighbours


def test_equal_rows_are_all_nearest():
    y, _ = drawn(8, 6, 5)
    y = np.repeat(y, 3, axis=0).astype(np.float32)
    z = unit(y + 1e-7 * np.random.default_rng(9).standard_normal(y.shape)).astype(np.float32)
    assert compared(y, z).neighbours == 1.0


def test_rows_that_are_not_finite_in_the_input_model_are_left_out():
    y, z = drawn(10, 30, 6, noise=0.3)
    want = wanted(y[2:], z[2:])
    y[0], y[1, 2] = np.nan, np.inf
    error = compared(y, z)
    assert (error.cosine, error.neighbours) == pytest.approx(want)


def test_complex_rows_have_no_direction():
    y, z = drawn(11, 30, 6)
    error = compared(y * 1j, z * 1j)
    assert (error.agreement, error.cosine, error.neighbours) == (None, None, None)


# --- many rows ----------------------------------------------------------------------------------------


def streamed(y, z, size):
    comparison = Comparison()
    for n in range(0, len(y), size):
        comparison.add({"y": y[n : n + size]}, {"y": z[n : n + size]}, {"x": y[n : n + size]})
    (error,) = comparison.errors()
    return error


@pytest.mark.parametrize("size", [1, 7, 64, 5000])
def test_batches_make_no_difference(size):
    y, z = drawn(12, 5000, 8, noise=0.02)
    error = streamed(y, z, size)
    assert error.cosine == pytest.approx(np.sum(y * z, axis=1).mean(), rel=1e-12)
    # Every fourth row: 5000 and 2500 are above 2048.
    near = [(rows @ rows.T - 2 * np.eye(len(rows))).argmax(axis=1) for rows in (y[::4], z[::4])]
    assert error.neighbours == np.mean(near[0] == near[1])
    assert 0.5 < error.neighbours < 1


def test_a_later_row_of_another_norm_makes_classes_of_all_rows():
    y, z = drawn(13, 100, 6, noise=0.3)
    y[99] *= 2
    error = streamed(y, z, 10)
    assert error.agreement == np.mean(y.argmax(-1) == z.argmax(-1))
    assert error.cosine is None


def test_rows_of_several_widths_are_no_embedding():
    comparison = Comparison()
    for width in (4, 6):
        y, z = drawn(14, 5, width)
        comparison.add({"y": y}, {"y": z}, {})
    (error,) = comparison.errors()
    assert error.agreement is not None
    assert (error.cosine, error.neighbours) == (None, None)


def test_the_rows_that_are_kept_are_bounded_by_their_width(monkeypatch):
    from onnx_lowrank.engines import embedding

    monkeypatch.setattr(embedding, "_LARGEST_ELEMENTS", 6 * 10)
    y, z = drawn(15, 40, 6, noise=0.3)
    # Ten rows have room: every fourth one.
    assert streamed(y, z, 3).neighbours == wanted(y[::4], z[::4])[1]
    assert streamed(y, z, 40).neighbours == wanted(y[::4], z[::4])[1]
