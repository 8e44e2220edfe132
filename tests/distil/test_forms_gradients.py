"""Gradients of all forms against central differences, in double precision."""

from __future__ import annotations

import re

import pytest

from differentiating import check_gradients
from gradient_cases import ALL, Operands, built
from onnx_lowrank.distil.forms import FORMS

NONE = {
    *(("", name) for name in ("Ceil", "Floor", "Round", "Sign", "IsNaN", "Shape", "Size")),
    *(("", name) for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
}
"""The forms without a gradient."""
SAME = {("", "Scatter"), ("", "Upsample")}
"""Older names of other forms."""


@pytest.mark.parametrize(("text", "operands"), ALL, ids=[text for text, _ in ALL])
def test_gradients_are_central_differences(text: str, operands: Operands) -> None:
    opset = 21 if "GroupNorm" in text else 24
    check_gradients(*built(text, operands, opset=opset))


def test_every_form_has_a_test_of_its_gradient() -> None:
    found = {(domain or "", name) for text, _ in ALL for domain, name in CALLED.findall(text)}
    assert {kind for kind in FORMS if kind[0] != "local"} == found | NONE | SAME


CALLED = re.compile(r"= (?:(com\.microsoft)\.)?([A-Z]\w+)(?= [<(])")
