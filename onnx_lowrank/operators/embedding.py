"""EmbedLayerNormalization of ONNX Runtime's optimizer: the embedding of BERT, with its normalization.

The word table is the layer. The node adds rows of a table of positions and of a table of segments, and
normalizes the sum. Its chain looks narrow rows up and leaves the rest to SkipLayerNormalization.
"""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from onnx_lowrank.core.layer import Layer, Use
from onnx_lowrank.graph.walk import attribute_of
from onnx_lowrank.operators.family import Operands, Sample, Site
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.operators.table import Table

_IDS, _SEGMENT_IDS, _WORDS, _POSITIONS, _SEGMENTS, _GAMMA, _BETA, _MASK, _POSITION_IDS = range(9)
"""Indices of the inputs."""

_FIRST_OPSET = 10
"""Before it, Slice took no computed ends."""


class EmbedLayerNormalization(Table):
    """Three tables, whose rows are added and normalized. The word table has c rows of f numbers."""

    domain = "com.microsoft"
    types = ("EmbedLayerNormalization",)
    operands = (_WORDS,)
    is_linear = False

    def activation(self, operand: int) -> int:
        """The ids of the words."""
        return _IDS

    def unfit(self, node: NodeProto, opset: int) -> str | None:
        """A missing input or output, or an opset without the operators of the chain."""
        if not _has(node, _POSITIONS, _GAMMA, _BETA) or not node.output[0]:
            return "it lacks an input or its output: repair the export"
        if _has(node, _SEGMENT_IDS) and not _has(node, _SEGMENTS):
            return "it has segments, but no table of them: repair the export"
        if opset < _FIRST_OPSET:
            return f"its chain needs opset {_FIRST_OPSET}: convert the model to it"
        return None

    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """Look-ups of words, positions and segments, then SkipLayerNormalization."""
        node = site.node
        _, mask_index, embedding_sum = (*node.output, "", "")[:3]
        if mask_index in site.read:
            _count_mask(fragment, node, mask_index)
        words = self.looked_up(fragment, site, names)
        beside = _positions(fragment, node)
        if _has(node, _SEGMENTS):
            # Without ids, every word is in the first segment.
            ids = node.input[_SEGMENT_IDS] or fragment.integers("first_segment", [0])
            segments = fragment.add("segments", "Gather", [node.input[_SEGMENTS], ids], axis=0)
            beside = fragment.add("beside", "Add", [beside, segments])
        inputs = [words, beside, node.input[_GAMMA], node.input[_BETA]]
        epsilon = attribute_of(node, "epsilon")
        fragment.add(
            "norm", "SkipLayerNormalization", inputs, **({} if epsilon is None else {"epsilon": epsilon})
        )
        last = fragment.nodes[-1]
        last.domain = self.domain
        if embedding_sum in site.read:
            last.output.extend(["", "", embedding_sum])

    def sample(self, layer: Layer, use: Use, node: NodeProto) -> Sample:
        """A few sequences of one word."""
        return Sample(_IDS, (3, 1), TensorProto.INT32)


def _has(node: NodeProto, *operands: int) -> bool:
    """Whether a node has all of these inputs."""
    return all(any(node.input[operand : operand + 1]) for operand in operands)


def _positions(fragment: Fragment, node: NodeProto) -> str:
    """The rows of the positions: of those given, or of 0, 1, … for all words of a sequence."""
    table = node.input[_POSITIONS]
    if _has(node, _POSITION_IDS):
        return fragment.add("positions", "Gather", [table, node.input[_POSITION_IDS]], axis=0)
    shape = fragment.add("shape", "Shape", [node.input[_IDS]])
    length = fragment.add("length", "Gather", [shape, fragment.integers("sequence_axis", [1])], axis=0)
    zero = fragment.integers("zero", [0])
    return fragment.add("positions", "Slice", [table, zero, length, zero])


def _count_mask(fragment: Fragment, node: NodeProto, output: str) -> None:
    """The number of ones in every row of the mask, an int32; 0 without a mask, as ONNX Runtime counts."""
    if _has(node, _MASK):
        mask = fragment.add("mask", "Cast", [node.input[_MASK]], to=TensorProto.INT64)
        ones = fragment.add("ones", "Equal", [mask, fragment.integers("one", [1])])
        counted = fragment.add("counted", "Cast", [ones], to=TensorProto.INT32)
    else:
        counted = fragment.add("counted", "Sub", [node.input[_IDS]] * 2)
    fragment.along("ReduceSum", "mask_index", counted, 1, output, keepdims=0)
