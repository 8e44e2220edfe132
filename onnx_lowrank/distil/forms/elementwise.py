"""Operators on single elements."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import torch
from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.forms.form import Call, form

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Div": torch.div,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Sub": torch.sub,
}
_MANY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
}


def _alone(call: Call, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(call.tensor(0))


def _paired(call: Call, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return function(call.tensor(0), call.tensor(1))


def _joined(call: Call, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return reduce(function, call.tensors())


for _name, _unary in _UNARY.items():
    form(_name)(partial(_alone, function=_unary))
for _name, _binary in _BINARY.items():
    form(_name)(partial(_paired, function=_binary))
for _name, _many in _MANY.items():
    form(_name)(partial(_joined, function=_many))


@form("Pow")
def _pow(call: Call) -> Tensor:
    x, exponent = call.tensor(0), call.tensor(1)
    if not x.is_floating_point():
        return torch.pow(x.to(exponent.dtype), exponent).to(x.dtype)
    return torch.pow(x, exponent.to(x.dtype))


@form("Mean")
def _mean(call: Call) -> Tensor:
    return reduce(torch.add, call.tensors()) / len(call)


@form("Clip")
def _clip(call: Call) -> Tensor:
    low = call.tensor(1) if call.has(1) else call.get("min")
    high = call.tensor(2) if call.has(2) else call.get("max")
    return torch.clamp(call.tensor(0), low, high) if low is not None or high is not None else call.tensor(0)


@form("LeakyRelu")
def _leaky(call: Call) -> Tensor:
    return functional.leaky_relu(call.tensor(0), call.get("alpha", 0.01))


@form("PRelu")
def _prelu(call: Call) -> Tensor:
    x = call.tensor(0)
    return torch.where(x < 0, x * call.tensor(1), x)


@form("Elu")
def _elu(call: Call) -> Tensor:
    return functional.elu(call.tensor(0), call.get("alpha", 1.0))


@form("Celu")
def _celu(call: Call) -> Tensor:
    return functional.celu(call.tensor(0), call.get("alpha", 1.0))


@form("ThresholdedRelu")
def _thresholded(call: Call) -> Tensor:
    x = call.tensor(0)
    return torch.where(x > call.get("alpha", 1.0), x, 0)


@form("Shrink")
def _shrink(call: Call) -> Tensor:
    x, bias, bound = call.tensor(0), call.get("bias", 0.0), call.get("lambd", 0.5)
    return torch.where(x < -bound, x + bias, torch.where(x > bound, x - bias, 0))


@form("Swish")
def _swish(call: Call) -> Tensor:
    x = call.tensor(0)
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


@form("Selu")
def _selu(call: Call) -> Tensor:
    alpha, gamma = call.get("alpha", 1.6732631921768188), call.get("gamma", 1.0507010221481323)
    return gamma * functional.elu(call.tensor(0), alpha)


@form("HardSigmoid")
def _hard_sigmoid(call: Call) -> Tensor:
    return torch.clamp(call.tensor(0) * call.get("alpha", 0.2) + call.get("beta", 0.5), 0, 1)


@form("Gelu")
@form("Gelu", "BiasGelu", domain="com.microsoft")
def _gelu(call: Call) -> Tensor:
    return functional.gelu(_biased(call), approximate=call.text("approximate", "none"))


@form("FastGelu", domain="com.microsoft")
def _fast_gelu(call: Call) -> Tensor:
    return functional.gelu(_biased(call), approximate="tanh")


@form("QuickGelu", domain="com.microsoft")
def _quick_gelu(call: Call) -> Tensor:
    x = call.tensor(0)
    return x * torch.sigmoid(call.get("alpha", 1.702) * x)


def _biased(call: Call) -> Tensor:
    return call.tensor(0) + call.tensor(1) if call.has(1) else call.tensor(0)


@form("Where")
def _where(call: Call) -> Tensor:
    return torch.where(call.tensor(0).bool(), call.tensor(1), call.tensor(2))


@form("Identity")
def _identity(call: Call) -> Tensor:
    return call.tensor(0)


@form("Dropout")
def _dropout(call: Call) -> tuple[Tensor, ...]:
    if call.ints(2) == [1]:
        raise NotImplementedError("Dropout in training")
    x = call.tensor(0)
    return (x, torch.ones_like(x, dtype=torch.bool))[: call.outputs]


@form("BiasSoftmax", domain="com.microsoft")
def _bias_softmax(call: Call) -> Tensor:
    x, bias = call.tensor(0), call.tensor(1)
    if call.get("is_inner_broadcast") and bias.ndim != x.ndim:
        raise NotImplementedError("com.microsoft.BiasSoftmax with a bias of fewer axes than its input")
    axis = call.get("axis", 1) % x.ndim
    return functional.softmax((x + bias).reshape(*x.shape[:axis], -1), dim=-1).reshape(x.shape)


@form("BiasAdd", domain="com.microsoft")
def _bias_add(call: Call) -> Tensor:
    return call.tensor(0) + call.tensor(1) + call.tensor(2)


@form("Softmax")
def _softmax(call: Call) -> Tensor:
    return _soft(call, functional.softmax)


@form("LogSoftmax")
def _log_softmax(call: Call) -> Tensor:
    return _soft(call, functional.log_softmax)


def _soft(call: Call, function: Callable[..., Tensor]) -> Tensor:
    x = call.tensor(0)
    if call.opset >= 13:
        return function(x, dim=call.get("axis", -1))
    axis = call.get("axis", 1) % x.ndim
    flat = x.reshape(*x.shape[:axis], -1)  # Older operator sets normalize over all axes from the first on.
    return function(flat, dim=-1).reshape(x.shape)
