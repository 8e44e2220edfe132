"""Frozen dataclasses that all stages share; none of them holds an ONNX object."""
