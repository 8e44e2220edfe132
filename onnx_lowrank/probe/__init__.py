"""Copies and parts of a model that show what its layers do."""
