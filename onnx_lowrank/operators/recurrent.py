"""LSTM, GRU and RNN.

Rules of their chains:

1. The input weight W, (directions, gates · hidden, inputs), is decomposed. Its product does not depend on the
   states. So the chain is a MatMul by the encoder, then the same operator with the decoder as a narrower W.
2. Both directions read the same vectors and share the encoder: the gates of all directions are the output
   features of one matrix.
3. The recurrent weights R, the biases, lengths, states, peepholes, attributes and outputs stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Lowering
from onnx_lowrank.graph.walk import attribute_of
from onnx_lowrank.operators.family import Operands, Operator, Sample, Shape, Site, Timed, known
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.operators.geometry import Vectors

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_R, _B, _LENGTHS, _STATES, _P = 2, 3, 4, (5, 6), 7
_STEPS = 3
"""Number of steps of a sample if no other input fixes it."""


class Recurrent(Operator):
    """An operator that runs over a sequence X (steps, batch, inputs), or (batch, steps, inputs)."""

    types = tuple(_GATES)
    is_linear = False

    def on_right(self, operand: int) -> bool:
        """W has its outputs first."""
        return False

    def kind(self, node: NodeProto) -> str:
        """Type and directions: two directions of one W could be read as one direction of twice the size."""
        return f"{node.op_type} of {_directions(node)}"

    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """All gates of all directions as the output features of one matrix."""
        directions, gates = _directions(node), _GATES[node.op_type]
        hidden = weight.shape[1] // gates if weight.ndim == 3 else 0
        hidden = attribute_of(node, "hidden_size", hidden)
        if weight.shape[:-1] != (directions, gates * hidden):
            return (
                f"its weight of shape {weight.shape} does not fit its {directions} × {gates} gates of size "
                f"{hidden}: repair the export"
            )
        return weight.reshape(1, -1, weight.shape[-1])

    def laid_out(
        self, node: NodeProto, operand: int, canonical: NDArray[Any], shape: Sequence[int]
    ) -> NDArray[Any]:
        """Separate the directions again."""
        return canonical.reshape(shape)

    def positions(
        self, node: NodeProto, operand: int, entering: Shape | None, leaving: Shape | None, features: int
    ) -> Positions | None:
        """The batch, and the steps as the one spatial axis."""
        sizes = known(entering)
        if sizes is None or len(sizes) != 3:
            return None
        steps, batch = sizes[1::-1] if _batch_first(node) else sizes[:2]
        return Positions(batch, (steps,), (steps,))

    def dense_evaluations(self, node: NodeProto, positions: Positions) -> int:
        """Once in every step of every sequence, as if all sequences had full length."""
        return positions.batch * prod(positions.inputs)

    def factor_evaluations(
        self, node: NodeProto, positions: Positions, kernel: tuple[int, ...], fold: Fold, *, transposed: bool
    ) -> tuple[int, int]:
        """Each once in every step."""
        evaluations = self.dense_evaluations(node, positions)
        return evaluations, evaluations

    def macs_undecomposed(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """The MACs of both weights, in every step."""
        return self._macs(node, inputs, (1, _R))

    def macs_beside(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """The MACs of the recurrent weights, in every step."""
        return self._macs(node, inputs, (_R,))

    def _macs(self, node: NodeProto, inputs: Sequence[Shape | None], weights: Sequence[int]) -> int | None:
        positions = self.positions(node, 1, inputs[0], None, 0)
        sizes = [known(inputs[weight]) for weight in weights if weight < len(inputs)]
        if positions is None or None in sizes:
            return None
        return self.dense_evaluations(node, positions) * sum(prod(size) for size in sizes if size)

    def layout(
        self, layer: Layer, nodes: Sequence[NodeProto], factors: Factors, lowering: Lowering
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """A matrix (inputs, j) for a MatMul, and a narrow W (directions, gates · hidden, j)."""
        directions, rows, _ = layer.uses[0].laid_out
        return factors.encoder[0, 0].T, factors.decoder.reshape(directions, rows, -1)

    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """MatMul of the sequence, then the node with the decoder as its W."""
        hidden = fragment.add("encoder", "MatMul", [names.value, names.encoder])
        fragment.copy("decoder", site.node, {0: hidden, site.use.operand: names.decoder})

    def geometry(self, layer: Layer, use: Use, node: NodeProto) -> Vectors:
        """One vector for every step, also for steps behind the end of a shorter sequence."""
        return Vectors()

    def sample(self, layer: Layer, use: Use, node: NodeProto) -> Sample | None:
        """A short sequence, or one of the model's size if lengths or states of this size come along."""
        if not any(node.input[_LENGTHS : max(_STATES) + 1]):
            return Sample(0, _sequence(node, _STEPS, 1, layer.c))
        shape = _shape_in_model(layer, use, node)
        return None if shape is None else Sample(0, shape)

    def timed(self, layer: Layer, use: Use, node: NodeProto) -> Timed | None:
        """The sequences that the node reads in the model, all of full length, without lengths."""
        shape = _shape_in_model(layer, use, node)
        if shape is None or use.positions is None:
            return None
        directions, rows, _ = use.laid_out
        hidden = rows // _GATES[node.op_type]
        state = _sequence(node, directions, use.positions.batch, hidden)
        sizes = {
            _R: (directions, rows, hidden),
            _B: (directions, 2 * rows),
            **dict.fromkeys(_STATES, state),
            _P: (directions, 3 * hidden),
        }
        others = {index: size for index, size in sizes.items() if any(node.input[index : index + 1])}
        return Timed(shape, use.laid_out, others)


def _directions(node: NodeProto) -> int:
    return 2 if attribute_of(node, "direction", "forward") == "bidirectional" else 1


def _batch_first(node: NodeProto) -> bool:
    """Whether sequences and states have the batch as their first axis (from opset 14 on)."""
    return bool(attribute_of(node, "layout", 0))


def _sequence(node: NodeProto, steps: int, batch: int, features: int) -> tuple[int, int, int]:
    """The shape of a sequence, or of states, with their directions in place of steps."""
    return (batch, steps, features) if _batch_first(node) else (steps, batch, features)


def _shape_in_model(layer: Layer, use: Use, node: NodeProto) -> tuple[int, int, int] | None:
    """The shape of the sequence that a use reads; None if it is unknown or the use never runs."""
    if use.positions is None or not use.positions.inputs:
        return None
    (steps,) = use.positions.inputs
    return _sequence(node, steps, use.positions.batch, layer.c)
