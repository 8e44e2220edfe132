"""Nodes under construction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import NodeProto
from onnx.helper import make_attribute
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter


class Fragment:
    """Nodes under construction, built with graphsurgeon; tensors are given by their names."""

    def __init__(self, stem: str, unique: Callable[[str], str], opset: int) -> None:
        """Start a chain.

        Args:
            stem: Start of all new names.
            unique: Makes a free name from a name that may be taken.
            opset: Version of the default domain where the chain will stand.
        """
        self.nodes: list[NodeProto] = []
        self._stem = stem
        self._unique = unique
        self._opset = opset

    def add(
        self, role: str, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        """Append a node and return the name of its output, by default a new name with the role in it."""
        output = output or self._unique(f"{self._stem}_{role}")
        node = gs.Node(
            op,
            self._unique(f"{self._stem}/{role}"),
            attributes,
            [gs.Variable(name) for name in inputs],
            [gs.Variable(output)],
        )
        self.nodes.append(OnnxExporter.export_node(node))
        return output

    def copy(self, role: str, node: NodeProto, inputs: Mapping[int, str]) -> str:
        """Append a copy of a node with new inputs at some indices, and return the name of its first output.

        It has the node's attributes and domain, but no doc string and metadata. Its further outputs keep
        their names.
        """
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.ClearField("doc_string")
        copy.ClearField("metadata_props")  # `rewrite` gives both to the last node of every chain
        copy.name = self._unique(f"{self._stem}/{role}")
        copy.output[0] = self._unique(f"{self._stem}_{role}")
        for index, name in inputs.items():
            while len(copy.input) <= index:
                copy.input.append("")
            copy.input[index] = name
        self.nodes.append(copy)
        return str(copy.output[0])

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes to the last node."""
        self.nodes[-1].attribute.extend(make_attribute(name, value) for name, value in attributes.items())

    def reshape(self, role: str, value: str, shape: Sequence[int]) -> str:
        """Append a Reshape to a constant shape (0 copies an input axis)."""
        return self.add(role, "Reshape", [value, self.integers(f"{role}_shape", shape)])

    def split(self, role: str, value: str, axis: int, sizes: Sequence[int]) -> list[str]:
        """Append a Split and return the names of its outputs; its sizes are an attribute before opset 13."""
        if self._opset < 13:
            outputs = [self.add(role, "Split", [value], axis=axis, split=list(sizes))]
        else:
            given = self.integers(f"{role}_sizes", sizes)
            outputs = [self.add(role, "Split", [value, given], axis=axis)]
        outputs += [self._unique(f"{self._stem}_{role}") for _ in sizes[1:]]
        self.nodes[-1].output.extend(outputs[1:])
        return outputs

    def along(
        self, op: str, role: str, value: str, axis: int, output: str | None = None, **attributes: Any
    ) -> str:
        """Append a Squeeze, an Unsqueeze or a ReduceSum; its axes are an attribute before opset 13."""
        if self._opset < 13:
            return self.add(role, op, [value], output, axes=[axis], **attributes)
        return self.add(role, op, [value, self.integers(f"{role}_axes", [axis])], output, **attributes)

    def gemm(self, role: str, pair: Sequence[str], transposed: int, dtype: str) -> str:
        """Append a Gemm that transposes one operand; before opset 11, it needs a bias, which is zero.

        Args:
            role: Its part in the chain.
            pair: The operands.
            transposed: The index of the operand to transpose.
            dtype: The type of the operands.
        """
        bias = []
        if self._opset < 11:
            zero = gs.Constant(f"{self._stem}_{role}_bias", np.zeros(1, dtype))
            bias = [self.add(f"{role}_bias", "Constant", [], value=zero)]
        return self.add(role, "Gemm", [*pair, *bias], transA=int(not transposed), transB=int(transposed))

    def integers(self, role: str, values: Sequence[int]) -> str:
        """Append a Constant node of int64 numbers."""
        tensor = gs.Constant(f"{self._stem}_{role}", np.asarray(values, np.int64))
        return self.add(role, "Constant", [], value=tensor)
