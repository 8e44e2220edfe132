"""The start of worker processes."""

import signal
from dataclasses import dataclass

import pytest

from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.work.executor import Processes


@dataclass(frozen=True)
class Nothing:
    nbytes: int = 1


def blocked(item, backend):
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="the system blocks no signals")
def test_an_interrupt_waits_in_workers_from_their_start():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with Processes(1, resolve("cpu")) as running:
        (found,) = running.map(blocked, [Nothing()])
    assert found == before | {signal.SIGINT}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
