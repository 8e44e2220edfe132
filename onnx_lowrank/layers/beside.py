"""The costs beside the weights of layers that are narrowed together."""

from __future__ import annotations

from math import prod

from onnx_lowrank.core.layer import Beside
from onnx_lowrank.files.load import Model
from onnx_lowrank.files.tensors import is_external
from onnx_lowrank.graph.shapes import Shapes
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.graph.weights import FLOATS, Source, Stored, constant, readers, resolve
from onnx_lowrank.layers.binding import Hidden
from onnx_lowrank.layers.work import node_macs


def beside(model: Model, walk: Walk, shapes: Shapes, hidden: Hidden, macs: int | None = 0) -> Beside:
    """Count what `rewrite.narrow` stores and removes, and what the operators between the layers compute.

    Args:
        model: The model.
        walk: Its walk.
        shapes: Its inferred shapes.
        hidden: What lies between the layers.
        macs: MACs between them beside those of depthwise convolutions; None if a dimension is unknown.
    """
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
    total = None if macs is None or None in counts else macs + sum(count or 0 for count in counts)
    return Beside(stored, owned, total, has_convolutions=bool(hidden.grouped))


def _floats(model: Model, walk: Walk, tensor: object) -> int:
    """The parameters of a constant: its elements if they are floats."""
    value = constant(walk, model, tensor)
    return 0 if value is None or value.dtype.name not in FLOATS.values() else value.size


def _is_owned(model: Model, walk: Walk, source: Source, reads: set[tuple[Place, int]]) -> bool:
    """Whether nothing else reads a stored tensor, or shares its bytes in a data file."""
    found = readers(walk, source)
    shares = is_external(source.tensor) and walk.readers_of_bytes(model, source.tensor) > 1
    return found is not None and reads.issuperset(found) and not shares
