"""The words that all stages share: frozen values, none of them ONNX."""
