"""The measured times of uses that are alike, and the times of layers that follow from them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from onnx_lowrank.allocate.times import Curve, Narrowed, Shared, faster
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.probe.micro import Micro

K = TypeVar("K", bound=Hashable)

_WIDTHS = (1 / 16, 1 / 4, 1 / 2, 3 / 4)
"""The shares of its width at which a layer is measured; between them, its time is linear in the width."""


@dataclass(slots=True)
class Kind:
    """Uses that are alike.

    Attributes:
        micro: One of them, as a model.
        time: The time of each, in nanoseconds.
        known: The relative times of options, measured.
        sizes: The relative times of layers that differ only in their output features and input channels.
        decoders: The relative times of the decoders of chains of one slice, without their encoders.
    """

    micro: Micro
    time: int
    known: dict[Option, float] = field(default_factory=dict)
    sizes: dict[tuple[int, int], float] = field(default_factory=dict)
    decoders: dict[Option, float] = field(default_factory=dict)


Parts = Sequence[tuple[float, Kind]]
"""The kinds of a layer's uses, each with the time that its uses take."""


def mean(parts: Sequence[tuple[float, Mapping[K, float]]]) -> dict[K, float]:
    """Relative times that are known for all kinds of a layer's uses, weighted by the times of these uses."""
    whole = sum(share for share, _ in parts)
    (_, first), *rest = parts
    names = [name for name in first if all(name in known for _, known in rest)]
    return {name: sum(share * known[name] for share, known in parts) / whole for name in names}


def chains(parts: Parts) -> dict[tuple[Fold, int], Curve]:
    """The times of a layer's decompositions; of several ways to write one, the fastest."""
    ratios: dict[tuple[Fold, int, Lowering], dict[int, float]] = {}
    for option, ratio in mean([(share, kind.known) for share, kind in parts]).items():
        ratios.setdefault((option.fold, option.k, option.lowering), {})[option.j] = ratio
    curves: dict[tuple[Fold, int], Curve] = {}
    for (fold, k, lowering), known in sorted(ratios.items()):
        curve = Curve(known, lowering)
        curves[fold, k] = faster(curves[fold, k], curve) if (fold, k) in curves else curve
    return curves


def shared(layer: Layer, parts: Parts, gain: float) -> Shared | None:
    """The times of a layer that shares an encoder; None if they are unknown."""
    first = mean([(share, kind.known) for share, kind in parts])
    other = mean([(share, kind.decoders) for share, kind in parts])
    both = [option for option in other if option in first]
    if not (layer.siblings and both):
        return None
    with_encoder, without = (Curve({option.j: known[option] for option in both}) for known in (first, other))
    return Shared(layer.id, with_encoder, without, gain)


def narrowed(layer: Layer, members: Sequence[Parts], widths: Sequence[int], gain: float) -> Narrowed | None:
    """The times of a layer and its partners at smaller widths; None if they are unknown.

    Args:
        layer: A layer with partners.
        members: The kinds of the partners' uses, and those of the layer's.
        widths: The widths that were measured.
        gain: The saving inside the model over that in isolation.
    """
    if not all(members):
        return None
    ratios: list[dict[int, float]] = [{layer.width: 1.0} for _ in members]
    sizes = [mean([(share, kind.sizes) for share, kind in parts]) for parts in members]
    for width in widths:
        few = [(less.f, less.c) for less in layer.at_width(width)]
        if all(size in known for size, known in zip(few, sizes, strict=True)):
            for ratio, size, known in zip(ratios, few, sizes, strict=True):
                ratio[width] = known[size]
    if len(ratios[0]) == 1:
        return None
    keeps = tuple(round(sum(share for share, _ in parts)) for parts in members)
    return Narrowed(keeps, tuple(map(Curve, ratios)), gain)


def widths_of(layer: Layer, block: int) -> list[int]:
    """The widths at which a layer with partners is measured.

    Args:
        layer: The layer.
        block: The widths of each of its heads are multiples of it.
    """
    step = layer.width_step * block
    counts = {max(1, round(share * layer.width / step)) for share in _WIDTHS}
    return [count * step for count in sorted(counts) if count * step < layer.width]
