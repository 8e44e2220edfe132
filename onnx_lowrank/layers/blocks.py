"""The block of a layer: what lies between a tensor and the sum that adds the block's result to it.

Rules:

1. The sum is an Add, or a normalization of ONNX Runtime with a sum in it. It adds a tensor that follows from
   the layer's result to one that does not, the skip connection.
2. All that the layer reads follows from the skip connection, apart from constants and shapes. So neither a
   bias nor an attention mask is one.
3. The first such sum counts. A layer with several uses, or outside the main graph, has no block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnx import NodeProto

from onnx_lowrank.graph.walk import Walk, is_op
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.adding import addends

_SHAPES = ("Shape", "Size")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the main graph.

    Attributes:
        skip: Name of the tensor that goes through the block and around it.
        result: Name of the tensor that is added to it.
        axis: The axis of the features of both, counted from the end.
    """

    skip: str
    result: str
    axis: int


class Blocks:
    """Finds the blocks of a model's layers."""

    def __init__(self, walk: Walk) -> None:
        """Read the main graph."""
        self._nodes: Sequence[NodeProto] = list(walk.scopes[""].nodes)
        self._made = {name: index for index, node in enumerate(self._nodes) for name in node.output}
        self._fixed = {"", *(name for path, name in walk.initializers if not path)}
        for node in self._nodes:
            if is_op(node, _SHAPES) or self._fixed.issuperset(node.input):
                self._fixed.update(node.output)

    def of(self, binding: Binding) -> Block | None:
        """The block of a layer; None if it has none."""
        use = binding.layer.uses[0]
        if len(binding.layer.uses) > 1 or use.scope:
            return None
        operator = registry.family(self._nodes[use.node])
        read = self._nodes[use.node].input[operator.activation(use.operand)]
        kernel = binding.layer.kernel
        axis = -1 - len(kernel) if kernel else operator.feature_axis(use)
        for skip, result in self._sums(use.node):
            if axis is not None and self._follows(read, skip):
                return Block(skip, result, axis)
        return None

    def _sums(self, layer: int) -> Iterator[tuple[str, str]]:
        """The sums that a layer's result reaches, in graph order: the other operand, and its own (rule 1)."""
        behind = set(self._nodes[layer].output)
        for node in self._nodes[layer + 1 :]:
            if behind.isdisjoint(node.input):
                continue
            added = addends(node, 0)
            is_sum = added is not None and added.other is not None
            operands = sorted(node.input[:2], key=lambda name: name in behind)
            if is_sum and [name in behind for name in operands] == [False, True]:
                yield operands[0], operands[1]
            behind.update(name for name in node.output if name)

    def _follows(self, tensor: str, skip: str) -> bool:
        """Whether all data of a tensor come from another one (rule 2)."""
        first = self._made.get(skip, -1)
        waiting, seen = [tensor], {skip}
        while waiting:
            name = waiting.pop()
            if name in seen or name in self._fixed:
                continue
            # Nothing that was made before the other tensor follows from it, and no input of the model does.
            if self._made.get(name, -1) <= first:
                return False
            seen.add(name)
            waiting += self._nodes[self._made[name]].input
        return skip not in self._fixed
