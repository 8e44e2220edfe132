"""The ranks that a plan may choose from: cheaper than the layer, in the blocks that a target computes in."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lowrank.allocate.cost import allowed, cost, linear, macs
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Budget
from onnx_lowrank.documents.recipes import Recipe


@dataclass(frozen=True, slots=True)
class Grid:
    """A budget, and the block of channels to which ranks are aligned.

    Kernels that compute in blocks pad what does not fill one, or fall back to slower ones. ONNX Runtime's
    blocked convolutions need it of the channels of every group: of a sliced convolution those are the
    c / k that the encoder reads and the rank j.

    Attributes:
        budget: What options cost. Of latency there is no formula: `Times` has it, and what saves no MACs is
            not measured.
        block: Ranks are multiples of it, and so are the channels of a sliced convolution's groups.
    """

    budget: Budget
    block: int = 1

    @property
    def counted(self) -> Budget:
        """What is counted to know which ranks are cheaper."""
        return Budget.MACS if self.budget is Budget.LATENCY else self.budget

    def ranks(self, layer: Layer, fold: Fold, k: int) -> range:
        """The ranks below full rank, ascending, at which a decomposition is cheaper than the layer.

        Args:
            layer: The layer.
            fold: A fold that it offers.
            k: A number of slices that it offers.

        Raises:
            InputError: MACs are the budget and a dimension that they need is unknown. Under a latency budget
                there are no ranks then.
        """
        if self.budget is Budget.LATENCY and macs(layer) is None:
            return range(0)
        slope, constant = linear(layer, fold, k, self.counted)
        spare = cost(layer, None, self.counted) - constant - 1
        fits = k == 1 or not layer.kernel or layer.shape[2] // k % self.block == 0
        if slope <= 0 or spare < slope or not fits:
            return range(0)
        top = min(layer.full_rank(fold, k) - 1, spare // slope)
        return range(self.block, top + 1, self.block)

    def wanted_spectra(self, layer: Layer, recipe: Recipe) -> dict[Fold, tuple[int, ...]]:
        """The folds, and for each the slice counts, whose spectra `candidates` needs.

        Those with an option that is cheaper than the layer, and k = 1 of the same fold, whose largest
        singular value is the norm of the spectral measures. Empty where the layer can only be kept.

        Raises:
            InputError: The budget counts MACs and a dimension that they need is unknown.
        """
        wanted = {}
        for fold, ks in allowed(layer, recipe).items():
            if cheaper := {k for k in ks if self.ranks(layer, fold, k)}:
                wanted[fold] = tuple(sorted(cheaper | {1}))
        return wanted
