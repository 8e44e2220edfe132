"""The factors of layers, each fitted independently of the others by the rules in `work.fitting`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import LayerFit
from onnx_lowrank.core.layer import Between, sharing
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.bias import Bias, bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.linalg.narrowing import Way
from onnx_lowrank.rewrite.refit import Refitted
from onnx_lowrank.rewrite.replace import Replacement
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.fitting import FactorsItem, fitted
from onnx_lowrank.work.joins import JoinedItem, fitted_jointly
from onnx_lowrank.work.moments import MomentsRef
from onnx_lowrank.work.narrowing import Keys, WidthItem, way_of
from onnx_lowrank.work.sharing import SharedItem
from onnx_lowrank.work.sums import SummedItem
from onnx_lowrank.work.weights import reference

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.measured import Statistics

Fitted = tuple[Replacement | Refitted, LayerFit]
"""The new numbers of one layer as the rewriter needs them, and how they were made."""


def fit(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    options: Mapping[str, Option],
    statistics: Statistics | None,
    executor: Executor,
) -> Iterator[Fitted]:
    """Make the factors of layers, in their order.

    Args:
        model: The model.
        walk: Its walk.
        bindings: The layers.
        options: Their options, by id.
        statistics: The moments to fit to; None to fit to the weights.
        executor: Runs the computations.

    Raises:
        InputError: The moments are not finite, or a data file has changed.
    """
    together = [b for b in bindings if sharing(b.layer, options)]
    bindings = [b for b in bindings if not sharing(b.layer, options)]
    biases = [None if statistics is None else bias(model, walk, binding) for binding in bindings]

    def items() -> Iterator[FactorsItem]:
        for binding, changeable in zip(bindings, biases, strict=True):
            yield factors_item(model, walk, binding, options[binding.layer.id], changeable, statistics)

    made = executor.map(fitted, items())
    for binding, changeable, layer in zip(bindings, biases, made, strict=True):
        shifted = None if changeable is None or layer.lost is None else changeable.values + layer.lost
        option = options[binding.layer.id]
        yield Replacement(binding, option, layer.factors, layer.certificate, shifted), layer.fit
    yield from _together(model, walk, together, options, statistics, executor)


def _together(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    options: Mapping[str, Option],
    statistics: Statistics | None,
    executor: Executor,
) -> Iterator[Fitted]:
    """The factors of layers that share a factor, group by group."""
    by_id = {binding.layer.id: binding for binding in bindings}
    holders = [b for b in bindings if b.layer.holds_factor(options[b.layer.id])]
    groups = [[by_id[name] for name in sharing(b.layer, options)] for b in holders]

    def items() -> Iterator[JoinedItem]:
        for group in groups:
            option = options[group[0].layer.id]
            yield joined_item(model, walk, group, option.lowering, option.j, statistics)

    for group, made in zip(groups, executor.map(fitted_jointly, items()), strict=True):
        for binding, layer in zip(group, made, strict=True):
            changeable, option = bias(model, walk, binding), options[binding.layer.id]
            shifted = None if changeable is None or layer.lost is None else changeable.values + layer.lost
            yield Replacement(binding, option, layer.factors, layer.certificate, shifted), layer.fit


def joined_item(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    lowering: Lowering,
    j: int,
    statistics: Statistics | None,
) -> JoinedItem:
    """The work item of layers that share a factor of rank j.

    Args:
        model: The model.
        walk: Its walk.
        bindings: The layers, in graph order.
        lowering: SHARED if they share an encoder, SUMMED if they share a decoder.
        j: The rank.
        statistics: The moments; None if they are unknown.

    Raises:
        InputError: A data file has changed.
    """
    names = [binding.layer.id for binding in bindings]
    if lowering is Lowering.SHARED:
        return shared_item(
            model, walk, bindings, j, None if statistics is None else statistics.shared_inputs(names)
        )
    weights = tuple(reference(model, walk, binding) for binding in bindings)
    biases = [bias(model, walk, binding) for binding in bindings]
    inside = [own.values for own in biases if own is not None and own.in_node]
    moments = None if statistics is None else statistics.summed_outputs(names)
    inputs = tuple(None if statistics is None else statistics.reference(name) for name in names)
    centred = tuple(own is not None for own in biases)
    added = np.sum([np.zeros(bindings[0].layer.f), *inside], axis=0)
    return SummedItem(weights, j, moments, inputs, centred, added)


def shared_item(
    model: Model, walk: Walk, bindings: Sequence[Binding], j: int, moments: MomentsRef | None
) -> SharedItem:
    """The work item of layers that share an encoder of rank j.

    Args:
        model: The model.
        walk: Its walk.
        bindings: The layers, siblings in graph order.
        j: The rank.
        moments: The moments of their inputs; None if they are unknown.

    Raises:
        InputError: A data file has changed.
    """
    weights = tuple(reference(model, walk, binding) for binding in bindings)
    centred = tuple(bias(model, walk, binding) is not None for binding in bindings)
    return SharedItem(weights, j, moments, centred)


def factors_item(
    model: Model,
    walk: Walk,
    binding: Binding,
    option: Option,
    changeable: Bias | None,
    statistics: Statistics | None,
) -> FactorsItem:
    """The work item of one layer.

    Args:
        model: The model.
        walk: Its walk.
        binding: The layer.
        option: Its option.
        changeable: The bias of the layer, if it can change.
        statistics: The moments to fit to; None to fit to the weight.

    Raises:
        InputError: A data file has changed.
    """
    weight = reference(model, walk, binding)
    if statistics is None:
        return FactorsItem(weight, option)
    moments = statistics.reference(binding.layer.id)
    # Only moments of outputs include the bias, and its values may be too many for an item to carry in vain.
    is_inside = moments is not None and moments.of_outputs
    added = added_inside(changeable) if is_inside else None
    way = None if option.lowering is not Lowering.NARROW else _way(model, walk, binding, statistics)
    per_rank = binding.layer.kept_per_rank
    return FactorsItem(weight, option, moments, changeable is not None, added, way, per_rank)


def _way(model: Model, walk: Walk, binding: Binding, statistics: Statistics) -> Way | WidthItem | None:
    """The way to make a layer narrower, or the question for it; None if its inputs were not measured."""
    if (known := statistics.ways.get(binding.layer.id)) is not None:
        return known
    return width_item(model, walk, binding, statistics) if can_narrow(binding, statistics) else None


def way_to(model: Model, walk: Walk, binding: Binding, statistics: Statistics) -> Way | None:
    """The way to make a layer narrower; None if its inputs were not measured.

    Raises:
        InputError: A data file has changed, or the moments are not finite.
    """
    found = _way(model, walk, binding, statistics)
    return way_of(found) if isinstance(found, WidthItem) else found


def can_narrow(binding: Binding, statistics: Statistics) -> bool:
    """Whether a layer has partners, and moments show what its narrow options lose."""
    layer = binding.layer
    seen = (layer, *layer.partners) if layer.loses_features else (layer,)
    found = [statistics.reference(each.id) for each in seen]
    return layer.narrowing is not None and not any(moments is None or moments.of_outputs for moments in found)


def width_item(model: Model, walk: Walk, binding: Binding, statistics: Statistics) -> WidthItem:
    """The work item of a layer that can be narrowed.

    Raises:
        InputError: A data file has changed.
    """
    narrowing, hidden = binding.layer.narrowing, binding.hidden
    moments = statistics.reference(binding.layer.id)
    if narrowing is None or hidden is None or moments is None:
        raise RuntimeError(f"{binding.layer.id!r} cannot be narrowed")
    changeable, keys = bias(model, walk, binding), None
    added = None if changeable is None else changeable.values
    if narrowing.between is Between.SCORES:
        (partner,) = hidden.producers or (binding,)
        others, its_bias = statistics.reference(partner.layer.id), bias(model, walk, partner)
        if others is None:
            raise RuntimeError(f"the inputs of {partner.layer.id!r} were not measured")
        its_values = None if its_bias is None else its_bias.values
        its_rows = narrowing.rows[-1] if narrowing.rows else None
        keys = Keys(reference(model, walk, partner), others, its_values, hidden.ignores_shift, its_rows)
    return WidthItem(
        weight=reference(model, walk, binding),
        moments=moments,
        centred=changeable is not None,
        between=narrowing.between,
        heads=narrowing.heads // hidden.shared,
        shared=hidden.shared,
        added=None if keys is None else added,
        keys=keys,
        rows=narrowing.rows[0] if binding.layer.packs_own else None,
    )


def added_inside(changeable: Bias | None) -> NDArray[np.float64] | None:
    """The bias that the layer's node adds to its outputs, shape (f,); None if another node adds it."""
    return changeable.values if changeable is not None and changeable.in_node else None
