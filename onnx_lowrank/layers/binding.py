"""Layers, and the places of their numbers in the model."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_lowrank.core.layer import Layer
from onnx_lowrank.graph.walk import Place
from onnx_lowrank.graph.weights import Stored


@dataclass(frozen=True, slots=True)
class Binding:
    """A layer, and the place of its numbers in the model.

    Attributes:
        layer: The layer.
        stored: The weight as the first use reads it.
        casts: For each use, the element type to which the stored weight is cast, or None.
        hidden: The channels between the layer and its producers; None without producers.
    """

    layer: Layer
    stored: Stored
    casts: tuple[int | None, ...]
    hidden: Hidden | None = None


@dataclass(frozen=True, slots=True)
class Hidden:
    """The channels between a consumer and its producers.

    Attributes:
        producers: The producers, in graph order.
        constants: Places and operands of the constants with one entry for each channel, and the axis of the
            channels, counted from the end.
        tensors: Names of the activations with these channels, in the main graph.
        grouped: Depthwise convolutions, with as many groups as there are channels.
        targets: Places and operands of the shapes that end with the number of channels.
    """

    producers: tuple[Binding, ...]
    constants: tuple[tuple[Place, int, int], ...]
    tensors: tuple[str, ...]
    grouped: tuple[Place, ...] = ()
    targets: tuple[tuple[Place, int], ...] = ()
