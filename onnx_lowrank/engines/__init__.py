"""Running a model: ONNX Runtime, the reference implementation, and inputs."""
