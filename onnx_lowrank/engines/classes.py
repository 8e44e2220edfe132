"""Whether the elements of an output's rows stand for classes, so that their largest one says something.

The rule, on the input model's values. The rows of a float output lie along its last axis. If all of them are
probabilities (no element below 0, sum 1), they are classes. Otherwise they may be logits, which have no mark
of their own, so they are classes unless one of these holds:

1. The output has one element in a row, or fewer than two axes.
2. It has four axes or more: the last axis of an image is its width, that of a cache of keys and values the
   size of a head.
3. It is a state: it has the shape of a float input, beside which the model has another input, so that the
   caller hands it back (the hidden state of a recurrent model). This does not hold if all float outputs have
   such shapes, because the model must give more than its state.
4. It has three axes, and another output has rows of probabilities for the same leading axes: a detector gives
   each box its classes there, and its position here.

So the logits of a language model (batch, sequence, vocabulary) and of a classifier (batch, classes) are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SUM = 1e-2  # tolerance of a sum of 1, for rounded probabilities


class Classes:
    """The evidence of one output, over all feeds."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] = ()
        self._is_shares = True
        self._is_state = True

    def add(self, y: NDArray[Any], feed: Mapping[str, NDArray[Any]]) -> None:
        """Add the input model's output on one feed.

        Args:
            y: The output, float64 or complex128.
            feed: The inputs of the model.
        """
        self._shape = y.shape
        self._is_state &= len(feed) > 1 and any(
            array.shape == y.shape and array.dtype.kind not in "biuOSU" for array in feed.values()
        )
        self._is_shares = self._is_shares and y.ndim > 1 and are_shares(y)

    @property
    def may_be(self) -> bool:
        """Whether the shape alone allows classes (rule 1)."""
        return len(self._shape) >= 2 and self._shape[-1] >= 2

    def are_classes(self, others: Sequence[Classes]) -> bool:
        """Whether the rows stand for classes.

        Args:
            others: The evidence of all float outputs of the model, with this one.
        """
        if not self.may_be or self._is_shares:
            return self.may_be
        is_state = self._is_state and not all(other._is_state for other in others)
        return not (len(self._shape) > 3 or is_state or any(map(self._is_beside, others)))

    def _is_beside(self, other: Classes) -> bool:
        return (
            len(self._shape) == 3
            and other.may_be
            and other._is_shares
            and other._shape[:-1] == self._shape[:-1]
        )


def are_shares(y: NDArray[Any]) -> bool:
    """Whether all finite rows are probabilities."""
    if y.dtype.kind == "c":
        return False
    finite = np.isfinite(y).all(axis=-1)
    rows = y if finite.all() else y[finite]
    return bool(np.all(rows >= 0) and np.all(np.abs(rows.sum(axis=-1) - 1) <= _SUM))
