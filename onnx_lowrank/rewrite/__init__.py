"""Writing factors into a copy of a model."""
