"""Writes networks as ONNX models, node by node; where their numbers come from is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

IR_VERSION = 10
OPSET = 17
BFLOAT16_OPSET = 22  # the first in which convolutions and pools take bfloat16

HE_GAIN = sqrt(2)  # keeps the size of activations through a ReLU (He et al. 2015, equation 10)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor that a network asks for: its elements' mean and standard deviation at initialization."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


Weights = Callable[[Parameter], NDArray[Any] | None]
"""Gives a parameter's numbers, in any float dtype; None leaves the tensor without data (a skeleton)."""


class Builder:
    """A model under construction: methods append nodes and return the name of what they compute.

    Parameters are named as in PyTorch's state_dict. Everything goes straight into the model's proto, since
    a graph that is made first and put into a model afterwards is copied whole.

    Attributes:
        model: The model so far.
        dtype: The dtype in which parameters are stored and activations computed.
        elements: The same as a TensorProto data type.
    """

    def __init__(
        self, name: str, weights: Weights, *, dtype: str = "float32", batchnorm: bool = True
    ) -> None:
        """Start an empty model.

        Args:
            name: Name of the graph.
            weights: Gives every parameter's numbers.
            dtype: float32, float16, bfloat16 or float64.
            batchnorm: Write the BatchNormalization behind a convolution as a node; otherwise the
                convolution has a bias instead, as it has once BatchNormalization is folded into it.
        """
        self.dtype = np.dtype(dtype)
        self.elements = helper.np_dtype_to_tensor_dtype(self.dtype)
        opset = BFLOAT16_OPSET if self.elements == TensorProto.BFLOAT16 else OPSET
        self.model: ModelProto = helper.make_model(
            helper.make_graph([], name, [], []),
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=IR_VERSION,
            producer_name="onnx-lowrank",
        )
        self._weights = weights
        self._batchnorm = batchnorm
        self._names: Counter[str] = Counter()
        self._constants: set[str] = set()

    def input(self, name: str, *shape: int | str, integer: bool = False) -> str:
        """Declare an input of the model's dtype or of int64."""
        elements = TensorProto.INT64 if integer else self.elements
        self.model.graph.input.append(helper.make_tensor_value_info(name, elements, shape))
        return name

    def output(self, name: str, *shape: int | str) -> None:
        """Declare an output of the model's dtype."""
        self.model.graph.output.append(helper.make_tensor_value_info(name, self.elements, shape))

    def node(self, op: str, inputs: Sequence[str], name: str, *, output: str = "", **attributes: Any) -> str:
        """Append a node with one output.

        Args:
            op: Operator type.
            inputs: Names of its inputs.
            name: Path of the module that it belongs to; the node is called `name/op`, numbered if need be.
            output: Name of its output, where it matters.
            attributes: Of the operator; None leaves one out.
        """
        return self.nodes(op, inputs, name, [output], **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[str], name: str, outputs: Sequence[str], **attributes: Any
    ) -> list[str]:
        """Append a node with as many outputs as names are given; an empty name stands for a fresh one."""
        base = f"{name}/{op}"
        count = self._names[base]
        self._names[base] += 1
        path = f"{base}_{count}" if count else base
        results = [output or f"{path}_output_{index}" for index, output in enumerate(outputs)]
        self.model.graph.node.append(helper.make_node(op, inputs, results, path, **attributes))
        return results

    def parameter(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> str:
        """Append a parameter as an initializer.

        Raises:
            ValueError: The weights given for it have another shape.
        """
        values = self._weights(Parameter(name, shape, std, mean))
        tensor = self.model.graph.initializer.add(name=name, dims=shape, data_type=self.elements)
        if values is not None:
            if values.shape != shape:
                raise ValueError(f"The weights of {name!r} have shape {values.shape}: give them {shape}.")
            tensor.raw_data = values.astype(self.dtype, copy=False).tobytes()
        return name

    def integers(self, *values: int, name: str = "") -> str:
        """A constant int64 vector, named after its values by default."""
        name = name or "integers_" + "_".join(map(str, values))
        if name not in self._constants:
            self._constants.add(name)
            self.model.graph.initializer.add().CopyFrom(
                helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
            )
        return name

    def scalar(self, value: float) -> str:
        """A constant scalar of the model's dtype."""
        name = f"scalar_{value:.6g}"
        if name not in self._constants:
            self._constants.add(name)
            self.model.graph.initializer.add().CopyFrom(helper.make_tensor(name, self.elements, [], [value]))
        return name

    def conv(
        self,
        x: str,
        name: str,
        channels: int,
        features: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        pad: int | None = None,
        groups: int = 1,
        norm: str = "",
        gain: float = HE_GAIN,
    ) -> str:
        """A square 2-D convolution and the BatchNormalization called `norm`, where it has one.

        Args:
            x: Input, N × channels × height × width.
            name: Its module.
            channels: Input channels.
            features: Output features.
            kernel: Kernel size.
            stride: Stride of both axes.
            pad: Padding of all four sides; None keeps the resolution at stride 1.
            groups: Groups of the operator.
            norm: Module of the BatchNormalization behind it; without one it has a bias.
            gain: Output over input in root mean square, for independent inputs.
        """
        pads = [kernel // 2 if pad is None else pad] * 4
        shape = (features, channels // groups, kernel, kernel)
        inputs = [x, self.parameter(f"{name}.weight", shape, gain / sqrt(prod(shape[1:])))]
        normalized = norm and self._batchnorm
        if not normalized:
            inputs.append(self.parameter(f"{name}.bias", (features,), 0.05))
        y = self.node(
            "Conv", inputs, name, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads, group=groups
        )
        return self._batchnormalization(y, norm, features) if normalized else y

    def _batchnormalization(self, x: str, name: str, features: int) -> str:
        statistics = [
            self.parameter(f"{name}.weight", (features,), 0.1, 1.0),
            self.parameter(f"{name}.bias", (features,), 0.05),
            self.parameter(f"{name}.running_mean", (features,), 0.1),
            self.parameter(f"{name}.running_var", (features,), 0.1, 1.0),
        ]
        return self.node("BatchNormalization", [x, *statistics], name, epsilon=1e-5)

    def gemm(
        self, x: str, name: str, channels: int, features: int, *, gain: float = 1.0, output: str = ""
    ) -> str:
        """A fully connected layer on a matrix: Gemm with a weight of features × channels."""
        weight = self.parameter(f"{name}.weight", (features, channels), gain / sqrt(channels))
        bias = self.parameter(f"{name}.bias", (features,), 0.05)
        return self.node("Gemm", [x, weight, bias], name, output=output, transB=1)

    def linear(self, x: str, name: str, channels: int, features: int, *, gain: float = 1.0) -> str:
        """A fully connected layer on inputs of any rank: MatMul by channels × features, then Add."""
        weight = self.parameter(f"{name}.weight", (channels, features), gain / sqrt(channels))
        bias = self.parameter(f"{name}.bias", (features,), 0.05)
        return self.node("Add", [bias, self.node("MatMul", [x, weight], name)], name)

    def embedding(self, indices: str, name: str, rows: int, features: int) -> str:
        """Rows of a table of rows × features."""
        return self.node("Gather", [self.parameter(f"{name}.weight", (rows, features), 0.02), indices], name)

    def layernorm(self, x: str, name: str, features: int, *, epsilon: float, output: str = "") -> str:
        """LayerNormalization of the last axis."""
        scale = self.parameter(f"{name}.weight", (features,), 0.1, 1.0)
        bias = self.parameter(f"{name}.bias", (features,), 0.05)
        return self.node("LayerNormalization", [x, scale, bias], name, output=output, epsilon=epsilon)

    def gelu(self, x: str, name: str) -> str:
        """The exact x · (1 + erf(x / √2)) / 2 in the nodes that exporters write."""
        erf = self.node("Erf", [self.node("Div", [x, self.scalar(sqrt(2))], name)], name)
        product = self.node("Mul", [x, self.node("Add", [erf, self.scalar(1.0)], name)], name)
        return self.node("Mul", [product, self.scalar(0.5)], name)
