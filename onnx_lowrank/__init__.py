"""onnx-lowrank: smaller ONNX models by low-rank decomposition, chosen and proved layer by layer."""

import gc
import logging

_COLLECTS = gc.isenabled()
gc.disable()  # Imports make many objects and little garbage: looking for it took a fifth of their time.
try:
    from onnx_lowrank.api import Result, compress
    from onnx_lowrank.core.plan import Plan
    from onnx_lowrank.documents.plans import read as read_plan
    from onnx_lowrank.documents.recipes import Recipe
    from onnx_lowrank.documents.reports import read as read_report
    from onnx_lowrank.errors import (
        BudgetError,
        InputError,
        LowRankError,
        PlanError,
        RecipeError,
        ReportError,
        ValidationError,
    )
    from onnx_lowrank.options import Options
    from onnx_lowrank.report.report import Report
    from onnx_lowrank.sweeps.run import sweep
finally:
    if _COLLECTS:
        gc.enable()

logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "BudgetError",
    "InputError",
    "LowRankError",
    "Options",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Report",
    "ReportError",
    "Result",
    "ValidationError",
    "compress",
    "read_plan",
    "read_report",
    "sweep",
]
