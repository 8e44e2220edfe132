"""Several passes over the data that together run the model once.

Each pass needs the activations of some layers. It starts at the cut before the first of them, from tensors
that the pass before it left on disk, and ends with the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx.helper import np_dtype_to_tensor_dtype

from onnx_lowrank.calibrate.shelf import Shelved
from onnx_lowrank.engines.engine import Feed, Run, UnsupportedError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.probe.suffix import START, Cuts, behind


class Relay(Shelved):
    """The parts of a model for consecutive passes; a context manager that keeps a temporary folder."""

    def __init__(
        self, model: Model, walk: Walk, groups: Sequence[Sequence[Binding]], memory: int | None = None
    ) -> None:
        """Find the cuts.

        Args:
            model: The model.
            walk: Its walk.
            groups: The layers of every pass, sorted by `Cuts.position`.
            memory: The most bytes of tensors in memory; None for the usual ones.
        """
        self._memory = memory
        cuts = Cuts(model, walk)
        self._cuts = [START, *(cuts.before(group) for group in groups[1:])]
        self._kinds: dict[str, int] = {}
        self._kept: set[tuple[str, int]] = set()
        self._taken: tuple[str, ...] = ()
        self._read: tuple[str, ...] = ()
        self._fed: tuple[str, ...] = ()
        self._new: tuple[str, ...] = ()

    def part(self, number: int, copy: Model, wanted: Sequence[str]) -> Model | None:
        """The part of the model for one pass; call it for one pass after the other.

        Args:
            number: The number of the pass.
            copy: The model, with further outputs.
            wanted: The outputs that the pass needs.

        Returns:
            The part; None if the pass before left all that this one needs.
        """
        cut = self._cuts[number]
        for name, batch in [key for key in self._kept if key[0] not in cut.crossing]:
            self._shelf.drop((name, False), batch)
            self._kept.remove((name, batch))
        following = self._cuts[number + 1].crossing if number + 1 < len(self._cuts) else ()
        self._new = tuple(name for name in following if name not in cut.crossing)
        needed = (name for name in wanted if name not in cut.crossing)
        part = behind(copy, cut, self._kinds, tuple(dict.fromkeys((*needed, *self._new))))
        inputs = [] if part is None else [value.name for value in part.proto.graph.input]
        self._taken = cut.crossing  # also those that only the caller wants
        self._read = tuple(name for name in inputs if name in cut.crossing)
        self._fed = tuple(name for name in inputs if name not in cut.crossing)
        return part

    def fed(self, feed: Feed) -> dict[str, Any]:
        """Those inputs of the model that the part takes."""
        return {name: feed[name] for name in self._fed}

    def run(self, run: Run, batch: int, feed: Feed) -> dict[str, Any]:
        """Run the part on one batch, and keep what the next pass needs.

        Args:
            run: Runs the part.
            batch: The number of the batch.
            feed: The inputs of the model.

        Returns:
            The outputs of the part, and the tensors that it takes from the pass before.

        Raises:
            UnsupportedError: A value between two passes is no tensor of numbers.
            InputError: The disk is full.
        """
        taken = self.taken(batch)
        found = run(self.given(taken, feed))
        self.keep(batch, found)
        return taken | found

    @property
    def new(self) -> tuple[str, ...]:
        """The outputs of the part that the next pass takes."""
        return self._new

    def taken(self, batch: int) -> dict[str, Any]:
        """The tensors of one batch that the pass takes from the pass before."""
        return {name: self._shelf.get((name, False), batch) for name in self._taken}

    def given(self, taken: Mapping[str, Any], feed: Feed) -> dict[str, Any]:
        """The inputs of the part on one batch.

        Args:
            taken: What it takes from the pass before.
            feed: The inputs of the model.
        """
        return {name: taken[name] for name in self._read} | self.fed(feed)

    def keep(self, batch: int, found: Mapping[str, Any]) -> None:
        """Keep what the next pass takes of one batch.

        Args:
            batch: The number of the batch.
            found: The outputs of the part.

        Raises:
            UnsupportedError: A value between two passes is no tensor of numbers.
            InputError: The disk is full.
        """
        for name in self._new:
            value = found[name]
            if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind == "O":
                raise UnsupportedError(f"the value {name!r} between two passes is no tensor of numbers")
            self._kinds[name] = np_dtype_to_tensor_dtype(value.dtype)
            self._shelf.put((name, False), batch, np.asarray(value, order="C"))
            self._kept.add((name, batch))
