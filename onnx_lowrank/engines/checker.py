"""onnx's checker."""

from __future__ import annotations

import onnx

from onnx_lowrank.engines.engine import materialized, one_line
from onnx_lowrank.files.load import Model


def check(model: Model) -> tuple[str, ...]:
    """What onnx's checker with full shape inference has against a model; () if nothing."""
    with materialized(model) as source:
        try:
            onnx.checker.check_model(source, full_check=True)
        except Exception as error:
            lines = (one_line(line, source) for line in str(error).splitlines())
            return tuple(line for line in lines if line) or (type(error).__name__,)
    return ()
