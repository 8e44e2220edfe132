"""The whole command on a device: the plan of the CPU, and its factors within 1e-6."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper

from devices import fake
from onnx_lowrank import compress
from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg.backend import resolve
from tiny import cnn

INPUTS = np.random.default_rng(8).standard_normal((40, 8, 6, 6)).astype(np.float32)


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A device for matrices of any size, which the command takes."""
    if request.param == "fake":
        found = fake()
    else:
        try:
            resolve("cuda")
        except InputError as error:
            pytest.skip(str(error))
        from array_api_compat import cupy

        from onnx_lowrank.linalg.cuda import Cuda

        found = replace(fake(), xp=cupy, device=Cuda(least=1))
    monkeypatch.setattr("onnx_lowrank.session.resolve", lambda *_: found)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recipe": "pca", "calibration": INPUTS},
        {"recipe": "activation", "calibration": INPUTS},
        {"recipe": "activation", "calibration": INPUTS, "recover": False},
        {"recipe": "auto", "calibration": INPUTS},
    ],
    ids=["free", "pca", "recovered", "activation", "auto"],
)
def test_a_device_gives_the_same_plan_and_the_same_factors(options, device, monkeypatch):
    found = compress(cnn(), 0.5, **options)
    monkeypatch.setattr("onnx_lowrank.session.resolve", lambda *_: resolve("cpu"))
    expected = compress(cnn(), 0.5, **options)
    assert found.plan.choices == expected.plan.choices
    weights = {array.name: numpy_helper.to_array(array) for array in expected.model.proto.graph.initializer}
    assert [array.name for array in found.model.proto.graph.initializer] == list(weights)
    for array in found.model.proto.graph.initializer:
        made, weight = numpy_helper.to_array(array), weights[array.name]
        np.testing.assert_allclose(made, weight, rtol=0, atol=1e-6 * np.max(np.abs(weight)))


def test_a_device_computes_all_decompositions_unless_it_fails(monkeypatch, caplog):
    device = fake()
    monkeypatch.setattr("onnx_lowrank.session.resolve", lambda *_: device)
    expected = compress(cnn(), 0.5)
    assert device.device.up
    device.device.broken = True
    assert compress(cnn(), 0.5).plan.choices == expected.plan.choices
    assert "failed on the GPU (no memory is left), so the CPU takes it over" in caplog.text
