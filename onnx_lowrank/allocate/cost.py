"""The costs of a layer's options, in the unit of any budget: exact integers.

Most costs grow linearly with the rank: cost(fold, k, j) = j · slope + constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.documents.recipes import Recipe

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Line:
    """The cost of one (fold, k) of a layer as a function of the rank: j · slope + constant.

    Attributes:
        keep: The cost of the kept layer.
        slope: The cost of one more rank.
        constant: The cost that does not depend on the rank.
    """

    keep: int
    slope: int
    constant: int


class Tariff(Protocol):
    """The costs of one layer, kept or decomposed."""

    @property
    def keep(self) -> int:
        """The cost of the kept layer."""

    def costs(self, fold: Fold, k: int, ranks: Ints) -> Ints:
        """The costs of a decomposition at these ranks, ascending."""

    def cost(self, option: Option | None) -> int:
        """The cost of an option; None is the kept layer."""

    def is_cheaper(self, costs: Ints, keep: int | None = None) -> NDArray[np.bool_]:
        """Whether each of these costs is enough below that of the kept layer to be worth a decomposition.

        Args:
            costs: The costs.
            keep: What several kept layers cost together, if the costs are those of several layers.
        """

    def together(self, option: Option, ranks: Ints) -> Ints:
        """The costs at some ranks of a lowering that changes several layers together.

        Args:
            option: An option of this lowering; the ranks are multiples of its rank.
            ranks: The ranks, ascending.
        """

    def members(self, widths: Ints) -> tuple[Ints, ...]:
        """The own costs at some widths of the layer's partners and of the layer; width 0 is the full one."""

    def lowering(self, fold: Fold, k: int) -> Lowering:
        """The operators of the chains that have these costs."""


class Costs(Protocol):
    """The costs of the options of all layers of a model."""

    def line(self, layer: Layer, fold: Fold, k: int) -> Line | None:
        """The line that selects the ranks of a decomposition; None if none should be considered."""

    def tariff(self, layer: Layer) -> Tariff:
        """The costs of a layer's options."""


@dataclass(frozen=True, slots=True)
class Linear:
    """Costs that grow linearly with the rank.

    Attributes:
        of_layer: The cost of a layer, kept (None) or decomposed.
    """

    of_layer: Callable[[Layer, Option | None], int]

    def line(self, layer: Layer, fold: Fold, k: int) -> Line:
        """The line through the costs at the ranks 1 and 2."""
        way = layer.lowerings(k)[0]
        first = self.of_layer(layer, Option(fold, k, 1, way))
        slope = self.of_layer(layer, Option(fold, k, 2, way)) - first
        return Line(self.of_layer(layer, None), slope, first - slope)

    def tariff(self, layer: Layer) -> Tariff:
        """The costs of a layer's options."""
        return _LinearTariff(self, layer)


@dataclass(frozen=True, slots=True)
class _LinearTariff:
    """The `Linear` costs of one layer."""

    costs_of: Linear
    layer: Layer

    @property
    def keep(self) -> int:
        return self.cost(None)

    def costs(self, fold: Fold, k: int, ranks: Ints) -> Ints:
        line = self.costs_of.line(self.layer, fold, k)
        return ranks * line.slope + line.constant

    def cost(self, option: Option | None) -> int:
        return self.costs_of.of_layer(self.layer, option)

    def is_cheaper(self, costs: Ints, keep: int | None = None) -> NDArray[np.bool_]:
        return costs < (self.keep if keep is None else keep)

    def together(self, option: Option, ranks: Ints) -> Ints:
        step = option.j
        first, second = self.cost(option), self.cost(replace(option, j=2 * step))
        return first + (ranks // step - 1) * (second - first)

    def members(self, widths: Ints) -> tuple[Ints, ...]:
        layer, step = self.layer, self.layer.width_step
        made, cost = [], self.costs_of.of_layer
        for whole, *few in zip(
            (*layer.partners, layer), layer.at_width(step), layer.at_width(2 * step), strict=True
        ):
            first, second = (cost(less, None) for less in few)
            costs = first + (widths // step - 1) * (second - first)
            made.append(np.where(widths > 0, costs, cost(whole, None)))
        return tuple(made)

    def lowering(self, fold: Fold, k: int) -> Lowering:
        return self.layer.lowerings(k)[0]


def factor_sizes(layer: Layer, fold: Fold, k: int) -> tuple[int, int]:
    """Parameters of the encoder and of the decoder per unit of rank, over all groups and slices."""
    encoder, decoder = fold.kernels(layer.kernel)
    return layer.c * prod(encoder), k * layer.f * prod(decoder)


def own_sizes(layer: Layer, option: Option) -> tuple[int, int]:
    """`factor_sizes` of an option, with 0 for a factor that counts as another layer's."""
    encoder, decoder = factor_sizes(layer, option.fold, option.k)
    if layer.holds_factor(option):
        return encoder, decoder
    return (0, decoder) if option.lowering is Lowering.SHARED else (encoder, 0)


def spared(layer: Layer, recipe: Recipe) -> str:
    """Why a recipe gives a layer no chain of its own, a phrase; "" if it may."""
    if not recipe.folds:
        return "the recipe narrows pairs of layers only"
    if not recipe.tables and any(use.reads_indices for use in layer.uses):
        return "the recipe leaves tables as they are"
    if not layer.slices:
        return "its operator has groups, and --lowering group-free writes none"
    return ""


def allowed(layer: Layer, recipe: Recipe) -> dict[Fold, tuple[int, ...]]:
    """The folds and slice counts that a recipe allows and a layer offers.

    A fold of the recipe stands for the fold with which it coincides on the layer's kernel (`Fold.on`). If the
    layer offers none of the recipe's folds, its first fold is used instead. There are none for a layer that
    the recipe spares (`spared`).
    """
    if spared(layer, recipe):
        return {}
    wanted = {fold.on(layer.kernel) for fold in recipe.folds}
    folds = [fold for fold in layer.folds if fold.on(layer.kernel) in wanted] or layer.folds[:1]
    ks = tuple(k for k in layer.slices if recipe.groups is None or k in recipe.groups)
    return {fold: ks for fold in folds if ks}
