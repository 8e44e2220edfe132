"""The losses of outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnx_lowrank.distil.losses import Known, losses
from onnx_lowrank.distil.losses.classes import TEMPERATURE
from onnx_lowrank.distil.target import Seen, Target
from onnx_lowrank.engines.padding import NO_PADDING, Padding

CPU = torch.device("cpu")


def rows(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("known", [Known(2.0), Known(1.0, is_class=True), Known(1.0, is_direction=True)])
def test_equal_outputs_have_no_loss(known):
    y = rows(0, 6, 5)
    for loss in losses(known).values():
        assert float(loss(y, y)) == pytest.approx(0, abs=1e-6)


def test_every_output_has_the_error_that_reports_show():
    y, z = rows(0, 6, 5), rows(1, 6, 5)
    power = float(((y - y.mean(0)) ** 2).mean())
    expected = float(((y - z) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())
    assert float(losses(Known(power))["relative error"](z, y)) == pytest.approx(expected, rel=1e-5)


def test_classes_are_compared_by_their_divergence_at_a_temperature():
    y, z = rows(0, 6, 5).double(), rows(1, 6, 5).double()
    p, q = (np.exp(v.numpy() / TEMPERATURE) for v in (y, z))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = TEMPERATURE**2 * np.mean(np.sum(p * np.log(p / q), axis=1))
    assert float(losses(Known(1.0, is_class=True))["divergence"](z, y)) == pytest.approx(expected)


def test_probabilities_are_compared_like_the_logits_that_give_them():
    y, z = rows(0, 6, 5), rows(1, 6, 5)
    logits = losses(Known(1.0, is_class=True))["divergence"](z, y)
    shares = losses(Known(1.0, is_class=True, is_share=True))["divergence"](
        torch.softmax(z, -1), torch.softmax(y, -1)
    )
    assert float(shares) == pytest.approx(float(logits), rel=1e-4)


def test_a_probability_of_zero_has_a_finite_gradient():
    z = torch.tensor([[1.0, 0.0]], requires_grad=True)
    losses(Known(1.0, is_class=True, is_share=True))["divergence"](z, torch.tensor([[0.5, 0.5]])).backward()
    assert torch.isfinite(z.grad).all()


def test_directions_are_compared_by_the_cosines_between_them():
    y = torch.nn.functional.normalize(rows(0, 6, 5), dim=1)
    turn = torch.linalg.qr(rows(1, 5, 5))[0]
    relations = losses(Known(1.0, is_direction=True))["relations"]
    # A rotation of all directions changes no cosine between them.
    assert float(relations(y @ turn, y)) == pytest.approx(0, abs=1e-9)
    assert float(relations(y[:1], y[:1])) == 0
    assert float(relations(y.roll(1, dims=1).flip(0), y)) > 0.1


def known(**outputs):
    seen = Seen()
    feed = {"x": np.zeros((6, 1))}
    for half in (slice(0, 3), slice(3, 6)):
        seen.add({name: value[half] for name, value in outputs.items()}, {"x": feed["x"][half]})
    return seen.known()


def test_kinds_of_outputs_are_seen_over_all_batches():
    rng = np.random.default_rng(0)
    logits, turned = rng.standard_normal((6, 5)), rng.standard_normal((6, 4))
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    found = known(logits=logits, turned=turned, shares=np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    assert found["logits"].is_class
    assert not found["logits"].is_share
    assert found["shares"].is_share
    assert found["turned"].is_direction
    assert not found["turned"].is_class
    assert found["logits"].power == pytest.approx(np.mean((logits - logits.mean(0)) ** 2))


def test_an_output_that_does_not_vary_is_divided_by_its_size():
    assert known(y=np.full((6, 3), 2.0))["y"].power == pytest.approx(4.0)
    assert known(y=np.zeros((6, 3)))["y"].power == 1.0


def target(inner=(), outputs=("y",), padding=NO_PADDING):
    return Target({name: losses(Known(1.0)) for name in outputs}, dict.fromkeys(inner, 1.0), padding, CPU)


def test_outputs_and_features_count_half_each_before_the_training():
    compared = target(inner=("a", "b", "c"), outputs=("y", "z"))
    values = {name: rows(place, 4, 3) for place, name in enumerate("yzabc")}
    wanted = {name: (value + 1 + place).numpy() for place, (name, value) in enumerate(values.items())}
    terms = compared.terms(values, wanted, {})
    compared.starts.update({key: float(value) for key, value in terms.items()})
    assert float(compared.loss(values, wanted, {})) == pytest.approx(2.0)
    assert compared.weights == pytest.approx({"a": 1 / 7, "b": 2 / 7, "c": 4 / 7})


def test_features_count_alike_where_no_output_has_a_gradient():
    assert target(inner=("a", "b"), outputs=()).weights == {"a": 0.5, "b": 0.5}


def test_hidden_positions_and_values_that_are_not_finite_do_not_count():
    padding = Padding(mask="m", axes={"y": 1})
    y = rows(0, 2, 3, 4)
    wanted = y.numpy().copy()
    wanted[0, 2] += 100.0
    wanted[1, 0] = np.inf
    feed = {"m": np.array([[1, 1, 0], [1, 1, 1]])}
    assert float(target(padding=padding).loss({"y": y}, {"y": wanted}, feed)) == 0
