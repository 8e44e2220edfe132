"""Products with weights: matrices and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.forms.form import Call, form

_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "": lambda x: x,
    "Clip": torch.clamp,
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "LeakyRelu": functional.leaky_relu,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}
"""The activations that ONNX Runtime fuses, with their parameters in order."""


@form("MatMul")
def _matmul(call: Call) -> Tensor:
    return torch.matmul(call.tensor(0), call.tensor(1))


@form("FusedMatMul", domain="com.microsoft")
def _fused_matmul(call: Call) -> Tensor:
    first, second = (_turned(call, operand, letter) for operand, letter in enumerate("AB"))
    return call.get("alpha", 1.0) * torch.matmul(first, second)


def _turned(call: Call, operand: int, letter: str) -> Tensor:
    """A matrix, or a batch of them, whose first axis may be the last but one."""
    x = call.tensor(operand)
    x = x.movedim(0, -2) if call.get(f"transBatch{letter}", 0) else x
    return x.transpose(-1, -2) if call.get(f"trans{letter}", 0) else x


@form("Gemm")
def _gemm(call: Call) -> Tensor:
    first = call.tensor(0).t() if call.get("transA", 0) else call.tensor(0)
    second = call.tensor(1).t() if call.get("transB", 0) else call.tensor(1)
    product = call.get("alpha", 1.0) * (first @ second)
    return product + call.get("beta", 1.0) * call.tensor(2) if call.has(2) else product


@form("Einsum")
def _einsum(call: Call) -> Tensor:
    return torch.einsum(call.get("equation").decode().replace(" ", ""), *call.tensors())


@form("FusedGemm", domain="com.microsoft")
def _fused_gemm(call: Call) -> Tensor:
    named = (call.get(f"activation_{name}") for name in ("alpha", "beta", "gamma"))
    return _activated(_gemm(call), call, [value for value in named if value is not None])


def _activated(x: Tensor, call: Call, parameters: Sequence[float]) -> Tensor:
    name = call.text("activation", "")
    if name not in _ACTIVATIONS:
        raise NotImplementedError(f"a fused operator with the activation {name}")
    return _ACTIVATIONS[name](x, *parameters)


@form("Conv")
def _conv(call: Call) -> Tensor:
    x, weight = call.tensor(0), call.tensor(1)
    rank = weight.ndim - 2
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    begin, end = ends(call, x.shape[2:], weight.shape[2:])
    if begin != end:
        x, begin = padded(x, begin, end), [0] * rank
    if rank == 2:
        x = x.contiguous(memory_format=torch.channels_last)  # Backward passes take half the time in it.
    convolve, groups = _CONVOLUTIONS[rank - 1], call.get("group", 1)
    return convolve(x, weight, call.optional(2), strides, begin, dilations, groups)


@form("FusedConv", domain="com.microsoft")
def _fused_conv(call: Call) -> Tensor:
    x = _conv(call) + call.tensor(3) if call.has(3) else _conv(call)
    return _activated(x, call, call.get("activation_params", []))


@form("ConvTranspose")
def _conv_transpose(call: Call) -> Tensor:
    x, weight = call.tensor(0), call.tensor(1)
    rank = weight.ndim - 2
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    extra, groups = call.get("output_padding", [0] * rank), call.get("group", 1)
    transposed = _TRANSPOSED[rank - 1]
    # PyTorch wants less additional output than a stride; rows of zeros follow, as nothing else reaches them.
    whole = transposed(x, weight, None, strides, 0, 0, groups, dilations)
    whole = padded(whole, [0] * rank, extra)
    begin, end = _cropped(call, x.shape[2:], whole.shape[2:], strides)
    whole = padded(whole, [-size for size in begin], [-size for size in end])
    return whole if not call.has(2) else whole + call.tensor(2).reshape(-1, *[1] * rank)


def _cropped(
    call: Call, size: Sequence[int], whole: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What a transposed convolution cuts off before and behind every spatial axis."""
    auto, wanted = call.text("auto_pad", "NOTSET"), call.get("output_shape")
    if wanted is None and not auto.startswith("SAME"):
        pads = call.get("pads", [0] * 2 * len(size))
        return list(pads[: len(size)]), list(pads[len(size) :])
    sizes = wanted[-len(size) :] if wanted else [n * stride for n, stride in zip(size, strides, strict=True)]
    total = [n - m for n, m in zip(whole, sizes, strict=True)]
    begin, end = halves([max(0, n) for n in total], upper=auto == "SAME_UPPER")
    # Zeros follow where a wanted size exceeds what there is; SAME takes what there is.
    return begin, [n + min(0, t) for n, t in zip(end, total, strict=True)] if wanted else end


def ends(call: Call, size: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """The padding of a window before and behind every spatial axis."""
    rank = len(kernel)
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    auto = call.text("auto_pad", "NOTSET")
    if auto in ("NOTSET", "VALID"):
        pads = call.get("pads", [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
        return list(pads[:rank]), list(pads[rank:])
    total = [
        max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        for n, s, k, d in zip(size, strides, kernel, dilations, strict=True)
    ]
    return halves(total, upper=auto == "SAME_UPPER")


def halves(total: Sequence[int], *, upper: bool) -> tuple[list[int], list[int]]:
    """Sizes before and behind every axis; the larger half is behind if `upper`."""
    less, more = [size // 2 for size in total], [size - size // 2 for size in total]
    return (less, more) if upper else (more, less)


def padded(x: Tensor, begin: Sequence[int], end: Sequence[int], value: float = 0.0) -> Tensor:
    """A tensor with numbers around its last axes, or without some of its own where sizes are negative."""
    pairs = [size for pair in zip(reversed(begin), reversed(end), strict=True) for size in pair]
    return functional.pad(x, pairs, value=value) if any(pairs) else x
