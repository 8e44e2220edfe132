"""The operators whose weights are decomposed."""
