"""Multiply-accumulates of one run, over all convolutions and matrix products of a model.

An If counts as its more expensive branch, so the bound of a plan holds on every route through the branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from operator import itemgetter
from typing import Self

import numpy as np

from onnx_lowrank.allocate.cost import Ints, own_sizes
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.budgets.budget import Budget, Counted, Run, Tools
from onnx_lowrank.core.layer import Layer, ScopeWork, Use
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.core.plan import Choice
from onnx_lowrank.core.routes import dearest, running
from onnx_lowrank.errors import InputError
from onnx_lowrank.layers.found import Found, find_layers
from onnx_lowrank.report.content import Total

_MOST_ROUTES = 64

_LARGEST = 2**60
"""More than any machine can compute, and well below the limit of the solver's 64-bit integers."""


def macs(layer: Layer, option: Option | None = None) -> int | None:
    """Multiply-accumulates of all uses of a layer; None if a dimension is unknown.

    Each factor counts once for each position at which it is evaluated; the two factors have different
    numbers of positions if one of them has a stride. Biases do not count.

    Args:
        layer: The layer.
        option: Its decomposition, or None for the kept layer.
    """
    counts = [use_macs(layer, use, option) for use in layer.uses]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def use_macs(layer: Layer, use: Use, option: Option | None = None) -> int | None:
    """Multiply-accumulates of one use of a layer; None if a dimension is unknown."""
    if use.evaluations is None:
        return None
    if option is None:
        return layer.size * use.evaluations.dense
    if option.lowering is Lowering.NARROW:
        return _narrow_macs(layer, option.j)
    encoder, decoder = own_sizes(layer, option)
    at_encoder, at_decoder = use.evaluations.factors[option.fold]
    return option.j * (encoder * at_encoder + decoder * at_decoder)


def _narrow_macs(layer: Layer, width: int) -> int | None:
    """Multiply-accumulates of a narrow layer, less what is saved by its partners and between them."""
    *partners, own = layer.at_width(width)
    before, after = [macs(partner) for partner in layer.partners], [macs(less) for less in partners]
    kept, beside = macs(own), layer.beside.macs
    if kept is None or beside is None or None in before or None in after:
        return None
    # All have one use, in one scope, and so run equally often.
    saved = sum(count or 0 for count in before) - sum(count or 0 for count in after)
    return kept - saved - beside * (layer.width - width) // layer.width


def known_macs(layer: Layer, option: Option | None = None) -> int:
    """Multiply-accumulates of a layer whose dimensions must all be known.

    Raises:
        InputError: A dimension is unknown, or the kept layer exceeds the solver's largest count.
    """
    count = macs(layer, option)
    if count is None:
        raise InputError(
            f"The MACs of layer {layer.id!r} are unknown because some of its shapes are unknown: pass the "
            "dimensions that the model's inputs leave open as --input-shape, or leave the layer out with "
            "--exclude."
        )
    # No limit for options: one that costs more than its layer is never chosen.
    if option is None and count > _LARGEST:
        raise _too_many(f"The MACs of layer {layer.id!r} are {count:,}")
    return count


def _too_many(what: str) -> InputError:
    return InputError(
        f"{what}, above the largest count of {_LARGEST:,}: pass smaller dimensions as --input-shape, or "
        "choose --budget params."
    )


def model_macs(found: Found, choices: Sequence[Choice] = ()) -> int | None:
    """Multiply-accumulates of a model under a plan, by default unchanged; None if a dimension is unknown."""
    return dearest_macs(found.work, found.options(choices))[0]


def dearest_macs(
    scopes: Sequence[ScopeWork], layers: Iterable[tuple[Layer, Option | None]]
) -> tuple[int | None, Mapping[str, int]]:
    """The multiply-accumulates of a whole model on its most expensive route, and that route.

    Args:
        scopes: Every scope of the model, the main graph first, each after its parent.
        layers: Every layer with its decomposition, or None if it is kept.

    Returns:
        As `core.routes.dearest`.
    """
    counts = {scope.path: [scope.macs] for scope in scopes}
    for layer, option in layers:
        for use in layer.uses:
            counts[use.scope].append(use_macs(layer, use, option))
    return dearest(scopes, counts)


class Macs(Budget):
    """The number of multiply-accumulates."""

    name = "macs"
    order = 1
    figure = "macs"
    title = "MACs"
    narrows = True
    shares = frozenset((Lowering.SHARED, Lowering.SUMMED))

    def unknown(self, found: Found) -> str:
        """Why the multiply-accumulates are unknown, and how the user can change that."""
        if found.open_inputs:
            return f"MACs need the shapes that the model leaves open: pass {found.shape_words}."
        return f"The MACs are unknown: {_lost(found)}."

    def on(self, found: Found, tools: Tools | None = None) -> Counted:
        """The meter of a model's multiply-accumulates."""
        return _Meter(found)

    def total(self, run: Run) -> Total:
        """The multiply-accumulates of both models; a model with merged operators is counted again."""
        if run.merged and run.rewritten is not None:
            after = model_macs(find_layers(run.rewritten.model, run.shapes, (), ()))
        else:
            after = model_macs(run.found, run.plan.choices)
        return Total(model_macs(run.found), after)

    def warnings(self, run: Run, total: Total) -> Iterator[str]:
        """A warning if the compressed model has more multiply-accumulates."""
        if total.before is not None and total.after is not None and total.after > total.before:
            yield (
                f"The MACs rise from {total.before:,} to {total.after:,}: choose --budget {self.name} to "
                "keep them down."
            )


