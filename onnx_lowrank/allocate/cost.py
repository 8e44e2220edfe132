"""What a layer costs, kept or decomposed: parameters and multiply-accumulates, exact integers.

The cost of a decomposition grows linearly with its rank: cost(fold, k, j) = j · slope + constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from math import prod

from onnx_lowrank.core.layer import Layer, ScopeWork, Use
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.core.plan import Budget
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import InputError


def parameters(layer: Layer, option: Option | None = None) -> int:
    """Parameters of a layer: its weight, and what stands and falls with it (BatchNorm, biases).

    Args:
        layer: The layer.
        option: Its decomposition, or None for the layer as it is.
    """
    if option is None:
        return layer.size + layer.freed
    encoder, decoder = _factor_sizes(layer, option.fold, option.k)
    return option.j * (encoder + decoder) + layer.added


def macs(layer: Layer, option: Option | None = None) -> int | None:
    """Multiply-accumulates of all uses of a layer; None where a dimension is unknown.

    Each factor is weighed by the number of positions at which it is evaluated, which differ between
    the two where a stride stands in one of them. Biases count nothing.

    Args:
        layer: The layer.
        option: Its decomposition, or None for the layer as it is.
    """
    counts = [use_macs(layer, use, option) for use in layer.uses]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def use_macs(layer: Layer, use: Use, option: Option | None = None) -> int | None:
    """Multiply-accumulates of one use of a layer; None where a dimension is unknown."""
    if use.evaluations is None:
        return None
    if option is None:
        return layer.size * use.evaluations.dense
    encoder, decoder = _factor_sizes(layer, option.fold, option.k)
    at_encoder, at_decoder = use.evaluations.factors[option.fold]
    return option.j * (encoder * at_encoder + decoder * at_decoder)


def total_macs(scopes: Sequence[ScopeWork], layers: Iterable[tuple[Layer, Option | None]]) -> int | None:
    """Multiply-accumulates of a whole model; None where a dimension is unknown.

    Of an If the dearer branch counts, the body of a Loop or Scan once, a function once per call: what
    is never called does not count.

    Args:
        scopes: Every scope of the model, the main graph first, each after the one that holds it.
        layers: Every layer with its decomposition, or None where it is kept.
    """
    return dearest(scopes, layers)[0]


def dearest(
    scopes: Sequence[ScopeWork], layers: Iterable[tuple[Layer, Option | None]]
) -> tuple[int | None, Mapping[str, int]]:
    """The multiply-accumulates of `total_macs`, and the route on which they are spent.

    Args:
        scopes: Every scope of the model, the main graph first, each after the one that holds it.
        layers: Every layer with its decomposition, or None where it is kept.

    Returns:
        The multiply-accumulates, and how often every scope runs on the dearest route through the
        branches; empty where the multiply-accumulates are unknown.
    """
    parts = {scope.path: [scope.macs] for scope in scopes}
    for layer, option in layers:
        for use in layer.uses:
            parts[use.scope].append(use_macs(layer, use, option))
    steps = _steps(scopes)
    try:
        order = list(TopologicalSorter({path: chain(*of) for path, of in steps.items()}).static_order())
    except CycleError:  # functions that call themselves never end
        return None, {}
    totals: dict[str, int | None] = {}
    for path in order:
        counts = [*parts[path], *(_dearer(totals, step) for step in steps[path])]
        totals[path] = None if None in counts else sum(filter(None, counts))
    start = scopes[0].path
    if totals[start] is None:
        return None, {}
    runs = dict.fromkeys(totals, 0) | {start: 1}
    for path in reversed(order):
        for step in steps[path] if runs[path] else ():
            runs[max(step, key=lambda body: totals[body] or 0)] += runs[path]
    return totals[start], runs


def running(scopes: Sequence[ScopeWork]) -> set[str]:
    """The paths of the scopes that some route runs: all but functions that nothing running calls."""
    steps = _steps(scopes)
    found: set[str] = set()
    pending = [scopes[0].path]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            pending.extend(chain(*steps[path]))
    return found


def _steps(scopes: Sequence[ScopeWork]) -> dict[str, list[list[str]]]:
    """What every scope runs beside its own nodes: for each step, the bodies of which it takes one."""
    steps: dict[str, list[list[str]]] = {scope.path: [[path] for path in scope.calls] for scope in scopes}
    branches: dict[tuple[str, int], list[str]] = {}
    for scope in scopes:
        if scope.parent is not None and scope.branch_of is None:
            steps[scope.parent].append([scope.path])
        elif scope.parent is not None and scope.branch_of is not None:
            key = scope.parent, scope.branch_of
            if key not in branches:
                steps[scope.parent].append(branches.setdefault(key, []))
            branches[key].append(scope.path)
    return steps


def _dearer(totals: Mapping[str, int | None], bodies: Sequence[str]) -> int | None:
    counts = [totals[path] for path in bodies]
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None


def cost(layer: Layer, option: Option | None, budget: Budget) -> int:
    """Cost of a layer, kept (option None) or decomposed, in a budget's unit.

    Raises:
        InputError: The budget counts MACs and a dimension that they need is unknown.
    """
    if budget is Budget.PARAMS:
        return parameters(layer, option)
    count = macs(layer, option)
    if count is None:
        raise InputError(
            f"The MACs of layer {layer.id!r} are unknown because a shape there is: pass the dimensions that "
            "the model's inputs leave open as --input-shape NAME=1,3,224,224, or leave the layer out "
            "with --exclude."
        )
    return count


def linear(layer: Layer, fold: Fold, k: int, budget: Budget) -> tuple[int, int]:
    """Slope and constant of the cost as a function of the rank: cost(j) = j · slope + constant.

    Raises:
        InputError: The budget counts MACs and a dimension that they need is unknown.
    """
    first = cost(layer, Option(fold, k, 1), budget)
    slope = cost(layer, Option(fold, k, 2), budget) - first
    return slope, first - slope


def allowed(layer: Layer, recipe: Recipe) -> dict[Fold, tuple[int, ...]]:
    """The folds and slice counts which a recipe asks for and a layer offers.

    A fold of the recipe stands for the one with which it coincides on the layer's kernel (`Fold.on`).
    Where the layer's operators allow none of them, its first fold takes their place.
    """
    asked = {fold.on(layer.kernel) for fold in recipe.folds}
    folds = [fold for fold in layer.folds if fold.on(layer.kernel) in asked] or layer.folds[:1]
    ks = tuple(k for k in layer.slices if recipe.groups is None or k in recipe.groups)
    return {fold: ks for fold in folds if ks}


def _factor_sizes(layer: Layer, fold: Fold, k: int) -> tuple[int, int]:
    """Parameters of the encoder and of the decoder per unit of rank, over all groups and slices."""
    encoder, decoder = fold.kernels(layer.kernel)
    return layer.c * prod(encoder), k * layer.f * prod(decoder)
