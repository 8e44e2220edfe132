"""The errors of the rewritten layers as node data for Model Explorer, Google's viewer of graphs.

The form is `GraphNodeData` of `model_explorer.node_data_builder`. Its keys are names of nodes, as the
viewer's adapters of ONNX have them. The last node of a chain keeps the name of the layer's node, so both
models show the values. https://github.com/google-ai-edge/model-explorer/wiki/4.-API-Guide
"""

from __future__ import annotations

import math
from collections.abc import Callable

from onnx_lowrank.documents.json_text import to_text
from onnx_lowrank.report.content import Content, LayerRow

_GRADIENT = (
    {"stop": 0, "bgColor": "#fff7bc", "textColor": "#000000"},
    {"stop": 0.5, "bgColor": "#fe9929", "textColor": "#000000"},
    {"stop": 1, "bgColor": "#8c2d04", "textColor": "#ffffff"},
)
"""From light to dark, which nobody has to tell by hue."""


def dumps(report: Content) -> str:
    """Write one error of every rewritten layer, the same for all: the first that is known for any layer."""
    rows = [row for row in report.layers if row.option is not None]
    found: dict[str, float] = {}
    name = report.measure
    for title, error in _errors(report):
        values = {row.id: value for row in rows if (value := error(row)) is not None and math.isfinite(value)}
        found = {node: values[row.id] for row in rows if row.id in values for node in row.nodes if node}
        if found:
            name = title
            break
    results = {node: {"value": float(f"{value:.4g}")} for node, value in found.items()}
    return to_text({"name": f"{name} of layers", "results": results, "gradient": _GRADIENT}, indent=2) + "\n"


def _errors(report: Content) -> tuple[tuple[str, Callable[[LayerRow], float | None]], ...]:
    held = "held-out" if report.calibration is not None and report.calibration.held else "measured"
    return (
        (f"{held} error", lambda row: None if row.fit is None else row.fit.error),
        (f"{report.measure} error", lambda row: row.error),
        ("certified bound", lambda row: None if row.certificate is None else max(row.certificate.spectral)),
    )
