"""The chains that replace a layer's nodes: which operators, with which attributes and layouts.

Rules, shared by all chains:

1. The first factor maps the input channels to groups · k · j ranks, the second those to the output
   features. Nothing stands between them, so that a chain of full rank computes what the node did.
2. What a convolution does along a spatial axis (stride, padding, dilation) goes to the factor that
   holds this axis' kernel. An axis of size 1 goes to the factor that is evaluated at fewer
   positions: the first of a Conv, the second of a ConvTranspose.
3. The bias and a Gemm's scalars go to the second factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import NodeProto
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import Layer, Use
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.graph.walk import attribute_of


class Fragment:
    """Nodes under construction, built with graphsurgeon; tensors go by their names."""

    def __init__(self, stem: str, unique: Callable[[str], str], opset: int) -> None:
        """Start a chain.

        Args:
            stem: What new names begin with.
            unique: Makes a free name of one that may be taken.
            opset: Version of the default domain where the chain will stand.
        """
        self.nodes: list[NodeProto] = []
        self._stem = stem
        self._unique = unique
        self._opset = opset

    def add(
        self, role: str, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any
    ) -> str:
        """Append a node and return the name of its output, by default a new one called after its role."""
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

    def reshape(self, role: str, value: str, shape: Sequence[int]) -> str:
        """Append a Reshape to a constant shape (0 copies an input axis)."""
        return self.add(role, "Reshape", [value, self.integers(f"{role}_shape", shape)])

    def along(self, op: str, role: str, value: str, axis: int) -> str:
        """Append a Squeeze or Unsqueeze; its axes are an attribute before opset 13."""
        if self._opset < 13:
            return self.add(role, op, [value], axes=[axis])
        return self.add(role, op, [value, self.integers(f"{role}_axes", [axis])])

    def integers(self, role: str, values: Sequence[int]) -> str:
        """Append a Constant node of int64 numbers."""
        tensor = gs.Constant(f"{self._stem}_{role}", np.asarray(values, np.int64))
        return self.add(role, "Constant", [], value=tensor)


@dataclass(frozen=True, slots=True)
class Operands:
    """Names of the tensors that a chain reads: its input, its two factors, its bias ("" for none).

    A bias other than the node's own is added as it is, without a Gemm's beta.
    """

    value: str
    encoder: str
    decoder: str
    bias: str


# --- convolutions ---------------------------------------------------------------------------------


def convolution_layout(
    layer: Layer, nodes: Sequence[NodeProto], factors: Factors, lowering: Lowering
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lay the factors of a Conv or ConvTranspose out as their nodes read them."""
    encoder, decoder = factors.encoder, factors.decoder
    groups, k, j, c, *first = encoder.shape
    _, f, _, _, *second = decoder.shape
    if lowering is Lowering.MATMUL:
        return encoder.reshape(j, c), decoder.reshape(f, j)
    first_op, second_op = _operators(layer, nodes, factors.fold)
    if first_op == "ConvTranspose":
        encoder = encoder.swapaxes(2, 3).reshape(groups * k * c, j, *first)
    else:
        encoder = encoder.reshape(groups * k * j, c, *first)
    if second_op == "ConvTranspose":
        decoder = np.moveaxis(decoder, 1, 3).reshape(groups * k * j, f, *second)
    else:
        decoder = decoder.reshape(groups * f, k * j, *second)
    return encoder, decoder


def convolution(
    fragment: Fragment,
    layer: Layer,
    nodes: Sequence[NodeProto],
    node: NodeProto,
    option: Option,
    names: Operands,
) -> str:
    """Conv or ConvTranspose → two of them; returns the name of the result (design table of folds)."""
    if option.lowering is Lowering.MATMUL:
        return _as_matrices(fragment, layer, names)
    first_op, second_op = _operators(layer, nodes, option.fold)
    held = _held_by_encoder(layer, nodes, option.fold)
    rest = tuple(axis for axis in range(len(layer.kernel)) if axis not in held)
    kernels = option.fold.kernels(layer.kernel)
    hidden = fragment.add(
        "encoder",
        first_op,
        [names.value, names.encoder],
        **_geometry(node, held, kernels[0], layer.groups * option.k, first_op),
    )
    inputs = [hidden, names.decoder] + ([names.bias] if names.bias else [])
    return fragment.add(
        "decoder", second_op, inputs, **_geometry(node, rest, kernels[1], layer.groups, second_op)
    )


def _as_matrices(fragment: Fragment, layer: Layer, names: Operands) -> str:
    """From x (N, c, …) by kernels of size 1 as matrices (j, c) and (f, j) → (N, f, …)."""
    spatial_axes = range(2, 2 + len(layer.kernel))
    value = fragment.reshape("positions", names.value, [0, 0, -1])
    value = fragment.add("encoder", "MatMul", [names.encoder, value])
    value = fragment.add("decoder", "MatMul", [names.decoder, value])
    if names.bias:
        column = fragment.along("Unsqueeze", "bias_axis", names.bias, 1)
        value = fragment.add("biased", "Add", [value, column])
    shape = fragment.add("shape", "Shape", [names.value])
    sizes = fragment.add("sizes", "Gather", [shape, fragment.integers("axes", spatial_axes)], axis=0)
    target = fragment.add("target", "Concat", [fragment.integers("head", [0, layer.f]), sizes], axis=0)
    return fragment.add("image", "Reshape", [value, target])


