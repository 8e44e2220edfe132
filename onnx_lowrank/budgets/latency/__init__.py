"""Latency: the time of a run, of layers and of whole models, measured where they will run."""

from onnx_lowrank.budgets.latency.budget import BUDGET as BUDGET
