"""Order, bounds, errors and ends of what runs work items, in threads and in processes."""

from __future__ import annotations

import gc
import logging
import operator
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from devices import fake
from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg.backend import of_each, one_blas_thread, resolve
from onnx_lowrank.work import executor as module
from onnx_lowrank.work.executor import Processes, Threads, executor

CPU = resolve("cpu")
PLENTY = 10**9


@dataclass(frozen=True)
class Number:
    value: int
    nbytes: int = 1


def square(item, backend):
    return item.value**2


def slow_first(item, backend):
    time.sleep(0.3 if item.value == 0 else 0)
    return item.value


def fail_at_three(item, backend):
    if item.value == 3:
        raise InputError(f"There is no {item.value}.")
    return item.value


def process(item, backend):
    return os.getpid()


def blas_threads(item=None, backend=None):
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


def sleep(item, backend):
    time.sleep(600)


def die(item, backend):
    os._exit(7)


def device(item, backend):
    return backend.name, backend.xp.__name__


def numbers(count, nbytes=1):
    return [Number(value, nbytes) for value in range(count)]


@pytest.fixture(scope="module")
def processes():
    with Processes(2, CPU, budget=PLENTY) as running:
        yield running


@pytest.fixture(params=["threads", "processes"])
def running(request):
    """An executor of two workers, in either kind."""
    if request.param == "threads":
        with Threads(CPU, number=2, budget=PLENTY) as made:
            yield made
    else:
        yield request.getfixturevalue("processes")


# --- both kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_results_come_in_the_order_of_the_items(running, count):
    assert list(running.map(square, numbers(count))) == [n**2 for n in range(count)]
    assert list(running.map(slow_first, iter(numbers(count)))) == list(range(count))


def test_an_error_comes_in_the_turn_of_its_item_and_the_executor_goes_on(running):
    results = running.map(fail_at_three, numbers(50))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="There is no 3"):
        next(results)
    assert list(running.map(square, numbers(3))) == [0, 1, 4]


def test_every_worker_has_one_blas_thread_and_the_limit_ends_with_the_work(running):
    with threadpool_limits(limits=2, user_api="blas"):
        before = blas_threads()
        inside = list(running.map(blas_threads, numbers(4)))
        assert inside
        assert all(threads == 1 for task in inside for threads in task)
        assert blas_threads() == before
        leaving = running.map(blas_threads, numbers(9))
        next(leaving)
        leaving.close()
        assert blas_threads() == before


def test_items_are_computed_where_the_executor_is_told(running):
    assert list(running.map(device, numbers(1))) == [("cpu", CPU.xp.__name__)]


@pytest.mark.parametrize("budget", [10, 25, 40])
def test_the_bytes_in_flight_keep_within_the_budget(budget):
    """At most so many items are drawn beyond those yielded, one of them in hand."""
    most = budget // 10
    drawn = []

    def items():
        for item in numbers(30, 10):
            drawn.append(item)
            yield item

    with Threads(CPU, number=8, budget=budget) as running:
        for done, _ in enumerate(running.map(slow_first, items())):
            assert len(drawn) <= done + 1 + most + 1
    assert len(drawn) == 30


def test_results_that_wait_for_their_turn_count_until_then():
    drawn = []

    def items():
        for item in numbers(6, 10):
            drawn.append(item.value)
            yield item

    release = threading.Event()

    def held(item, backend):
        if item.value == 0:
            release.wait(30)
        return item.value

    with Threads(CPU, number=4, budget=30) as running:
        threading.Timer(0.5, release.set).start()
        results = running.map(held, items())
        assert next(results) == 0
        assert drawn == [0, 1, 2, 3], "three fit, and one is in hand"
        assert list(results) == [1, 2, 3, 4, 5]


