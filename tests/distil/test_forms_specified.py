"""Forms of operators against the stored outputs of onnx's backend tests."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest
from onnx.backend.test.runner import Runner

import backend_cases
from backend_cases import Case
from differentiating import run
from onnx_lowrank.distil.forms import FORMS
from onnx_lowrank.distil.forms.form import FLOATS, widened

LEAST = (1004, 188)
"""How many node tests of an operator with a form there are, and how many cannot hold, with onnx 1.23.

Newer versions have more. Those that cannot hold have sequences, texts, or numbers of a type that tensors do
not have: floats of 8 bits or fewer, whole numbers of fewer than 8, or of more than 8 without a sign.
"""


def has_form(case: Case) -> bool:
    nodes = case.proto.graph.node
    return len(nodes) == 1 and (nodes[0].domain, nodes[0].op_type) in FORMS


def is_foreign(case: Case) -> bool:
    """Whether a value is none that a tensor can hold."""
    values = (value for feed, wanted in case.sets for value in (*feed.values(), *wanted))
    return any(
        not isinstance(value, (np.ndarray, np.generic)) or not _is_known(value.dtype) for value in values
    )


def _is_known(dtype: np.dtype) -> bool:
    return dtype in FLOATS or dtype.name in ("bool", "int8", "int16", "int32", "int64", "uint8")


def difference(case: Case) -> str:
    """What differs from the stored outputs; empty if nothing does."""
    for feed, wanted in case.sets:
        try:
            found = run(case.proto, feed)
            rtol = max(case.rtol, *map(_rounding, wanted))
            Runner.assert_similar_outputs(
                [widened(value) for value in wanted], [*found.values()], rtol, case.atol
            )
        except Exception as error:  # Anything that goes wrong is a difference.
            return f"{type(error).__name__}: {error}"
    return ""


def _rounding(array: np.ndarray) -> float:
    """What a stored output in half precision errs by; products of it have errors of this size, too."""
    return 2 * float(ml_dtypes.finfo(array.dtype).eps) if array.dtype in FLOATS else 0


@pytest.mark.backend
def test_every_node_test_holds(record_property) -> None:
    cases = list(filter(has_form, backend_cases.nodes()))
    foreign = list(filter(is_foreign, cases))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The examples overflow and divide by zero on purpose.
        found = {case.name: text for case in cases if case not in foreign and (text := difference(case))}
    counts = len(cases), len(foreign)
    record_property("counts", f"forms: {counts[0]} node tests, {counts[1]} have values that no tensor holds")
    assert not found
    assert all(number >= least for number, least in zip(counts, LEAST, strict=True))
