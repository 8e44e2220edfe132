"""Factors beside rounded ones, against least squares in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.linalg import rounding


def case(seed, groups=1, features=3, inputs=5, outputs=4, kernel=()):
    rng = np.random.default_rng(seed)
    encoder = rng.standard_normal((groups, features, inputs))
    rounded = encoder + 0.2 * rng.standard_normal(encoder.shape)
    decoder = rng.standard_normal((1, outputs, groups * features, *kernel))
    return encoder, rounded, decoder


def whole(encoder):
    """An encoder as one matrix, whose groups read different inputs."""
    groups, features, inputs = encoder.shape
    made = np.zeros((groups * features, groups * inputs))
    for g in range(groups):
        made[g * features : (g + 1) * features, g * inputs : (g + 1) * inputs] = encoder[g]
    return made


@given(seed=st.integers(0, 10_000), groups=st.integers(1, 3))
def test_it_is_the_least_squares_decoder_and_never_worse(seed, groups):
    encoder, rounded, decoder = case(seed, groups)
    made = rounding.decoder(encoder, rounded, decoder)[0]
    target, given_ = decoder[0] @ whole(encoder), whole(rounded)
    wanted = np.linalg.lstsq(given_.T, target.T, rcond=None)[0].T
    np.testing.assert_allclose(made, wanted, atol=1e-9)
    before, after = (np.linalg.norm(target - d @ given_) for d in (decoder[0], made))
    assert after <= before * (1 + 1e-12)


def test_a_mixture_of_the_same_rows_loses_nothing():
    encoder, _, decoder = case(1)
    mixed = np.random.default_rng(2).standard_normal((3, 3)) @ encoder
    made = rounding.decoder(encoder, mixed, decoder)
    np.testing.assert_allclose(made[0] @ mixed[0], decoder[0] @ encoder[0], atol=1e-10)


def test_an_encoder_that_stays_keeps_its_decoder():
    encoder, _, decoder = case(3)
    assert rounding.decoder(encoder, encoder, decoder) is decoder


def test_every_position_of_the_kernel_is_fitted_alike():
    encoder, rounded, decoder = case(4, kernel=(3, 2))
    made = rounding.decoder(encoder, rounded, decoder)
    assert made.shape == decoder.shape
    np.testing.assert_allclose(
        made[..., 1, 0], rounding.decoder(encoder, rounded, decoder[..., 1, 0]), atol=1e-12
    )


def test_a_rounded_encoder_of_zeros_gives_zeros():
    encoder, _, decoder = case(5)
    assert not rounding.decoder(encoder, np.zeros_like(encoder), decoder).any()


@given(seed=st.integers(0, 10_000), groups=st.integers(1, 3))
def test_an_encoder_behind_a_rounded_decoder_likewise(seed, groups):
    encoder, _, decoder = case(seed, groups, kernel=(2,))
    rounded = decoder + 0.2 * np.random.default_rng(seed + 1).standard_normal(decoder.shape)
    made = rounding.encoder(decoder, rounded, encoder)
    plain, coarse = (np.moveaxis(d[0], 1, -1).reshape(-1, d.shape[2]) for d in (decoder, rounded))
    for group in range(groups):
        part = slice(3 * group, 3 * group + 3)
        wanted = np.linalg.lstsq(coarse[:, part], plain[:, part] @ encoder[group], rcond=None)[0]
        np.testing.assert_allclose(made[group], wanted, atol=1e-9)
    errors = [rounding.error((encoder, decoder), (each, rounded)) for each in (encoder, made)]
    assert errors[1] <= errors[0] * (1 + 1e-12)
    assert errors[0] == pytest.approx(np.linalg.norm((plain - coarse) @ whole(encoder)) ** 2)


def test_a_decoder_that_stays_keeps_its_encoder():
    encoder, _, decoder = case(3)
    assert rounding.encoder(decoder, decoder, encoder) is encoder
    assert rounding.error((encoder, decoder), (encoder, decoder)) == 0


def test_groups_of_the_decoder():
    encoder, rounded, _ = case(6, groups=2)
    decoder = np.random.default_rng(7).standard_normal((2, 4, 3))
    made = rounding.decoder(encoder, rounded, decoder)
    for group in range(2):
        target = decoder[group] @ encoder[group]
        wanted = np.linalg.lstsq(rounded[group].T, target.T, rcond=None)[0].T
        np.testing.assert_allclose(made[group], wanted, atol=1e-9)
