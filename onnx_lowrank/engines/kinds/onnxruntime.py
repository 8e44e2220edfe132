"""ONNX Runtime."""

from onnx_lowrank.engines.engine import Kind
from onnx_lowrank.engines.runtime import runtime

KIND = Kind("onnxruntime", runtime)
