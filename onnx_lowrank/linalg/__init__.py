"""Folds, spectra and factors of arrays; the same code runs on NumPy and on CuPy."""
