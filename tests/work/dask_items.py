"""Items, and the functions that compute them, for the workers of a cluster: few imports, no tests."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from onnx_lowrank.errors import InputError


@dataclass(frozen=True)
class Number:
    value: int
    nbytes: int = 1
    given: Any = None


def square(item, backend):
    return item.value**2


def fail_at_three(item, backend):
    if item.value == 3:
        raise InputError(f"There is no {item.value}.")
    return item.value


def no_disk(item, backend):
    raise OSError("the worker's disk is full")


def blas_threads(item, backend):
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


def process(item, backend):
    return os.getpid()


def device(item, backend):
    return backend.name


def sleep(item, backend):
    time.sleep(600)


def die(item, backend):
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(item, backend):
    """End the first worker that computes the item 2."""
    marker = Path(item.given)
    if item.value == 2 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item.value**2


def hoard(item, backend):
    """Take memory until the nanny ends this worker; it looks ten times a second."""
    taken = []
    for _ in range(16):
        taken.append(np.ones(2**23))
        time.sleep(0.1)
    time.sleep(600)


def together(item, backend):
    """The most items that were computed in this process at the same time."""
    _NOW.append(item.value)
    time.sleep(0.2)
    most = len(_NOW)
    _NOW.remove(item.value)
    return most


_NOW: list[int] = []
