"""The training: rounds, rates, the best tensors, replays."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
import torch

from onnx_lowrank.core.plan import Round
from onnx_lowrank.distil.learning import RATES, Learner
from onnx_lowrank.distil.schedule import LONGEST, bounded, plateaus, replayed

CPU = torch.device("cpu")


def quadratic(goal, noise=0.0):
    """A learner that moves a matrix to a goal, from batches with noise."""

    def losses(seed):
        draws = np.random.default_rng(seed)
        for _ in count():
            shift = torch.from_numpy(noise * draws.standard_normal(goal.shape)).float()
            yield lambda tensors, shift=shift: (tensors["w"] - goal - shift).square().mean()

    def judge(tensors):
        return float((tensors["w"] - goal).square().mean()), True

    return Learner({"w": np.ones(goal.shape, np.float32)}, losses, judge, CPU)


GOAL = torch.linspace(0.5, 2.0, 12).reshape(3, 4)


def silent(share, last, best):
    pass


def test_rounds_are_repeated_to_the_same_bits():
    rounds = [Round(20, 0.02), Round(20, 0.005, is_again=True), Round(20, 0.001)]
    first, second = (quadratic(GOAL, 0.3).learn(replayed(rounds), silent) for _ in range(2))
    assert np.array_equal(first.values["w"], second.values["w"])
    again = quadratic(GOAL, 0.3).learn(replayed(first.rounds), silent)
    assert np.array_equal(first.values["w"], again.values["w"])
    assert first.after < first.before / 4


def test_the_tensors_of_least_held_out_loss_are_kept():
    made = quadratic(GOAL).learn(replayed([Round(60, 0.02), Round(2, 1.0)]), silent)
    assert made.rounds == (Round(60, 0.02),)
    assert float((torch.from_numpy(made.values["w"]) - GOAL).square().mean()) == pytest.approx(made.after)
    assert made.steps == 62


def test_tensors_that_may_not_be_the_result_are_not_kept():
    learner = quadratic(GOAL)
    judge = learner._judge
    learner._judge = lambda tensors: (judge(tensors)[0], False)
    made = learner.learn(replayed([Round(60, 0.02)]), silent)
    assert made.rounds == ()
    assert np.array_equal(made.values["w"], np.ones((3, 4)))
    assert made.after == made.before


def test_a_training_that_diverges_goes_on_from_the_best_tensors():
    made = quadratic(GOAL).learn(replayed([Round(30, 0.02), Round(40, 1.0), Round(60, 0.005)]), silent)
    only = quadratic(GOAL).learn(replayed([Round(30, 0.02)]), silent)
    assert len(made.rounds) == 3
    assert made.after < only.after


def test_an_interrupt_keeps_the_best_so_far():
    def interrupted(share, last, best):
        if best < 0.2:
            raise KeyboardInterrupt

    made = quadratic(GOAL).learn(replayed([Round(10, 0.02)] * 100), interrupted)
    assert made.is_ended
    assert 0 < len(made.rounds) < 100
    assert made.after < 0.2


def test_zeros_are_trained_too():
    learner = quadratic(GOAL)
    learner = Learner(
        {"w": np.ones((3, 4), np.float32), "b": np.zeros(4, np.float32)},
        lambda seed: (lambda t: (t["w"] + t["b"] - GOAL).square().mean() for _ in count()),
        lambda tensors: (float(tensors["b"].abs().max().neg()), True),
        CPU,
    )
    assert np.abs(learner.learn(replayed([Round(50, 0.02)]), silent).values["b"]).max() > 0.01


def test_the_range_test_avoids_rates_that_diverge():
    assert quadratic(GOAL)._first_rate()[0] == RATES[0]
    # A loss that any step makes much larger.
    steep = Learner(
        {"w": np.ones((3, 4), np.float32)},
        lambda seed: (lambda t: 1 + 1e9 * (t["w"] - 1).square().mean() - t["w"].mean() for _ in count()),
        lambda tensors: (1.0, True),
        CPU,
    )
    assert steep._first_rate()[0] == RATES[-1]


def sent(schedule, losses):
    """The rounds of a schedule that is told these losses."""
    found = [next(schedule)]
    for loss in losses:
        try:
            found.append(schedule.send(loss))
        except StopIteration:
            break
    return found


def test_a_bounded_training_ends_in_time_with_a_falling_rate():
    passed = iter(np.arange(0, 200, 2.5))
    found = sent(bounded(0.01, 100.0, 0.05, lambda: float(next(passed))), [1.0] * 100)
    assert len(found) == 40
    assert {one.steps for _, one in found} == {50}
    rates = [one.rate for _, one in found]
    assert rates[0] < rates[3] > rates[-1]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 1e-4
    assert not any(one.is_again for _, one in found)


def test_a_slow_machine_makes_fewer_rounds():
    passed = iter(np.arange(0, 2000, 25.0))
    assert len(sent(bounded(0.01, 100.0, 0.05, lambda: float(next(passed))), [1.0] * 100)) == 4


def test_the_rate_falls_where_the_loss_stops_falling():
    falling = [1 / number for number in range(1, 20)]
    found = sent(plateaus(0.01), [*falling, *[1.0] * 100])
    again = [place for place, (_, one) in enumerate(found) if one.is_again]
    assert again == [22, 25, 28]
    assert found[-1][1].rate == pytest.approx(0.01 * 0.3**3)
    assert len(found) == 31


def test_a_training_without_a_bound_ends():
    assert len(sent(plateaus(0.01), [0.99**number for number in range(LONGEST + 10)])) == LONGEST
