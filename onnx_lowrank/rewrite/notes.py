"""Metadata of a compressed model about its compression; no runtime reads it.

Rules:

1. The metadata of the model hold the run, and the option and the certificate of every rewritten layer. From
   IR 10 on, the nodes of the layer's chains hold option and certificate, too, unless another node has the
   same name.
2. A factor that was multiplied with its neighbour is no longer in the file. Nobody could check the
   certificate of its layer, so it is left out. The product has a certificate of its own.
3. The numbers of some layers are trained after the rewriting, and those of the layers that were narrowed with
   them, too. No norm then compares such a layer with its old weight, so it has no certificate.
4. A model that was compressed before keeps its older entries; the new entries get other keys.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from onnx import ModelProto, NodeProto

from onnx_lowrank.core.factors import Certificate
from onnx_lowrank.core.outcome import Merge
from onnx_lowrank.graph.scopes import scopes
from onnx_lowrank.rewrite.replace import Rewritten

METADATA = "onnx_lowrank"
"""Prefix of the keys in metadata_props."""

_NODES_HAVE_METADATA = 10
"""The first IR version with metadata of nodes."""


def stamp(rewritten: Rewritten, run: Mapping[str, str], merges: Iterable[Merge] = ()) -> None:
    """Write the metadata into a model, in place.

    Args:
        rewritten: The model, its chains and their certificates.
        run: Description of the run that made the factors.
        merges: The products in the model, in the order in which they were made.
    """
    for holder, key, value in _entries(rewritten, run, merges):
        _add(holder, key, value)


def unstamp(rewritten: Rewritten, run: Mapping[str, str], merges: Iterable[Merge] = ()) -> None:
    """Take the metadata out of a model again, in place; the arguments are those of `stamp`."""
    for holder, key, value in _entries(rewritten, run, merges):
        of_key = re.compile(rf"{re.escape(METADATA)}\.{key}(\.\d+)?$")
        places = [i for i, e in enumerate(holder.metadata_props) if of_key.match(e.key) and e.value == value]
        if places:
            del holder.metadata_props[places[-1]]


def _entries(
    rewritten: Rewritten, run: Mapping[str, str], merges: Iterable[Merge]
) -> Iterator[tuple[ModelProto | NodeProto, str, str]]:
    """The entries of a model and of its nodes: what holds each, its key, and its value."""
    if not rewritten.proofs:
        return
    proto = rewritten.model.proto
    products = [merged for merged in merges if merged.layers]
    multiplied = {name for merged in products for name in (merged.first, merged.second)}
    notes = {layer: _note(rewritten, layer, multiplied) for layer in rewritten.proofs}
    yield proto, "run", json.dumps(dict(run))
    yield proto, "layers", json.dumps(notes, ensure_ascii=False)
    if products:
        yield proto, "products", json.dumps([_product(merged) for merged in products], ensure_ascii=False)
    if proto.ir_version >= _NODES_HAVE_METADATA:
        yield from _of_nodes(rewritten, notes, products)


def _of_nodes(
    rewritten: Rewritten, notes: Mapping[str, Any], products: Iterable[Merge]
) -> Iterator[tuple[NodeProto, str, str]]:
    by_name: dict[str, dict[str, Any]] = {}
    for layer, chains in rewritten.chains.items():
        for name in (name for chain in chains for name in chain):
            by_name.setdefault(name, {"layer": layer, **notes[layer]})
    for merged in products:
        by_name[merged.second] = {"product": _product(merged)}
    nodes = [node for scope in scopes(rewritten.model.proto) for node in scope.nodes]
    bearers = Counter(node.name for node in nodes)
    for node in nodes:
        # Names may repeat, and a name does not tell which of its nodes is the one of a chain.
        for key, value in by_name.get(node.name, {}).items() if bearers[node.name] == 1 else ():
            yield node, key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _note(rewritten: Rewritten, layer: str, multiplied: set[str]) -> dict[str, Any]:
    """The option of a layer, and its certificate if both factors are in the model (rule 2)."""
    option, certificate = rewritten.proofs[layer]
    names = {name for chain in rewritten.chains[layer] for name in chain}
    if lost := sorted(names & multiplied):
        return {"option": str(option), "multiplied": lost}
    if certificate is None:
        return {"option": str(option), "trained": True}
    return {"option": str(option), **_bounds(certificate)}


def _product(merged: Merge) -> dict[str, Any]:
    bounds = {"trained": True} if merged.certificate is None else _bounds(merged.certificate)
    return {"nodes": [merged.first, merged.second], "layers": merged.layers, **bounds}


def _bounds(certificate: Certificate) -> dict[str, Any]:
    return {"spectral": certificate.spectral, "frobenius": certificate.frobenius}


def _add(proto: ModelProto | NodeProto, key: str, value: str) -> None:
    """Add an entry under a free key (rule 3)."""
    taken = {entry.key for entry in proto.metadata_props}
    candidate, n = f"{METADATA}.{key}", 1
    while candidate in taken:
        n += 1
        candidate = f"{METADATA}.{key}.{n}"
    proto.metadata_props.add(key=candidate, value=value)
