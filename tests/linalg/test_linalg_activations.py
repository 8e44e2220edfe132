"""Activation-aware factors and their errors against dense least squares."""

import numpy as np
import pytest
from activation_reference import dense_encoder, dense_map, least_error, moments, samples, targets
from linalg_reference import CASES, SHAPES, matrix_shape, planted

from devices import fake
from onnx_lowrank.core.factors import Factors, Moments
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.linalg import projection
from onnx_lowrank.linalg.activations import corrected_mean, errors, fit, output_errors, output_fit, products
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.factorize import factorize
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import error, of_targets, of_weight

CPU = resolve("cpu")
STRICT = fake()
# One operator group, or several; and the fold and k under which there is something to refine.
REFINED = [
    (shape, fold, k)
    for shape, fold, k in CASES
    if min(matrix_shape(shape, fold, k)[2:]) > 1 and not (fold.on(shape[3:]) is Fold.ENCODE and k == 1)
]


def patches(shape, count, seed):
    return samples(shape[0], int(np.prod(shape[2:])), count, seed)


def aware(shape, seed, count=200, ridge=1e-3):
    """A random weight and its quadratic on random inputs."""
    weight = np.random.default_rng(seed).standard_normal(shape)
    return weight, of_weight(weight, moments(patches(shape, count, seed + 1)), centred=True, ridge=ridge)


