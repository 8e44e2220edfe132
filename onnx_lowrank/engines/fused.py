"""The operators that ONNX Runtime's optimizer puts in place of several, in both models."""

from __future__ import annotations

from onnx_lowrank.core.outcome import Fused
from onnx_lowrank.engines.engine import UnsupportedError
from onnx_lowrank.engines.runtime import OWN, Runtime
from onnx_lowrank.files.load import Model, stored_bytes
from onnx_lowrank.graph.scopes import scopes

_MOST_BYTES = 2**29
"""Larger models are not optimized: that takes their size in memory and on disk, and seconds."""


_SIGNS = frozenset({"Softmax", "LayerNormalization", "RMSNormalization", "Gelu", "Erf", "Attention"})
"""The operators around which the optimizer fuses much; networks of convolutions mostly have none of them."""


def compare(original: Model, compressed: Model, engine: Runtime) -> Fused | None:
    """Count the fused operators of both models; those of the second only if the first has some.

    Only models of transformers are optimized, those with one of `_SIGNS` or with operators of the runtime's
    own: for a small network of convolutions, optimizing both models is a noticeable part of the whole run.

    Args:
        original: The input model.
        compressed: The compressed model.
        engine: The runtime that optimizes them.

    Returns:
        None for other models.
    """
    nodes = (node for scope in scopes(original.proto) for node in scope.nodes)
    if not any(node.op_type in _SIGNS or node.domain == OWN for node in nodes):
        return None
    if stored_bytes(original) > _MOST_BYTES:
        return Fused(note=f"the model has more than {_MOST_BYTES >> 20} MiB")
    try:
        before = engine.fused(original)
        return Fused(before, engine.fused(compressed) if before else {})
    except UnsupportedError as error:
        return Fused(note=f"{engine.name} does not optimize the model: {error}")
