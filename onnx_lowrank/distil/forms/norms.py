"""Normalizations and reductions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.forms.form import Call, Value, form


def _along_channels(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


@form("BatchNormalization")
def _batch_norm(call: Call) -> Tensor:
    if call.outputs > 1 or call.get("training_mode"):
        raise NotImplementedError("BatchNormalization in training")
    x = call.tensor(0)
    scale, bias, mean, variance = (_along_channels(call.tensor(i), x) for i in range(1, 5))
    return (x - mean) * (scale / torch.sqrt(variance + call.get("epsilon", 1e-5))) + bias


@form("InstanceNormalization")
def _instance_norm(call: Call) -> Tensor:
    return functional.instance_norm(
        call.tensor(0), weight=call.tensor(1), bias=call.tensor(2), eps=call.get("epsilon", 1e-5)
    )


@form("GroupNormalization")
def _group_norm(call: Call) -> Tensor:
    x, groups = call.tensor(0), call.get("num_groups")
    normal = functional.group_norm(x, groups, eps=call.get("epsilon", 1e-5))
    scale, bias = call.tensor(1), call.tensor(2)
    if scale.shape[0] == groups:  # one of each group before operator set 21
        scale, bias = (values.repeat_interleave(x.shape[1] // groups) for values in (scale, bias))
    return normal * _along_channels(scale, x) + _along_channels(bias, x)


@form("LayerNormalization")
def _layer_norm(call: Call) -> tuple[Tensor, ...]:
    x, axis, epsilon = call.tensor(0), call.get("axis", -1), call.get("epsilon", 1e-5)
    normal = _normal(x, axis, call.tensor(1), call.optional(2), epsilon)
    return normal if call.outputs == 1 else (normal, *_statistics(x, axis, epsilon))[: call.outputs]


def _normal(x: Tensor, axis: int, scale: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return functional.layer_norm(x, shape, scale, bias, epsilon)
    normal = functional.layer_norm(x, shape, eps=epsilon) * scale
    return normal if bias is None else normal + bias


def _statistics(x: Tensor, axis: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """The mean, and the inverse of the standard deviation."""
    variance, mean = torch.var_mean(x, dim=_behind(x, axis), correction=0, keepdim=True)
    return mean, torch.rsqrt(variance + epsilon)


def _behind(x: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(range(axis % x.ndim, x.ndim))


@form("RMSNormalization", "SimplifiedLayerNormalization")
@form("SimplifiedLayerNormalization", domain="com.microsoft")
def _rms_norm(call: Call) -> tuple[Tensor, ...]:
    x, axis, epsilon = call.tensor(0), call.get("axis", -1), call.get("epsilon", 1e-5)
    inverse = _inverse_power(x, axis, epsilon)
    return (x * inverse * call.tensor(1), inverse)[: call.outputs]


def _inverse_power(x: Tensor, axis: int, epsilon: float) -> Tensor:
    return torch.rsqrt(x.square().mean(dim=_behind(x, axis), keepdim=True) + epsilon)


@form("SkipLayerNormalization", domain="com.microsoft")
def _skip_layer_norm(call: Call) -> tuple[Tensor, ...]:
    total = call.tensor(0) + call.tensor(1)
    total = total + call.tensor(4) if call.has(4) else total
    epsilon = call.get("epsilon", 1e-5)
    normal = _normal(total, -1, call.tensor(2), call.optional(3), epsilon)
    return normal if call.outputs == 1 else (normal, *_statistics(total, -1, epsilon), total)[: call.outputs]


@form("SkipSimplifiedLayerNormalization", domain="com.microsoft")
def _skip_rms_norm(call: Call) -> tuple[Value, ...]:
    total = call.tensor(0) + call.tensor(1)
    total = total + call.tensor(3) if call.has(3) else total
    inverse = _inverse_power(total, -1, call.get("epsilon", 1e-5))
    return (total * inverse * call.tensor(2), None, inverse, total)[: call.outputs]


@form("EmbedLayerNormalization", domain="com.microsoft")
def _embed_layer_norm(call: Call) -> tuple[Tensor, ...]:
    ids = call.tensor(0).long()
    positions = call.tensor(8).long() if call.has(8) else torch.arange(ids.shape[1], device=ids.device)
    total = functional.embedding(ids, call.tensor(2)) + functional.embedding(positions, call.tensor(3))
    if call.has(1):
        total = total + functional.embedding(call.tensor(1).long(), call.tensor(4))
    normal = _normal(total, -1, call.tensor(5), call.optional(6), call.get("epsilon", 1e-12))
    lengths = call.tensor(7).sum(dim=1) if call.has(7) else torch.zeros(ids.shape[0], device=ids.device)
    return (normal, lengths.int(), total)[: call.outputs]


@form("LRN")
def _response_norm(call: Call) -> Tensor:
    x, size = call.tensor(0), call.get("size")
    before = (size - 1) // 2
    padded = functional.pad(x.square(), [0] * 2 * (x.ndim - 2) + [before, size - 1 - before])
    power = padded.unfold(1, size, 1).sum(dim=-1)
    scaled = call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * power
    return x / scaled ** call.get("beta", 0.75)


@form("LpNormalization")
def _lp_norm(call: Call) -> Tensor:
    x, axis = call.tensor(0), call.get("axis", -1)
    norm = torch.linalg.vector_norm(x, call.get("p", 2), dim=axis, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)


@form("MeanVarianceNormalization")
def _mean_variance(call: Call) -> Tensor:
    x, axes = call.tensor(0), tuple(call.get("axes", [0, 2, 3]))
    centred = x - x.mean(dim=axes, keepdim=True)
    return centred / (centred.square().mean(dim=axes, keepdim=True).sqrt() + 1e-9)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(dim=axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(dim=axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(dim=axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(dim=axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(dim=axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(dim=axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(dim=axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, dim=axes, keepdim=keep),
}


def _reduced(call: Call, reduction: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Tensor:
    x, axes = call.tensor(0), call.ints(1, "axes")
    if not x.numel():
        raise NotImplementedError("a reduction of nothing")
    if not axes and call.get("noop_with_empty_axes", 0):
        return reduction(x.unsqueeze(0), (0,), False)
    axes = axes or list(range(x.ndim))
    return reduction(x, tuple(axes), bool(call.get("keepdims", 1)))


for _name, _reduction in _REDUCTIONS.items():
    form(_name)(partial(_reduced, reduction=_reduction))
