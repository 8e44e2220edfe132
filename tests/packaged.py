"""Trained models that packages carry, where build.py of the real models has written them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

FOLDER = Path(tempfile.gettempdir()) / "real_models"


def path_of(name):
    """The model's file; the test skips without it."""
    path = FOLDER / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is missing: build.py of the real models writes it")
    return path
