"""Pairs of layers with hidden channels between them, such as the two matrices of a feed-forward block.

Rules:

1. The consumer reads an activation that is computed from the results of producers: one layer, several (a
   gated block). Between are any number of operators that compute every channel by itself, from its element
   (`operators.elementwise`) or from all positions of the channel (`operators.spatial`: a depthwise
   convolution, a pool). At the end, the axes of the positions may be dropped before a matrix.
2. Every output feature of a producer is one input channel of the consumer, on the same axis. All have one
   use, in the main graph, and a plain linear family (`Operator.product`).
3. Nothing but these operators reads the tensors between, and the model does not return them. Constants
   between have one value, or one for each channel; a depthwise convolution has one kernel for each channel.
   The user wants none of these operators left alone.
4. A layer belongs to one pair at most. The pairs with the most weight come first: a chain of layers, each the
   producer of the next, gives every other pair.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.shapes import Shapes, shape_of
from onnx_lowrank.graph.walk import Place, Walk, label
from onnx_lowrank.graph.weights import constant
from onnx_lowrank.layers.binding import Binding, Hidden
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.elementwise import is_elementwise
from onnx_lowrank.operators.spatial import channel_operands, columns, drops_positions, is_depthwise


@dataclass(frozen=True, slots=True)
class Axis:
    """The axis of the channels of an activation.

    Attributes:
        index: Its index, counted from the end; 0 for the second axis of an activation with unknown axes.
        axes: Number of axes of the activation; 0 if it is unknown.
    """

    index: int
    axes: int

    @property
    def is_second(self) -> bool:
        """Whether it is the second axis."""
        return self.index == 0 or self.axes + self.index == 1


_SECOND = Axis(0, 0)

_Behind = list[tuple[Any, Axis | None]]
"""Activations behind a node, each with the axis of its channels."""

_ALIGNED = 7
"""The first opset whose operators align the last axes of their operands."""


def hidden_channels(
    model: Model,
    walk: Walk,
    shapes: Shapes,
    bindings: Sequence[Binding],
    spared: Container[tuple[str, str]],
) -> dict[str, Hidden]:
    """The hidden channels that can be dropped, by the id of the consumer.

    Args:
        model: The model.
        walk: Its walk.
        shapes: Its inferred shapes.
        bindings: Its layers, in graph order.
        spared: Scope and name of the operators that the user wants left alone.
    """
    plain = {place_of(binding): binding for binding in bindings if is_plain(walk, binding)}
    found = {}
    for place, binding in plain.items():
        between = _Between(model, walk, shapes, plain, place, spared).explore()
        if between is not None:
            found[binding.layer.id] = between
    return dict(_apart(found, {binding.layer.id: binding for binding in bindings}))


def _apart(found: Mapping[str, Hidden], bindings: Mapping[str, Binding]) -> Iterator[tuple[str, Hidden]]:
    """Rule 4: pairs that share no layer, in graph order."""

    def members(consumer: str) -> set[str]:
        return {consumer, *(producer.layer.id for producer in found[consumer].producers)}

    taken: set[str] = set()
    chosen = set()
    for consumer in sorted(found, key=lambda name: -sum(bindings[m].layer.size for m in members(name))):
        if not members(consumer) & taken:
            taken |= members(consumer)
            chosen.add(consumer)
    yield from ((consumer, between) for consumer, between in found.items() if consumer in chosen)


def place_of(binding: Binding) -> Place:
    """The node that applies a layer first."""
    use = binding.layer.uses[0]
    return Place(use.scope, use.node)


def is_plain(walk: Walk, binding: Binding) -> bool:
    """Rule 2 for one layer."""
    layer = binding.layer
    if len(layer.uses) > 1 or layer.uses[0].scope or layer.groups > 1 or binding.casts[0] is not None:
        return False
    use, node = layer.uses[0], walk.node(place_of(binding))
    operator = registry.family(node)
    flipped = operator.transposes(node, operator.activation(use.operand))
    return operator.product is not None and not flipped and channel_axis(walk, binding) is not None


def channel_axis(walk: Walk, binding: Binding) -> Axis | None:
    """The axis of a plain layer's input channels and output features; None if it is unknown."""
    layer, use = binding.layer, binding.layer.uses[0]
    if layer.kernel:
        return Axis(-len(layer.kernel) - 1, len(layer.kernel) + 2)
    index = registry.family(walk.node(place_of(binding))).feature_axis(use)
    return None if index is None else Axis(index, use.rank or 0)


