"""The parts of layers that are measured on their own.

A layer has one part, unless some of its uses apply the transpose of its matrix, as a tied embedding does: a
Gather looks up rows, and a MatMul with the transpose compares features with all rows. Both kinds of uses
show the same features, the results of one and the inputs of the other. Each kind is a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from onnx_lowrank.layers.binding import Binding

_TRANSPOSED = "\0transposed"
"""The end of the id of a layer's second part, behind the layer's id."""

_SUMMED = "\0summed"
"""The end of the id of the measurement of a sum, behind the id of the first of its layers."""


@dataclass(frozen=True, slots=True)
class Part:
    """Uses of one layer that are measured together.

    Attributes:
        id: An id of its own.
        binding: The layer with these uses only, and with `id`. The transposed uses of a layer are plain uses
            of the transposed matrix.
        layer: The id of the whole layer.
        of_outputs: Whether its outputs must be measured, or its inputs; None to choose.
        reason: Why nothing can be measured, a sentence; usually empty.
    """

    id: str
    binding: Binding
    layer: str
    of_outputs: bool | None = None
    reason: str = ""


def split(binding: Binding) -> tuple[Part, ...]:
    """The parts of a layer: one, or two if some uses apply the transpose; the first has the layer's id."""
    layer = binding.layer
    flags = [use.transposed for use in layer.uses]
    if not any(flags):
        return (Part(layer.id, binding, layer.id),)
    if not any(use.reads_indices for use in layer.uses):
        # Their results have a bias in them, and a batch has features of its own in every matrix.
        reason = "it is applied both plain and transposed, to different inputs: give each use its own weight"
        return (Part(layer.id, binding, layer.id, reason=reason),)
    # The results of a look-up are features. The inputs of the other uses are features, too.
    given = not any(use.reads_indices for use in layer.uses if use.transposed)
    plain = replace(layer, uses=tuple(use for use in layer.uses if not use.transposed))
    turned = replace(
        layer,
        id=layer.id + _TRANSPOSED,
        f=layer.c,
        c=layer.f,
        uses=tuple(replace(use, transposed=False) for use in layer.uses if use.transposed),
    )
    pairs = list(zip(flags, binding.casts, strict=True))
    casts = [tuple(cast for flag, cast in pairs if flag == wanted) for wanted in (False, True)]
    return (
        Part(layer.id, replace(binding, layer=plain, casts=casts[0]), layer.id, given),
        Part(turned.id, replace(binding, layer=turned, casts=casts[1]), layer.id, not given),
    )


def whole(part: str) -> str:
    """The id of the layer to which the part with this id belongs."""
    return part.removesuffix(_TRANSPOSED).removesuffix(_SUMMED)


def sums(bindings: Iterable[Binding]) -> Iterator[Binding]:
    """The sums to measure: the last layer of each, with the id of the sum.

    Its outputs stand for the sum: all of the sum is known where it runs.
    """
    for binding in bindings:
        addends = binding.layer.addends
        if addends[-1:] == (binding.layer.id,):
            yield replace(binding, layer=replace(binding.layer, id=summed(addends)))


def summed(layers: Sequence[str]) -> str:
    """The id of the measurement of the sum of layers, given their ids in graph order."""
    return layers[0] + _SUMMED


def is_sum(name: str) -> bool:
    """Whether an id is that of a sum."""
    return name.endswith(_SUMMED)
