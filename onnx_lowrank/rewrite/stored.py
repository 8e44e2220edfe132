"""The factors of a layer, as the chains of a compressed model hold them.

The rewriter lays factors out as its operators read them. A layout only orders their numbers: laid out, the
numbers of their places show where each of them went.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.operators import registry

_ENDS = re.compile(r"_(encoder|decoder)(_\d+)?$")


def factors(
    walk: Walk,
    binding: Binding,
    option: Option,
    chain: Sequence[NodeProto],
    values: Mapping[str, NDArray[Any]],
) -> Factors | None:
    """Read the factors of a layer back.

    Args:
        walk: The walk of the input model.
        binding: The layer.
        option: Its option.
        chain: The nodes of the chain of its first use.
        values: The stored tensors of the compressed model, by name.

    Returns:
        The factors; None if the chain does not hold both of them, as in a narrowed or multiplied layer, or if
        rows of a table stay.
    """
    if option.lowering in (Lowering.NARROW, Lowering.SPARSE):
        return None
    layer = binding.layer
    own = {Lowering.SHARED: Lowering.NATIVE, Lowering.SUMMED: Lowering.NATIVE}
    lowering = own.get(option.lowering, option.lowering)
    nodes = [walk.node(Place(use.scope, use.node)) for use in layer.uses]
    counted = _counted(layer.shape, option)
    laid_out = registry.family(nodes[0]).layout(layer, nodes, counted, lowering)
    names = {"encoder": list[str](), "decoder": list[str]()}
    for name in dict.fromkeys(name for node in chain for name in node.input):
        if name in values and (found := _ENDS.search(name)):
            names[found[1]].append(name)
    made: list[NDArray[Any]] = []
    for places, end, shape in zip(
        laid_out, names, (counted.encoder.shape, counted.decoder.shape), strict=True
    ):
        stored = np.concatenate([values[name].ravel() for name in names[end]]) if names[end] else np.empty(0)
        if stored.size != places.size or not np.array_equal(np.sort(places.ravel()), np.arange(places.size)):
            return None
        numbers = np.empty_like(stored)
        numbers[places.ravel().astype(np.intp)] = stored
        made.append(numbers.reshape(shape))
    return Factors(option.fold, made[0], made[1])


def _counted(shape: tuple[int, ...], option: Option) -> Factors:
    """Factors whose numbers are their places."""
    groups, f, c, *kernel = shape
    before, behind = option.fold.kernels(tuple(kernel))
    encoder = (groups, option.k, option.j, c // option.k, *before)
    decoder = (groups, f, option.k, option.j, *behind)
    first, second = (np.arange(prod(size), dtype=np.float64).reshape(size) for size in (encoder, decoder))
    return Factors(option.fold, first, second)