def _held_by_encoder(layer: Layer, nodes: Sequence[NodeProto], fold: Fold) -> tuple[int, ...]:
    """The spatial axes whose stride, padding and dilation go to the first factor (rule 2)."""
    axes = fold.encoder_axes(len(layer.kernel))
    if any(spatial(node, "output_shape") for node in nodes):  # it fixes all axes at once
        return axes
    small_first = layer.op == "Conv"
    return tuple(a for a, n in enumerate(layer.kernel) if (a in axes if n > 1 else small_first))


def _operators(layer: Layer, nodes: Sequence[NodeProto], fold: Fold) -> tuple[str, str]:
    """Operator types of the factors: one that does nothing along any axis is a 1×1 Conv."""
    if layer.op == "Conv":
        return "Conv", "Conv"
    busy: set[int] = {axis for axis, n in enumerate(layer.kernel) if n > 1}
    for node in nodes:
        busy |= {axis for axis in range(len(layer.kernel)) if _is_busy(node, axis, len(layer.kernel))}
    held = set(_held_by_encoder(layer, nodes, fold))
    first, second = ("ConvTranspose" if axes else "Conv" for axes in (busy & held, busy - held))
    return first, second


def _is_busy(node: NodeProto, axis: int, n: int) -> bool:
    """Whether a node does more along an axis than its kernel would if it had size 1."""
    pads = spatial(node, "pads") or [0] * 2 * n
    return bool(
        (spatial(node, "strides") or [1] * n)[axis] != 1
        or pads[axis]
        or pads[axis + n]
        or (spatial(node, "output_padding") or [0] * n)[axis]
        or spatial(node, "output_shape")
    )


def is_pointwise(node: NodeProto, kernel: Sequence[int]) -> bool:
    """Whether a node is a Conv that maps every position by itself, and all of them.

    With a kernel and strides of 1, an auto_pad of any kind pads nothing.

    Args:
        node: The node.
        kernel: Its spatial kernel, () for matrices.
    """
    return (
        node.op_type == "Conv"
        and prod(kernel) == 1
        and all(stride == 1 for stride in spatial(node, "strides"))
        and not any(spatial(node, "pads"))
    )


def spatial(node: NodeProto, name: str) -> list[int]:
    """The entries of a spatial attribute of a convolution; none where it is left out."""
    values: list[int] = attribute_of(node, name, [])
    return values


def _geometry(
    node: NodeProto, held: tuple[int, ...], kernel: tuple[int, ...], group: int, op: str
) -> dict[str, Any]:
    """Attributes of the factor that holds the axes `held` of a convolution."""
    n = len(kernel)
    attributes: dict[str, Any] = {"kernel_shape": list(kernel)}
    if group != 1:
        attributes["group"] = group
    if not held:
        return attributes
    per_axis = ["strides", "dilations"] + (["output_padding"] if op == "ConvTranspose" else [])
    for name in per_axis:
        if values := spatial(node, name):
            neutral = 0 if name == "output_padding" else 1
            attributes[name] = [v if a in held else neutral for a, v in enumerate(values)]
    if pads := spatial(node, "pads"):
        attributes["pads"] = [v if a % n in held else 0 for a, v in enumerate(pads)]
    # SAME and VALID decide for each axis by its own kernel and stride, so they can be repeated.
    if auto_pad := attribute_of(node, "auto_pad", ""):
        attributes["auto_pad"] = auto_pad
    if op == "ConvTranspose" and (sizes := spatial(node, "output_shape")):
        attributes["output_shape"] = sizes
    return attributes


# --- matrices -------------------------------------------------------------------------------------


def inputs_first(layer: Layer) -> bool:
    """Whether a matrix layer's factors are stored input features first, as its first use reads them."""
    use = layer.uses[0]
    return use.op == "Gather" or use.operand == 1


