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
        hidden: The parts between the layer and the partners that are narrowed with it; None without partners.
        sum: The operators that add up its result and those of `Layer.addends`; None without such layers.
    """

    layer: Layer
    stored: Stored
    casts: tuple[int | None, ...]
    hidden: Hidden | None = None
    sum: Sum | None = None


@dataclass(frozen=True, slots=True)
class Sum:
    """The operators that add up the results of layers, in the main graph.

    Attributes:
        results: Names of the results, in the order of the layers.
        nodes: The operators, in graph order; the last one gives the sum.
        others: Places and operands of all further addends.
    """

    results: tuple[str, ...]
    nodes: tuple[Place, ...]
    others: tuple[tuple[Place, int], ...]


@dataclass(frozen=True, slots=True)
class Size:
    """A constant number in a shape, which follows the width of a layer.

    Attributes:
        place: The node that reads the shape.
        operand: Its input that is the shape.
        part: The input, of the Concat that joins the shape, that holds the number; None if the whole shape is
            one constant.
        index: The number's index in the constant.
        stated: The number, if the model computes it from a size that stays; a constant takes its place.
    """

    place: Place
    operand: int
    part: int | None
    index: int
    stated: int | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """A number that the model computes from the size of a head, and that has to stay.

    Attributes:
        place: A node that reads it.
        operand: Its input that is the number.
        value: The number.
        shape: The shape of the tensor that holds it.
    """

    place: Place
    operand: int
    value: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """An output of a Split of a packed matrix's features.

    Attributes:
        place: The Split.
        output: The number of its output.
        lengths: The sizes of all its outputs.
    """

    place: Place
    output: int
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hidden:
    """The parts of a model between a layer and its partners that change with the width.

    Attributes:
        producers: The partners, in graph order.
        constants: Places and operands of the constants with one entry for each feature of a partner, and the
            axis of the features, counted from the end.
        tensors: Names of the activations with these features, in the main graph.
        grouped: Depthwise convolutions, with as many groups as there are features.
        targets: Places and operands of the shapes that end with the number of features.
        sizes: The numbers in the shapes of these activations.
        pins: The numbers that the model computes from these sizes.
        totals: The numbers in the shapes that state all features of a packed matrix.
        splits: For the rows of a packed matrix, the Splits that cut them out; empty if all parts have one
            size of heads.
        fused: The Attention that holds the packed matrix; None if it is another operator.
        shared: The number of heads of the layer that meet one head of the partner.
        ignores_shift: Whether a Softmax ignores what is the same for all keys.
    """

    producers: tuple[Binding, ...]
    constants: tuple[tuple[Place, int, int], ...]
    tensors: tuple[str, ...]
    grouped: tuple[Place, ...] = ()
    targets: tuple[tuple[Place, int], ...] = ()
    sizes: tuple[Size, ...] = ()
    pins: tuple[Pin, ...] = ()
    totals: tuple[Size, ...] = ()
    splits: tuple[Piece, ...] = ()
    fused: Place | None = None
    shared: int = 1
    ignores_shift: bool = False
