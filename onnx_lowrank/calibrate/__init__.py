"""Activation statistics of a model on calibration data, and what is fitted to them."""
