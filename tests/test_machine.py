"""The arguments that tell where a run computes and how much it may take."""

import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from onnx_lowrank import BudgetError, InputError, compress, machine
from onnx_lowrank.calibrate import jobs, measurement, originals, shelf
from onnx_lowrank.calibrate.allowance import Allowance
from tiny import cnn

X = np.random.default_rng(0).standard_normal((40, 8, 6, 6)).astype(np.float32)

# --- threads and workers -------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "most"), [(machine.thread_count, 1024), (machine.worker_count, 64)])
def test_a_number_of_threads_or_workers_is_taken_as_it_is(number, most):
    for given in (0, 1, 7, most, np.int64(3)):
        assert number(given) == given
        assert type(number(given)) is int


@pytest.mark.parametrize("given", [-1, 1025, 10**30])
def test_a_number_of_threads_that_is_wrong_is_told(given):
    with pytest.raises(InputError, match=rf"^--threads is {given}: pass 1 to 1024, or 0 to let the runtime"):
        machine.thread_count(given)


@pytest.mark.parametrize("given", [-1, 65, 10**30])
def test_a_number_of_workers_that_is_wrong_is_told(given):
    with pytest.raises(
        InputError, match=rf"^--workers is {given}: pass 1 to 64, or 0 for the threads of one"
    ):
        machine.worker_count(given)


def test_windows_has_fewer_workers(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert machine.worker_count(61) == 61
    with pytest.raises(InputError, match=r"^--workers is 62: pass 1 to 61, or 0"):
        machine.worker_count(62)
    ProcessPoolExecutor(61).shutdown()
    with pytest.raises(ValueError, match="61"):
        ProcessPoolExecutor(62)


@pytest.mark.parametrize("name", ["threads", "workers"])
@pytest.mark.parametrize("given", [None, "2", 2.0, True, [2]])
def test_what_is_no_number_of_threads_or_workers_is_told(name, given):
    with pytest.raises(InputError, match=rf"^{name} is .*: give a whole number\.$"):
        getattr(machine, f"{name.removesuffix('s')}_count")(given)


# --- the scheduler -------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["tcp://10.0.0.1:8786", "tls://a-b.example:1", "tcp://[::1]:8786"])
def test_an_address_of_a_scheduler_is_taken_as_it_is(address):
    assert machine.scheduler(address, 0) == address
    assert machine.scheduler(None, 2) is None


@pytest.mark.parametrize(
    "address", ["10.0.0.1:8786", "tcp://host", "http://host:1", "tcp://a b:1", "tcp://h:1/x"]
)
def test_what_is_no_address_is_told(address):
    with pytest.raises(
        InputError, match=r"^--scheduler is '.*': give the address that `dask scheduler` prints"
    ):
        machine.scheduler(address, 0)


@pytest.mark.parametrize("given", [1, True, b"tcp://h:1", ""])
def test_what_is_no_text_for_a_scheduler_is_told(given):
    with pytest.raises(InputError, match=r"^scheduler is .*: give an address such as tcp://"):
        machine.scheduler(given, 0)


def test_an_absent_dask_names_the_extra(monkeypatch):
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"is not installed: run `pip install \"onnx-lowrank\[distributed\]\"`"
    ):
        machine.scheduler("tcp://10.0.0.1:8786", 0)


# --- memory --------------------------------------------------------------------------------------


def test_by_default_calibration_takes_two_gib():
    given = machine.allowance(None, calibrated=False)
    assert given.total == 2**31
    usual = measurement.MEMORY, shelf.MEMORY, originals.MEMORY
    assert (given.moments, given.activations, given.outputs) == usual


@pytest.mark.parametrize("gib", [0.0625, 1, 2.5, np.float32(4), np.float16(32), 1000])
def test_an_allowance_is_given_in_gib(gib):
    given = machine.allowance(gib, calibrated=True)
    assert given.total == float(gib) * 2**30
    assert given.moments + given.activations + given.outputs == given.total


@pytest.mark.parametrize("gib", [0, -1, 0.06, 2**31, 10**400, float("nan"), float("inf")])
def test_a_wrong_allowance_is_told(gib):
    with pytest.raises(
        InputError, match=r"^--memory is .*: pass GiB, from 0\.0625 to 131072; the default is 2\.$"
    ):
        machine.allowance(gib, calibrated=True)


@pytest.mark.parametrize("given", ["2", True, [2], 2j])
def test_an_allowance_that_is_no_number_is_told(given):
    with pytest.raises(InputError, match=r"^memory is .*: give a number of GiB such as 2\.$"):
        machine.allowance(given, calibrated=True)


def test_without_calibration_there_is_nothing_to_limit():
    with pytest.raises(InputError, match=r"^--memory limits what --calibration takes: pass --calibration"):
        compress(cnn(), 0.5, memory=1)


def passes_of(monkeypatch, allowance):
    """A compressed model, the number of passes over the inputs, and the memory of all stores."""
    passes, shelves, outputs = [], set(), set()
    measure, shelve, keep = (
        measurement._Measurement._measure,
        shelf.Shelf.__init__,
        originals.Originals.__init__,
    )

    def measured(self, *given):
        passes.append(given)
        measure(self, *given)

    def shelved(self, folder, memory=None):
        shelves.add(memory)
        shelve(self, folder, memory)

    def kept(self, memory):
        outputs.add(memory)
        keep(self, memory)

    with monkeypatch.context() as patch:
        patch.setattr(measurement._Measurement, "_measure", measured)
        patch.setattr(shelf.Shelf, "__init__", shelved)
        patch.setattr(originals.Originals, "__init__", kept)
        patch.setattr(machine, "LEAST", 0)
        gib = allowance.total / 2**30
        result = compress(cnn(), 0.6, calibration={"x": X}, recipe="activation", memory=gib)
    return result.proto, len(passes), shelves, outputs


def test_less_memory_takes_more_passes_and_gives_the_same_model(monkeypatch):
    second = jobs.moments_bytes((1, 16 * 9))  # those of the second convolution
    less, usual = Allowance(-(-second * 8 // 5)), Allowance()
    made, few, shelves, outputs = passes_of(monkeypatch, usual)
    assert (shelves, outputs) == ({usual.activations}, {usual.outputs})
    found, many, shelves, outputs = passes_of(monkeypatch, less)
    assert (shelves, outputs) == ({less.activations}, {less.outputs})
    assert many > few
    assert found == made


def test_a_layer_without_moments_tells_the_option(monkeypatch):
    monkeypatch.setattr(machine, "LEAST", 0)
    with pytest.raises(BudgetError, match=r"fit into the 1\.2\S* GiB for statistics: raise --memory\.$"):
        compress(cnn(), 0.9, calibration={"x": X}, recipe="activation", memory=2e-6)
