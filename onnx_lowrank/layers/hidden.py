"""Pairs of layers with hidden channels between them, such as the two matrices of a feed-forward block.

Rules:

1. The consumer reads an activation that channelwise operators (`operators.elementwise`) compute from the
   results of producers: one layer, several (a gated block), through any number of such operators.
2. Every output feature of a producer is one input channel of the consumer, on the same axis. All have one
   use, in the main graph, and a plain linear family (`Operator.product`).
3. Nothing but these operators reads the tensors between, and the model does not return them. Constants
   between have one value, or one for each channel.
4. A layer belongs to one pair at most. The pairs with the most weight come first: a chain of layers, each the
   producer of the next, gives every other pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import constant
from onnx_lowrank.layers.binding import Binding, Hidden
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.elementwise import is_channelwise


def hidden_channels(model: Model, walk: Walk, bindings: Sequence[Binding]) -> dict[str, Hidden]:
    """The hidden channels that can be dropped, by the id of the consumer.

    Args:
        model: The model.
        walk: Its walk.
        bindings: Its layers, in graph order.
    """
    plain = {place_of(binding): binding for binding in bindings if is_plain(walk, binding)}
    found = {}
    for place, binding in plain.items():
        between = _Between(model, walk, plain, place).explore()
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


def channel_axis(walk: Walk, binding: Binding) -> int | None:
    """The axis of a plain layer's input channels and output features, counted from the end."""
    return registry.family(walk.node(place_of(binding))).feature_axis(binding.layer.uses[0])


class _Between:
    """The operators between a consumer and its producers."""

    def __init__(self, model: Model, walk: Walk, plain: Mapping[Place, Binding], consumer: Place) -> None:
        self._model = model
        self._walk = walk
        self._plain = plain
        self._consumer = consumer
        binding = plain[consumer]
        self._channels = binding.layer.c
        self._axis = channel_axis(walk, binding)
        self._producers: dict[Place, Binding] = {}
        self._nodes: set[Place] = set()
        self._constants: list[tuple[Place, int, int]] = []
        self._tensors: dict[str, Any] = {}

    def explore(self) -> Hidden | None:
        """Walk back from the consumer's input to the producers; None if a rule fails."""
        use = self._plain[self._consumer].layer.uses[0]
        self._activation = registry.family(self._walk.node(self._consumer)).activation(use.operand)
        waiting = [self._walk.operand(self._consumer, self._activation)]
        while waiting:
            tensor = waiting.pop()
            if tensor is None or tensor.name in self._tensors:
                continue
            behind = self._behind(tensor)
            if behind is None:
                return None
            self._tensors[tensor.name] = tensor
            waiting += behind
        if not self._producers or not all(map(self._is_inside, self._tensors.values())):
            return None
        producers = tuple(self._producers[place] for place in sorted(self._producers))
        names = tuple(self._walk.origin(tensor)[1] for tensor in self._tensors.values())
        return Hidden(producers, tuple(self._constants), names)

    def _behind(self, tensor: Any) -> list[Any] | None:
        """The activations from which a tensor is computed: none of a producer; None if a rule fails."""
        place = self._walk.producer(tensor)
        if place is None or place.scope or self._walk.is_output(tensor):
            return None
        node = self._walk.node(place)
        if place in self._plain:
            producer = self._plain[place]
            if producer.layer.f != self._channels or channel_axis(self._walk, producer) != self._axis:
                return None
            self._producers[place] = producer
            bias = registry.family(node).bias
            return self._read(place, [] if bias is None else [bias])
        is_norm = node.op_type == "BatchNormalization"
        if not is_channelwise(node) or (is_norm and not self._lies_second()):
            return None
        self._nodes.add(place)
        return self._read(place, range(len(node.input)))

    def _read(self, place: Place, operands: Iterable[int]) -> list[Any] | None:
        """The computed operands of a node; its constants with channels are noted. None if a rule fails."""
        computed = []
        for index in operands:
            tensor = self._walk.operand(place, index)
            value = None if tensor is None else constant(self._walk, self._model, tensor)
            if value is None:
                computed += [] if tensor is None else [tensor]
            elif value.size > 1:
                # A vector with other values beside it broadcasts along the last axis; parameters do not.
                is_parameter = place in self._plain or self._walk.node(place).op_type == "BatchNormalization"
                axis = -1 if is_parameter and value.ndim == 1 else self._axis
                if axis is None or not self._has_channels(value.shape, axis):
                    return None
                self._constants.append((place, index, axis))
        return computed if bool(computed) != (place in self._plain) else None

    def _has_channels(self, shape: tuple[int, ...], axis: int) -> bool:
        """Whether a constant has one value for each channel, all along the axis."""
        return len(shape) >= -axis and shape[axis] == self._channels == prod(shape)

    def _lies_second(self) -> bool:
        """Whether the channels lie along the second axis of the activation."""
        layer = self._plain[self._consumer].layer
        return bool(layer.kernel) or layer.uses[0].rank == 2

    def _is_inside(self, tensor: Any) -> bool:
        """Rule 3: whether only the operators between and the consumer read a tensor."""
        return all(
            place in self._nodes or (place, index) == (self._consumer, self._activation)
            for place, index in self._walk.consumers(tensor)
        )
