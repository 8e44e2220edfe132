"""MatMul and Gemm.

Their weight is the operand on the right, (*batch, c, f), or on the left, (*batch, f, c); a Gemm may
transpose both operands. The bias and a Gemm's scalars go to the second factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph.walk import attribute_of
from onnx_lowrank.operators.family import Kind, Operands, Operator, Sample, Shape, Site, Timed, known
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.operators.geometry import Vectors

_ROWS = 3
"""Number of vectors in a sample."""

_FUSED_WITHOUT_KERNEL = "float64"
"""The type in which ONNX Runtime before 1.26 fuses a Transpose and a MatMul, and has no kernel for both.

It does not fuse a Gemm, and no swap of the axes in the middle of four.
"""


class Product(Operator):
    """A matrix product with a constant on either side, or a look-up of rows."""

    transposable = True

    def kind(self, node: NodeProto) -> str:
        """Products share weights with each other."""
        return "matrix"

    def activation(self, operand: int) -> int:
        """The other of the two operands."""
        return 1 - operand

    def on_right(self, operand: int) -> bool:
        """Whether the weight is the right operand, so that it multiplies the activation's rows."""
        return operand == 1

    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """Matrices with their outputs first."""
        if weight.ndim < 2:
            return "its weight is a vector, which has rank one already"
        matrices = weight.reshape(-1, *weight.shape[-2:])
        return matrices if self._outputs_first(node, operand) else matrices.swapaxes(1, 2)

    def laid_out(
        self, node: NodeProto, operand: int, canonical: NDArray[Any], shape: Sequence[int]
    ) -> NDArray[Any]:
        """Matrices in the orientation in which the node reads them."""
        return (canonical if self._outputs_first(node, operand) else canonical.swapaxes(1, 2)).reshape(shape)

    def _outputs_first(self, node: NodeProto, operand: int) -> bool:
        return self.on_right(operand) == self.transposes(node, operand)

    def needs_rank(self, laid_out: Sequence[int]) -> bool:
        """A batch does: a vector would be one activation for all its matrices."""
        return len(laid_out) > 2

    def can_slice(self, use: Use, laid_out: Sequence[int], opset: int) -> bool:
        """The chain reshapes an input of known rank, with Constant nodes of integers (opset 9)."""
        return not use.transposed and use.rank is not None and len(laid_out) == 2 and opset >= 9

    def lowerings(
        self, use: Use, kernel: tuple[int, ...], groups: int, *, sliced: bool
    ) -> tuple[Lowering, ...]:
        """Rows can be positions of a Conv, and their slices those of a grouped Conv."""
        if not self.on_right(use.operand) or use.rank not in (2, 3) or use.transposed or groups > 1:
            return (Lowering.NATIVE,)
        return (Lowering.NATIVE, *([Lowering.CONV] if sliced else []), Lowering.POINTWISE)

    def positions(
        self, node: NodeProto, operand: int, entering: Shape | None, leaving: Shape | None, features: int
    ) -> Positions | None:
        """The number of vectors, from the shape of the result."""
        sizes = known(leaving)
        return None if sizes is None else Positions(prod(sizes) // features)

    def dense_evaluations(self, node: NodeProto, positions: Positions) -> int:
        """Once per vector."""
        return positions.batch

    def factor_evaluations(
        self, node: NodeProto, positions: Positions, kernel: tuple[int, ...], fold: Fold, *, transposed: bool
    ) -> tuple[int, int]:
        """Once per vector."""
        return positions.batch, positions.batch

    def macs_undecomposed(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """Outputs times the length of the vectors."""
        left, right, outputs = known(inputs[0]), known(inputs[1]), known(leaving)
        if outputs is None or not left or not right:
            return None
        return prod(outputs) * left[-2 if self.transposes(node, 0) else -1]

    def layout(
        self,
        layer: Layer,
        nodes: Sequence[NodeProto],
        factors: Factors,
        lowering: Lowering,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Matrices with the inputs first where the weight is on the right, else with the outputs first."""
        _, k, j, c = factors.encoder.shape
        f, batch = factors.decoder.shape[1], layer.uses[0].laid_out[:-2]
        if k > 1:
            encoder, decoder = factors.encoder[0], factors.decoder.reshape(f, k * j)
        else:
            encoder, decoder = factors.encoder.reshape(*batch, j, c), factors.decoder.reshape(*batch, f, j)
        if self.on_right(layer.uses[0].operand):
            encoder, decoder = encoder.swapaxes(-1, -2), decoder.swapaxes(-1, -2)
        if lowering is Lowering.CONV:
            encoder = factors.encoder.reshape(k * j, c, 1)
        elif lowering is Lowering.POINTWISE:
            encoder, decoder = factors.encoder.reshape(k * j, c, 1), factors.decoder.reshape(f, k * j, 1)
        return encoder, decoder

    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """The first factor (with slices, a batched MatMul or a grouped Conv), then the second."""
        use, option = site.use, site.option
        if option.lowering is Lowering.POINTWISE:
            value = self._rows_read(fragment, site.node, use, names.value)
            result = _pointwise(fragment, value, names, option.k, use.rank or 2)
            if names.bias:
                fragment.add("biased", "Add", [result, names.bias])
            return
        first, second = self.stored_factors(fragment, site, names)
        hidden = self._encoded(fragment, site, first, names.value)
        pair = [hidden, second] if self.on_right(use.operand) else [second, hidden]
        self._last(fragment, site, pair, names.bias)

    def _encoded(self, fragment: Fragment, site: Site, encoder: str, value: str) -> str:
        """Append the first factor."""
        use, option, layer = site.use, site.option, site.layer
        rank, on_right = use.rank or 2, self.on_right(use.operand)
        is_fused = layer.dtype == _FUSED_WITHOUT_KERNEL
        if is_fused and option.k == 1 and self._is_flipped(site.node, use):
            pair = [value, encoder] if on_right else [encoder, value]
            return fragment.gemm("encoder", pair, self.activation(use.operand), layer.dtype)
        value = self._rows_read(fragment, site.node, use, value)
        if option.lowering is Lowering.CONV:
            return _sliced_conv(fragment, value, encoder, option.k, rank)
        if option.k == 1:
            return fragment.add("encoder", "MatMul", [value, encoder] if on_right else [encoder, value])
        if is_fused and on_right and rank == 2:
            value = fragment.along("Unsqueeze", "batch_axis", value, 0)
            hidden = _sliced_right(fragment, value, encoder, layer.c // option.k, option, 3)
            return fragment.along("Squeeze", "batch", hidden, 0)
        encode = _sliced_right if on_right else _sliced_left
        return encode(fragment, value, encoder, layer.c // option.k, option, rank)

    def stored_factors(self, fragment: Fragment, site: Site, names: Operands) -> tuple[str, str]:
        """The factors in the order and the orientation in which a use applies them.

        They are stored as the first use reads them. A transposed use applies the decoder first.
        """
        use, layer = site.use, site.layer
        first, second = (names.decoder, names.encoder) if use.transposed else (names.encoder, names.decoder)
        inputs_first = self.on_right(use.operand) != use.transposed
        # Not on_right(): the first use may be of another family. All families store weights on the right,
        # and tables, with the inputs first.
        is_stored_inputs_first = layer.uses[0].inputs_first
        if inputs_first != is_stored_inputs_first and site.option.lowering is not Lowering.CONV:
            axes = len(use.laid_out)
            perm = [*range(axes - 2), axes - 1, axes - 2]
            first = fragment.add("encoder_transposed", "Transpose", [first], perm=perm)
            second = fragment.add("decoder_transposed", "Transpose", [second], perm=perm)
        return first, second

    def _rows_read(self, fragment: Fragment, node: NodeProto, use: Use, value: str) -> str:
        """The activation, transposed if the node transposes it."""
        if not self._is_flipped(node, use):
            return value
        rank = use.rank or 2
        perm = [*range(rank - 2), rank - 1, rank - 2]
        return fragment.add("input_transposed", "Transpose", [value], perm=perm)

    def _is_flipped(self, node: NodeProto, use: Use) -> bool:
        """Whether the node transposes its activation."""
        return self.transposes(node, self.activation(use.operand))

    def _last(self, fragment: Fragment, site: Site, pair: list[str], bias: str) -> None:
        """Append the second factor."""
        fragment.add("decoder", "MatMul", pair)

    def geometry(self, layer: Layer, use: Use, node: NodeProto) -> Vectors:
        """Rows where the weight is on the right, else columns."""
        on_left = not self.on_right(use.operand)
        flipped = self.transposes(node, self.activation(use.operand))
        return Vectors(use.laid_out[:-2], on_left != flipped, on_left, self.scale(node))

    def sample(self, layer: Layer, use: Use, node: NodeProto) -> Sample | None:
        """A few vectors."""
        channels = layer.c // layer.groups
        rank = use.rank or 2
        if rank == 1:
            return Sample(self.activation(use.operand), (channels,))
        matrix = (_ROWS, channels) if self._reads_rows(node, use) else (channels, _ROWS)
        return Sample(self.activation(use.operand), (*[1] * (rank - 2), *matrix))

    def _reads_rows(self, node: NodeProto, use: Use) -> bool:
        """Whether the activation has the vectors as its rows."""
        return self.on_right(use.operand) != self.transposes(node, self.activation(use.operand))

    def timed(self, layer: Layer, use: Use, node: NodeProto) -> Timed | None:
        """As many vectors as in the model; None for batches of matrices, as their input shape is unknown."""
        if use.positions is None or layer.groups > 1:
            return None
        f, c = (layer.c, layer.f) if use.transposed else (layer.f, layer.c)
        rank = use.rank or 2
        rows = use.positions.batch
        pair = (rows, c) if self._reads_rows(node, use) else (c, rows)
        outputs_first = self._outputs_first(node, use.operand)
        biased = self.bias is not None and len(node.input) > self.bias and bool(node.input[self.bias])
        shape = (f,) if self.on_right(use.operand) else (f, 1)
        return Timed(
            (c,) if rank == 1 else (*[1] * (rank - 2), *pair),
            (f, c) if outputs_first else (c, f),
            {self.bias: shape} if biased and self.bias is not None else {},
        )


class MatMul(Product):
    """MatMul; an Add behind it counts as its bias."""

    types = ("MatMul",)
    operands = (1, 0)
    product: ClassVar[Kind | None] = "matrix"
    adds_behind = True

    def feature_axis(self, use: Use) -> int | None:
        """The last axis, or the last but one if the weight is on the left."""
        if use.operand == 1:
            return -1
        # A vector leaves no axis behind the features.
        if use.rank in (None, 1):
            return None if use.rank is None else -1
        return -2

    def bias_shape(self, use: Use, laid_out: Sequence[int], features: int) -> tuple[int, ...]:
        """One value per feature of every matrix of a batch."""
        batch = tuple(laid_out[:-2])
        if use.operand == 0:
            if use.rank is None:
                raise InputError(
                    f"The bias of {use.op} {use.name!r} needs an input of known rank: pass --input-shape."
                )
            return (*batch, features // prod(batch), 1) if use.rank > 1 else (features,)
        return (*batch, 1, features // prod(batch)) if batch else (features,)


class Gemm(Product):
    """Gemm: alpha · A · B + beta · C."""

    types = ("Gemm",)
    operands = (1, 0)
    product: ClassVar[Kind | None] = "matrix"
    bias = 2

    def transposes(self, node: NodeProto, operand: int) -> bool:
        """The value of transA or transB."""
        return bool(attribute_of(node, "transB" if operand else "transA", 0))

    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """One matrix with its outputs first."""
        if weight.ndim > 2:
            return "the weight of a Gemm has to be a matrix"
        return super().canonical(node, operand, weight)

    def rank(self, entering: Shape | None) -> int | None:
        """Its operands are matrices."""
        return 2

    def folds_batchnorm(self, operand: int, opset: int) -> bool:
        """With the weight on the right, and from opset 7 on: then a vector broadcasts along the features."""
        return operand == 1 and opset >= 7

    def scale(self, node: NodeProto) -> float:
        """Its alpha."""
        return float(attribute_of(node, "alpha", 1.0))

    def bias_scale(self, node: NodeProto) -> float:
        """Its beta."""
        return float(attribute_of(node, "beta", 1.0))

    def feature_axis(self, use: Use) -> int | None:
        """The last axis, or the first if the weight is on the left."""
        return -1 if use.operand == 1 else -2

    def bias_shape(self, use: Use, laid_out: Sequence[int], features: int) -> tuple[int, ...]:
        """A row, or a column if the weight is on the left."""
        return (features,) if use.operand == 1 else (features, 1)

    def set_bias(self, node: NodeProto, name: str) -> None:
        """Set the bias and remove beta, which would scale it."""
        super().set_bias(node, name)
        kept = [attribute for attribute in node.attribute if attribute.name != "beta"]
        del node.attribute[:]
        node.attribute.extend(kept)

    def _last(self, fragment: Fragment, site: Site, pair: list[str], bias: str) -> None:
        node = site.node
        dropped = {"transA", "transB"} | ({"beta"} if bias and bias not in node.input else set())
        kept = {a.name: attribute_of(node, a.name) for a in node.attribute if a.name not in dropped}
        fragment.add("decoder", "Gemm", pair + ([bias] if bias else []), **kept)


def _sliced_right(fragment: Fragment, value: str, encoder: str, c: int, option: Option, rank: int) -> str:
    """Multiply x (..., N, k · c) by k slices (k, c, j), to (..., N, k · j)."""
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
    """Multiply x (N, k · c) or (B, N, k · c) by a kernel (k · j, c, 1) in k groups, to (…, N, k · j)."""
    parts = _channels_first(fragment, value, rank)
    parts = fragment.add("encoder", "Conv", [parts, encoder], kernel_shape=[1], group=k)
    return _channels_last(fragment, parts, rank)


def _pointwise(fragment: Fragment, value: str, names: Operands, k: int, rank: int) -> str:
    """Multiply x (N, c) or (B, N, c) by kernels (k · j, c / k, 1) in k groups and (f, k · j, 1)."""
    hidden = _channels_first(fragment, value, rank)
    hidden = fragment.add("encoder", "Conv", [hidden, names.encoder], kernel_shape=[1], group=k)
    hidden = fragment.add("decoder", "Conv", [hidden, names.decoder], kernel_shape=[1])
    return _channels_last(fragment, hidden, rank)


def _channels_first(fragment: Fragment, value: str, rank: int) -> str:
    """Rows (N, c) or (B, N, c) as the positions of a convolution, (1, c, N) or (B, c, N)."""
    if rank == 2:
        value = fragment.along("Unsqueeze", "batch_axis", value, 0)
    return fragment.add("channels_first", "Transpose", [value], perm=[0, 2, 1])


def _channels_last(fragment: Fragment, value: str, rank: int) -> str:
    """The inverse of `_channels_first`."""
    value = fragment.add("channels_last", "Transpose", [value], perm=[0, 2, 1])
    return fragment.along("Squeeze", "batch", value, 0) if rank == 2 else value


def _sliced_left(fragment: Fragment, value: str, encoder: str, c: int, option: Option, rank: int) -> str:
    """Multiply k slices (k, j, c) by x (..., k · c, N), to (..., k · j, N)."""
    k, j = option.k, option.j
    if rank == 1:
        parts = fragment.add("encoder", "MatMul", [encoder, fragment.reshape("slices", value, [k, c, 1])])
        return fragment.reshape("ranks", parts, [k * j])
    # A 0 of Reshape copies the input axis at the same index, so an axis of size 1 in front of N keeps N's
    # index right. Not -1 for N: it is ambiguous if the batch is empty.
    keep = [0] * (rank - 2)
    parts = fragment.along("Unsqueeze", "slices_axis", value, rank - 1)
    parts = fragment.reshape("slices", parts, [*keep, k, c, 0])
    parts = fragment.add("encoder", "MatMul", [encoder, parts])
    parts = fragment.reshape("ranks_axis", parts, [*keep, k * j, 1, 0])
    return fragment.along("Squeeze", "ranks", parts, rank - 1)
