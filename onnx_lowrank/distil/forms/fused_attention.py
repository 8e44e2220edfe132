"""ONNX Runtime's own operators of attention.

Formulas: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onnx_lowrank.distil.forms.attention import added, attend, causal, chosen, heads, joined, rotated
from onnx_lowrank.distil.forms.form import Call, Value, form

_OWN = "com.microsoft"
_MASKED = -10000.0


@form("Attention", domain=_OWN)
def _packed(call: Call) -> tuple[Value, ...]:
    product = call.tensor(0) @ call.tensor(1)
    product = product + call.tensor(2) if call.has(2) else product
    sizes = call.get("qkv_hidden_sizes") or [product.shape[-1] // 3] * 3
    count = call.get("num_heads")
    query, key, value = (heads(x, count) for x in product.split(list(sizes), dim=-1))
    if call.get("do_rotary", 0):
        raise NotImplementedError("com.microsoft.Attention with do_rotary")
    past = call.optional(4)
    if past is not None:
        key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
    bias = added(_masked(call, 3, query, key), call.optional(5), _causal(call, query, key))
    made = attend(query, key, value, bias, call.get("scale") or None)
    return (joined(made.values), torch.stack((key, value)) if call.outputs > 1 else None)[: call.outputs]


@form("MultiHeadAttention", domain=_OWN)
def _multi_head(call: Call) -> tuple[Value, ...]:
    if call.has(8) or call.has(9):
        raise NotImplementedError("com.microsoft.MultiHeadAttention with a buffer of past keys")
    query, key, value = _separate(call)
    if call.has(6):
        key, value = torch.cat((call.tensor(6), key), dim=2), torch.cat((call.tensor(7), value), dim=2)
    bias = added(_masked(call, 4, query, key), call.optional(5), _causal(call, query, key))
    made = attend(query, key, value, bias, call.get("scale") or None)
    return (joined(made.values), key, value, made.products)[: call.outputs]


def _separate(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of heads, with their biases."""
    count, first = call.get("num_heads"), call.tensor(0)
    if first.ndim == 5:  # Three of each head stand side by side.
        query, key, value = (x.flatten(2) for x in first.unbind(dim=3))
    elif call.tensor(1).ndim == 5:
        query, key, value = first, *(x.flatten(2) for x in call.tensor(1).unbind(dim=3))
    else:
        query, key, value = first, call.tensor(1), call.tensor(2)
    if not call.has(3):
        return heads(query, count), *(heads(x, count) if x.ndim == 3 else x for x in (key, value))
    sizes = [query.shape[-1]] * 2
    biases = call.tensor(3).split([*sizes, call.tensor(3).shape[0] - sum(sizes)])
    if key.ndim == 4:  # of a cross attention, whose keys have their bias
        return heads(query + biases[0], count), key, value
    return (
        heads(query + biases[0], count),
        heads(key + biases[1], count),
        heads(value + biases[2], count),
    )


def _masked(call: Call, operand: int, query: Tensor, key: Tensor) -> Tensor | None:
    """The bias of a mask: 1 for a key that counts, or the number of keys that count."""
    mask = call.optional(operand)
    if mask is None:
        return None
    batch, length = query.shape[0], key.shape[2]
    if mask.ndim == 1:
        if mask.shape[0] != batch:
            raise NotImplementedError("a mask with the starts and the ends of sequences")
        mask = torch.arange(length, device=mask.device) < mask[:, None]
    if mask.ndim == 4:
        raise NotImplementedError("a mask of four axes")
    mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
    return chosen(mask != 0, query, call.get("mask_filter_value", _MASKED))


def _causal(call: Call, query: Tensor, key: Tensor) -> Tensor | None:
    return causal(query, key, key.shape[2] - query.shape[2]) if call.get("unidirectional", 0) else None


@form("GroupQueryAttention", domain=_OWN)
def _grouped(call: Call) -> tuple[Value, ...]:
    _check_grouped(call)
    count, groups = call.get("num_heads"), call.get("kv_num_heads")
    query, key, value = call.tensor(0), call.optional(1), call.optional(2)
    if key is None or value is None:
        size = query.shape[-1] // (count + 2 * groups)
        query, key, value = query.split([count * size, groups * size, groups * size], dim=-1)
    query, key, value = heads(query, count), heads(key, groups), heads(value, groups)
    past = call.tensor(3).shape[2] if call.has(3) else 0
    lengths = call.tensor(5).long().reshape(-1) + 1
    if past and bool((lengths != past + query.shape[2]).any()):
        raise NotImplementedError("com.microsoft.GroupQueryAttention with pasts of several lengths")
    if call.get("do_rotary", 0):
        places = call.tensor(9).long() if call.has(9) else torch.arange(past, past + query.shape[2])[None]
        query, key = (_turned(call, x, call.tensor(7)[places], call.tensor(8)[places]) for x in (query, key))
    if past:
        key, value = torch.cat((call.tensor(3), key), dim=2), torch.cat((call.tensor(4), value), dim=2)
    window = call.get("local_window_size", -1)
    bias = added(causal(query, key, past, window - 1 if window > 0 else -1), call.optional(10))
    made = attend(query, key, value, bias, call.get("scale") or None, call.get("softcap", 0.0))
    return (joined(made.values), key, value)[: call.outputs]


def _check_grouped(call: Call) -> None:
    """Raise an error for what the form does not have."""
    given = {"a head sink": call.has(11), "smooth_softmax": call.get("smooth_softmax", 0) == 1}
    for name, is_given in given.items():
        if is_given:
            raise NotImplementedError(f"com.microsoft.GroupQueryAttention with {name}")


def _turned(call: Call, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    is_interleaved = bool(call.get("rotary_interleaved", call.get("interleaved", 0)))
    return rotated(x, cosine.unsqueeze(1), sine.unsqueeze(1), is_interleaved=is_interleaved)


@form("RotaryEmbedding", domain=_OWN)
def _rotary(call: Call) -> Tensor:
    x, places = call.tensor(0), call.tensor(1).long()
    cosine, sine = call.tensor(2), call.tensor(3)
    if call.get("is_packed_batching", 0):
        raise NotImplementedError("com.microsoft.RotaryEmbedding with is_packed_batching")
    size = 2 * cosine.shape[-1]
    inner = heads(x, call.get("num_heads", 0) or x.shape[-1] // size) if x.ndim == 3 else x
    if places.ndim < 2:  # the position of the first
        places = (places.reshape(-1) + torch.arange(inner.shape[2], device=places.device))[None]
    turned = _turned(call, inner, cosine[places], sine[places]) * (call.get("scale", 1.0) or 1.0)
    return joined(turned) if x.ndim == 3 else turned
