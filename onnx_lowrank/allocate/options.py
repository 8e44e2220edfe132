"""The options of a layer: every decomposition worth considering, with its cost and its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.allocate.cost import Costs, Ints, Tariff, allowed
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.core.layer import Layer, shared_full_rank
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.measures import Errors, Floats

_FOLDS = tuple(Fold)
_DIGITS = 9
_LARGEST = 300
_POWERS = np.array([float(f"1e{n}") for n in range(-_LARGEST, _LARGEST + 1)])


@dataclass(frozen=True, slots=True)
class Candidates:
    """The choices for one layer as parallel arrays; index 0 keeps the layer.

    Attributes:
        layer: The layer's id.
        fold: Index of the fold in `Fold`'s order; -1 for keep.
        k: Slice counts; 0 for keep.
        j: Ranks; 0 for keep.
        full: Full rank of (fold, k); 0 for keep.
        cost: Costs in the budget's unit; every option is cheaper than keep.
        error: Errors in the recipe's measure, rounded to 9 significant digits; 0 for keep.
        price: The costs that the recipe trades against error, if they are not those of the budget.
        block: The ranks are multiples of it.
        tariff: The source of the costs; None if all chains use the native operators.
        reason: Why there is no choice but to keep the layer, if neither costs nor ranks are the reason.
        yields: How much of its cost it gives up under the aggregate ratio, relative to other layers.
        encoder: For options that share an encoder, the id of the first layer of those that share it.
    """

    layer: str
    fold: Ints
    k: Ints
    j: Ints
    full: Ints
    cost: Ints
    error: Floats
    price: Ints | None = None
    block: int = 1
    tariff: Tariff | None = None
    reason: str = ""
    yields: float = 1.0
    encoder: str = ""

    def only_keep(self, reason: str) -> Candidates:
        """The same layer with no choice but to keep it, for a reason, a phrase."""
        names = ("fold", "k", "j", "full", "cost", "error")
        price = None if self.price is None else self.price[:1]
        return replace(self, price=price, reason=reason, **{name: getattr(self, name)[:1] for name in names})

    def option(self, index: int) -> Option | None:
        """The option at an index, or None for keep."""
        if index == 0:
            return None
        fold, k, j = _FOLDS[self.fold[index]], int(self.k[index]), int(self.j[index])
        way = Lowering.NATIVE if self.tariff is None else self.tariff.lowering(fold, k)
        return Option(fold, k, j, way, self.encoder)


def candidates(
    layer: Layer, errors: Errors, recipe: Recipe, grid: Grid[Costs], price: Costs | None = None
) -> Candidates:
    """All options of a layer that are cheaper than keeping it and that no other option beats.

    One option beats another if neither its price nor its error is larger. Ties go to the lower cost, then
    fold order, k, j. Recipes that aggregate uniformly consider all ranks, so no option is dropped.

    Args:
        layer: The layer.
        errors: The errors of its options; a (fold, k) without errors is not considered.
        recipe: Which options to consider.
        grid: The ranks and their costs.
        price: The costs that the recipe trades against error, if they are not those of the grid.

    Raises:
        InputError: The costs or the prices depend on an unknown dimension.
    """
    tariff = grid.costs.tariff(layer)
    tariffs = (tariff, tariff if price is None else price.tariff(layer))
    rows = [np.array([[-1], [0], [0], [0], *([costs.keep] for costs in tariffs)])]
    columns = [np.zeros(1)]
    for fold, ks in allowed(layer, recipe).items():
        for k in ks:
            if (fold, k) in errors and (ranks := _ranks(layer, fold, k, grid, tariff)).size:
                rows.append(_options(layer, fold, k, ranks, tariffs))
                columns.append(errors[fold, k][ranks])
    table, error = np.concatenate(rows, axis=1, dtype=np.int64), _rounded(np.concatenate(columns))
    if recipe.aggregate is not Aggregate.UNIFORM:
        front = _pareto(table, error)
        table, error = table[:, front], error[front]
    folds, k_, j, full, costs, prices = table
    traded = None if price is None else prices
    return Candidates(layer.id, folds, k_, j, full, costs, error, traded, grid.block, tariff)


def narrowings(layer: Layer, errors: Floats, grid: Grid[Costs], *, every: bool = False) -> Candidates:
    """The widths to which a layer can be narrowed, each with the saving of its partners.

    Args:
        layer: A layer with partners.
        errors: The errors at the widths 0 … full width, in the recipe's measure.
        grid: The block of which widths, or those of a head, are multiples; and the costs.
        every: Whether to offer every width, also one that another width beats.

    Raises:
        InputError: The costs depend on an unknown dimension.
    """
    tariff = _Together(grid.costs.tariff(layer), layer.narrow_fold, Lowering.NARROW, layer.width_step)
    return _table(layer, errors, grid.widths(layer), layer.width, tariff, grid, every=every)


def sparse_tables(layer: Layer, errors: Floats, grid: Grid[Costs]) -> Candidates:
    """The ranks at which a table keeps some rows and is cheaper than as it is.

    Args:
        layer: A layer that can keep rows.
        errors: The errors at the ranks 0 … full rank, in the recipe's measure.
        grid: The step between ranks, and the costs.

    Raises:
        InputError: The costs depend on an unknown dimension.
    """
    fold, step = layer.folds[0], layer.sparse_step(grid.block)
    tariff = _Together(grid.costs.tariff(layer), fold, Lowering.SPARSE, step)
    full = layer.full_rank(fold, 1)
    ranks = np.arange(step, full, step, dtype=np.int64)
    ranks = ranks[tariff.is_cheaper(tariff.costs(fold, 1, ranks))] if ranks.size else ranks
    return _table(layer, errors, ranks, full, tariff, grid)


def _table(
    layer: Layer,
    errors: Floats,
    ranks: Ints,
    full: int,
    tariff: _Together,
    grid: Grid[Costs],
    *,
    every: bool = False,
) -> Candidates:
    """The options of one lowering that no other of them beats (or all of them), and the kept layer."""
    rows = [np.array([[-1], [0], [0], [0], [tariff.keep], [tariff.keep]])]
    if ranks.size:
        rows.append(_options(layer, tariff.fold, 1, ranks, (tariff, tariff)))
    table = np.concatenate(rows, axis=1, dtype=np.int64)
    table[3, 1:] = full
    error = _rounded(np.concatenate([np.zeros(1), errors[ranks]]))
    front = np.arange(error.size) if every else _pareto(table, error)
    folds, k, j, full_ranks, costs, _ = table[:, front]
    return Candidates(layer.id, folds, k, j, full_ranks, costs, error[front], None, grid.block, tariff)


def shared_ranks(layers: Sequence[Layer], lowering: Lowering, grid: Grid[Costs]) -> Ints:
    """The ranks of a factor that layers share, ascending, at which all together are cheaper than kept.

    Args:
        layers: Layers that can share it, in graph order.
        lowering: SHARED if it is an encoder, SUMMED if it is a decoder.
        grid: The step between ranks, and the costs.

    Raises:
        InputError: The costs depend on an unknown dimension.
    """
    tariffs = _shared_tariffs(layers, lowering, grid)
    ranks = grid.together(layers[0], shared_full_rank(layers, lowering))
    if not ranks.size:
        return ranks
    total: Ints = np.sum([tariff.costs(tariff.fold, 1, ranks) for tariff in tariffs], axis=0)
    return ranks[tariffs[0].is_cheaper(total, sum(tariff.keep for tariff in tariffs))]


def sharings(
    layers: Sequence[Layer], lowering: Lowering, errors: Sequence[Floats], grid: Grid[Costs]
) -> tuple[Candidates, ...]:
    """For every layer, its candidates with a shared factor; those at one index have the same rank.

    Args:
        layers: As for `shared_ranks`.
        lowering: As for `shared_ranks`.
        errors: For each, its errors at the ranks 0, 1, …, in the recipe's measure.
        grid: As for `shared_ranks`.

    Raises:
        InputError: The costs depend on an unknown dimension.
    """
    ranks, made = shared_ranks(layers, lowering, grid), []
    # Measured costs can fall after the errors were computed.
    ranks = ranks[ranks < min(error.size for error in errors)]
    for layer, tariff, error in zip(layers, _shared_tariffs(layers, lowering, grid), errors, strict=True):
        rows = np.zeros((6, ranks.size + 1), dtype=np.int64)
        rows[:, 0] = -1, 0, 0, 0, tariff.keep, tariff.keep
        if ranks.size:
            rows[:, 1:] = _options(layer, tariff.fold, 1, ranks, (tariff, tariff))
        folds, k, j, full, costs, _ = rows
        full[1:] = shared_full_rank(layers, lowering)
        known = _rounded(np.concatenate([np.zeros(1), error[ranks]]))
        shared = Candidates(layer.id, folds, k, j, full, costs, known, None, grid.block, tariff)
        made.append(replace(shared, encoder=tariff.encoder))
    return tuple(made)


def _shared_tariffs(layers: Sequence[Layer], lowering: Lowering, grid: Grid[Costs]) -> list[_Together]:
    encoder = layers[0].id if lowering is Lowering.SHARED else ""
    return [
        _Together(grid.costs.tariff(layer), layer.shared_fold, lowering, encoder=encoder) for layer in layers
    ]


@dataclass(frozen=True, slots=True)
class _Together:
    """The costs of a layer's options with a lowering of their own.

    Attributes:
        layer: The costs of the layer's options.
        fold: The fold of these options.
        way: Their lowering.
        step: The number of which their ranks are multiples.
        encoder: The id of the first of the layers that share an encoder; "" if none do.
    """

    layer: Tariff
    fold: Fold
    way: Lowering
    step: int = 1
    encoder: str = ""

    @property
    def keep(self) -> int:
        return self.layer.keep

    def costs(self, fold: Fold, k: int, ranks: Ints) -> Ints:
        return self.layer.together(Option(fold, k, self.step, self.way, self.encoder), ranks)

    def cost(self, option: Option | None) -> int:
        return self.layer.cost(option)

    def is_cheaper(self, costs: Ints, keep: int | None = None) -> NDArray[np.bool_]:
        return self.layer.is_cheaper(costs, keep)

    def together(self, option: Option, ranks: Ints) -> Ints:
        return self.layer.together(option, ranks)

    def members(self, widths: Ints) -> tuple[Ints, ...]:
        return self.layer.members(widths)

    def lowering(self, fold: Fold, k: int) -> Lowering:
        return self.way


def unscored(layer: Layer, recipe: Recipe, grid: Grid[Costs]) -> Candidates:
    """The candidates of a layer without known errors, which show how cheap the layer can become.

    Raises:
        InputError: The costs depend on an unknown dimension.
    """
    wanted = grid.wanted_spectra(layer, recipe)
    sizes = {(fold, k): layer.full_rank(fold, k) for fold, ks in wanted.items() for k in ks}
    return candidates(layer, {key: np.ones(size + 1) for key, size in sizes.items()}, recipe, grid)


def _ranks(layer: Layer, fold: Fold, k: int, grid: Grid[Costs], tariff: Tariff) -> Ints:
    """The ranks at which a decomposition is cheaper."""
    ranks = grid.offered(layer, fold, k)
    return ranks[tariff.is_cheaper(tariff.costs(fold, k, ranks))] if ranks.size else ranks


def _options(layer: Layer, fold: Fold, k: int, j: Ints, tariffs: tuple[Tariff, Tariff]) -> Ints:
    """Rows fold, k, j, full, cost, price of the options with ranks j; the tariffs give cost and price."""
    rows: Ints = np.empty((6, j.size), dtype=np.int64)
    rows[0], rows[1], rows[2], rows[3] = _FOLDS.index(fold), k, j, layer.full_rank(fold, k)
    cost, price = tariffs
    rows[4] = cost.costs(fold, k, j)
    rows[5] = rows[4] if price is cost else price.costs(fold, k, j)
    return rows


def _rounded(values: Floats) -> Floats:
    """Round to significant digits, so the last bits of a spectrum do not affect the choice."""
    positive = values > 0
    exponent = np.floor(np.log10(values, where=positive, out=np.zeros_like(values))).astype(int)
    scale = _POWERS[np.clip(_DIGITS - 1 - exponent, -_LARGEST, _LARGEST) + _LARGEST]
    return np.asarray(np.rint(values * scale) / scale, dtype=np.float64)


def _pareto(table: Ints, error: Floats) -> NDArray[np.intp]:
    """Indices of keep (0) and of the options that no other option beats, by ascending price."""
    fold, k, j, _, costs, prices = table[:, 1:]
    order = np.lexsort((j, k, fold, costs, error[1:], prices)) + 1
    best = np.minimum.accumulate(error[order])
    wins = np.ones(order.size, dtype=bool)
    wins[1:] = error[order][1:] < best[:-1]
    front: NDArray[np.intp] = np.concatenate(([0], order[wins]))
    return front
