"""The operators that ONNX Runtime's optimizer makes, counted in both models."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from onnx_lowrank import compress
from onnx_lowrank.core.outcome import Fused
from onnx_lowrank.engines import fused
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.load import load
from onnx_lowrank.report.terminal import show
from rewriting import model

ENGINE = runtime("CPUExecutionProvider")
TEXT = "g (float[1,16,8,8] x) => (float[1,16,6,6] y) { h = Conv (x, w) r = Relu (h) y = Softmax (r) }"
PLAIN = TEXT.replace("Relu", "Neg")
WEIGHTS = {"w": (16, 16, 3, 3)}


def loaded(text):
    return load(model(text, **WEIGHTS))


def test_fused_operators_are_counted():
    assert ENGINE.fused(loaded(TEXT)) == {"FusedConv": 1}
    assert ENGINE.fused(loaded(PLAIN)) == {}


def test_what_is_lost_is_what_is_fewer():
    found = fused.compare(loaded(TEXT), loaded(PLAIN), ENGINE)
    assert (found.before, found.lost) == ({"FusedConv": 1}, {"FusedConv": 1})
    assert Fused({"A": 3, "B": 1}, {"A": 1, "B": 2, "C": 4}).lost == {"A": 2}
    kept = fused.compare(loaded(TEXT), loaded(TEXT), ENGINE)
    assert (kept.before, kept.lost, kept.note) == ({"FusedConv": 1}, {}, "")


def test_a_model_without_fused_operators_can_lose_none():
    assert fused.compare(loaded(PLAIN), loaded(TEXT), ENGINE) == Fused()


def test_networks_of_convolutions_are_not_optimized():
    plain = loaded(TEXT.replace("Softmax", "Identity"))
    assert fused.compare(plain, plain, ENGINE) is None


def test_large_models_are_not_optimized(monkeypatch):
    monkeypatch.setattr(fused, "_MOST_BYTES", 1024)
    found = fused.compare(loaded(TEXT), loaded(TEXT), ENGINE)
    assert found == Fused(note="the model has more than 0 MiB")


def test_a_model_that_the_runtime_does_not_load_has_a_note():
    proto = model(TEXT, **WEIGHTS)
    proto.graph.node[1].domain = "nobody"
    proto.opset_import.add(domain="nobody", version=1)
    found = fused.compare(load(proto), load(proto), ENGINE)
    assert found.note.startswith("ONNX Runtime CPUExecutionProvider does not optimize the model: ")
    assert not found.before


@pytest.mark.parametrize("lost", [True, False])
def test_the_report_says_what_is_lost(lost):
    proto = model(TEXT, **WEIGHTS)
    with compress(proto, 0.7) as result:
        report = result.report
        assert report.validation.fused.before == {"FusedConv": 1}
        if lost:
            changed = replace(
                report.validation, fused=Fused({"FusedConv": 2, "Attention": 6}, {"FusedConv": 2})
            )
            report = replace(report, validation=changed)
        console = Console(file=StringIO(), width=120)
        show(report, console)
        text = console.file.getvalue()
        assert ("ONNX Runtime no longer fuses 6 of 6 Attention" in text) == lost
        assert '"FusedConv"' in report.to_json()
