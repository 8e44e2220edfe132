"""Model files: loading, external data, tensors, atomic saving."""