class _Between:
    """The operators between a consumer and its producers."""

    def __init__(
        self,
        model: Model,
        walk: Walk,
        shapes: Shapes,
        plain: Mapping[Place, Binding],
        consumer: Place,
        spared: Container[tuple[str, str]],
    ) -> None:
        self._model = model
        self._walk = walk
        self._shapes = shapes
        self._plain = plain
        self._spared = spared
        self._consumer = consumer
        self._channels = plain[consumer].layer.c
        self._producers: dict[Place, Binding] = {}
        self._nodes: set[Place] = set()
        self._grouped: list[Place] = []
        self._targets: list[tuple[Place, int]] = []
        self._constants: list[tuple[Place, int, int]] = []
        # The tensors between, by name, and the axes of their channels.
        self._tensors: dict[str, Any] = {}
        self._axes: dict[str, Axis] = {}

    def explore(self) -> Hidden | None:
        """Walk back from the consumer's input to the producers; None if a rule fails."""
        consumer = self._plain[self._consumer]
        operator = registry.family(self._walk.node(self._consumer))
        self._activation = operator.activation(consumer.layer.uses[0].operand)
        waiting = [(self._walk.operand(self._consumer, self._activation), channel_axis(self._walk, consumer))]
        while waiting:
            tensor, axis = waiting.pop()
            if tensor is None or axis is None or self._axes.get(tensor.name, axis) != axis:
                return None
            if tensor.name in self._tensors:
                continue
            behind = self._behind(tensor, axis)
            if behind is None:
                return None
            self._tensors[tensor.name], self._axes[tensor.name] = tensor, axis
            waiting += behind
        if not self._producers or not all(map(self._is_inside, self._tensors.values())):
            return None
        producers = tuple(self._producers[place] for place in sorted(self._producers))
        names = tuple(self._walk.origin(tensor)[1] for tensor in self._tensors.values())
        return Hidden(producers, tuple(self._constants), names, tuple(self._grouped), tuple(self._targets))

    def _behind(self, tensor: Any, axis: Axis) -> _Behind | None:
        """The activations from which a tensor is computed: none of a producer; None if a rule fails."""
        place = self._walk.producer(tensor)
        if place is None or place.scope or self._walk.is_output(tensor):
            return None
        if place in self._plain:
            return self._produced(place, axis)
        node = self._walk.node(place)
        if (place.scope, label(node)) in self._spared:
            return None
        self._nodes.add(place)
        if is_elementwise(node):
            return self._elements(place, range(len(node.input)), axis) or None
        if (axis.index, axis.axes) == (-1, 2):
            axes = drops_positions(self._walk, self._model, place)
            if axes is not None:
                return self._dropped(place, axes)
        return self._moved(place, axis) if axis.is_second else None

    def _dropped(self, place: Place, axes: int) -> _Behind | None:
        """The activation behind an operator that drops the axes of the positions, and its number of axes."""
        tensor = self._walk.operand(place, 0)
        shape = shape_of(self._walk, self._shapes, tensor)
        stated = columns(self._walk, self._model, place)
        if stated == self._channels and shape is not None and set(shape[2:]) <= {1}:
            # Only shapes tell that the rows are images, not positions.
            self._targets.append((place, 1))
        elif stated not in (None, -1):
            return None
        axes = axes or len(shape or ())
        return [(tensor, Axis(1 - axes, axes) if axes > 1 else _SECOND)]

    def _produced(self, place: Place, axis: Axis) -> _Behind | None:
        """Rule 2 for a layer that computes a tensor between."""
        producer = self._plain[place]
        own = channel_axis(self._walk, producer)
        if own is None or producer.layer.f != self._channels:
            return None
        if not (own.is_second if axis == _SECOND else own.index == axis.index):
            return None
        self._producers[place] = producer
        bias = registry.family(self._walk.node(place)).bias
        operands = () if bias is None else (bias,)
        if producer.layer.kernel:
            return [] if self._have_channels(place, operands) else None
        return [] if self._elements(place, operands, own) == [] else None

    def _moved(self, place: Place, axis: Axis) -> _Behind | None:
        """The activation behind an operator that keeps the channels of the second axis apart."""
        operands = channel_operands(self._walk, self._model, place, axis.axes)
        if operands is None or not self._have_channels(place, operands):
            return None
        if is_depthwise(self._walk, self._model, place):
            self._grouped.append(place)
        return [(self._walk.operand(place, 0), axis)]

    def _elements(self, place: Place, operands: Iterable[int], axis: Axis) -> _Behind | None:
        """The computed operands of a node; its constants with channels are noted. None if a rule fails."""
        computed: _Behind = []
        for operand in operands:
            tensor = self._walk.operand(place, operand)
            value = None if tensor is None else constant(self._walk, self._model, tensor)
            if value is None:
                computed += [] if tensor is None else [(tensor, axis)]
            elif value.size > 1:
                if not self._has_channels(value.shape, axis.index):
                    return None
                self._constants.append((place, operand, axis.index))
        return computed

    def _has_channels(self, shape: tuple[int, ...], index: int) -> bool:
        """Whether a constant has one value for each channel, all along the axis with this index."""
        if self._walk.opsets[""] < _ALIGNED or not 0 < -index <= len(shape):
            return False
        return shape[index] == self._channels == prod(shape)

    def _have_channels(self, place: Place, operands: Iterable[int]) -> bool:
        """Whether operands are constants with one entry for each channel on their first axis; notes them."""
        for operand in operands:
            tensor = self._walk.operand(place, operand)
            value = None if tensor is None else constant(self._walk, self._model, tensor)
            if value is not None and value.shape[:1] == (self._channels,):
                self._constants.append((place, operand, -value.ndim))
            elif tensor is not None:
                return False
        return True

    def _is_inside(self, tensor: Any) -> bool:
        """Rule 3: whether only the operators between and the consumer read a tensor."""
        return all(
            place in self._nodes or (place, index) == (self._consumer, self._activation)
            for place, index in self._walk.consumers(tensor)
        )
