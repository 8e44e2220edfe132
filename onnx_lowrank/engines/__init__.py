"""Engines that run a model (ONNX Runtime, onnx's reference implementation), their inputs and outputs."""
