"""Fixtures for the linear algebra."""

import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg.backend import Backend, resolve


@pytest.fixture(scope="session")
def cuda() -> Backend:
    """The CUDA backend; without one the test is skipped with what is missing."""
    try:
        return resolve("cuda")
    except InputError as error:
        pytest.skip(str(error))
