"""Choosing one option for every layer: pure numbers, no ONNX, no device arrays."""
