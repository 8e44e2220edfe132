"""How one layer is decomposed: its fold, its slices, its rank and the operators of its chain."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache


class Fold(StrEnum):
    """How a weight tensor is unfolded into a matrix: which kernel axes belong to the encoder.

    The order of the members is the order in which ties are broken.
    """

    ENCODE = "encode"
    ROWS = "rows"
    COLS = "cols"
    DECODE = "decode"

    def encoder_axes(self, n: int) -> tuple[int, ...]:
        """The spatial axes (of `n`) whose kernel the encoder holds; the decoder holds the others.

        ROWS and COLS are defined for two spatial axes only.
        """
        match self:
            case Fold.ENCODE:
                return tuple(range(n))
            case Fold.ROWS:
                return (1,)
            case Fold.COLS:
                return (0,)
            case Fold.DECODE:
                return ()

    @lru_cache(maxsize=1024)  # Every cost of every option asks for this.
    def kernels(self, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Split a kernel into the encoder's and the decoder's; an axis of the other one has size 1."""
        axes = self.encoder_axes(len(kernel))
        encoder = tuple(n if axis in axes else 1 for axis, n in enumerate(kernel))
        decoder = tuple(1 if axis in axes else n for axis, n in enumerate(kernel))
        return encoder, decoder

    def on(self, kernel: tuple[int, ...]) -> Fold:
        """The first fold that splits a kernel as this one does.

        Folds coincide if axes have size 1 (matrices, 1×1 and 5×1 kernels). ROWS and COLS stand for ENCODE if
        the kernel does not have exactly two axes.
        """
        if len(kernel) != 2 and self in (Fold.ROWS, Fold.COLS):
            return Fold.ENCODE
        candidates = tuple(Fold) if len(kernel) == 2 else (Fold.ENCODE, Fold.DECODE)
        return next(fold for fold in candidates if fold.kernels(kernel) == self.kernels(kernel))

    @classmethod
    def distinct(cls, kernel: tuple[int, ...]) -> tuple[Fold, ...]:
        """The folds of a kernel that differ from each other, in tie order."""
        return tuple(fold for fold in cls if fold.on(kernel) is fold)


class Lowering(StrEnum):
    """The operators of a chain; all compute the same result.

    NATIVE uses the layer's own kind: Conv for convolutions, MatMul for matrices, batched MatMul for slices of
    matrices. CONV writes the slices of a matrix as a grouped Conv; POINTWISE writes both factors of a matrix
    as Convs with a kernel of size 1. MATMUL writes a convolution with a kernel of size 1 as MatMuls. SPLIT
    writes each slice of a convolution as a convolution of its own, without groups. NARROW writes no chain:
    one factor selects channels, or has one block for each head of attention, so that partners of the layer
    take it in; the layer's own node applies the other. SHARED writes one encoder for several layers that
    read the same tensor (`Layer.siblings`), and a decoder for each of them. SUMMED writes an encoder for each
    of the layers whose results are added (`Layer.addends`), and one decoder behind the sum. SPARSE writes a
    table as a low-rank one plus rows that stay as they are (`Layer.kept_per_rank`).
    """

    NATIVE = "native"
    CONV = "conv"
    POINTWISE = "pointwise"
    MATMUL = "matmul"
    SPLIT = "split"
    NARROW = "narrow"
    SHARED = "shared"
    SUMMED = "summed"
    SPARSE = "sparse"


class Style(StrEnum):
    """Which lowerings a plan may choose, where a layer has several; styles can be combined.

    CONV writes matrices with POINTWISE, MATMUL writes convolutions of size 1 with MATMUL, and GROUP_FREE
    writes no grouped convolution. Without a style, chains are native, unless measured times prefer others.
    """

    CONV = "conv"
    MATMUL = "matmul"
    GROUP_FREE = "group-free"


@dataclass(frozen=True, slots=True, order=True)
class Option:
    """One way to decompose a layer: fold, number of slices k, rank j of every slice, and its operators.

    Attributes:
        fold: Which kernel axes belong to the encoder.
        k: The number of slices.
        j: The rank of every slice.
        lowering: The operators of the chain.
        encoder: For a shared encoder, the id of the first layer that shares it, in graph order: the encoder
            counts as this layer's, and is written before it. "" for other lowerings.
    """

    fold: Fold
    k: int
    j: int
    lowering: Lowering = Lowering.NATIVE
    encoder: str = ""

    def __str__(self) -> str:
        """The option as short text: encode k=2 j=16, with the lowering unless it is native."""
        text = f"{self.fold} k={self.k} j={self.j}"
        return text if self.lowering is Lowering.NATIVE else f"{text} {self.lowering}"