def test_an_item_above_the_budget_runs_alone():
    running_now, most = [], []
    lock = threading.Lock()

    def watch(item, backend):
        with lock:
            running_now.append(item.value)
            most.append(len(running_now))
        time.sleep(0.02)
        with lock:
            running_now.remove(item.value)
        return item.value

    with Threads(CPU, number=4, budget=5) as running:
        assert list(running.map(watch, numbers(6, 1000))) == list(range(6))
    assert set(most) == {1}


@pytest.mark.parametrize("workers", [1, 3])
def test_items_are_drawn_when_a_worker_is_about_to_be_free(workers):
    begun = []

    def begin(item, backend):
        begun.append(item.value)

    def items():
        for item in numbers(30):
            assert item.value <= len(begun) + workers + 1, "drawn long before it can run"
            yield item

    with Threads(CPU, number=workers, budget=PLENTY) as running:
        assert len(list(running.map(begin, items()))) == 30


def test_a_result_that_is_there_is_given_before_the_next_item_is_drawn():
    """Drawing may take long, where a walk recovers the layer first; progress goes on with it."""
    drawn = []

    def items():
        for item in numbers(10):
            drawn.append(item.value)
            time.sleep(0.05)
            yield item

    with Threads(CPU, number=2, budget=PLENTY) as running:
        for done, _ in enumerate(running.map(square, items())):
            assert len(drawn) <= done + 3


# --- threads ------------------------------------------------------------------------------------------


def test_threads_run_at_the_same_time_whatever_the_device():
    for backend in (CPU, fake()):
        meeting = threading.Barrier(3, timeout=30)
        with Threads(backend, number=3, budget=PLENTY) as running:
            list(running.map(lambda item, backend, meeting=meeting: meeting.wait(), numbers(3)))
            running.each(lambda _, meeting=meeting: meeting.wait(), range(3))


def in_a_lane(item, backend):
    with backend.lane(item.value):
        return backend.name


def test_items_share_the_memory_of_a_device():
    backend = fake(least=2, capacity=25)
    with Threads(backend, number=8, budget=PLENTY) as running:
        assert list(running.map(in_a_lane, numbers(20, 10))) == ["cuda"] * 20
    assert backend.device.lanes == [10] * 18, "the items below the least size need no room"
    assert 10 <= backend.device.most <= 20


@pytest.mark.parametrize(
    ("nbytes", "broken", "reason"),
    [
        (26 * 2**30, False, "needs 26.0 GiB, and the GPU has room for 25.0 GiB"),
        (1, True, "failed on the GPU (no memory is left)"),
    ],
)
def test_the_cpu_takes_over_where_a_device_fails(nbytes, broken, reason, caplog):
    backend = fake(capacity=25 * 2**30)
    backend.device.broken = broken
    with Threads(backend, number=2, budget=2 * nbytes) as running:
        assert list(running.map(put_there, numbers(1, nbytes))) == ["cpu"]
    assert [record.getMessage() for record in caplog.records] == [
        f"A computation {reason}, so the CPU takes it over."
    ]


def put_there(item, backend):
    backend.asarray(np.ones(3))
    return backend.name


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_each_gives_the_results_in_order(workers, count):
    with Threads(CPU, number=workers) as running:
        assert running.each(lambda n: n * n, range(count)) == [n * n for n in range(count)]


@pytest.mark.parametrize("most", [1, 2, 3, 20])
def test_items_that_are_computed_together_are_drawn_a_few_at_a_time(most):
    items, seen = iter(range(12)), []
    with Threads(CPU, number=2) as running:
        for result in running.together(lambda n: n * n, items, most):
            seen.append(result)
            assert len(seen) + operator.length_hint(items) > 12 - most
    assert seen == [n * n for n in range(12)]


def test_the_next_items_are_computed_while_a_result_is_used():
    begun = [threading.Event() for _ in range(4)]
    with Threads(CPU, number=2) as running:
        results = running.together(lambda n: begun[n].set() or n, range(4), 2)
        assert next(results) == 0
        assert begun[1].wait(10)
        assert list(results) == [1, 2, 3]


