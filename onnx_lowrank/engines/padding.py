"""Padding: positions of a text that a mask hides, and that the model ignores.

Texts of several lengths are made one array by padding. The activations at these positions, often half of all,
change no result, so nothing should be fitted to them and no error there counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.engines.engine import Feed


@dataclass(frozen=True, slots=True)
class Padding:
    """The padding of a model's inputs.

    Attributes:
        mask: The input that hides positions with 0, shape (samples, positions); "" if none does.
        axes: For each output with elements of hidden positions, the axis of the positions; the first axis
            counts the samples.
        layers: The layers with a vector for every position, samples first. Hidden positions change no other
            vector of theirs.
        removable: The inputs, with the mask, whose second axis counts positions and may end behind the last
            shown one; none if the model needs all positions.
    """

    mask: str = ""
    axes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    layers: frozenset[str] = frozenset()
    removable: frozenset[str] = frozenset()

    def shown(self, feed: Feed) -> NDArray[np.bool_] | None:
        """Whether each position counts, shape (samples, positions); None if all do."""
        if not self.mask or self.mask not in feed:
            return None
        shown = np.asarray(feed[self.mask]) != 0
        return None if shown.all() else shown

    def ends(self, feed: Feed) -> NDArray[np.intp]:
        """The number of positions up to the last shown one, at least 1, of every sample: shape (samples,)."""
        shown = np.asarray(feed[self.mask]) != 0
        ends: NDArray[np.intp] = np.where(shown, np.arange(1, shown.shape[1] + 1), 1).max(axis=1, initial=1)
        return ends

    def trim(self, feed: Feed) -> Feed:
        """A feed without the positions behind the last one that a sample shows, if they are removable."""
        if not self.removable:
            return feed
        end = int(self.ends(feed).max())
        return {name: array[:, :end] if name in self.removable else array for name, array in feed.items()}

    def hide(self, output: str, values: NDArray[Any], feed: Feed) -> NDArray[Any]:
        """An output with NaN at hidden positions, which leaves them out of comparisons.

        Args:
            output: The name of the output.
            values: Its elements, floats.
            feed: The inputs that gave it.
        """
        shown, axis = self.shown(feed), self.axes.get(output)
        if shown is None or axis is None:
            return values
        # Slices, as another feed may give an output of fewer axes.
        if values.shape[:1] + values.shape[axis : axis + 1] != shown.shape:
            return values
        hidden = np.array(values)
        np.moveaxis(hidden, axis, 1)[~shown] = np.nan
        return hidden


NO_PADDING = Padding()
