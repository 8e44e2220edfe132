"""The clock, on a machine that is only pretended."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.budgets.latency import clock
from onnx_lowrank.budgets.latency.clock import Pace, interleaved

WARM_UP, LEAST, MOST = clock.WARM_UP, clock.LEAST, clock._MOST
FOREVER = Pace(seconds=1e9, spread=0.0)


_PACE = Pace(1.0)


class Machine:
    """A clock that stands still but for the work that is done."""

    def __init__(self):
        self.now, self.order = 0, []

    def __call__(self):
        return self.now

    def work(self, name, cost):
        """Something that takes so long at its n-th run."""
        runs = 0

        def run():
            nonlocal runs
            self.order.append(name)
            self.now += int(cost(runs))
            runs += 1

        return run


def steady(nanoseconds):
    return lambda _: nanoseconds


def noisy(seed, nanoseconds=10**6):
    """Times of which no median is ever known well."""
    values = np.exp(np.random.default_rng(seed).normal(0, 3, 2 * MOST)) * nanoseconds
    return lambda index: max(1, int(values[index]))


@pytest.mark.parametrize("costs", [(100,), (100, 200), (400, 100, 4), (7, 7, 7, 7)])
@pytest.mark.parametrize("warm", [False, True])
def test_steady_times_are_exact_after_the_least_rounds(costs, warm):
    machine = Machine()
    runs = [machine.work(index, steady(cost)) for index, cost in enumerate(costs)]
    assert interleaved(runs, FOREVER, machine, warm=warm) == list(costs)
    assert len(machine.order) == len(costs) * (WARM_UP + LEAST * (2 if warm else 1))


@pytest.mark.parametrize("warm", [False, True])
def test_they_run_in_turns(warm):
    machine = Machine()
    interleaved([machine.work(name, steady(5)) for name in "abc"], FOREVER, machine, warm=warm)
    turn = "aabbcc" if warm else "abc"
    assert "".join(machine.order) == "abc" * WARM_UP + turn * LEAST


def test_the_warm_up_does_not_count():
    machine = Machine()
    runs = [machine.work("", lambda index, own=own: own if index >= WARM_UP else 10**12) for own in (50, 25)]
    assert interleaved(runs, FOREVER, machine) == [50, 25]


def test_warm_times_are_those_of_the_second_of_two_runs():
    machine = Machine()
    cold_first = [
        machine.work("", lambda index, own=own: own if (index - WARM_UP) % 2 else 100 * own) for own in (8, 6)
    ]
    assert interleaved(cold_first, FOREVER, machine, warm=True) == [8, 6]


@pytest.mark.parametrize("growth", [1.01, 1.5, 0.9])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 3.0])
def test_paired_ratios_ignore_a_machine_that_becomes_slower(growth, share):
    machine = Machine()
    base = 10**9
    runs = [
        machine.work("", lambda index, part=part: part * base * growth ** min(index, 40))
        for part in (1.0, share)
    ]
    first, second = interleaved(runs, Pace(seconds=1e9, spread=0.02), machine)
    assert second / first == pytest.approx(share, rel=1e-6)


@pytest.mark.parametrize("outlier", range(LEAST))
def test_one_interruption_changes_nothing(outlier):
    machine = Machine()
    cost = lambda index: 10**9 if index == WARM_UP + outlier else 100  # noqa: E731
    runs = [machine.work("", steady(100)), machine.work("", cost), machine.work("", steady(50))]
    assert interleaved(runs, FOREVER, machine) == [100, 100, 50]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rounds", [1, LEAST, LEAST + 1, 50])
def test_it_ends_when_the_seconds_are_over(seed, rounds):
    machine = Machine()
    # A round takes a second, of which the first takes a part that varies.
    parts = np.random.default_rng(seed).integers(10**8, 9 * 10**8, MOST)
    runs = [machine.work("a", lambda n: parts[n]), machine.work("b", lambda n: 10**9 - parts[n])]
    interleaved(runs, Pace(seconds=rounds - 1e-6, spread=0.0), machine)
    assert machine.order.count("b") == WARM_UP + max(rounds, LEAST)


@pytest.mark.parametrize("seed", range(3))
def test_it_ends_after_the_most_rounds(seed):
    machine = Machine()
    interleaved([machine.work("a", noisy(seed)), machine.work("b", noisy(seed + 10))], FOREVER, machine)
    assert machine.order.count("a") == machine.order.count("b") == WARM_UP + MOST


@pytest.mark.parametrize("seed", range(5))
def test_it_ends_once_the_medians_are_known(seed):
    """A wider spread never takes more rounds."""
    counts = []
    for spread in (0.3, 0.1, 0.03, 0.01):
        machine = Machine()
        rng = np.random.default_rng(seed)
        values = rng.uniform(0.8, 1.2, (2, 2 * MOST)) * 10**6
        runs = [machine.work("", lambda index, own=own: own[index]) for own in values]
        interleaved(runs, Pace(seconds=1e9, spread=spread), machine)
        counts.append(len(machine.order))
    assert counts == sorted(counts)
    assert counts[0] == 2 * (WARM_UP + LEAST)
    assert counts[-1] > counts[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_result_is_the_median_of_ratios_times_the_first_ones_median(seed):
    machine = Machine()
    values = np.random.default_rng(seed).uniform(1e5, 3e5, (3, WARM_UP + LEAST)).astype(int)
    runs = [machine.work("", lambda index, own=own: own[index]) for own in values]
    times = values[:, WARM_UP:].astype(float)
    expected = np.median(times / times[0], axis=1) * np.median(times[0])
    assert interleaved(runs, Pace(seconds=0.0), machine) == expected.astype(int).tolist()


def test_a_clock_that_is_too_coarse_gives_no_zero():
    machine = Machine()
    assert interleaved([machine.work("", steady(0))] * 2, FOREVER, machine) == [1, 1]


@pytest.mark.clock
@pytest.mark.parametrize("warm", [False, True])
def test_the_real_clock_runs(warm):
    times = interleaved([lambda: sum(range(100)), lambda: sum(range(200))], Pace(seconds=0.0), warm=warm)
    assert len(times) == 2
    assert min(times) >= 1
