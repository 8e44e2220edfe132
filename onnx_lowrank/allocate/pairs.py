"""Options of several layers at once: a pair is narrowed together, or its layers are chosen one by one.

A pair becomes one class of the knapsack. Its candidates are the narrowings, and the combinations of its
layers' candidates that no other combination beats. So a plan that is optimal for the classes is optimal for
all choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from onnx_lowrank.allocate.cost import Costs, Ints
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates, narrowings
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.plan import Aggregate, Choice
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.measures import Floats

Picks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """Layers that are narrowed together.

    Attributes:
        table: The narrowings; index 0 keeps all channels.
        members: Indices of the layers; the consumer, whose id the table has, is the last one.
        shares: For every producer, its own cost under every narrowing; the rest is the consumer's.
    """

    table: Candidates
    members: Picks
    shares: tuple[Ints, ...]


def pairs_of(layers: Sequence[Layer], errors: Mapping[str, Floats], grid: Grid[Costs]) -> tuple[Pair, ...]:
    """The pairs of layers that can be narrowed, each cheaper in some width than as it is.

    Args:
        layers: All layers, in graph order.
        errors: The errors of consumers at the widths 0 … c, by id.
        grid: The widths to choose from, and their costs.

    Raises:
        InputError: The costs depend on an unknown dimension.
    """
    numbers = {layer.id: number for number, layer in enumerate(layers)}
    made = []
    for layer in layers:
        if layer.id in errors:
            table = narrowings(layer, errors[layer.id], grid)
            producers = (numbers[producer.id] for producer in layer.producers)
            shares = tuple(_costs_of_widths(producer, table.j, grid) for producer in layer.producers)
            made.append(Pair(table, (*producers, numbers[layer.id]), shares))
    return tuple(pair for pair in made if pair.table.cost.size > 1)


def _costs_of_widths(producer: Layer, widths: Ints, grid: Grid[Costs]) -> Ints:
    """The costs of a producer with fewer output features, which are linear; width 0 keeps all of them."""
    first, second = (grid.costs.tariff(replace(producer, f=width)).keep for width in (1, 2))
    return np.where(widths > 0, first + (widths - 1) * (second - first), grid.costs.tariff(producer).keep)


@dataclass(frozen=True)
class Classes:
    """The candidates of all layers, with those of pairs.

    Attributes:
        layers: The candidates of every layer alone, in graph order.
        pairs: The pairs; they share no layer.
        recipe: Says how errors are combined.
    """

    layers: tuple[Candidates, ...]
    pairs: tuple[Pair, ...]
    recipe: Recipe

    @cached_property
    def tables(self) -> tuple[Candidates, ...]:
        """The candidates of every class."""
        return tuple(table for table, _ in self._made)

    def limits(self, limits: Limits) -> Limits:
        """The constraints on the classes, given those on the layers.

        A narrowing costs as much under every constraint: pairs are in the main graph, which all routes run.
        """
        if not self.pairs:
            return limits
        costs = tuple(self._costs(number, limits) for number in range(len(self._made)))
        return Limits(limits.budgets, costs, limits.alike)

    def choices(self, picks: Sequence[int]) -> tuple[Choice, ...]:
        """The choice for every layer, in graph order, given a pick for every class."""
        made: dict[int, Choice] = {}
        for (members, pair), (_, rows), pick in zip(self._members, self._made, picks, strict=True):
            row = rows[pick]
            if len(row) == 1 and pair is not None:
                made |= _narrowed(self.layers, pair, row[0])
                continue
            for member, index in zip(members, row, strict=True):
                made[member] = _choice(self.layers[member], index)
        return tuple(made[number] for number in range(len(self.layers)))

    @cached_property
    def _members(self) -> tuple[tuple[Picks, Pair | None], ...]:
        """The layers of every class, in the order of its first layer."""
        paired = {member: pair for pair in self.pairs for member in pair.members}
        firsts = {id(pair): min(pair.members) for pair in self.pairs}
        return tuple(
            ((number,), None) if number not in paired else (paired[number].members, paired[number])
            for number in range(len(self.layers))
            if number not in paired or firsts[id(paired[number])] == number
        )

    @cached_property
    def _made(self) -> tuple[tuple[Candidates, tuple[Picks, ...]], ...]:
        """The candidates of every class, each with its layers' picks, or the pick of a narrowing alone."""
        return tuple(self._class(members, pair) for members, pair in self._members)

    def _class(self, members: Picks, pair: Pair | None) -> tuple[Candidates, tuple[Picks, ...]]:
        if pair is None:
            table = self.layers[members[0]]
            return table, tuple((index,) for index in range(table.cost.size))
        cost, value = np.zeros(1, dtype=np.int64), np.zeros(1)
        rows: list[Picks] = [()]
        for member in members:
            table = self.layers[member]
            cost, value, rows = self._combined(cost, value, rows, table)
        narrow = pair.table
        extra = int(sum(self.layers[m].cost[0] for m in members[:-1]))
        cost = np.concatenate([cost, narrow.cost[1:] + extra])
        value = np.concatenate([value, self._values(narrow.error[1:])])
        rows = [*rows, *((index,) for index in range(1, narrow.cost.size))]
        kept = _front(cost, value)
        # The class must offer to keep its layers: index 0, as in every table.
        keep = rows.index((0,) * len(members))
        order = [keep, *(index for index in kept if index != keep)]
        none = np.zeros(len(order), dtype=np.int64)
        error = np.asarray(value[order] if self._is_max else value[order] ** (1 / self.recipe.power))
        made = Candidates(narrow.layer, none - 1, none, none, none, cost[order], error)
        return made, tuple(rows[index] for index in order)

    def _combined(
        self, cost: Ints, value: Floats, rows: Sequence[Picks], table: Candidates
    ) -> tuple[Ints, Floats, list[Picks]]:
        """Combinations with one more layer; only those that no other beats, and the one that keeps all."""
        errors = self._values(table.error)
        costs = (cost[:, None] + table.cost).ravel()
        values = (np.maximum if self._is_max else np.add)(value[:, None], errors).ravel()
        kept = [int(index) for index in _front(costs, values)]
        keep = next(n for n, row in enumerate(rows) if not any(row)) * table.cost.size
        if keep not in kept:
            kept.append(keep)
        size = table.cost.size
        return costs[kept], values[kept], [(*rows[index // size], index % size) for index in kept]

    @property
    def _is_max(self) -> bool:
        return self.recipe.aggregate is Aggregate.MAX

    def _values(self, errors: Floats) -> Floats:
        """The addends of the objective, or the errors themselves where the largest counts."""
        return errors if self._is_max else np.asarray(errors**self.recipe.power)

    def _costs(self, number: int, limits: Limits) -> Ints:
        """The costs of a class under every constraint, shape (constraints, candidates)."""
        (members, pair), (_, rows) = self._members[number], self._made[number]
        if pair is None:
            return limits.costs[members[0]]
        columns = []
        for row in rows:
            if len(row) == 1:
                others = sum(limits.costs[m][:, 0] for m in members[:-1])
                columns.append(others + pair.table.cost[row[0]])
            else:
                columns.append(sum(limits.costs[m][:, index] for m, index in zip(members, row, strict=True)))
        return np.stack(columns, axis=1)


def _front(cost: Ints, value: Floats) -> list[int]:
    """Indices of the candidates that no other beats in cost and value, by ascending cost."""
    order = np.lexsort((value, cost))
    best = np.minimum.accumulate(value[order])
    wins = np.ones(order.size, dtype=bool)
    wins[1:] = value[order][1:] < best[:-1]
    return [int(index) for index in order[wins]]


def _choice(table: Candidates, index: int) -> Choice:
    return Choice(table.layer, table.option(index), int(table.cost[index]), float(table.error[index]))


def _narrowed(layers: Sequence[Candidates], pair: Pair, index: int) -> Mapping[int, Choice]:
    """The choices for a narrowed pair: the consumer has the option, its producers say why they have none."""
    *producers, consumer = pair.members
    shares = [int(share[index]) for share in pair.shares]
    saved = sum(int(layers[member].cost[0]) for member in producers) - sum(shares)
    reason = f"narrowed to {int(pair.table.j[index])} channels with {pair.table.layer}"
    kept = {
        member: Choice(layers[member].layer, None, share, 0.0, reason)
        for member, share in zip(producers, shares, strict=True)
    }
    choice = _choice(pair.table, index)
    return {**kept, consumer: replace(choice, cost=choice.cost + saved)}
