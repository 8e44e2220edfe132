"""The past of a decoder among its inputs and outputs: roles, and whether its length fits the others."""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnx import ModelProto

from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.inputs import Spec, outputs
from onnx_lowrank.engines.made import is_past, is_position, past_axis
from onnx_lowrank.graph.weights import FLOATS

_READ = ("input_ids", "inputs_embeds", "decoder_input_ids")
_MASKS = ("attention_mask", "decoder_attention_mask")
_RANK = 4  # samples, heads, positions, features; or more, with keys and values in one
_PRESENT = re.compile(r"present([._]?(key|value|kv|state|[0-9])|$)")


def named_role(spec: Spec) -> str | None:
    """The role of an input of a language model, by its name; None for ids, and for unknown inputs.

    Returns:
        "past", "branch" (whether a merged decoder has a past), "mask", "types" or "positions".
    """
    name = spec.name.lower()
    if is_past(spec):
        return "past"
    if name == "use_cache_branch":
        return "branch"
    if "mask" in name:
        return "mask"
    if "token_type" in name or "segment" in name:
        return "types"
    return "positions" if is_position(spec) else None


def caches(proto: ModelProto) -> frozenset[str]:
    """The outputs that a decoder keeps for its next call, like present.0.key; none without other floats.

    They are keys and values of its layers. The errors there are errors inside the model: they matter as far
    as they change the other outputs, and a decoder has many more of them.
    """
    given = outputs(proto)
    found = {
        spec.name
        for spec in given
        if _PRESENT.match(spec.name.lower()) is not None and (spec.shape is None or len(spec.shape) >= _RANK)
    }
    others = {spec.dtype.name for spec in given if spec.name not in found and spec.dtype is not None}
    return frozenset() if others.isdisjoint(FLOATS.values()) else frozenset(found)


def uneven(wanted: Sequence[Spec], feed: Feed) -> str | None:
    """The reason why the parts of a past do not fit each other; None if they do, or if there is no past."""
    seen: dict[str, tuple[str, int]] = {}
    for spec, length in _lengths(wanted, feed):
        name = (spec.shape or ())[past_axis(spec)]
        if isinstance(name, str):
            first, other = seen.setdefault(name, (spec.name, length))
            if other != length:
                return f"the past {first!r} has {other} positions, but {spec.name!r} has {length}"
    return None


def unmasked(wanted: Sequence[Spec], feed: Feed) -> str | None:
    """The reason why an attention mask does not fit the past; None if it does, or if there is no past.

    A model may read its mask in another way. So this explains a failure, and is none by itself.
    """
    if (reason := uneven(wanted, feed)) is not None:
        return reason
    lengths = {length for _, length in _lengths(wanted, feed)}
    read = next((feed[name] for name in _READ if name in feed), None)
    mask = next((name for name in _MASKS if name in feed), None)
    if len(lengths) != 1 or read is None or mask is None or read.ndim < 2 or feed[mask].ndim != 2:
        return None
    past, new, total = *lengths, read.shape[1], feed[mask].shape[1]
    if total == past + new:
        return None
    return f"the past has {past} positions and the input {new}, so {mask!r} needs {past + new}, not {total}"


def _lengths(wanted: Sequence[Spec], feed: Feed) -> list[tuple[Spec, int]]:
    """The past inputs with their lengths."""
    pasts = (spec for spec in wanted if is_past(spec) and spec.name in feed)
    return [(spec, feed[spec.name].shape[past_axis(spec)]) for spec in pasts]
