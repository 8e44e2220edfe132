"""Trained models that packages carry: one module for each, with its data and its scores."""
