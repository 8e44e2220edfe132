"""The rest of a model behind its first layers, with the tensors there on a few inputs.

A change of one layer does not reach what runs before it. So that part runs once for all changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.helper import np_dtype_to_tensor_dtype

from onnx_lowrank.engines.engine import Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.probe.suffix import Cut, Cuts, behind


class Tails:
    """The tails of a model before groups of its layers."""

    def __init__(
        self,
        model: Model,
        walk: Walk,
        groups: Sequence[Sequence[Binding]],
        feeds: Sequence[Feed],
        engine: Engine,
        memory: int,
    ) -> None:
        """Run the model once, and keep the tensors before every group but the first.

        Args:
            model: The model.
            walk: Its walk.
            groups: Groups of layers, in graph order.
            feeds: The inputs.
            engine: Runs the model.
            memory: The most bytes to keep. If they do not suffice, every tail is the whole model.
        """
        self._feeds = feeds
        self._values: list[dict[str, NDArray[Any]]] = []
        cuts = Cuts(model, walk)
        self._cuts: list[Cut | None] = [None, *(cuts.before(group) for group in groups[1:])]
        names = dict.fromkeys(name for cut in self._cuts if cut is not None for name in cut.crossing)
        if names:
            self._run(cuts.returning(names), tuple(names), engine, memory)

    def tail(self, group: int, copy: Model) -> tuple[Model, Sequence[Feed]]:
        """The tail before a group of layers, and its inputs.

        Args:
            group: The number of the group.
            copy: The model, or a copy in which only layers of the group differ.
        """
        cut = self._cuts[group]
        if cut is None or not cut.crossing or not self._values:
            return copy, self._feeds
        kinds = {name: np_dtype_to_tensor_dtype(self._values[0][name].dtype) for name in cut.crossing}
        tail = behind(copy, cut, kinds)
        if tail is None:
            return copy, self._feeds
        taken = {value.name for value in tail.proto.graph.input}
        feeds = ({**feed, **values} for feed, values in zip(self._feeds, self._values, strict=True))
        return tail, [{name: array for name, array in feed.items() if name in taken} for feed in feeds]

    def _run(self, model: Model, names: Sequence[str], engine: Engine, memory: int) -> None:
        """Compute the tensors for all inputs; keep none if that fails or takes too much memory."""
        kept: list[dict[str, NDArray[Any]]] = []
        try:
            with engine.open(model) as run:
                for feed in self._feeds:
                    given = run(feed)
                    values = {name: given[name] for name in names}
                    if not all(isinstance(v, np.ndarray) and v.dtype.kind != "O" for v in values.values()):
                        return
                    memory -= sum(value.nbytes for value in values.values())
                    if memory < 0:
                        return
                    kept.append(values)
        except (UnsupportedError, RejectedError):
            return
        self._values = kept
