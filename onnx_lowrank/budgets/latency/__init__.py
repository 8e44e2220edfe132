"""Latency: the times of layers and of whole models, measured on the machine that will run them."""

from onnx_lowrank.budgets.latency.budget import BUDGET as BUDGET
