"""Attention and rotary positions of the standard operator sets, and what ONNX Runtime's forms share.

Formulas: the operators' specification, https://onnx.ai/onnx/operators/onnx__Attention.html.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from onnx_lowrank.distil.forms.form import Call, Value, form


@dataclass(frozen=True, slots=True)
class Attended:
    """Attention, and what it is made of.

    Attributes:
        values: The result, batch by head by query by size.
        products: The scaled products of queries and keys.
        capped: The same within `softcap`.
        biased: The same with biases.
        shares: The weights of the keys, whose sum is 1.
    """

    values: Tensor
    products: Tensor
    capped: Tensor
    biased: Tensor
    shares: Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Attended:
    """Attention of heads.

    Args:
        query: The queries, batch by head by query by size.
        key: The keys, for as many heads, or for groups of them.
        value: The values of the keys.
        bias: What is added to the products; rows of negative infinity alone attend to nothing.
        scale: The factor of the products.
        softcap: The bound of the products; 0 for none.
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    root = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    products = (query * root) @ (key * root).transpose(-1, -2)
    capped = softcap * torch.tanh(products / softcap) if softcap > 0 else products
    if bias is None:
        shares = torch.softmax(capped, dim=-1)
        return Attended(shares @ value, products, capped, capped, shares)
    nothing = bias.amax(dim=-1, keepdim=True) == -torch.inf
    biased = capped + bias
    shares = torch.softmax(
        torch.where(nothing, 0, biased), dim=-1
    )  # Infinities alone give NaN, gradients too.
    shares = torch.where(nothing, 0, shares)
    return Attended(shares @ value, products, capped, biased, shares)


def causal(query: Tensor, key: Tensor, offset: Tensor | int, left: int = -1, right: int = 0) -> Tensor:
    """A bias that lets queries attend to keys near them, (batch by 1 by) query by key.

    Args:
        query: The queries, batch by head by query by size.
        key: The keys.
        offset: The position of the first query among the keys, or one of each batch.
        left: How many keys before its own a query attends to; below 0, all.
        right: How many keys behind.
    """
    if isinstance(offset, Tensor):
        offset = offset.reshape(-1, 1, 1, 1)
    position = torch.arange(query.shape[2], device=query.device)[:, None] + offset
    distance = position - torch.arange(key.shape[2], device=query.device)
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen = seen & (distance <= left) if left >= 0 else seen
    seen = seen & (-distance <= right) if right >= 0 else seen
    return chosen(seen, query)


def chosen(mask: Tensor, like: Tensor, masked: float = -torch.inf) -> Tensor:
    """A bias of 0 where a mask holds, and a negative number elsewhere."""
    return torch.where(mask, 0.0, masked).to(like.dtype)


def added(*biases: Tensor | None) -> Tensor | None:
    """The sum of the biases that there are."""
    total: Tensor | None = None
    for bias in biases:
        if bias is not None:
            total = bias if total is None else total + bias
    return total


def heads(x: Tensor, count: int) -> Tensor:
    """Batch by position by features as batch by head by position by size."""
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """The inverse of `heads`."""
    return x.transpose(1, 2).flatten(2)


@form("Attention")
def _attention(call: Call) -> tuple[Value, ...]:
    query, key, value = (call.tensor(operand) for operand in range(3))
    is_flat = query.ndim == 3
    if is_flat:
        query = heads(query, call.get("q_num_heads"))
        key, value = (heads(x, call.get("kv_num_heads")) for x in (key, value))
    past = call.optional(4)
    if past is not None:
        key, value = torch.cat((past, key), dim=2), torch.cat((call.tensor(5), value), dim=2)
    filled = call.tensor(6).long() if call.has(6) else None
    bias = added(_mask(call, query, key), _window(call, query, key, filled))
    if filled is not None:
        within = torch.arange(key.shape[2], device=key.device) < filled.reshape(-1, 1, 1, 1)
        bias = added(bias, chosen(within, query))
    made = attend(query, key, value, bias, call.get("scale"), call.get("softcap", 0.0))
    modes = (made.products, made.capped, made.biased, made.shares)
    inner = modes[call.get("qk_matmul_output_mode", 0)]
    values = joined(made.values) if is_flat else made.values
    return (values, key, value, inner)[: call.outputs]


def _mask(call: Call, query: Tensor, key: Tensor) -> Tensor | None:
    """The bias of an operand: numbers to add, or a mask; the keys behind it are masked."""
    mask = call.optional(3)
    if mask is None:
        return None
    mask = chosen(mask, query) if mask.dtype == torch.bool else mask
    missing = key.shape[2] - mask.shape[-1]
    return functional.pad(mask, (0, missing), value=-torch.inf) if missing > 0 else mask


def _window(call: Call, query: Tensor, key: Tensor, filled: Tensor | None) -> Tensor | None:
    left, right = call.get("left_window_size", -1), call.get("right_window_size", -1)
    if call.get("is_causal", 0):
        right = 0
    if left < 0 and right < 0:
        return None
    offset = filled - query.shape[2] if filled is not None else call.tensor(4).shape[2] if call.has(4) else 0
    return causal(query, key, offset, left, right)


@form("RotaryEmbedding")
def _rotary(call: Call) -> Tensor:
    x = call.tensor(0)
    inner = heads(x, call.get("num_heads")) if x.ndim == 3 else x
    cosine, sine = call.tensor(1), call.tensor(2)
    if call.has(3):
        places = call.tensor(3).long()
        cosine, sine = cosine[places], sine[places]
    is_interleaved = bool(call.get("interleaved", 0))
    turned = rotated(inner, cosine.unsqueeze(1), sine.unsqueeze(1), is_interleaved=is_interleaved)
    return joined(turned) if x.ndim == 3 else turned


def rotated(x: Tensor, cosine: Tensor, sine: Tensor, *, is_interleaved: bool) -> Tensor:
    """Heads whose pairs of features are turned by angles.

    Args:
        x: The heads, batch by head by position by size.
        cosine: The cosines of the angles, as many as half the features that are turned.
        sine: Their sines.
        is_interleaved: Whether pairs stand side by side; otherwise each half has one of a pair.
    """
    turned, rest = x[..., : 2 * cosine.shape[-1]], x[..., 2 * cosine.shape[-1] :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if is_interleaved else turned.chunk(2, dim=-1)
    real, imaginary = cosine * first - sine * second, sine * first + cosine * second
    if is_interleaved:
        return torch.cat((torch.stack((real, imaginary), dim=-1).flatten(-2), rest), dim=-1)
    return torch.cat((real, imaginary, rest), dim=-1)
