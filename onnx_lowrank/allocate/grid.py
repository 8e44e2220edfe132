"""The ranks for a plan to choose from: cheaper than the layer, and fit for the target's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate import layout
from onnx_lowrank.allocate.cost import Costs, allowed
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold
from onnx_lowrank.documents.recipes import Recipe

C = TypeVar("C", bound=Costs, covariant=True)
D = TypeVar("D", bound=Costs)
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Grid(Generic[C]):
    """The costs of a model's options, and the block of channels to which ranks are aligned.

    Kernels that compute in blocks pad channels to a full block, or fall back to slower kernels. ONNX
    Runtime's blocked convolutions need full blocks in every group: in a sliced convolution, these are the
    c / k channels that the encoder reads, and the rank j.

    Attributes:
        costs: The costs of options.
        block: The ranks, and the channels of a sliced convolution's groups, are multiples of it.
        blocked: Whether convolutions keep to the ranks and widths of ONNX Runtime's blocked layout, as far as
            `layout` asks for it.
    """

    costs: C
    block: int = 1
    blocked: bool = False

    def at(self, costs: D) -> Grid[D]:
        """The same ranks with other costs."""
        return Grid(costs, self.block, self.blocked)

    def ranks(self, layer: Layer, fold: Fold, k: int) -> range:
        """The ranks below full rank, ascending, at which a decomposition is cheaper than the layer.

        Args:
            layer: The layer.
            fold: A fold that it offers.
            k: A number of slices that it offers.

        Raises:
            InputError: The costs depend on an unknown dimension.
        """
        line = self.costs.line(layer, fold, k)
        fits = k == 1 or not layer.kernel or layer.shape[2] // k % self.block == 0
        if line is None or not fits:
            return range(0)
        spare = line.keep - line.constant - 1
        if line.slope <= 0 or spare < line.slope:
            return range(0)
        top = min(layer.full_rank(fold, k) - 1, spare // line.slope)
        return range(self.block, top + 1, self.block)

    def offered(self, layer: Layer, fold: Fold, k: int) -> Ints:
        """The ranks that a plan can choose: those of `ranks` that the blocked layout holds.

        Args:
            layer: The layer.
            fold: A fold that it offers.
            k: A number of slices that it offers.

        Raises:
            InputError: The costs depend on an unknown dimension.
        """
        ranks = np.array(self.ranks(layer, fold, k), dtype=np.int64)
        return ranks[layout.holds_ranks(layer, k, ranks)] if self.blocked else ranks

    def widths(self, layer: Layer) -> Ints:
        """The widths, below its own, to which a layer can be narrowed, ascending.

        Args:
            layer: A layer with partners.
        """
        step = layer.width_step * self.block
        widths = np.arange(step, layer.width, step, dtype=np.int64)
        return widths[layout.holds_widths(layer, widths)] if self.blocked else widths

    def together(self, layer: Layer, full: int) -> Ints:
        """The ranks below full rank of a factor that layers share, ascending.

        Args:
            layer: Any of these layers.
            full: Their full rank.
        """
        ranks = np.arange(self.block, full, self.block, dtype=np.int64)
        return ranks[layout.holds_ranks(layer, 1, ranks)] if self.blocked else ranks

    def wanted_spectra(self, layer: Layer, recipe: Recipe) -> dict[Fold, tuple[int, ...]]:
        """The folds, and for each the slice counts, whose spectra `candidates` needs.

        These are the slice counts with an option that is cheaper than the layer, and k = 1 of the same fold,
        because its largest singular value is the norm in the spectral measures. Empty if the layer can only
        be kept.

        Raises:
            InputError: The costs depend on an unknown dimension.
        """
        wanted = {}
        for fold, ks in allowed(layer, recipe).items():
            if cheaper := {k for k in ks if self.offered(layer, fold, k).size}:
                wanted[fold] = tuple(sorted(cheaper | {1}))
        return wanted