class _Meter(Counted):
    """The multiply-accumulates of one model, of its layers and of the work beside them."""

    def __init__(self, found: Found) -> None:
        self.budget = BUDGET
        self._found = found

    @cached_property
    def total(self) -> int:
        """The multiply-accumulates of the input model."""
        return self.of_model(())

    def of_layer(self, layer: Layer, option: Option | None) -> int:
        """The multiply-accumulates of a layer, over all its uses."""
        return known_macs(layer, option)

    def of_model(self, choices: Sequence[Choice]) -> int:
        """The multiply-accumulates of the model under a plan.

        Raises:
            InputError: They are unknown, or exceed the solver's largest count.
        """
        count = model_macs(self._found, choices)
        if count is None:
            raise InputError(f"The model's MACs are unknown because {self._unknown()}.")
        if count > _LARGEST:
            raise _too_many(f"The MACs of {self._found.model.name} are {count:,}{self._most()}")
        return count

    def _most(self) -> str:
        """The layer with the most multiply-accumulates, a phrase; empty if there is no layer."""
        counts = [(macs(layer) or 0, layer.id) for layer in self._found.layers]
        return f" (layer {max(counts, key=itemgetter(0))[1]!r} has the most)" if counts else ""

    def bounds(self, tables: Sequence[Candidates], limit: int) -> _Routes:
        """One constraint, for the most expensive route of the input model; `further` adds routes."""
        _, route = dearest_macs(self._found.work, self._found.options())
        return _Routes(self._found, tuple(tables), limit, (route,))

    def _unknown(self) -> str:
        """Why the multiply-accumulates are unknown, and how the user can change that."""
        found = self._found
        if found.open_inputs:
            return (
                f"its inputs {', '.join(found.open_inputs)} have open dimensions: pass them as "
                f"{found.shape_words}, or choose --budget params"
            )
        return f"{_lost(found)}, or choose --budget params"


def _lost(found: Found) -> str:
    """The place where the shapes of a model with fixed inputs are lost, and how the user can change that."""
    for scope in found.work:
        uses = (use for layer in found.layers for use in layer.uses if use.scope == scope.path)
        name = next((use.name for use in uses if use.positions is None), scope.unknown)
        if name and scope.path in running(found.work):
            place = f" in {scope.path}" if scope.path else ""
            return (
                f"the shapes at node {name!r}{place} do not follow from its inputs' shapes: inline functions "
                "and check --input-shape"
            )
    return "its functions call themselves: inline them"


@dataclass(frozen=True, slots=True)
class _Routes:
    """Bounds on some of the routes through a model's branches.

    A plan that is optimal under some of the bounds and keeps within all of them is optimal under all of them.
    So routes are added one by one.

    Attributes:
        found: The model.
        tables: The candidates of its layers, whose costs are MACs.
        limit: Largest MACs of the whole model.
        routes: How often every scope runs, for each route.
    """

    found: Found
    tables: tuple[Candidates, ...]
    limit: int
    routes: tuple[Mapping[str, int], ...]

    @property
    def limits(self) -> Limits:
        """One constraint for each route."""
        return route_limits(self.found.layers, self.tables, self.found.work, self.routes, self.limit)

    def further(self, choices: Sequence[Choice]) -> Self | None:
        """Add the most expensive route of a plan; None if it is bounded, or if there are too many routes."""
        route = dearest_macs(self.found.work, self.found.options(choices))[1]
        if route in self.routes or len(self.routes) == _MOST_ROUTES:
            return None
        return replace(self, routes=(*self.routes, route))


def route_limits(
    layers: Sequence[Layer],
    tables: Sequence[Candidates],
    scopes: Sequence[ScopeWork],
    routes: Sequence[Mapping[str, int]],
    limit: int,
) -> Limits:
    """Limit the MACs of a whole model on each of the given routes through its branches.

    Args:
        layers: The layers.
        tables: Their candidates, whose costs are MACs.
        scopes: Every scope of the model.
        routes: How often every scope runs, for each route (`core.routes.dearest`).
        limit: Largest MACs of the whole model.
    """
    fixed = [
        sum(runs[scope.path] * (scope.macs or 0) for scope in scopes if runs[scope.path]) for runs in routes
    ]
    return Limits(
        limit - np.array(fixed, dtype=np.int64),
        tuple(
            np.stack([_macs(layer, table, runs) for runs in routes])
            for layer, table in zip(layers, tables, strict=True)
        ),
        all(_alike(layer, routes) for layer in layers),
    )


def _macs(layer: Layer, table: Candidates, runs: Mapping[str, int]) -> Ints:
    """MACs of a layer's candidates on a route."""
    counts = {runs[use.scope] for use in layer.uses}
    if len(counts) == 1:
        return table.cost * counts.pop()
    options = [table.option(index) for index in range(table.cost.size)]
    return np.array(
        [
            sum(runs[use.scope] * (use_macs(layer, use, option) or 0) for use in layer.uses)
            for option in options
        ],
        dtype=np.int64,
    )


def _alike(layer: Layer, routes: Sequence[Mapping[str, int]]) -> bool:
    """Whether all routes weigh a layer's two factors alike.

    They do if each route runs all uses equally often, or if all uses that run have one kind.
    """
    same = all(len({runs[use.scope] for use in layer.uses}) == 1 for runs in routes)
    return same or len({_kind(use) for use in layer.uses if _kind(use) != ()}) <= 1


def _kind(use: Use) -> tuple[int, ...] | None:
    """The kind of a use: uses of one kind have MACs in a fixed proportion for all options; () if none run."""
    if use.evaluations is None:
        return None
    counts = (use.evaluations.dense, *(n for pair in use.evaluations.factors.values() for n in pair))
    unit = gcd(*counts)
    return tuple(count // unit for count in counts) if unit else ()


BUDGET = Macs()
