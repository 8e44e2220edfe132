"""What was done to a model: as a table in the terminal, and as JSON."""

from onnx_lowrank.report.model import LayerRow, Report, Total, Totals
from onnx_lowrank.types import Solver

__all__ = ["LayerRow", "Report", "Solver", "Total", "Totals"]
