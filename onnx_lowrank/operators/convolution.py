"""Conv and ConvTranspose.

Rules of their chains:

1. The first factor maps the input channels to groups · k · j ranks, the second maps the ranks to the output
   features. Nothing stands between them, so a chain of full rank computes the same as the node.
2. The stride, padding and dilation of a spatial axis go to the factor that holds the kernel of this axis.
   For a kernel axis of size 1, they go to the factor that leaves fewer positions between the two: the first
   of a Conv, the second of a ConvTranspose.
3. The bias goes to the second factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Lowering
from onnx_lowrank.graph.walk import attribute_of
from onnx_lowrank.operators.family import Kind, Operands, Operator, Sample, Shape, Site, Timed, known
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.operators.window import Window

_SPATIAL = {"strides": 1, "dilations": 1, "pads": 2, "output_padding": 1, "output_shape": 1}
"""Attributes of convolutions, with their number of entries per spatial axis."""

_SPREAD = 4
"""Number of positions by which a sample exceeds the kernel along every axis."""


class Convolution(Operator):
    """The weight of a Conv is (f, c / g, *kernel), that of a ConvTranspose (c, f / g, *kernel)."""

    bias = 2
    surrounded = True

    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """Split the weight into the operator's own groups."""
        groups = attribute_of(node, "group", 1)
        if weight.ndim < 3 or groups < 1 or weight.shape[0] % groups:
            return f"its weight of shape {weight.shape} does not fit its group {groups}: repair the export"
        kernel = list(weight.shape[2:])
        if attribute_of(node, "kernel_shape", kernel) not in ([], kernel):
            return f"its weight of shape {weight.shape} does not fit its kernel_shape: repair the export"
        for name, axes in _SPATIAL.items():
            if len(attribute_of(node, name, [])) not in (0, axes * len(kernel)):
                return f"its {name} do not fit its {len(kernel)} spatial axes: repair the export"
        blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        if self._swaps:
            blocks = blocks.swapaxes(1, 2)
        if blocks.shape[1] == blocks.shape[2] == 1 and groups > 1:
            return "it is depthwise: one channel per group leaves nothing to decompose"
        return blocks

    def laid_out(
        self, node: NodeProto, operand: int, canonical: NDArray[Any], shape: Sequence[int]
    ) -> NDArray[Any]:
        """Join the groups again."""
        return (canonical.swapaxes(1, 2) if self._swaps else canonical).reshape(shape)

    @property
    def _swaps(self) -> bool:
        """Whether the weight has its input channels first."""
        return False

    def lowerings(
        self, use: Use, kernel: tuple[int, ...], groups: int, *, sliced: bool
    ) -> tuple[Lowering, ...]:
        """Slices are the groups of one convolution, or convolutions of their own."""
        return (Lowering.NATIVE, Lowering.SPLIT) if sliced and groups == 1 else (Lowering.NATIVE,)

    def positions(
        self, node: NodeProto, operand: int, entering: Shape | None, leaving: Shape | None, features: int
    ) -> Positions | None:
        """The batch and the spatial sizes on both sides."""
        inputs, outputs = known(entering), known(leaving)
        if inputs is None or outputs is None or not 2 < len(inputs) == len(outputs):
            return None
        return Positions(outputs[0], inputs[2:], outputs[2:])

    def folds_batchnorm(self, operand: int, opset: int) -> bool:
        """A convolution has one bias per output feature, in every opset."""
        return True

    def feature_axis(self, use: Use) -> int | None:
        """The bias is a vector; the runtime broadcasts it over the other axes."""
        return -1

    def layout(
        self,
        layer: Layer,
        nodes: Sequence[NodeProto],
        factors: Factors,
        lowering: Lowering,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Kernels with all channels of all slices, as (outputs, inputs) or the other way round."""
        encoder, decoder = factors.encoder, factors.decoder
        groups, k, j, c, *first = encoder.shape
        _, f, _, _, *second = decoder.shape
        if lowering is Lowering.MATMUL:
            return encoder.reshape(j, c), decoder.reshape(f, j)
        first_op, second_op = self._factor_types(layer, nodes, factors.fold)
        if first_op == "ConvTranspose":
            encoder = encoder.swapaxes(2, 3).reshape(groups * k * c, j, *first)
        else:
            encoder = encoder.reshape(groups * k * j, c, *first)
        if second_op == "ConvTranspose":
            decoder = np.moveaxis(decoder, 1, 3).reshape(groups * k * j, f, *second)
        else:
            decoder = decoder.reshape(groups * f, k * j, *second)
        return encoder, decoder

    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """Two convolutions, or two MatMul over the flattened positions of a kernel of size 1."""
        layer, option = site.layer, site.option
        if option.lowering is Lowering.MATMUL:
            _as_matrices(fragment, layer, names)
            return
        first_op, second_op = self._factor_types(layer, site.nodes, option.fold)
        held = self._held_by_encoder(layer, site.nodes, option.fold)
        rest = tuple(axis for axis in range(len(layer.kernel)) if axis not in held)
        kernels = option.fold.kernels(layer.kernel)
        parts = [(names.value, names.encoder)]
        groups = layer.groups * option.k
        if names.slices:
            sizes = [layer.c // option.k] * option.k
            parts = [*zip(fragment.split("slices", names.value, 1, sizes), names.slices, strict=True)]
            groups = 1
        encode = _geometry(site.node, held, kernels[0], groups, first_op)
        made = [fragment.add("encoder", first_op, part, **encode) for part in parts]
        hidden = made[0] if len(made) == 1 else fragment.add("ranks", "Concat", made, axis=1)
        inputs = [hidden, names.decoder] + ([names.bias] if names.bias else [])
        geometry = _geometry(site.node, rest, kernels[1], layer.groups, second_op)
        self._last(fragment, site, second_op, inputs, geometry)

    def _last(
        self, fragment: Fragment, site: Site, op: str, inputs: list[str], geometry: dict[str, Any]
    ) -> None:
        """Append the second factor."""
        fragment.add("decoder", op, inputs, **geometry)

    def _factor_types(self, layer: Layer, nodes: Sequence[NodeProto], fold: Fold) -> tuple[str, str]:
        """Operator types of the two factors."""
        return "Conv", "Conv"

    def _held_by_encoder(self, layer: Layer, nodes: Sequence[NodeProto], fold: Fold) -> tuple[int, ...]:
        """The spatial axes with their stride, padding and dilation in the first factor (rule 2)."""
        axes = fold.encoder_axes(len(layer.kernel))
        return tuple(a for a, n in enumerate(layer.kernel) if n == 1 or a in axes)

    def geometry(self, layer: Layer, use: Use, node: NodeProto) -> Window:
        """The windows of the kernel."""
        n = len(layer.kernel)
        return Window(
            groups=layer.groups,
            kernel=layer.kernel,
            strides=tuple(spatial(node, "strides") or [1] * n),
            dilations=tuple(spatial(node, "dilations") or [1] * n),
            pads=tuple(spatial(node, "pads") or [0] * 2 * n),
            auto_pad=attribute_of(node, "auto_pad", "NOTSET"),
            transposed=self._swaps,
            output_padding=tuple(spatial(node, "output_padding") or [0] * n),
            output_shape=tuple(spatial(node, "output_shape")),
        )

    def sample(self, layer: Layer, use: Use, node: NodeProto) -> Sample:
        """One image that is a little larger than the kernel."""
        dilations = spatial(node, "dilations") or [1] * len(layer.kernel)
        sizes = ((n - 1) * d + 1 + _SPREAD for n, d in zip(layer.kernel, dilations, strict=True))
        return Sample(0, (1, layer.c, *sizes))

    def timed(self, layer: Layer, use: Use, node: NodeProto) -> Timed | None:
        """The image that the node reads in the model."""
        if use.positions is None:
            return None
        channels = (layer.f, layer.c // layer.groups)
        if self._swaps:
            channels = (layer.c, layer.f // layer.groups)
        biased = len(node.input) > 2 and bool(node.input[2])
        return Timed(
            (use.positions.batch, layer.c, *use.positions.inputs),
            (*channels, *layer.kernel),
            {2: (layer.f,)} if biased else {},
        )


class Conv(Convolution):
    """Conv."""

    types = ("Conv",)
    product: ClassVar[Kind | None] = "kernel"

    def lowerings(
        self, use: Use, kernel: tuple[int, ...], groups: int, *, sliced: bool
    ) -> tuple[Lowering, ...]:
        """A pointwise Conv of one group is a matrix, too."""
        is_matrix = groups == 1 and use.pointwise and not sliced
        ways = super().lowerings(use, kernel, groups, sliced=sliced)
        return (*ways, Lowering.MATMUL) if is_matrix else ways

    def is_pointwise(self, node: NodeProto, kernel: Sequence[int]) -> bool:
        """The kernel and the strides are 1, and there are no pads; then auto_pad pads nothing either."""
        return (
            prod(kernel) == 1
            and all(stride == 1 for stride in spatial(node, "strides"))
            and not any(spatial(node, "pads"))
        )

    def dense_evaluations(self, node: NodeProto, positions: Positions) -> int:
        """Once per output position."""
        return positions.batch * prod(positions.outputs)

    def factor_evaluations(
        self, node: NodeProto, positions: Positions, kernel: tuple[int, ...], fold: Fold, *, transposed: bool
    ) -> tuple[int, int]:
        """The encoder strides along the axes that it holds, and along kernel axes of size 1."""
        held = fold.encoder_axes(len(kernel))
        strided = {axis for axis, n in enumerate(kernel) if axis in held or n == 1}
        inputs, outputs = positions.inputs, positions.outputs
        between = (outputs[a] if a in strided else inputs[a] for a in range(len(inputs)))
        return positions.batch * prod(between), positions.batch * prod(outputs)

    def macs_undecomposed(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """Outputs times the weight's elements per output."""
        weight, outputs = known(inputs[1]), known(leaving)
        if outputs is None or not weight or not known(inputs[0]):
            return None
        return prod(outputs) * prod(weight[1:])


class ConvTranspose(Convolution):
    """ConvTranspose."""

    types = ("ConvTranspose",)

    @property
    def _swaps(self) -> bool:
        return True

    def holds_kernel_whole(self, node: NodeProto) -> bool:
        """An output_shape fixes all spatial sizes at once."""
        return bool(spatial(node, "output_shape"))

    def dense_evaluations(self, node: NodeProto, positions: Positions) -> int:
        """Once per input position."""
        return positions.batch * prod(positions.inputs)

    def factor_evaluations(
        self, node: NodeProto, positions: Positions, kernel: tuple[int, ...], fold: Fold, *, transposed: bool
    ) -> tuple[int, int]:
        """The encoder spreads along the kernel axes that it holds; axes of size 1 belong to the decoder."""
        spread = {axis for axis in fold.encoder_axes(len(kernel)) if kernel[axis] > 1}
        inputs, outputs = positions.inputs, positions.outputs
        between = (outputs[a] if a in spread else inputs[a] for a in range(len(inputs)))
        return positions.batch * prod(inputs), positions.batch * prod(between)

    def macs_undecomposed(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """Inputs times the weight's elements per input."""
        image, weight = known(inputs[0]), known(inputs[1])
        if known(leaving) is None or not image or not weight:
            return None
        return prod(image) * prod(weight[1:])

    def _held_by_encoder(self, layer: Layer, nodes: Sequence[NodeProto], fold: Fold) -> tuple[int, ...]:
        axes = fold.encoder_axes(len(layer.kernel))
        if any(self.holds_kernel_whole(node) for node in nodes):
            return axes
        return tuple(a for a, n in enumerate(layer.kernel) if n > 1 and a in axes)

    def _factor_types(self, layer: Layer, nodes: Sequence[NodeProto], fold: Fold) -> tuple[str, str]:
        """ConvTranspose for a factor that changes positions along an axis, else a 1×1 Conv."""
        busy: set[int] = {axis for axis, n in enumerate(layer.kernel) if n > 1}
        for node in nodes:
            busy |= {axis for axis in range(len(layer.kernel)) if _is_busy(node, axis, len(layer.kernel))}
        held = set(self._held_by_encoder(layer, nodes, fold))
        first, second = ("ConvTranspose" if axes else "Conv" for axes in (busy & held, busy - held))
        return first, second


def _as_matrices(fragment: Fragment, layer: Layer, names: Operands) -> None:
    """Map x (N, c, …) by kernels of size 1, as matrices (j, c) and (f, j), to (N, f, …)."""
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
    fragment.add("image", "Reshape", [value, target])


def _is_busy(node: NodeProto, axis: int, n: int) -> bool:
    """Whether a node strides, pads or crops along an axis."""
    pads = spatial(node, "pads") or [0] * 2 * n
    return bool(
        (spatial(node, "strides") or [1] * n)[axis] != 1
        or pads[axis]
        or pads[axis + n]
        or (spatial(node, "output_padding") or [0] * n)[axis]
        or spatial(node, "output_shape")
    )


def spatial(node: NodeProto, name: str) -> list[int]:
    """The entries of a spatial attribute of a convolution; an empty list if it is left out."""
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
    # Repeated in both factors: SAME and VALID pad each axis by its own kernel and stride.
    if auto_pad := attribute_of(node, "auto_pad", ""):
        attributes["auto_pad"] = auto_pad
    if op == "ConvTranspose" and (sizes := spatial(node, "output_shape")):
        attributes["output_shape"] = sizes
    return attributes
