"""One decoder behind the sum of narrow tensors, in the place of the operators that added up layers' results.

Rules:

1. The narrow results of the encoders are added up in the order of the layers. The decoder follows, with the
   sum of the biases that the layers' nodes added, then the other addends in their order.
2. The last node takes the name, the notes and the output of the last operator of the sum; the others go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import NodeProto

from onnx_lowrank.graph.walk import Walk, label
from onnx_lowrank.layers.binding import Sum
from onnx_lowrank.operators import registry
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.rewrite.edits import Edits


@dataclass(frozen=True, slots=True)
class Encoded:
    """A layer of a sum whose encoder is written.

    Attributes:
        names: Names of the nodes of the encoder.
        value: Name of their result.
        decoder: The node that would map it to the layer's result.
    """

    names: tuple[str, ...]
    value: str
    decoder: NodeProto


def add_up(walk: Walk, edits: Edits, added: Sum, layers: Sequence[Encoded], bias: str) -> str:
    """Plan the sum and its decoder.

    Args:
        walk: The model's walk.
        edits: Where to plan them.
        added: The operators of the sum.
        layers: Its layers, in their order; the decoder is that of the first.
        bias: Name of the bias of the decoder; "" for none.

    Returns:
        The name of the decoder.
    """
    end, edit = added.nodes[-1], edits.scopes[""]
    last = walk.node(end)
    fragment = Fragment(label(last), edits.unique, walk.opsets[""])
    first, *others = layers
    total = first.value
    for other in others:
        total = fragment.add("narrow_sum", "Add", [total, other.value])
    decoder = first.decoder
    decoder.input[list(decoder.input).index(first.value)] = total
    if bias:
        registry.family(decoder).set_bias(decoder, bias)
    fragment.nodes.append(decoder)
    value = decoder.output[0]
    for place, operand in added.others:
        name = edit.repointed.get((place.node, operand)) or walk.node(place).input[operand]
        value = fragment.add("sum", "Add", [value, name])
    made = fragment.nodes[-1]
    made.output[0] = last.output[0]
    made.name = last.name or made.name
    made.doc_string = last.doc_string
    made.metadata_props.extend(last.metadata_props)
    for place in added.nodes:
        edit.deleted.add(place.node)
        edit.forgotten.update(name for name in walk.node(place).output if name != last.output[0])
    edit.before.setdefault(end.node, []).extend(fragment.nodes)
    return str(decoder.name)
