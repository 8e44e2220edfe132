"""Layers made by hand, with what their operators know of them."""

from __future__ import annotations

from dataclasses import replace

from onnx.helper import make_node

from onnx_lowrank.core.layer import Evaluations, Layer, Use
from onnx_lowrank.operators import registry


def evaluated(layer: Layer) -> Layer:
    """The layer with the evaluations of its uses and the lowerings that all of them share."""
    uses = tuple(_use(layer, use) for use in layer.uses)
    ways = {
        sliced: [_family(use).lowerings(use, layer.kernel, layer.groups, sliced=sliced) for use in uses]
        for sliced in (False, True)
    }
    whole, several = (
        tuple(way for way in found[0] if all(way in other for other in found)) if found else layer.whole
        for found in ways.values()
    )
    return replace(layer, uses=uses, whole=whole, sliced=several)


def _family(use: Use):
    return registry.family(make_node(use.op, [], []))


def _use(layer: Layer, use: Use) -> Use:
    if use.positions is None:
        return use
    node, family = make_node(use.op, [], []), _family(use)
    factors = {
        fold: family.factor_evaluations(node, use.positions, layer.kernel, fold, transposed=use.transposed)
        for fold in layer.folds
    }
    return replace(use, evaluations=Evaluations(family.dense_evaluations(node, use.positions), factors))