def recovered(shape, seed, count=200, ridge=1e-3):
    """The quadratic of a layer that gets other inputs than it had, and should give what it gave."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    x = patches(shape, count, seed + 1)
    y = x @ np.swapaxes(weight.reshape(*shape[:2], -1), 1, 2)
    changed = x + 0.2 * rng.standard_normal(x.shape)
    return of_targets(weight, moments(changed), targets(y, changed), centred=True, ridge=ridge)


def full_rank(shape, fold, k):
    return min(matrix_shape(shape, fold, k)[2:])


@pytest.mark.parametrize("make", [lambda shape: aware(shape, 0)[1], lambda shape: recovered(shape, 2)])
@pytest.mark.parametrize(("shape", "fold", "k"), CASES)
def test_errors_are_those_of_dense_least_squares(shape, fold, k, make):
    quadratic = make(shape)
    top = full_rank(shape, fold, k)
    found = errors(quadratic, shape, fold, k, top, CPU)
    assert found.shape == (top + 1,)
    assert found[0] == 1
    assert np.all(np.diff(found) <= 0)
    for j in {1, (top + 1) // 2, top}:
        left = 0.0
        for group in range(shape[0]):
            optimum = quadratic.optimum[group].reshape(1, *shape[1:])
            dense = dense_map(dense_encoder(optimum, quadratic.second[group], fold, k, j), shape, fold)
            left += least_error(
                quadratic.second[group], quadratic.cross[group], quadratic.power[group], dense
            )
        assert found[j] == pytest.approx(left / quadratic.power.sum(), rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("make", [lambda shape: aware(shape, 4)[1], lambda shape: recovered(shape, 6)])
@pytest.mark.parametrize(("shape", "fold", "k"), CASES)
def test_errors_are_those_of_the_factors_at_every_rank(shape, fold, k, make):
    quadratic = make(shape)
    top = full_rank(shape, fold, k)
    found = errors(quadratic, shape, fold, k, top, CPU)
    for j in range(1, top + 1):
        factors = fit(quadratic, shape, Option(fold, k, j), CPU)
        assert factors.encoder.shape[1:3] == factors.decoder.shape[2:4] == (k, j)
        assert error(quadratic, compose(factors)) == pytest.approx(found[j], abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_factors(shape):
    quadratic = aware(shape, 4)[1]
    tried = [Option(f, k, full_rank(shape, f, k) - 1) for other, f, k in CASES if other == shape]
    options = [Option(o.fold, o.k, j) for o in tried for j in {1, o.j} if j >= 1]
    made = list(products(quadratic, shape, options, CPU))
    assert len(made) == len(options)
    for option, product in zip(options, made, strict=True):
        wanted = compose(fit(quadratic, shape, option, CPU))
        np.testing.assert_allclose(product, wanted, atol=1e-7 * np.abs(wanted).max())


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("ridge", [0.0, 1e-4])
@pytest.mark.parametrize(("shape", "fold", "k"), CASES[::2])
def test_few_samples_leave_errors_and_factors_in_agreement(shape, fold, k, ridge, count):
    _, quadratic = aware(shape, 8, count=count, ridge=ridge)
    top = full_rank(shape, fold, k)
    found = errors(quadratic, shape, fold, k, top, CPU)
    assert found[top] < 1e-9
    for j in {1, (top + 1) // 2, top}:
        factors = fit(quadratic, shape, Option(fold, k, j), CPU, steps=3)
        assert np.all(np.isfinite(factors.encoder))
        assert np.all(np.isfinite(factors.decoder))
        assert error(quadratic, compose(factors)) <= found[j] + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_one_slice_encoded_leaves_the_tails_of_the_eigenvalues(shape):
    weight, quadratic = aware(shape, 10)
    matrices = weight.reshape(*shape[:2], -1)
    values = np.linalg.eigvalsh(matrices @ quadratic.second @ np.swapaxes(matrices, 1, 2))[:, ::-1]
    top = full_rank(shape, Fold.ENCODE, 1)
    tails = [values[:, j:].sum() / values.sum() for j in range(top + 1)]
    np.testing.assert_allclose(errors(quadratic, shape, Fold.ENCODE, 1, top, CPU), tails, atol=1e-11)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
@pytest.mark.parametrize(("shape", "fold", "k"), CASES[::2])
def test_a_weight_of_low_rank_is_found_exactly(shape, fold, k, ridge):
    full = full_rank(shape, fold, k)
    rank = (full + 1) // 2
    option = Option(fold, k, rank)
    weight = compose(factorize(np.random.default_rng(12).standard_normal(shape), option, CPU))
    quadratic = of_weight(weight, moments(patches(shape, 100, 13)), centred=True, ridge=ridge)
    factors = fit(quadratic, shape, option, CPU, steps=5)
    assert error(quadratic, compose(factors)) < 1e-12
    assert errors(quadratic, shape, fold, k, full, CPU)[rank] < 1e-11
    np.testing.assert_allclose(compose(factors), weight, atol=1e-5)


@pytest.mark.parametrize(("shape", "fold", "k"), CASES)
def test_full_rank_reproduces_the_weight_to_rounding(shape, fold, k):
    weight, _ = planted(shape, fold, k, 1e6, seed=14)
    quadratic = of_weight(weight, moments(patches(shape, 3, 15)), centred=True, ridge=1e-6)
    factors = fit(quadratic, shape, Option(fold, k, full_rank(shape, fold, k)), CPU, steps=5)
    assert np.linalg.norm(compose(factors) - weight) <= 1e-13 * np.linalg.norm(weight)


@pytest.mark.parametrize(("shape", "fold", "k"), REFINED[::4])
def test_gradient_is_that_of_finite_differences(shape, fold, k):
    quadratic = recovered(shape, 16)
    problem = projection.folded(quadratic, shape, fold, k, CPU)
    start = projection.encoder(problem, (full_rank(shape, fold, k) + 1) // 2)
    start = start / np.linalg.norm(start, axis=-1, keepdims=True)
    start = start + 0.3 * np.random.default_rng(17).standard_normal(start.shape)
    found = projection.solve(problem, start).gradient()

    def value(x):
        return projection.solve(problem, x.reshape(start.shape)).value / problem.power

    step = 1e-5
    expected = np.empty(start.size)
    for place in range(start.size):
        shift = np.zeros(start.size)
        shift[place] = step
        expected[place] = (value(start.ravel() + shift) - value(start.ravel() - shift)) / (2 * step)
    np.testing.assert_allclose(found.ravel() / problem.power, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("shape", "fold", "k"), REFINED[::2])
def test_refinement_lowers_the_error(shape, fold, k):
    quadratic = recovered(shape, 18)
    for j in {1, full_rank(shape, fold, k) - 1}:
        option = Option(fold, k, j)
        plain = error(quadratic, compose(fit(quadratic, shape, option, CPU)))
        few = error(quadratic, compose(fit(quadratic, shape, option, CPU, steps=3)))
        many = error(quadratic, compose(fit(quadratic, shape, option, CPU, steps=30)))
        best = error(quadratic, quadratic.optimum)
        assert best - 1e-12 <= many <= few + 1e-12
        assert few <= plain + 1e-12
        assert many < plain - 1e-9 or many < best + 1e-6


@pytest.mark.parametrize(("shape", "fold", "k"), REFINED[::2])
def test_held_out_error_is_never_above_that_of_where_it_began(shape, fold, k):
    rng = np.random.default_rng(20)
    weight = rng.standard_normal(shape)
    x = patches(shape, 40, 21)
    quadratic = of_weight(weight, moments(x[:, :8]), centred=False, ridge=1e-4)
    held = of_weight(weight, moments(x[:, 8:]), centred=False, ridge=0.0)
    option = Option(fold, k, (full_rank(shape, fold, k) + 1) // 2)
    plain, looked = (compose(fit(quadratic, shape, option, CPU, held=held, steps=n)) for n in (0, 24))
    assert error(held, looked) <= error(held, plain) + 1e-12
    assert error(quadratic, looked) <= error(quadratic, plain) + 1e-9


def test_refinement_stops_where_the_held_out_error_rises():
    shape, option = (1, 8, 16), Option(Fold.ENCODE, 4, 2)
    weight = np.random.default_rng(22).standard_normal(shape)
    x = patches(shape, 60, 23)
    quadratic = of_weight(weight, moments(x[:, :6]), centred=False, ridge=1e-4)
    held = of_weight(weight, moments(x[:, 6:]), centred=False, ridge=0.0)
    to_the_end = error(held, compose(fit(quadratic, shape, option, CPU, steps=60)))
    looked = error(held, compose(fit(quadratic, shape, option, CPU, held=held, steps=60)))
    assert looked < to_the_end - 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_decoding_needs_the_refitted_decoder_and_the_refined_encoder(seed):
    # The inputs lie near a plane of the channels, which says nothing about the weight's singular vectors.
    shape, option = (1, 6, 8, 3, 3), Option(Fold.DECODE, 1, 2)
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    x = np.einsum("cl,nlt->nct", rng.standard_normal((8, 2)), rng.standard_normal((500, 2, 9)))
    x = x + 0.3 * rng.standard_normal(x.shape) * np.geomspace(1, 0.2, 9)
    quadratic = of_weight(weight, moments(x.reshape(1, 500, -1)), centred=True, ridge=0.0)
    plain = error(quadratic, compose(factorize(weight, option, CPU)))
    fitted, refined = (
        error(quadratic, compose(fit(quadratic, shape, option, CPU, steps=n))) for n in (0, 40)
    )
    assert plain > 10 * fitted
    assert fitted > 1.02 * refined > 0


@pytest.mark.parametrize(("shape", "fold", "k"), CASES[::3])
def test_factors_are_balanced_and_signed(shape, fold, k):
    _, quadratic = aware(shape, 28)
    j = (full_rank(shape, fold, k) + 1) // 2
    factors = fit(quadratic, shape, Option(fold, k, j), CPU, steps=3)
    for group, i in np.ndindex(shape[0], k):
        rows = factors.encoder[group, i].reshape(j, -1)
        columns = np.moveaxis(factors.decoder[group, :, i], 1, 0).reshape(j, -1)
        sigma = np.linalg.svd(columns.T @ rows, compute_uv=False)[:j]
        for gram in (rows @ rows.T, columns @ columns.T):
            np.testing.assert_allclose(gram, np.diag(sigma), atol=1e-11 * sigma[0])
        for column in columns:
            assert column[np.argmax(np.abs(column))] > 0


@pytest.mark.parametrize(("shape", "fold", "k"), CASES[::3])
def test_zero_inputs_give_the_plain_factors(shape, fold, k):
    weight = np.random.default_rng(30).standard_normal(shape)
    quadratic = of_weight(weight, moments(np.zeros_like(patches(shape, 4, 0))), centred=True, ridge=1e-3)
    for j in range(1, full_rank(shape, fold, k) + 1):
        option = Option(fold, k, j)
        plain = compose(factorize(weight, option, CPU))
        np.testing.assert_allclose(compose(fit(quadratic, shape, option, CPU)), plain, atol=1e-10)


@pytest.mark.parametrize(("shape", "fold", "k"), CASES[::3])
def test_zero_weights_give_zero_factors_without_error(shape, fold, k):
    quadratic = of_weight(np.zeros(shape), moments(patches(shape, 9, 31)), centred=True, ridge=1e-3)
    top = full_rank(shape, fold, k)
    assert not errors(quadratic, shape, fold, k, top, CPU).any()
    for j in {1, top}:
        factors = fit(quadratic, shape, Option(fold, k, j), CPU, steps=5)
        assert not factors.encoder.any()
        assert not factors.decoder.any()


@pytest.mark.parametrize("shape", [(1, 6, 8), (2, 6, 4, 3, 3), (1, 4, 12, 1, 1)])
def test_slices_without_weight_or_inputs_do_not_disturb_the_others(shape):
    weight = np.random.default_rng(32).standard_normal(shape)
    x = patches(shape, 50, 33).reshape(shape[0], 50, *shape[2:])
    weight[:, :, 0] = 0
    x[:, :, -1] = 0
    quadratic = of_weight(weight, moments(x.reshape(shape[0], 50, -1)), centred=True, ridge=0.0)
    for fold in {fold.on(shape[3:]) for fold in Fold}:
        k = shape[2]
        found = errors(quadratic, shape, fold, k, 1, CPU)
        factors = fit(quadratic, shape, Option(fold, k, 1), CPU, steps=5)
        assert error(quadratic, compose(factors)) <= found[1] + 1e-9 < 1
        assert not factors.encoder[:, 0].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_errors_do_not_depend_on_the_scale(scale):
    shape = (2, 6, 4, 3, 3)
    weight = np.random.default_rng(34).standard_normal(shape)
    x = patches(shape, 100, 35)
    one, other = (
        errors(of_weight(w, moments(v), centred=True, ridge=1e-3), shape, Fold.ROWS, 2, 4, CPU)
        for w, v in ((weight, x), (weight * scale, x / scale**0.5))
    )
    np.testing.assert_allclose(one, other, rtol=1e-9)


@pytest.mark.parametrize(("shape", "fold", "k"), CASES[::4])
def test_the_same_arguments_give_the_same_bits_and_stay_as_they_are(shape, fold, k):
    quadratic = recovered(shape, 36)
    held = recovered(shape, 38)
    before = [array.copy() for array in (quadratic.second, quadratic.cross, quadratic.power)]
    option = Option(fold, k, (full_rank(shape, fold, k) + 1) // 2)
    one, other = (fit(quadratic, shape, option, CPU, held=held, steps=6) for _ in range(2))
    np.testing.assert_array_equal(one.encoder, other.encoder)
    np.testing.assert_array_equal(one.decoder, other.decoder)
    for array, kept in zip((quadratic.second, quadratic.cross, quadratic.power), before, strict=True):
        np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize(("shape", "fold", "k"), CASES[::2])
def test_strict_namespace_gives_the_same(shape, fold, k):
    quadratic, held = recovered(shape, 40), recovered(shape, 42)
    top = full_rank(shape, fold, k)
    np.testing.assert_allclose(
        errors(quadratic, shape, fold, k, top, STRICT), errors(quadratic, shape, fold, k, top, CPU), atol=1e-9
    )
    for j in {(top + 1) // 2, top}:
        option = Option(fold, k, j)
        strict, numpy = (
            fit(quadratic, shape, option, backend, held=held, steps=2) for backend in (STRICT, CPU)
        )
        assert type(strict.encoder) is np.ndarray
        np.testing.assert_allclose(compose(strict), compose(numpy), atol=1e-6)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_moments_give_what_input_moments_give(shape, centred):
    weight = np.random.default_rng(45).standard_normal(shape)
    x = patches(shape, 200, 46)
    outputs = moments(x @ np.swapaxes(weight.reshape(*shape[:2], -1), 1, 2))
    quadratic = of_weight(weight, moments(x), centred=centred, ridge=0.0)
    top = full_rank(shape, Fold.ENCODE, 1)
    found = output_errors(outputs, weight, centred=centred, ridge=0.0)
    np.testing.assert_allclose(found, errors(quadratic, shape, Fold.ENCODE, 1, top, CPU), atol=1e-11)
    for j in range(1, top + 1):
        factors = output_fit(outputs, weight, j, CPU, centred=centred, ridge=0.0)
        assert factors.fold is Fold.ENCODE
        assert error(quadratic, compose(factors)) == pytest.approx(found[j], abs=1e-11)


@pytest.mark.parametrize("shape", [(1, 8, 40), (2, 6, 9)])
def test_the_ridge_of_output_moments_fills_what_no_sample_shows(shape):
    weight = np.random.default_rng(47).standard_normal(shape)
    seen = Moments(1, np.zeros(shape[:2]), np.zeros((*shape[:2], shape[1])))
    for group in range(shape[0]):
        seen.second[group, 0, 0] = 1.0
    j = shape[1] - 1
    factors = output_fit(seen, weight, j, CPU, centred=True, ridge=1e-6)
    difference = (weight - compose(factors)).reshape(*shape[:2], -1)
    np.testing.assert_allclose(difference[:, 0], 0, atol=1e-3)
    for group in range(shape[0]):
        rest = np.linalg.svd(weight[group, 1:], compute_uv=False)
        assert np.linalg.norm(difference[group]) == pytest.approx(rest[-1], rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_that_are_always_zero_count_as_those_of_white_inputs(shape):
    weight = np.random.default_rng(48).standard_normal(shape)
    nothing = Moments(3, np.zeros(shape[:2]), np.zeros((*shape[:2], shape[1])))
    found = output_errors(nothing, weight, centred=True, ridge=1e-3)
    sigma = np.linalg.svd(weight.reshape(*shape[:2], -1), compute_uv=False)
    tails = [np.sum(sigma[:, j:] ** 2) / np.sum(sigma**2) for j in range(sigma.shape[1] + 1)]
    np.testing.assert_allclose(found, tails, atol=1e-12)
    factors = output_fit(nothing, weight, 1, CPU, centred=True, ridge=1e-3)
    np.testing.assert_allclose(
        compose(factors), compose(factorize(weight, Option(Fold.ENCODE, 1, 1), CPU)), atol=1e-10
    )


def test_a_group_whose_outputs_are_zero_counts_next_to_nothing():
    weight = np.random.default_rng(52).standard_normal((2, 4, 6))
    outputs = moments(patches((1, 4, 6), 20, 53) @ np.swapaxes(weight, 1, 2))
    outputs.second[1] = 0
    alone = Moments(outputs.count, outputs.mean[:1], outputs.second[:1])
    found = output_errors(outputs, weight, centred=True, ridge=0.0)
    np.testing.assert_allclose(found, output_errors(alone, weight[:1], centred=True, ridge=0.0), atol=1e-8)
    factors = output_fit(outputs, weight, 2, CPU, centred=True, ridge=0.0)
    plain = compose(factorize(weight[1:], Option(Fold.ENCODE, 1, 2), CPU))
    np.testing.assert_allclose(compose(factors)[1:], plain, atol=1e-10)


def test_output_moments_of_a_zero_weight():
    nothing = Moments(3, np.zeros((1, 4)), np.zeros((1, 4, 4)))
    assert not output_errors(nothing, np.zeros((1, 4, 6)), centred=False, ridge=1e-3).any()
    assert not compose(output_fit(nothing, np.zeros((1, 4, 6)), 2, CPU, centred=False, ridge=1e-3)).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_corrected_mean_is_what_the_outputs_lose_on_average(shape, dtype):
    weight, quadratic = aware(shape, 49)
    x = patches(shape, 50, 50)
    factors = fit(quadratic, shape, Option(Fold.ENCODE, 1, 1), CPU)
    kept = Factors(factors.fold, factors.encoder.astype(dtype), factors.decoder.astype(dtype))
    exact = Factors(factors.fold, kept.encoder.astype(np.float64), kept.decoder.astype(np.float64))
    lost = (weight - compose(exact)).reshape(*shape[:2], -1)
    expected = (x @ np.swapaxes(lost, 1, 2)).mean(axis=1).ravel()
    found = corrected_mean(weight, kept, moments(x))
    assert found.shape == (shape[0] * shape[1],)
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [3, 200])
@pytest.mark.parametrize(("shape", "fold", "k"), CASES[::4])
def test_cuda_gives_the_same(shape, fold, k, count, cuda):
    _, quadratic = aware(shape, 51, count=count, ridge=0.0)
    top = full_rank(shape, fold, k)
    found, expected = (errors(quadratic, shape, fold, k, top, backend) for backend in (cuda, CPU))
    np.testing.assert_allclose(found, expected, atol=1e-8)
    option = Option(fold, k, (top + 1) // 2)
    factors = fit(quadratic, shape, option, cuda, held=quadratic, steps=4)
    assert type(factors.encoder) is np.ndarray
    assert error(quadratic, compose(factors)) <= expected[option.j] + 1e-8