def test_items_together_do_not_wait_for_threads_that_are_busy():
    """A thread of the pool may ask for them, too."""
    with Threads(CPU, number=2) as running:
        ask = partial(running.each, lambda n: list(running.together(lambda m: m * n, range(5), 2)))
        assert ask(range(6)) == [[m * n for m in range(5)] for n in range(6)]


class Held:
    """Something that takes memory, such as an array."""


@pytest.mark.parametrize("way", ["each", "together", "in_turn"])
def test_nothing_that_was_computed_is_held_while_all_threads_are_busy(way):
    """The queue of the pool keeps the calls that its threads had no time for."""
    held, busy, done = weakref.WeakSet(), threading.Event(), threading.Event()

    def kept(*given):
        held.add(made := Held())
        return made

    def work(running):
        items = map(kept, range(3))
        if way == "each":
            running.each(kept, [next(items), next(items), next(items)])
        elif way == "together":
            for _ in running.together(kept, items, 2):
                pass
        else:
            running.in_turn(kept, [1, 2], items)

    with Threads(CPU, number=2) as running:
        blocking = [running._pool.submit(lambda: busy.set() or done.wait(30)) for _ in range(2)]
        assert busy.wait(10)
        for _ in range(3):
            work(running)
        gc.collect()
        left = len(held)
        done.set()
        assert all(future.result() for future in blocking)
    assert left == 0


@pytest.mark.parametrize("wrong", range(6))
def test_an_error_together_comes_in_its_turn_and_nothing_runs_any_more(wrong):
    active, seen = [], []
    with Threads(CPU, number=3) as running:
        with pytest.raises(InputError, match=f"not {wrong}"):
            seen.extend(running.together(partial(_fails, active, wrong), range(6), 3))
        assert seen == list(range(wrong))
        assert active == []


def _fails(active, wrong, n):
    active.append(n)
    time.sleep(0.01)
    active.remove(n)
    if n == wrong:
        raise InputError(f"not {n}")
    return n


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_lanes_take_their_items_in_order(workers, count, number):
    lanes = [[] for _ in range(number)]
    with Threads(CPU, number=workers) as running:
        running.in_turn(list.append, lanes, iter(range(count)))
    assert lanes == [list(range(n, count, number)) for n in range(number)]


def test_a_lane_that_is_slow_does_not_hold_up_the_others():
    first = threading.Event()

    def work(lane, n):
        if n == 0:
            assert first.wait(10)
        if n == 3:
            first.set()

    def items():
        yield from range(2)
        assert not first.is_set()
        yield 3

    with Threads(CPU, number=2) as running:
        running.in_turn(work, ["slow", "fast", "other"], items())
    assert first.is_set()


@pytest.mark.parametrize("wrong", range(6))
def test_an_error_in_a_lane_is_raised_when_nothing_runs_any_more(wrong):
    active = []
    with Threads(CPU, number=3) as running:
        with pytest.raises(InputError, match=f"not {wrong}"):
            running.in_turn(lambda lane, n: _fails(lane, wrong, n), [active, active], range(6))
        assert active == []


@pytest.mark.parametrize("wrong", range(6))
def test_an_error_in_each_is_raised_when_nothing_runs_any_more(wrong):
    active = []

    def work(n):
        active.append(n)
        time.sleep(0.01)
        active.remove(n)
        if n == wrong:
            raise InputError(f"not {n}")

    with Threads(CPU, number=3) as running:
        with pytest.raises(InputError, match=f"not {wrong}"):
            running.each(work, range(6))
        assert active == []


