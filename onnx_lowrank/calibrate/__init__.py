"""Calibration data, the statistics of a model's activations on it, and the effects of layers' errors."""
