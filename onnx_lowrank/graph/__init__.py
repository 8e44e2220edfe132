"""Everything that touches ONNX protos: loading, finding layers, rewriting, saving."""
