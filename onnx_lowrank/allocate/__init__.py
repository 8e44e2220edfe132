"""Choose one option for every layer, from numbers alone: no ONNX, no device arrays."""
