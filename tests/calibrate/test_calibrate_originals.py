"""Outputs of the input model, kept between comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.calibrate.originals import Originals


class Model:
    """Counts its runs."""

    def __init__(self, value):
        self.value = value
        self.runs = 0

    def __call__(self):
        self.runs += 1
        return {"y": self.value}


def test_a_batch_is_computed_once():
    kept, first, second = Originals(), Model(np.zeros(3)), Model(np.ones(3))
    for _ in range(3):
        assert kept.outputs(0, first)["y"] is first.value
        assert kept.outputs(1, second)["y"] is second.value
    assert (first.runs, second.runs) == (1, 1)


def test_memory_is_bounded():
    kept, models = Originals(memory=47), [Model(np.zeros(3)) for _ in range(3)]
    for _ in range(2):
        for number, model in enumerate(models):
            kept.outputs(number, model)
    assert [model.runs for model in models] == [1, 2, 2]


@pytest.mark.parametrize("value", [[np.zeros(2)], {1: 0.5}, np.array(["text"], object), None])
def test_outputs_of_unknown_size_are_not_kept(value):
    kept, model = Originals(), Model(value)
    assert kept.outputs(0, model)["y"] is kept.outputs(0, model)["y"]
    assert model.runs == 2
