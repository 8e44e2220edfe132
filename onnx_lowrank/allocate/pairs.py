"""Options of several layers at once: they are narrowed together, share a factor, or are chosen one by one.

Groups that have a layer in common, and their layers, become one class of the knapsack. A candidate takes some
groups that have no layer in common, with an option for each, and an option for every other layer. All such
candidates are there but those that another one beats, so a plan that is optimal for the classes is optimal
for all choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

_MOST_WAYS = 64
"""The most ways to take groups of one class; beyond it, the groups with the least weight are left out."""

_MOST_COMBINATIONS = 2**24
"""The most combinations that are compared at once; a class that would need more has no groups."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Layers that are narrowed together.

    Attributes:
        table: The narrowings; index 0 keeps the full width.
        members: Indices of the layers: the partners, then the layer with the id of the table.
        shares: For every member, its own cost under every narrowing; empty if those are unknown. The costs of
            the numbers between them are only in the table.
        widths: For every partner, the features that it keeps under every narrowing.
        taken: For a packed matrix among the members, the first features of the parts that get fewer.
        bound: Id of the layer whose narrowing at the same index goes with this one; "" if there is none.
    """

    table: Candidates
    members: Picks
    shares: tuple[Ints, ...]
    widths: tuple[Ints, ...]
    taken: Mapping[int, frozenset[int]] = field(default_factory=dict)
    bound: str = ""

    @property
    def tables(self) -> tuple[Candidates | None, ...]:
        """The candidates of every member; None for the partners, which are kept beside a narrowing."""
        return (*[None] * (len(self.members) - 1), self.table)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Layers that can share a factor, or one layer with candidates of another lowering.

    Attributes:
        tables: The candidates of every layer; those at one index go together, and index 0 keeps all layers.
        members: Indices of the layers.
        is_sum: Whether they share a decoder. Such groups are left out first of a class that would have too
            many candidates: they connect layers of other groups.
    """

    tables: tuple[Candidates, ...]
    members: Picks
    is_sum: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """Two pairs that are narrowed together, with as many numbers in a head: one packed matrix has both.

    Attributes:
        pairs: The pairs; their tables have the same widths.
    """

    pairs: tuple[Pair, Pair]

    @property
    def tables(self) -> tuple[Candidates | None, ...]:
        """The candidates of every member; None for partners that have no narrowing of their own."""
        return tuple(self._tables.values())

    @property
    def members(self) -> Picks:
        """Indices of the layers."""
        return tuple(self._tables)

    @property
    def _tables(self) -> dict[int, Candidates | None]:
        made: dict[int, Candidates | None] = {}
        for pair in self.pairs:
            for member, table in zip(pair.members, pair.tables, strict=True):
                made[member] = made.get(member) or table
        return dict(sorted(made.items()))


Group = Pair | Sharing | Bound


def pairs_of(
    layers: Sequence[Layer], errors: Mapping[str, Floats], grid: Grid[Costs]
) -> tuple[Pair | Bound, ...]:
    """The pairs of layers that can be narrowed, each cheaper in some width than as it is.

    Args:
        layers: All layers, in graph order.
        errors: The errors of layers with partners at the widths 0 … full width, by id.
        grid: The widths to choose from, and their costs.

    Raises:
        InputError: The costs depend on an unknown dimension.
    """
    numbers = {layer.id: number for number, layer in enumerate(layers)}
    pairs = {
        layer.id: _pair(layer, errors[layer.id], numbers, grid) for layer in layers if layer.id in errors
    }
    made: list[Pair | Bound] = []
    # Without shares, the costs of a layer at other widths are unknown.
    for pair in (pair for pair in pairs.values() if pair.table.cost.size > 1 and pair.shares):
        other = pairs.get(pair.bound)
        if not pair.bound:
            made.append(pair)
        elif other is not None and other.shares and pair.members < other.members:
            made.append(Bound((pair, other)))
    return tuple(made)


