"""ONNX Runtime on a model that is too large for one session: a session for one part of it after the other.

A part is a run of consecutive nodes of the main graph. Only its weights are in memory while it runs, and only
the tensors that later parts need go on. The order of the nodes is one in which they can run, as ONNX demands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype

from onnx_lowrank.engines.engine import Feed, Run, UnsupportedError
from onnx_lowrank.engines.runtime import Runtime
from onnx_lowrank.files.load import Model, array
from onnx_lowrank.files.tensors import is_external, reference, stored_size, tensors
from onnx_lowrank.graph.scopes import reads

_WHOLE = 2**29
_LARGEST = 4
"""A session holds a model whose weights take at most _WHOLE bytes and _LARGEST times its largest tensor
together. Those of a part of a larger model take at most the greater of both."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive nodes of a model's main graph.

    Attributes:
        nodes: The nodes.
        inputs: The names of earlier tensors that they read, graph inputs included.
        outputs: The names of their results that later parts read or the model returns.
    """

    nodes: tuple[NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def limit(model: Model) -> int:
    """The most bytes of weights in a part, for a model of any size."""
    return max(_WHOLE, _LARGEST * max(map(_bytes, tensors(model.proto)), default=0))


def is_large(model: Model) -> bool:
    """Whether a model has more weights than a session may hold."""
    sizes = tuple(map(_bytes, tensors(model.proto)))
    return sum(sizes) > _WHOLE + _LARGEST * max(sizes, default=0)


@dataclass(frozen=True, slots=True)
class Parted:
    """An engine that runs a model part by part.

    Attributes:
        runtime: Runs the parts.
    """

    runtime: Runtime
    concurrent: ClassVar[int] = 1
    """The parts of a second run would take memory again."""

    @property
    def name(self) -> str:
        """The name in reports."""
        return f"{self.runtime.name}, in parts"

    @contextmanager
    def open(self, model: Model) -> Iterator[Run]:
        """Divide a large model; every run opens the sessions of its parts, one after the other.

        A run raises UnsupportedError if the runtime does not accept a part, or a tensor between two parts is
        of a type that cannot be passed.
        """
        if not is_large(model):
            with self.runtime.open(model) as whole:
                yield whole
            return
        divided = parts(model, limit(model))
        returned = [value.name for value in model.proto.graph.output]
        constants = {t.name: array(model, t) for t in model.proto.graph.initializer if t.name in returned}
        last_readers = {name: number for number, part in enumerate(divided) for name in part.inputs}

        def run(feed: Feed) -> dict[str, Any]:
            live: dict[str, Any] = {**constants, **feed}
            for number, part in enumerate(divided):
                fed = {name: live[name] for name in part.inputs if name in live}
                with self.runtime.open(_alone(model, part, fed)) as opened:
                    live |= opened(fed)
                # Before the next part runs, as these may take more memory than its weights.
                live = {
                    name: value
                    for name, value in live.items()
                    if name in returned or last_readers.get(name, -1) > number
                }
            return {name: live[name] for name in returned}

        yield run


def parts(model: Model, most: int) -> tuple[Part, ...]:
    """Cut the main graph into parts that read at most some bytes of weights; a part has at least one node.

    Args:
        model: The model.
        most: The bytes.
    """
    graph = model.proto.graph
    stored = {tensor.name: _bytes(tensor) for tensor in graph.initializer}
    read = [set(reads(node)) for node in graph.node]
    groups: list[list[int]] = [[]]
    held: set[str] = set()
    size = 0
    for number, node in enumerate(graph.node):
        own = sum(map(_bytes, tensors(node)))
        more = own + sum(stored[name] for name in read[number] & (stored.keys() - held))
        if groups[-1] and size + more > most:
            groups.append([])
            held, size = set(), 0
            more = own + sum(stored[name] for name in read[number] & stored.keys())
        groups[-1].append(number)
        held |= read[number] & stored.keys()
        size += more
    needed = {value.name for value in graph.output}
    found = []
    for group in reversed(groups):
        made = {name for number in group for name in graph.node[number].output if name}
        # Sorted: the order of a set of texts changes from run to run.
        outputs = tuple(sorted(made & needed))
        foreign = set[str]().union(*(read[number] for number in group)) - made
        needed = (needed - made) | (foreign if outputs else set())
        if outputs:
            found.append(Part(tuple(graph.node[n] for n in group), tuple(sorted(foreign)), outputs))
    return tuple(reversed(found))


def _alone(model: Model, part: Part, fed: Feed) -> Model:
    """A part as a model of its own, with the data files that it needs."""
    source = model.proto
    graph = GraphProto(name="part")
    graph.node.extend(part.nodes)
    needed = set(part.inputs)
    graph.initializer.extend(t for t in source.graph.initializer if t.name in needed and t.name not in fed)
    graph.sparse_initializer.extend(t for t in source.graph.sparse_initializer if t.values.name in needed)
    # Shapes stay open; the arrays that are there tell the types.
    graph.input.extend(_info(name, value) for name, value in fed.items())
    graph.output.extend(ValueInfoProto(name=name) for name in part.outputs)
    proto = ModelProto(graph=graph, ir_version=max(source.ir_version, 4))  # before, weights were inputs
    proto.opset_import.extend(source.opset_import)
    proto.functions.extend(source.functions)
    return replace(model, proto=proto, files=_files(model, tensors(proto)), path=None)


def _info(name: str, value: Any) -> ValueInfoProto:
    if not isinstance(value, np.ndarray):
        raise UnsupportedError(f"{name!r} is no tensor, so it cannot pass from one part to the next")
    kind = TensorProto.STRING if value.dtype.kind in "OU" else np_dtype_to_tensor_dtype(value.dtype)
    return make_tensor_value_info(name, kind, None)


def _files(model: Model, used: Iterator[TensorProto]) -> Mapping[str, Any]:
    locations = {reference(tensor)["location"] for tensor in used if is_external(tensor)}
    return {location: model.files[location] for location in sorted(locations)}


def _bytes(tensor: TensorProto) -> int:
    return stored_size(tensor) or 0
