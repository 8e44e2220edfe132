"""Tests of what needs PyTorch, which is optional: without it, they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

_IS_ABSENT = find_spec("torch") is None and not os.environ.get("ONNX_LOWRANK_REQUIRE_TORCH")


class _Skipped(pytest.Module):
    """A module that is not imported."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip("PyTorch is absent", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return _Skipped.from_parent(parent, path=module_path) if _IS_ABSENT else None
