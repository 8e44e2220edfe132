"""Real models with calibration data: what its inputs, without labels, are worth."""

from __future__ import annotations

import evaluate_digits
import numpy as np
import pytest
import zoo

import onnx_lowrank
from onnx_lowrank.core.factors import Fit
from tiny import DIGITS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("ratio", "least"), [(0.5, 0.985), (0.3, 0.98)])
def test_digits_keep_their_accuracy(ratio, least):
    images = evaluate_digits.load().train_images[::8]
    ours = onnx_lowrank.compress(DIGITS, ratio, calibration=images)
    theirs = onnx_lowrank.compress(DIGITS, ratio, inputs={"image": evaluate_digits.load().test_images})
    mine = onnx_lowrank.compress(
        DIGITS, plan=ours.plan, calibration=images, inputs={"image": evaluate_digits.load().test_images}
    )
    assert ours.report.reached <= ratio
    assert evaluate_digits.top1(ours.proto.SerializeToString()) >= least
    assert 0 < mine.report.validation.worst < 0.5 * theirs.report.validation.worst


def test_a_transformer():
    proto = zoo.build("bert_base", scale=1 / 16)
    rng = np.random.default_rng(0)
    data = {value.name: rng.integers(0, 2, (10, 16)) for value in proto.graph.input}
    result = onnx_lowrank.compress(proto, 0.8, recipe="activation", calibration=data)
    assert result.report.reached <= 0.8
    assert 0 < result.report.validation.worst < 1
    fits = [row.fit for row in result.report.layers if row.option]
    assert fits
    assert Fit.ACTIVATIONS in {fit.fit for fit in fits}


@pytest.mark.parametrize(("ratio", "least"), [(0.5, 0.90), (0.35, 0.87)])
def test_resnet20_keeps_its_accuracy_with_few_images(shared, ratio, least):
    """Without data, half the parameters cost five points and a third of them most of the accuracy."""
    from scores import cifar_inputs, tasks

    (resnet20,) = tasks(("resnet20",))
    with np.load(shared / "data/cifar10_subset.npz", allow_pickle=False) as data:
        images = cifar_inputs(data["calibration_images"][:200])
    path = shared / "models/resnet20_cifar10.onnx"
    result = onnx_lowrank.compress(path, ratio, recipe="activation", calibration=images)
    assert result.report.reached <= ratio
    assert any(row.fit.recovered for row in result.report.layers if row.fit)
    assert resnet20.measure(result.proto) >= least
