"""Changes of a model: planned in all its scopes, then applied to one copy of it.

Rules:

1. A new tensor is stored where a given tensor is stored (initializer or Constant node), under a new name
   that collides with nothing. Before IR 4, initializers had to be inputs of the graph, so there new tensors
   are Constant nodes. New initializers come in the order of their turns, whatever order they are made in:
   so the padding between them is known beforehand.
2. A tensor that has lost all its readers goes with its views, its graph input, its value_info and its
   quantization annotations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.scopes import Scope, scopes
from onnx_lowrank.graph.walk import FreeNames, Place, Walk, is_op
from onnx_lowrank.graph.weights import VIEWS, Source

_BURIED = VIEWS | {"Constant", "Slice", "Concat", "Gather", "Shape"}
"""Operators of constants and of shapes that go with their last reader."""

Store = Callable[[str, NDArray[Any]], TensorProto]
"""Makes a tensor from a name and an array; for big models, it puts the bytes on disk."""


@dataclass(slots=True)
class Edit:
    """The changes in one scope. Nodes are given by their index in the original.

    Attributes:
        before: New nodes, by the node that they precede.
        deleted: The nodes to delete.
        repointed: New inputs of nodes that stay, by node and operand.
        attributes: New attributes of nodes that stay, by node and name; None deletes an attribute.
        forgotten: Names of the tensors to delete, with their value_info and annotations.
        initializers: New initializers, each with its turn.
        renewed: New values of initializers that keep their names, by name.
        constants: New values of Constant nodes, by node.
    """

    before: dict[int, list[NodeProto]] = field(default_factory=dict)
    deleted: set[int] = field(default_factory=set)
    repointed: dict[tuple[int, int], str] = field(default_factory=dict)
    attributes: dict[tuple[int, str], Any] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)
    initializers: list[tuple[int, TensorProto]] = field(default_factory=list)
    renewed: dict[str, TensorProto] = field(default_factory=dict)
    constants: dict[int, TensorProto] = field(default_factory=dict)


class Edits:
    """The edits of all scopes of a model.

    Attributes:
        scopes: The edits, by the path of their scope.
        unique: Makes a free name from a name that may be taken.
        changed: Numbers that are planned already; narrowings that go together name the same ones.
        turn: The place of the next new initializers among all new ones.
    """

    def __init__(self, model: Model, walk: Walk, store: Store) -> None:
        """Start without edits.

        Args:
            model: The model; it is not changed.
            walk: Its walk.
            store: Makes the new tensors.
        """
        self.scopes: dict[str, Edit] = {path: Edit() for path in walk.scopes}
        self.unique = FreeNames(walk).unique
        self.changed: set[Hashable] = set()
        self.turn = 0
        self._model = model
        self._walk = walk
        self._store = store
        self._unreads: dict[tuple[Place, int], Any] = {}

    def keep(self, beside: Source, name: str, values: NDArray[Any]) -> str:
        """Store a new tensor where another tensor is stored (rule 1); returns its name."""
        edit = self.scopes[beside.scope]
        tensor = self._store(self.unique(name), values)
        if beside.place is None and self._model.proto.ir_version >= 4:
            edit.initializers.append((self.turn, tensor))
        else:
            node = onnx.helper.make_node(
                "Constant", [], [tensor.name], self.unique(f"{tensor.name}/constant")
            )
            node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
            index = 0 if beside.place is None else beside.place.node
            edit.before.setdefault(index, []).append(node)
        return tensor.name

    def renew(self, source: Source, values: NDArray[Any]) -> None:
        """Give a stored tensor new values of the same dtype and shape; its name stays."""
        edit, tensor = self.scopes[source.scope], self._store(source.name, values)
        if source.place is None:
            edit.renewed[source.name] = tensor
        else:
            edit.constants[source.place.node] = tensor

    def unread(self, place: Place, operand: int) -> None:
        """Note that a node does not read a tensor any more."""
        tensor = self._walk.operand(place, operand)
        if tensor is not None:
            self._unreads[place, operand] = tensor

    def _bury(self) -> tuple[str, ...]:
        """Delete the tensors that have lost all readers (rule 2); returns the deleted graph inputs."""
        removed = []
        pending = list(self._unreads.values())
        buried: set[tuple[str, str]] = set()
        while pending:
            tensor = pending.pop()
            scope, name = key = self._walk.origin(tensor)
            place = self._walk.producer(tensor)
            is_kept = self._walk.is_output(tensor) or any(
                read not in self._unreads for read in self._walk.consumers(tensor)
            )
            # Kept for now: the tensor comes again with each further reader that is deleted.
            if is_kept or key in buried:
                continue
            if place is None and key in self._walk.initializers:
                removed += [v.name for v in self._model.proto.graph.input if not scope and v.name == name]
            elif place is None or not is_op(self._walk.node(place), _BURIED):
                continue
            else:
                self.scopes[scope].deleted.add(place.node)
                for index in range(len(self._walk.node(place).input)):
                    operand = self._walk.operand(place, index)
                    if operand is not None:
                        self._unreads[place, index] = operand
                        pending.append(operand)
            buried.add(key)
            self.scopes[scope].forgotten.add(name)
        return tuple(sorted(removed))

    def apply(self) -> tuple[ModelProto, tuple[str, ...]]:
        """Apply all edits to a copy of the model; returns the copy and the deleted graph inputs."""
        removed = self._bury()
        proto = ModelProto()
        proto.CopyFrom(self._model.proto)
        _drop(proto.graph.input, lambda value: value.name in removed)
        # Inner scopes before the scopes that hold them, so that no holder moves before its body is edited.
        for scope in reversed(list(scopes(proto))):
            _apply(self.scopes[scope.path], scope)
        return proto, removed


def _apply(edit: Edit, scope: Scope) -> None:
    """Change one scope in place."""
    body: Any = scope.graph or scope.function
    for (index, operand), name in edit.repointed.items():
        inputs = body.node[index].input
        inputs.extend([""] * (operand + 1 - len(inputs)))
        inputs[operand] = name
    for (index, name), value in edit.attributes.items():
        set_attribute(body.node[index], name, value)
    for index, tensor in edit.constants.items():
        del body.node[index].attribute[:]  # a Constant may hold its value in another attribute
        set_attribute(body.node[index], "value", tensor)
    # The last first, so that the indices of the others stay right.
    for index in sorted(edit.before.keys() | edit.deleted, reverse=True):
        if index in edit.deleted:
            del body.node[index]
        for node in reversed(edit.before.get(index, [])):
            body.node.insert(index, node)
    _drop(body.value_info, lambda value: value.name in edit.forgotten)
    if scope.graph is not None:
        for tensor in scope.graph.initializer:
            if tensor.name in edit.renewed:
                tensor.CopyFrom(edit.renewed[tensor.name])
        _drop(scope.graph.initializer, lambda tensor: tensor.name in edit.forgotten)
        _drop(scope.graph.quantization_annotation, lambda note: note.tensor_name in edit.forgotten)
        scope.graph.initializer.extend(tensor for _, tensor in sorted(edit.initializers, key=itemgetter(0)))


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Set an attribute of a node, in place; None deletes it."""
    if value is None:
        _drop(node.attribute, lambda attribute: attribute.name == name)
        return
    made = onnx.helper.make_attribute(name, value)
    for attribute in node.attribute:
        if attribute.name == name:
            attribute.CopyFrom(made)
            return
    node.attribute.append(made)


def _drop(messages: Any, is_dead: Callable[[Any], bool]) -> None:
    """Delete the dead messages of a repeated field, in place."""
    for index in range(len(messages) - 1, -1, -1):
        if is_dead(messages[index]):
            del messages[index]
