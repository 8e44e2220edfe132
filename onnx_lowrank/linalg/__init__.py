"""Folds, spectra and factors: arrays in, arrays out; the same code on NumPy and CuPy."""
