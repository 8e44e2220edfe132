"""The distance of a low-rank model from the original: what distillation makes small.

Rules:

1. The losses of all float outputs count alike, after each is divided by its value before the training. The
   caches that a decoder keeps for its next call do not count, nor do outputs that no trained tensor reaches.
2. The errors of inner features count together as much as the outputs (`distil.features`): a sample shows
   more there than at the outputs. The last feature counts for a half, and each one before for half as much
   as the next. All count alike where no gradient passes to the outputs.
3. Positions that a mask hides count nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_lowrank.distil.losses import Known, Loss
from onnx_lowrank.engines.classes import Classes, are_shares
from onnx_lowrank.engines.embedding import Embedding
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.padding import Padding
from onnx_lowrank.engines.spread import Spread, is_batched

Arrays = Mapping[str, NDArray[Any]]


class Seen:
    """Collects facts about the original's outputs, batch by batch."""

    def __init__(self) -> None:
        self._classes: dict[str, Classes] = {}
        self._embeddings: dict[str, Embedding] = {}
        self._spreads: dict[str, Spread] = {}
        self._shares: dict[str, bool] = {}
        self._counts: dict[str, int] = {}

    def add(self, outputs: Arrays, feed: Feed) -> None:
        """Add the outputs on a batch."""
        for name, value in outputs.items():
            y = np.asarray(value, np.float64)
            self._spreads.setdefault(name, Spread()).add(y, batched=is_batched(feed, y))
            self._counts[name] = self._counts.get(name, 0) + y.size
            self._classes.setdefault(name, Classes()).add(y, feed)
            if y.ndim > 1:
                self._embeddings.setdefault(name, Embedding()).add(y, y)
                self._shares[name] = self._shares.get(name, True) and are_shares(y)

    def known(self) -> dict[str, Known]:
        """The facts about every output."""
        every = list(self._classes.values())
        found = {}
        for name, spread in self._spreads.items():
            embedding = self._embeddings.get(name)
            is_direction = embedding is not None and embedding.is_embedding
            power = spread.power() or spread.energy
            found[name] = Known(
                power=power / self._counts[name] if power > 0 else 1.0,
                is_class=self._classes[name].are_classes(every) and not is_direction,
                is_share=self._shares.get(name, False),
                is_direction=is_direction,
            )
        return found


@dataclass(slots=True)
class Target:
    """The losses of a model.

    Attributes:
        outputs: The losses of every output, by the names of their kinds.
        inner: E(y − ȳ)² of the elements of every inner feature.
        padding: The padding of the inputs.
        device: The device that computes.
        starts: The value of each loss before the training.
    """

    outputs: Mapping[str, Mapping[str, Loss]]
    inner: Mapping[str, float]
    padding: Padding
    device: torch.device
    starts: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the values that are compared."""
        return (*self.outputs, *self.inner)

    def terms(
        self, got: Mapping[str, Tensor], wanted: Arrays, feed: Feed, names: Iterable[str] | None = None
    ) -> dict[tuple[str, str], Tensor]:
        """The losses on a batch, by the name of the value and of the kind.

        Args:
            got: The values of the low-rank model.
            wanted: Those of the original.
            feed: The inputs.
            names: The values to compare; None compares all.
        """
        found: dict[tuple[str, str], Tensor] = {}
        for name in self.names if names is None else names:
            # The shape of an output may depend on values, as behind NonMaxSuppression.
            if name not in wanted or got[name].shape != wanted[name].shape:
                continue
            theirs, ours = self._rows(got[name], self._hidden(name, wanted[name], feed))
            if not len(ours):
                continue
            for kind, loss in self.outputs.get(name, {}).items():
                found[name, kind] = loss(theirs, ours)
            if name in self.inner:
                found[name, _INNER] = (theirs - ours).square().mean() / self.inner[name]
        return found

    def loss(self, got: Mapping[str, Tensor], wanted: Arrays, feed: Feed) -> Tensor:
        """The loss on a batch: about 2 before the training, if there are features, else 1."""
        return self.total(self.terms(got, wanted, feed))

    def total(self, terms: Mapping[tuple[str, str], Any]) -> Any:
        """The mean of the losses of outputs, and that of features, each over its value at the start."""
        scaled = {key: value / self.starts.get(key, 1.0) for key, value in terms.items()}
        outputs = [value for (_, kind), value in scaled.items() if kind != _INNER]
        inner = [(self.weights[name], value) for (name, kind), value in scaled.items() if kind == _INNER]
        found = sum(outputs) / max(len(outputs), 1)
        return found + sum(weight * value for weight, value in inner)

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the features, of sum 1."""
        halves = [2.0**place if self.outputs else 1.0 for place in range(len(self.inner))]
        return {name: half / sum(halves) for name, half in zip(self.inner, halves, strict=True)}

    def _hidden(self, name: str, values: NDArray[Any], feed: Feed) -> NDArray[Any]:
        """A value with NaN at hidden positions, which the second axis of features counts like their mask."""
        padding = replace(self.padding, axes={name: 1}) if name in self.inner else self.padding
        return padding.hide(name, values, feed)

    def _rows(self, got: Tensor, wanted: NDArray[Any]) -> tuple[Tensor, Tensor]:
        """The rows along the last axis that are finite in the original and shown."""
        ours = torch.from_numpy(np.asarray(wanted, np.float32)).to(self.device)
        width = ours.shape[-1] if ours.ndim > 1 else 1
        ours, theirs = ours.reshape(-1, width), got.float().reshape(-1, width)
        shown = torch.isfinite(ours).all(dim=1)
        return (theirs, ours) if bool(shown.all()) else (theirs[shown], ours[shown])


_INNER = "feature"
"""The kind of the loss of an inner feature."""
