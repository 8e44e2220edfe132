"""The lowerings that the options of a run may have.

Rules:

1. Without a style, a layer has the lowerings between which measured times choose, the native one first.
2. A style leaves a layer one lowering for one slice and one for several; where the layer does not have the
   style's lowering, that is the native one.
3. CONV and MATMUL leave out what only the other operator can write: the shared factors of the layers that
   they change, and the slices of a pointwise convolution.
4. GROUP_FREE leaves out the slices of matrices that are convolutions, more slices of a convolution than
   `_MOST`, and layers whose own operator has groups, as both of their factors have them, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace

from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Lowering, Style
from onnx_lowrank.layers.found import Found

_MOST = 16
"""The most slices with a node each: up to here, the times are like those of a grouped convolution
(docs/targets.md)."""

_UNASKED = frozenset((Lowering.POINTWISE, Lowering.SPLIT))
"""The lowerings that are not tried without a style."""


def lowered(found: Found, styles: Set[Style]) -> Found:
    """A model whose layers offer only what some styles allow.

    Args:
        found: The model with its layers.
        styles: The styles.
    """
    layers = [_lowered(layer, styles) for layer in found.layers]
    alone = {layer.id for layer in layers if not _is_native(layer)} if styles else set[str]()
    bindings = (
        replace(binding, layer=_apart(layer, alone))
        for binding, layer in zip(found.bindings, layers, strict=True)
    )
    return replace(found, bindings=tuple(bindings))


def is_left(layer: Layer, styles: Set[Style]) -> bool:
    """Whether a style asks to write a layer in another way than with its own operators, and it has none."""
    reads_rows = any(use.reads_indices for use in layer.uses)
    return Style.CONV in styles and not layer.kernel and not reads_rows and _is_native(layer)


def _lowered(layer: Layer, styles: Set[Style]) -> Layer:
    if not styles:
        tried = [tuple(way for way in ways if way not in _UNASKED) for ways in (layer.whole, layer.sliced)]
        return replace(layer, whole=tried[0], sliced=tried[1])
    whole, several = _first(layer.whole, _WHOLE, styles), _first(layer.sliced, _SLICED, styles)
    slices = layer.slices
    if whole is Lowering.MATMUL:
        slices = slices[:1]
    if Style.GROUP_FREE in styles:
        most = 1 if several is Lowering.POINTWISE else _MOST if layer.kernel else slices[-1]
        slices = tuple(k for k in slices if k <= most and not (layer.kernel and layer.groups > 1))
    return replace(layer, whole=(whole,), sliced=(several,), slices=slices)


_WHOLE = {Style.CONV: Lowering.POINTWISE, Style.MATMUL: Lowering.MATMUL}
_SLICED = {Style.CONV: Lowering.POINTWISE, Style.GROUP_FREE: Lowering.SPLIT}


def _first(ways: Iterable[Lowering], wanted: dict[Style, Lowering], styles: Set[Style]) -> Lowering:
    """The lowering of a style if there is one among these ways, else the native one."""
    asked = {way for style, way in wanted.items() if style in styles}
    return next((way for way in ways if way in asked), Lowering.NATIVE)


def _is_native(layer: Layer) -> bool:
    return layer.whole == (Lowering.NATIVE,)


def _apart(layer: Layer, alone: Set[str]) -> Layer:
    """The layer; it shares no factor with layers whose chains are not native."""
    siblings = () if alone & set(layer.siblings) else layer.siblings
    return replace(layer, siblings=siblings, addends=() if alone & set(layer.addends) else layer.addends)
