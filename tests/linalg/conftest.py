"""Fixtures for the linear algebra."""

from dataclasses import replace

import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg.backend import Backend, resolve


@pytest.fixture(scope="session")
def cuda() -> Backend:
    """The CUDA backend, for matrices of any size; without one the test is skipped with what is missing."""
    try:
        found = resolve("cuda")
    except InputError as error:
        pytest.skip(str(error))
    from onnx_lowrank.linalg.cuda import Cuda

    return replace(found, device=Cuda(least=1))
