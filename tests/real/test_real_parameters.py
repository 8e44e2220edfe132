"""Parameters of real models, counted against published figures."""

import hashlib

import pytest

from onnx_lowrank.files.load import load, stored_bytes
from onnx_lowrank.files.save import save
from onnx_lowrank.graph.parameters import parameters

PARAMETERS = {
    "resnet20_cifar10": 269_036,
    "magika_v3_3": 784_223,
    "ultraface_rfb320": 307_624,
    "silero_vad": 545_286,
    "silero_vad_half": 309_635,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_match_the_known_count(shared, name):
    assert parameters(load(shared / "models" / f"{name}.onnx")) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_real_model_is_saved_as_it_came(shared, name, tmp_path):
    path = shared / "models" / f"{name}.onnx"
    content = path.read_bytes()
    model = load(path)
    save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == content
    assert model.sha256 == hashlib.sha256(content).hexdigest()
    assert stored_bytes(model) == len(content)