def _pair(layer: Layer, errors: Floats, numbers: Mapping[str, int], grid: Grid[Costs]) -> Pair:
    """The pair of a layer with its partners."""
    narrowing = layer.narrowing
    if narrowing is None:
        raise RuntimeError(f"{layer.id!r} cannot be narrowed")
    # The widths of two tables have to be the same, so none is left out.
    table = narrowings(layer, errors, grid, every=bool(narrowing.bound))
    members = tuple(numbers[member.id] for member in (*layer.partners, layer))
    layers = [layer.at_width(int(width) or layer.width)[:-1] for width in table.j]
    kept = tuple(np.array([each.f for each in partners]) for partners in zip(*layers, strict=True))
    rows = frozenset(each.start for each in narrowing.rows)
    taken = {members[0]: rows} if rows else {}
    return Pair(table, members, grid.costs.tariff(layer).members(table.j), kept, taken, narrowing.bound)


@dataclass(frozen=True, slots=True)
class _Unit:
    """A unit of choice: one layer (index 0 keeps it), or a group (index 0 is not taken).

    The partners of a narrowed layer have no table; the pair has their costs.
    """

    members: Picks
    tables: tuple[Candidates | None, ...]
    indices: range
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True)
class _Row:
    """One candidate of a class: an index for each of the units that are chosen together."""

    units: tuple[_Unit, ...]
    picks: Picks


