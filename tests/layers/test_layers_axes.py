"""Axes through Reshape and Transpose: followed symbolically, as NumPy lays out the elements."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.layers.axes import INSIDE, Part, axes_of, inside, permuted, regrouped, shared_heads


def indices(axes, sizes):
    """For every element, in the shape of the axes, its index along every original axis."""
    shape = [int(np.prod([part.size for part in axis])) for axis in axes]
    parts = [part for axis in axes for part in axis]
    made = np.zeros((len(sizes), *[part.size for part in parts]), int)
    for position, part in enumerate(parts):
        steps = np.arange(part.size) * part.stride
        made[part.origin] += steps.reshape(-1, *[1] * (len(parts) - position - 1))
    return made.reshape(len(sizes), *shape)


RESHAPES = [
    ((2, 6, 5), (2, 2, 3, 5)),
    ((2, 3, 4), (24,)),
    ((2, 3, 4), (6, 4)),
    ((4, 6), (2, 2, 3, 2)),
    ((1, 6, 1), (6, 1, 1)),
    ((2, 1, 12), (1, 2, 3, 1, 4)),
]


@pytest.mark.parametrize(("sizes", "target"), RESHAPES)
def test_a_reshape_joins_and_splits_axes_as_numpy_does(sizes, target):
    axes = axes_of(range(len(sizes)), sizes)
    made = regrouped(axes, target)
    expected = np.indices(sizes).reshape(len(sizes), *target)
    np.testing.assert_array_equal(indices(made, sizes), expected)
    assert regrouped(made, sizes) == axes


def test_a_reshape_that_cuts_across_axes_is_not_followed():
    assert regrouped(axes_of((0, 1), (4, 3)), (3, 4)) is None
    assert regrouped(axes_of((0, 1), (4, 3)), (2, 3)) is None
    assert regrouped(axes_of((0, 1), (4, 3)), (4, 3, 2)) is None


def test_axes_are_permuted_and_joined_again():
    axes = axes_of((0, 1, INSIDE), (2, 6, 5))
    split = regrouped(axes, (2, 2, 3, 5))
    turned = permuted(split, (0, 2, 1, 3))
    assert turned[1:3] == ((Part(1, 1, 3),), (Part(1, 3, 2),))
    assert permuted(turned, (0, 2, 1, 3)) == split
    assert regrouped(split, (2, 6, 5)) == axes
    assert permuted(axes, (0, 0, 1)) is None
    assert inside(split, 5) == 3
    assert inside(regrouped(axes, (12, 5)), 5) == 1
    assert inside(axes_of((0, INSIDE), (2, 6)), 3) is None


def test_heads_that_share_follow_each_other():
    many, few = [Part(1, 1, 6)], [Part(1, 2, 3)]
    assert shared_heads(many, many) == 1
    assert shared_heads(many, few) == 2
    assert shared_heads([Part(1, 1, 3), Part(2, 1, 2)], [Part(1, 1, 3)]) == 2
    # Head h of the queries meets head h modulo 3.
    assert shared_heads(many, [Part(1, 1, 3)]) is None
    assert shared_heads([Part(2, 1, 2), Part(1, 1, 3)], [Part(1, 1, 3)]) is None
    assert shared_heads(many, [Part(7, 1, 3)]) is None
    assert shared_heads(few, many) is None
