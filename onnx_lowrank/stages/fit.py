"""The factors of layers, each on its own: `work.fitting` has the rules by which they are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.statistics import Statistics
from onnx_lowrank.core.factors import LayerFit
from onnx_lowrank.core.option import Option
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.bias import Bias, bias
from onnx_lowrank.layers.find import Binding
from onnx_lowrank.rewrite.replace import Replacement
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.fitting import FactorsItem, fitted
from onnx_lowrank.work.weights import reference

Fitted = tuple[Replacement, LayerFit]
"""The factors of one layer as the rewriter needs them, and how they came about."""


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
        executor: What computes.

    Raises:
        InputError: The moments are not finite, or a data file has changed.
    """
    biases = [None if statistics is None else bias(model, walk, binding) for binding in bindings]

    def items() -> Iterator[FactorsItem]:
        for binding, own in zip(bindings, biases, strict=True):
            yield factors_item(model, walk, binding, options[binding.layer.id], own, statistics)

    made = executor.map(fitted, items())
    for binding, own, layer in zip(bindings, biases, made, strict=True):
        shifted = None if own is None or layer.lost is None else own.values + layer.lost
        option = options[binding.layer.id]
        yield Replacement(binding, option, layer.factors, layer.certificate, shifted), layer.fit


def factors_item(
    model: Model,
    walk: Walk,
    binding: Binding,
    option: Option,
    own: Bias | None,
    statistics: Statistics | None,
) -> FactorsItem:
    """What to compute for one layer.

    Args:
        model: The model.
        walk: Its walk.
        binding: The layer.
        option: Its option.
        own: The bias of the layer that can change.
        statistics: The moments to fit to; None to fit to the weight.

    Raises:
        InputError: A data file has changed.
    """
    weight = reference(model, walk, binding)
    if statistics is None:
        return FactorsItem(weight, option)
    moments = statistics.reference(binding.layer.id)
    # Only moments of outputs have the bias in them, and its values may be as many as items should not carry.
    is_inside = moments is not None and moments.of_outputs
    return FactorsItem(weight, option, moments, own is not None, added_inside(own) if is_inside else None)


def added_inside(own: Bias | None) -> NDArray[np.float64] | None:
    """What the layer's own node adds to its output features, shape (f,)."""
    return own.values if own is not None and own.in_node else None
