"""Real models: each reaches a ratio, passes validation, and changes only where its plan names it."""

from __future__ import annotations

import onnx
import pytest

import onnx_lowrank
from onnx_lowrank.files.load import load
from onnx_lowrank.graph.parameters import parameters
from rewriting import assert_only_named_changes, found, full_rank, rewritten

RATIOS = {
    "resnet20_cifar10": 0.5,
    "magika_v3_3": 0.6,
    "ultraface_rfb320": 0.8,
    "silero_vad": 0.7,
    "silero_vad_half": 0.7,
}


@pytest.mark.parametrize("name", RATIOS)
def test_a_real_model_reaches_its_ratio_and_passes_validation(shared, name, tmp_path):
    path = shared / "models" / f"{name}.onnx"
    result = onnx_lowrank.compress(path, ratio=RATIOS[name])
    validation = result.report.validation
    assert validation is not None
    assert validation.engine == "ONNX Runtime CPUExecutionProvider"
    assert not validation.notes
    assert validation.outputs
    before = load(path)
    totals = result.report.totals.amount("params")
    assert (totals.before, totals.after) == (parameters(before), parameters(result.model))
    assert totals.after <= RATIOS[name] * totals.before
    result.save(tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    assert onnx.load(tmp_path / "out.onnx") == result.proto


@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_half"])
def test_recurrent_weights_make_smaller_models(shared, name):
    """The convolutions alone reach no ratio below 0.43."""
    result = onnx_lowrank.compress(shared / "models" / f"{name}.onnx", ratio=0.3)
    assert result.report.reached <= 0.3
    rows = [row for row in result.report.layers if row.op == "LSTM"]
    assert rows
    assert all(row.option is not None for row in rows)


@pytest.mark.parametrize("name", RATIOS)
def test_only_what_the_plan_names_changes(shared, name):
    path = shared / "models" / f"{name}.onnx"
    seen = found(path)
    digest = seen.model.proto.SerializeToString(deterministic=True)
    layers = [binding.layer for binding in seen.bindings]
    assert layers
    for chosen in (layers, layers[::2], layers[1::2]):
        result = rewritten(seen, {layer.id: full_rank(layer) for layer in chosen})
        assert_only_named_changes(seen.model.proto, result.model.proto, chosen, result.chains)
    assert seen.model.proto.SerializeToString(deterministic=True) == digest