def test_an_interrupt_leaves_nothing_at_work():
    active = []

    def work(item, backend):
        active.append(item.value)
        time.sleep(0.05)
        active.remove(item.value)

    def items():
        yield from numbers(4)
        raise KeyboardInterrupt

    with Threads(CPU, number=2, budget=PLENTY) as running:
        with pytest.raises(KeyboardInterrupt):
            list(running.map(work, items()))
        assert active == []


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_idle_threads_help_with_the_slices_of_a_large_item_without_a_pool_of_their_own(workers):
    matrices = np.random.default_rng(0).standard_normal((7, 300, 300))
    names = set()

    def values(matrix):
        names.add(threading.current_thread().name)
        return np.linalg.svdvals(matrix)

    def job(item, backend):
        return of_each(values, matrices, backend)

    before = threading.active_count()
    with Threads(CPU, number=workers, budget=PLENTY) as running:
        (found,) = running.map(job, numbers(1))
        assert threading.active_count() - before <= workers
    with one_blas_thread():
        np.testing.assert_array_equal(found, np.linalg.svdvals(matrices))
    assert all(name.startswith("onnx-lowrank") for name in names)


def test_all_items_may_want_help_at_once():
    """Nobody waits for a helper that never comes."""
    matrices = np.random.default_rng(0).standard_normal((3, 256, 256))

    def job(item, backend):
        return of_each(np.linalg.eigvalsh, matrices, backend).sum()

    with Threads(CPU, number=2, budget=PLENTY) as running:
        assert len(set(running.map(job, numbers(6)))) == 1


# --- processes ----------------------------------------------------------------------------------------


def test_processes_are_others(processes):
    found = set(processes.map(process, numbers(6)))
    assert os.getpid() not in found
    assert 1 <= len(found) <= 2


def test_workers_choose_the_kind(monkeypatch, caplog):
    monkeypatch.setattr(module, "free_memory", lambda: 2**33)
    monkeypatch.setattr(module, "cores", lambda: 5)
    with (
        caplog.at_level(logging.DEBUG, "onnx_lowrank"),
        executor(0, CPU, None) as threads,
        executor(3, CPU, 2**27) as others,
    ):
        assert [record.getMessage() for record in caplog.records] == [
            "computes layers in 5 threads, with at most 2.00 GiB in flight",
            "computes layers in 3 processes, with at most 1.25 GiB in flight",
        ]
        assert isinstance(threads, Threads)
        assert isinstance(others, Processes)
        assert threads.threads is threads
        assert isinstance(others.threads, Threads)


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_error_ends_the_processes_at_once(error):
    def interrupted():
        yield Number(0)  # which a worker computes when the error comes
        time.sleep(0.3)
        raise error

    workers = []

    def run():
        with Processes(2, CPU, budget=PLENTY) as running:
            before = set(active_children())
            assert list(running.map(square, numbers(2))) == [0, 1]
            workers.extend(set(active_children()) - before)
            list(running.map(sleep, interrupted()))

    start = time.monotonic()
    with pytest.raises(type(error)):
        run()
    assert time.monotonic() - start < 300, "nobody waited for the work"
    assert workers
    assert not any(worker.is_alive() for worker in workers)


def test_a_worker_that_dies_is_an_error_that_says_so():
    wanted = pytest.raises(InputError, match="worker process ended by itself")
    with Processes(1, CPU, budget=PLENTY) as running, wanted:
        list(running.map(die, numbers(2)))


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this in the background
sys.path[:0] = sys.argv[1:]
from test_work_executor import CPU, PLENTY, Number, Processes, process, sleep
if __name__ == "__main__":
    with Processes(1, CPU, budget=PLENTY) as running:
        print(next(running.map(process, [Number(0)])), flush=True)
        list(running.map(sleep, [Number(1)]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no signal that kills")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_no_worker_outlives_a_process_that_is_killed(tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent
    command = [sys.executable, str(script), str(here), str(here.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        time.sleep(0.2)
        parent.send_signal(getattr(signal, name))
        try:
            parent.wait(60)
        finally:
            parent.kill()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and _is_alive(worker):
            time.sleep(0.05)
        assert not _is_alive(worker)


def _is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


# --- the budget ---------------------------------------------------------------------------------------


def test_items_take_a_quarter_of_the_memory_that_is_free(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 4000)
    with Threads(CPU) as threads, Processes(1, CPU) as processes:
        assert threads._budget == 1000
        assert processes._budget + processes.threads._budget == 1000
