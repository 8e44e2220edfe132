"""onnx-lowrank: smaller ONNX models by low-rank decomposition, chosen and proved layer by layer."""

from onnx_lowrank.errors import (
    BudgetError,
    InputError,
    LowRankError,
    PlanError,
    RecipeError,
    ValidationError,
)
from onnx_lowrank.pipeline import Result, compress
from onnx_lowrank.plan import read as read_plan
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.report import Report
from onnx_lowrank.types import Plan

__all__ = [
    "BudgetError",
    "InputError",
    "LowRankError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Report",
    "Result",
    "ValidationError",
    "compress",
    "read_plan",
]