def matrix_layout(
    layer: Layer, batch: tuple[int, ...], factors: Factors, lowering: Lowering
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lay the factors of Gemm, MatMul or Gather out as the first use's nodes read them.

    Args:
        layer: The layer.
        batch: Leading axes of its weight in the model (their product is layer.groups).
        factors: Encoder (groups, k, j, c / k), decoder (groups, f, k, j).
        lowering: By which operators they are applied.
    """
    _, k, j, c = factors.encoder.shape
    f = factors.decoder.shape[1]
    if k > 1:
        encoder, decoder = factors.encoder[0], factors.decoder.reshape(f, k * j)
    else:
        encoder, decoder = factors.encoder.reshape(*batch, j, c), factors.decoder.reshape(*batch, f, j)
    if inputs_first(layer):
        encoder, decoder = encoder.swapaxes(-1, -2), decoder.swapaxes(-1, -2)
    if lowering is Lowering.CONV:
        encoder = factors.encoder.reshape(k * j, c, 1)
    return encoder, decoder


def matrix(
    fragment: Fragment, layer: Layer, use: Use, node: NodeProto, option: Option, axes: int, names: Operands
) -> str:
    """Gather, MatMul or Gemm → the operator on the narrow factor, then MatMul or Gemm.

    Args:
        fragment: The chain under construction.
        layer: The layer.
        use: The use to rewrite.
        node: Its node.
        option: The option of the factors.
        axes: Number of axes of a factor as it is stored when k = 1.
        names: The chain's operands.
    """
    on_right = use.op == "Gather" or use.operand == 1
    first, second = (names.decoder, names.encoder) if use.transposed else (names.encoder, names.decoder)
    by_conv = option.lowering is Lowering.CONV
    if (on_right != use.transposed) != inputs_first(layer) and not by_conv:
        perm = [*range(axes - 2), axes - 1, axes - 2]
        first = fragment.add("encoder_transposed", "Transpose", [first], perm=perm)
        second = fragment.add("decoder_transposed", "Transpose", [second], perm=perm)
    if use.op == "Gather":
        hidden = fragment.add("encoder", "Gather", [first, names.value], axis=0)
        return fragment.add("decoder", "MatMul", [hidden, second])
    value = names.value
    if use.op == "Gemm" and attribute_of(node, "transA" if on_right else "transB", 0):
        value = fragment.add("input_transposed", "Transpose", [value], perm=[1, 0])
    if by_conv:
        hidden = _sliced_conv(fragment, value, first, option.k, use.rank or 2)
    elif option.k > 1:
        encode = _sliced_right if on_right else _sliced_left
        hidden = encode(fragment, value, first, layer.c // option.k, option, use.rank or 2)
    else:
        hidden = fragment.add("encoder", "MatMul", [value, first] if on_right else [first, value])
    pair = [hidden, second] if on_right else [second, hidden]
    if use.op == "MatMul":
        return fragment.add("decoder", "MatMul", pair)
    dropped = {"transA", "transB"} | ({"beta"} if names.bias and names.bias not in node.input else set())
    kept = {a.name: attribute_of(node, a.name) for a in node.attribute if a.name not in dropped}
    return fragment.add("decoder", "Gemm", pair + ([names.bias] if names.bias else []), **kept)


def _sliced_right(fragment: Fragment, value: str, encoder: str, c: int, option: Option, rank: int) -> str:
    """From x (..., N, k · c) times k slices (k, c, j) → (..., N, k · j)."""
    k, j = option.k, option.j
    if rank == 1:
        parts = fragment.reshape("slices", value, [k, 1, c])
        return fragment.reshape("ranks", fragment.add("encoder", "MatMul", [parts, encoder]), [k * j])
    keep = [0] * (rank - 1)
    swap = [*range(rank - 2), rank - 1, rank - 2, rank]
    parts = fragment.reshape("slices", value, [*keep, k, c])
    parts = fragment.add("slices_first", "Transpose", [parts], perm=swap)
    parts = fragment.add("encoder", "MatMul", [parts, encoder])
    parts = fragment.add("slices_last", "Transpose", [parts], perm=swap)
    return fragment.reshape("ranks", parts, [*keep, k * j])


def _sliced_conv(fragment: Fragment, value: str, encoder: str, k: int, rank: int) -> str:
    """From x (N, k · c) or (B, N, k · c) by a kernel (k · j, c, 1) in k groups → (…, N, k · j)."""
    if rank == 2:
        value = fragment.along("Unsqueeze", "batch_axis", value, 0)
    parts = fragment.add("channels_first", "Transpose", [value], perm=[0, 2, 1])
    parts = fragment.add("encoder", "Conv", [parts, encoder], kernel_shape=[1], group=k)
    parts = fragment.add("channels_last", "Transpose", [parts], perm=[0, 2, 1])
    return fragment.along("Squeeze", "batch", parts, 0) if rank == 2 else parts


def _sliced_left(fragment: Fragment, value: str, encoder: str, c: int, option: Option, rank: int) -> str:
    """From k slices (k, j, c) times x (..., k · c, N) → (..., k · j, N)."""
    k, j = option.k, option.j
    if rank == 1:
        parts = fragment.add("encoder", "MatMul", [encoder, fragment.reshape("slices", value, [k, c, 1])])
        return fragment.reshape("ranks", parts, [k * j])
    # Reshape copies an axis (0) only to where it stood, so N stands behind an axis of size 1 meanwhile;
    # a -1 in its place could not be resolved where the batch is empty.
    keep = [0] * (rank - 2)
    parts = fragment.along("Unsqueeze", "slices_axis", value, rank - 1)
    parts = fragment.reshape("slices", parts, [*keep, k, c, 0])
    parts = fragment.add("encoder", "MatMul", [encoder, parts])
    parts = fragment.reshape("ranks_axis", parts, [*keep, k * j, 1, 0])
    return fragment.along("Squeeze", "ranks", parts, rank - 1)
