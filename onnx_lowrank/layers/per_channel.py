"""The costs of hidden channels beside the weights of the layers around them."""

from __future__ import annotations

from math import prod

from onnx_lowrank.core.layer import PerChannel
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import is_external
from onnx_lowrank.graph.shapes import Shapes
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import FLOATS, Source, Stored, constant, readers, resolve
from onnx_lowrank.layers.binding import Hidden
from onnx_lowrank.layers.work import node_macs


def per_channel(model: Model, walk: Walk, shapes: Shapes, hidden: Hidden) -> PerChannel:
    """Count what `rewrite.narrow` stores and removes for every channel, and what the channel computes.

    Args:
        model: The model.
        walk: Its walk.
        shapes: Its inferred shapes.
        hidden: The channels.
    """
    channels = hidden.producers[0].layer.f
    reads = {(place, operand) for place, operand, _ in hidden.constants}
    # A tensor that is read along one axis is stored once for all its readers.
    tensors = {
        (tensor.name, axis): tensor
        for place, operand, axis in hidden.constants
        if (tensor := walk.operand(place, operand)) is not None
    }
    stored = sum(_floats(model, walk, tensor) for tensor in tensors.values())
    found = [resolve(walk, tensor) for tensor in tensors.values()]
    sources = {(s.source.scope, s.source.name): s.source for s in found if isinstance(s, Stored)}
    owned = 0
    for source in sources.values():
        owned += prod(source.tensor.dims) if _is_owned(model, walk, source, reads) else 0
    counts = [node_macs(walk, shapes, place, is_layer=False) for place in hidden.grouped]
    macs = None if None in counts else sum(count or 0 for count in counts) // channels
    return PerChannel(stored // channels, owned // channels, macs)


def _floats(model: Model, walk: Walk, tensor: object) -> int:
    """The parameters of a constant: its elements if they are floats."""
    value = constant(walk, model, tensor)
    return 0 if value is None or value.dtype.name not in FLOATS.values() else value.size


def _is_owned(model: Model, walk: Walk, source: Source, reads: set[tuple[Place, int]]) -> bool:
    """Whether nothing else reads a stored tensor, or shares its bytes in a data file."""
    found = readers(walk, source)
    shares = is_external(source.tensor) and walk.readers_of_bytes(model, source.tensor) > 1
    return found is not None and reads.issuperset(found) and not shares
