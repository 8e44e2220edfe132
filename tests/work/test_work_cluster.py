"""Work items on a real Dask cluster: a scheduler and two worker processes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import time
from pydoc import locate
from threading import Thread

import dask
import distributed  # noqa: F401 - it adds its settings to those of Dask
import numpy as np
import pytest
from dask_items import (
    Number,
    blas_threads,
    device,
    die,
    die_once,
    fail_at_three,
    hoard,
    no_disk,
    process,
    sleep,
    square,
)
from test_work_items import bits, every_item, weight_of

from dasked import cluster
from onnx_lowrank import InputError, compress
from onnx_lowrank.calibrate import measurement
from onnx_lowrank.calibrate.sections import section_sums
from onnx_lowrank.cli import main
from onnx_lowrank.core.option import Fold
from onnx_lowrank.documents import plans
from onnx_lowrank.linalg.backend import one_blas_thread, resolve
from onnx_lowrank.work import carried
from onnx_lowrank.work import cluster as module
from onnx_lowrank.work.cluster import Cluster
from onnx_lowrank.work.fitting import fitted
from onnx_lowrank.work.scoring import WeightItem, singular_values
from tiny import DIGITS, cnn

CPU = resolve("cpu")
PLENTY = 10**9
X = np.random.default_rng(0).standard_normal((40, 8, 6, 6)).astype(np.float32)

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no signal that kills"),
]


@pytest.fixture(scope="module")
def dasked(tmp_path_factory):
    """Two workers with nannies, which start a dead worker again."""
    with cluster(tmp_path_factory.mktemp("dask")) as made:
        made.work("--nworkers", "2", "--memory-limit", "700MiB")
        yield made


@pytest.fixture
def running(dasked):
    with Cluster(dasked.address, CPU, budget=PLENTY) as made:
        yield made


@pytest.fixture
def brief():
    """Connections that are given up soon."""
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        yield


class Versions:
    """Other versions in this process; in another process, where it arrives, it is what it stands for."""

    def __init__(self, **other):
        self._other = other

    def __call__(self, device):
        return {**carried.versions(device), **self._other}

    def __reduce__(self):
        return locate, ("onnx_lowrank.work.carried.versions",)


def numbers(count, **more):
    return [Number(value, **more) for value in range(count)]


def content(**options):
    with compress(cnn(), 0.5, device="cpu", **options) as result:
        return (
            result.proto.SerializeToString(deterministic=True),
            plans.to_json(result.plan),
            result.report.layers,
            result.report.trials,
        )


# --- results ------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_items_from_other_processes(running):
    assert list(running.map(square, iter(numbers(20)))) == [n**2 for n in range(20)]
    assert list(running.map(square, [])) == []
    assert os.getpid() not in set(running.map(process, numbers(4)))
    assert set(running.map(device, numbers(1))) == {"cpu"}
    inside = list(running.map(blas_threads, numbers(4)))
    assert all(threads == 1 for item in inside for threads in item)
    assert inside[0]


def test_an_error_comes_in_the_turn_of_its_item_and_the_executor_goes_on(running):
    results = running.map(fail_at_three, numbers(50))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match=r"^There is no 3\.$"):
        next(results)
    assert list(running.map(square, numbers(3))) == [0, 1, 4]
    with pytest.raises(OSError, match="the worker's disk is full"):
        list(running.map(no_disk, numbers(1)))


@pytest.mark.parametrize("is_seen", [True, False])
def test_results_have_the_bits_of_this_process_wherever_the_files_are(
    running, tmp_path, monkeypatch, is_seen
):
    items = list(every_item(tmp_path / "moments"))
    weight = weight_of((1, 24, 36), 7, folder=tmp_path)
    items.append((singular_values, WeightItem(weight, {Fold.ENCODE: (1, 2)})))
    with one_blas_thread(solvers=True):
        wanted = [bits(function(item, CPU)) for function, item in items]
    if not is_seen:
        monkeypatch.setattr(carried, "_PIECE", 1)  # The marks of this process differ from the workers'.
        carried._mark.cache_clear()
    results = [next(running.map(function, [item])) for function, item in items]
    carried._mark.cache_clear()
    assert [bits(result) for result in results] == wanted
    assert {tmp_path / "7.data", tmp_path / "moments"}.issubset(running._carried) is not is_seen


def test_a_model_runs_where_all_workers_see_its_data(running, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.write_bytes(bytes(10**5))
    assert running.reaches([])
    assert running.reaches([data])
    monkeypatch.setattr(carried, "_PIECE", 1)
    carried._mark.cache_clear()
    assert not running.reaches([data])
    carried._mark.cache_clear()


def test_the_client_draws_few_items_ahead(running):
    """Also while the first item waits for a worker that starts: five items fill the budget of two workers."""
    drawn = []

    def items():
        for item in numbers(30, nbytes=2 * PLENTY // 5):
            drawn.append(item)
            yield item

    for done, _ in enumerate(running.map(square, items())):
        assert len(drawn) <= done + 1 + 2 * (2 + 1)  # five in flight, and one that waits for room


@pytest.mark.parametrize("options", [{}, {"calibration": X}], ids=["weights", "calibrated"])
def test_a_cluster_makes_the_model_that_threads_make_also_if_a_worker_dies(dasked, monkeypatch, options):
    monkeypatch.setattr(measurement, "_TAPPED", 2**15)  # a few samples at a time, and so several sections
    wanted = content(**options)
    sent, send = [], Cluster.send

    def killing(self, function, item):
        if len(sent) == 2:
            one = next(iter(self._client.run(os.getpid).values()))
            os.kill(one, signal.SIGKILL)
        sent.append(function)
        return send(self, function, item)

    monkeypatch.setattr(Cluster, "send", killing)
    assert content(scheduler=dasked.address, **options) == wanted
    assert sent.count(section_sums) > (1 if options else -1)
    assert sent.count(fitted) > 1


# --- workers that die ---------------------------------------------------------------------------------


def test_an_item_whose_worker_died_is_computed_by_another(running, tmp_path):
    marker = tmp_path / "died"
    items = numbers(6, given=str(marker))
    assert list(running.map(die_once, items)) == [n**2 for n in range(6)]
    assert marker.exists()


@pytest.mark.parametrize("function", [die, hoard])
def test_an_item_that_ends_all_workers_is_an_error_that_says_so(running, function):
    with pytest.raises(InputError, match=r"^An item of about 2\.00 GiB ended 2 workers .*--memory-limit"):
        list(running.map(function, numbers(1, nbytes=2**31)))
    assert list(running.map(square, numbers(3))) == [0, 1, 4]


# --- versions -----------------------------------------------------------------------------------------


def test_a_worker_of_other_versions_is_an_error_that_names_both(dasked, monkeypatch):
    own = carried.versions("cpu")
    for name, shown in (("numpy", "numpy"), ("code", "code of onnx-lowrank")):
        monkeypatch.setattr(module, "versions", Versions(**{name: "0.0.1"}))
        theirs = own[name] if name == "numpy" else own[name][:12]
        wanted = (
            rf"^The Dask worker tcp://\S+ has another {shown} \({theirs}\) than this machine \(0\.0\.1\): "
        )
        with pytest.raises(InputError, match=wanted):
            compress(cnn(), 0.5, scheduler=dasked.address)
        # So does a worker that comes later, which nobody checked.
        monkeypatch.setattr(Cluster, "_check", lambda self: None)
        with pytest.raises(InputError, match=wanted), Cluster(dasked.address, CPU, budget=PLENTY) as running:
            list(running.map(square, numbers(1)))
        monkeypatch.undo()


def test_a_cluster_without_this_package_is_an_error_that_says_so(dasked, monkeypatch):
    monkeypatch.setattr(module, "_PACKAGE", "no-such-package")
    with pytest.raises(InputError, match=r"^The Dask scheduler has no no-such-package: install version "):
        compress(cnn(), 0.5, scheduler=dasked.address)


def test_another_processor_is_a_warning_and_has_results_of_its_own(dasked, monkeypatch, caplog, tmp_path):
    assert content(scheduler=dasked.address, cache=tmp_path) == content(cache=tmp_path)
    known = len(list(tmp_path.rglob("*")))
    monkeypatch.setattr(module, "versions", Versions(processor="Z80"))
    content(scheduler=dasked.address, cache=tmp_path)
    assert [r.getMessage() for r in caplog.records if "another processor" in r.getMessage()]
    assert len(list(tmp_path.rglob("*"))) > known


# --- schedulers ---------------------------------------------------------------------------------------


def test_a_scheduler_that_cannot_be_reached_is_an_error_and_writes_nothing(tmp_path, brief, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        command = [
            str(DIGITS),
            str(tmp_path / "out.onnx"),
            "--ratio",
            "0.5",
            "--scheduler",
            address,
            "--quiet",
        ]
        with pytest.raises(SystemExit) as ended:
            main(command)
    assert ended.value.code == 2
    assert f"onnx-lowrank: The Dask scheduler at {address} cannot be reached (" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_scheduler_that_needs_certificates_is_an_error_that_names_the_settings(brief):
    wanted = (
        r"^The Dask scheduler at tls://127\.0\.0\.1:1 needs certificates \(.+\): set distributed\.comm\.tls\."
    )
    with pytest.raises(InputError, match=wanted), Cluster("tls://127.0.0.1:1", CPU, budget=PLENTY):
        pass


def test_a_scheduler_without_workers_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    monkeypatch.setattr(module, "_POLL", 0.2)
    with cluster(tmp_path) as made:
        wanted = rf"^The Dask scheduler at {made.address} has had no worker for 0\.5 seconds: start some"
        with pytest.raises(InputError, match=wanted):
            compress(cnn(), 0.5, scheduler=made.address)


def test_workers_that_go_away_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_POLL", 0.2)
    with cluster(tmp_path) as made:
        worker = made.work("--no-nanny")
        with Cluster(made.address, CPU, budget=PLENTY) as running:
            monkeypatch.setattr(module, "_PATIENCE", 0.5)
            Thread(target=lambda: (time.sleep(1), worker.kill())).start()
            with pytest.raises(InputError, match=r"has had no worker for 0\.5 seconds"):
                list(running.map(sleep, numbers(1)))


def test_a_scheduler_that_goes_away_is_an_error_and_the_cache_keeps_the_results(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    singular = []
    with cluster(tmp_path) as made:
        made.work("--no-nanny")
        answer = Cluster.answer

        def killing(self, future, nbytes):
            found = answer(self, future, nbytes)
            singular.append(found)
            if len(singular) == 2:
                made.scheduler.kill()
                made.scheduler.wait()
            return found

        monkeypatch.setattr(Cluster, "answer", killing)
        wanted = rf"^The connection to the Dask scheduler at {made.address} is lost: start it .*--cache DIR"
        with pytest.raises(InputError, match=wanted):
            compress(cnn(), 0.5, device="cpu", scheduler=made.address, cache=folder)
    monkeypatch.undo()
    assert len([path for path in folder.rglob("*") if path.is_file()]) >= 2
    assert content(cache=folder) == content(cache=False)
