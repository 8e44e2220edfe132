"""The report of a run, as a table in the terminal and as JSON."""

from onnx_lowrank.core.plan import Solver
from onnx_lowrank.report.content import LayerRow, Total, Totals
from onnx_lowrank.report.report import Report

__all__ = ["LayerRow", "Report", "Solver", "Total", "Totals"]