@dataclass(frozen=True)
class Classes:
    """The candidates of all layers, with those of groups.

    Attributes:
        layers: The candidates of every layer alone, in graph order.
        groups: The groups; they may have layers in common.
        recipe: Says how errors are combined.
    """

    layers: tuple[Candidates, ...]
    groups: tuple[Group, ...]
    recipe: Recipe

    @cached_property
    def tables(self) -> tuple[Candidates, ...]:
        """The candidates of every class."""
        return tuple(table for table, _ in self._made)

    def limits(self, limits: Limits) -> Limits:
        """The constraints on the classes, given those on the layers.

        A group costs as much under every constraint: its layers are in the main graph, which all routes run.
        """
        if not self.groups:
            return limits
        return Limits(limits.budgets, tuple(_costs(rows, limits) for _, rows in self._made), limits.alike)

    def choices(self, picks: Sequence[int]) -> tuple[Choice, ...]:
        """The choice for every layer, in graph order, given a pick for every class."""
        made: dict[int, Choice] = {}
        for (_, rows), pick in zip(self._made, picks, strict=True):
            narrowed: list[tuple[Pair, int]] = []
            for unit, index in zip(rows[pick].units, rows[pick].picks, strict=True):
                made |= _chosen(unit, index)
                narrowed += [(pair, index) for pair in unit.pairs]
            made |= _narrowed(self.layers, narrowed)
        return tuple(made[number] for number in range(len(self.layers)))

    @cached_property
    def _made(self) -> tuple[tuple[Candidates, tuple[_Row, ...]], ...]:
        """The candidates of every class, each with its units' picks, in the order of the first layers."""
        clusters = _clusters(len(self.layers), self.groups)
        made = dict(pair for members, groups in clusters for pair in self._classes(members, groups))
        return tuple(made[first] for first in sorted(made))

    def _classes(
        self, members: Picks, groups: Sequence[Group]
    ) -> Iterator[tuple[int, tuple[Candidates, tuple[_Row, ...]]]]:
        """The class of a cluster, or a class for every layer if it would have too many candidates."""
        found = None if not groups else self._class(members, groups)
        if found is not None:
            yield members[0], found
            return
        fewer = [group for group in groups if not (isinstance(group, Sharing) and group.is_sum)]
        if len(fewer) < len(groups):
            for part, inside in _clusters(len(self.layers), fewer):
                if part[0] in members:
                    yield from self._classes(part, inside)
            return
        for member in members:
            unit = self._alone(member)
            yield member, (self.layers[member], tuple(_Row((unit,), (index,)) for index in unit.indices))

    def _class(self, members: Picks, groups: Sequence[Group]) -> tuple[Candidates, tuple[_Row, ...]] | None:
        """The candidates of one class; None if there are too many."""
        costs, values = [np.zeros(1, dtype=np.int64)], [np.zeros(1)]
        rows: list[_Row] = []
        for taken in _ways(groups):
            units = tuple(sorted(self._units(members, taken), key=lambda unit: unit.members))
            combined = self._combinations(units)
            if combined is None:
                return None
            cost, value, picks = combined
            costs.append(cost)
            values.append(value)
            rows += [_Row(units, each) for each in picks]
        alone = tuple(self._alone(member) for member in members)
        rows.insert(0, _Row(alone, (0,) * len(members)))
        # The class must offer to keep its layers: index 0, as in every table.
        costs[0] += sum(int(self.layers[member].cost[0]) for member in members)
        cost, value = np.concatenate(costs), np.concatenate(values)
        order = [0, *(index for index in _front(cost, value) if index and cost[index] < cost[0])]
        none = np.zeros(len(order), dtype=np.int64)
        error = np.asarray(value[order] if self._is_max else value[order] ** (1 / self.recipe.power))
        name = self.layers[members[-1]].layer
        # The last layer of a pair may have no block of its own: it reads more than the block's input.
        yields = max(self.layers[member].yields for member in members)
        made = Candidates(name, none - 1, none, none, none, cost[order], error, yields=yields)
        return made, tuple(rows[index] for index in order)

    def _units(self, members: Picks, taken: Sequence[Group]) -> Iterator[_Unit]:
        """The groups that are taken, and the layers of the class that are in none of them."""
        counted: set[int] = set()
        # A packed matrix counts once: where its own queries and keys get fewer, if they do.
        for group in sorted(taken, key=lambda group: sum(table is None for table in group.tables)):
            size = max(0 if table is None else table.cost.size for table in group.tables)
            pairs = () if isinstance(group, Sharing) else (group,) if isinstance(group, Pair) else group.pairs
            fresh = [n for n, member in enumerate(group.members) if member not in counted]
            counted.update(group.members)
            tables = group.tables
            yield _Unit(
                tuple(group.members[n] for n in fresh), tuple(tables[n] for n in fresh), range(1, size), pairs
            )
        inside = {member for group in taken for member in group.members}
        yield from (self._alone(member) for member in members if member not in inside)

    def _alone(self, member: int) -> _Unit:
        table = self.layers[member]
        return _Unit((member,), (table,), range(table.cost.size))

    def _combinations(self, units: Sequence[_Unit]) -> tuple[Ints, Floats, list[Picks]] | None:
        """The combinations of candidates that no other beats; None if there are too many to compare."""
        cost, value = np.zeros(1, dtype=np.int64), np.zeros(1)
        rows: list[Picks] = [()]
        for unit in units:
            size = len(unit.indices)
            if cost.size * size > _MOST_COMBINATIONS:
                return None
            its_cost, its_value = self._candidates(unit)
            costs = (cost[:, None] + its_cost).ravel()
            values = (np.maximum if self._is_max else np.add)(value[:, None], its_value).ravel()
            kept = _front(costs, values)
            cost, value = costs[kept], values[kept]
            rows = [(*rows[index // size], unit.indices[index % size]) for index in kept]
        return cost, value, rows

    def _candidates(self, unit: _Unit) -> tuple[Ints, Floats]:
        """The costs of a unit's candidates, and their parts of the objective."""
        cost, value = np.zeros(len(unit.indices), dtype=np.int64), np.zeros(len(unit.indices))
        for member, table in zip(unit.members, unit.tables, strict=True):
            if table is None:
                cost = cost + self.layers[member].cost[0]
                continue
            cost = cost + table.cost[unit.indices]
            error = table.error[unit.indices]
            value = np.maximum(value, error) if self._is_max else value + error**self.recipe.power
        return cost, value

    @property
    def _is_max(self) -> bool:
        return self.recipe.aggregate is Aggregate.MAX


def _clusters(number: int, groups: Sequence[Group]) -> Iterator[tuple[Picks, list[Group]]]:
    """The layers that groups connect, in graph order, with the groups; every other layer is alone."""
    clusters: dict[int, list[int]] = {member: [member] for member in range(number)}
    for group in groups:
        joined = sorted({m for member in group.members for m in clusters[member]})
        clusters |= dict.fromkeys(joined, joined)
    for member, cluster in clusters.items():
        if cluster[0] == member:
            yield tuple(cluster), [group for group in groups if group.members[0] in cluster]


def _ways(groups: Sequence[Group]) -> list[tuple[Group, ...]]:
    """All sets of groups without a layer in common; if there are too many, without the last groups."""
    ways: list[tuple[Group, ...]] = [()]
    for group in groups:
        more = [(*way, group) for way in ways if all(_are_apart(group, other) for other in way)]
        if len(ways) + len(more) > _MOST_WAYS:
            break
        ways += more
    return ways


def _are_apart(one: Group, other: Group) -> bool:
    """Whether groups have no layer in common, or take other parts of a packed matrix."""
    common = set(one.members) & set(other.members)
    if isinstance(one, Pair) and isinstance(other, Pair):
        packed = one.taken.keys() & other.taken.keys()
        common -= {member for member in packed if not one.taken[member] & other.taken[member]}
    return not common


def _costs(rows: Sequence[_Row], limits: Limits) -> Ints:
    """The costs of a class's candidates under every constraint, shape (constraints, candidates)."""
    columns = []
    for row in rows:
        column = np.zeros_like(limits.budgets)
        for unit, index in zip(row.units, row.picks, strict=True):
            is_group = unit.indices.start > 0
            for member, table in zip(unit.members, unit.tables, strict=True):
                if table is not None and is_group:
                    column = column + table.cost[index]
                else:
                    column = column + limits.costs[member][:, 0 if table is None else index]
        columns.append(column)
    return np.stack(columns, axis=1)


def _front(cost: Ints, value: Floats) -> list[int]:
    """Indices of the candidates that no other beats in cost and value, by ascending cost."""
    order = np.lexsort((value, cost))
    best = np.minimum.accumulate(value[order])
    wins = np.ones(order.size, dtype=bool)
    wins[1:] = value[order][1:] < best[:-1]
    indices: list[int] = order[wins].tolist()
    return indices


def _chosen(unit: _Unit, index: int) -> Mapping[int, Choice]:
    """The choices for the layers of a unit without pairs."""
    return {
        member: Choice(table.layer, table.option(index), int(table.cost[index]), float(table.error[index]))
        for member, table in zip(unit.members, unit.tables, strict=True)
        if table is not None and not unit.pairs
    }


def _narrowed(layers: Sequence[Candidates], taken: Sequence[tuple[Pair, int]]) -> Mapping[int, Choice]:
    """The choices for the members of pairs, each taken at an index of its table.

    Each has its own cost; the table's has the savings of all. Partners say why they have no option.
    """
    made: dict[int, Choice] = {}
    # Owners come last: a packed matrix may be the partner in one pair, and have an option by another.
    for pair, index in taken:
        for partner, widths in zip(pair.members[:-1], pair.widths, strict=True):
            reason = f"narrowed to {int(widths[index])} channels with {pair.table.layer}"
            known = made.get(partner)
            reason = reason if known is None else f"{known.reason}, {reason}"
            made[partner] = Choice(layers[partner].layer, None, 0, 0.0, reason)
    for pair, index in taken:
        table = pair.table
        made[pair.members[-1]] = Choice(table.layer, table.option(index), 0, float(table.error[index]))
    costs = {member: int(layers[member].cost[0]) for member in made}
    for pair, index in taken:
        for member, share in zip(pair.members, pair.shares, strict=True):
            costs[member] += int(share[index]) - int(layers[member].cost[0])
    return {member: replace(choice, cost=costs[member]) for member, choice in made.items()}
