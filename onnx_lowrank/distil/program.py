"""An ONNX graph as a differentiable program: PyTorch computes floats, onnx's reference the rest.

Rules:

1. A node with a form (`forms`) and a tensor, or many floats, among its operands runs in PyTorch.
2. All other nodes run in onnx's reference implementation: shapes, masks and positions carry no gradient.
3. A node without a form is a stop point: its results are right, and no gradient passes it.
4. A node that reads only stored values, shapes, and what follows from these runs once: its results are kept
   until a shape changes.
5. Floats have at least 32 bits: gradients of half precision underflow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from onnx_lowrank.distil.features import Node, nodes
from onnx_lowrank.distil.forms import FORMS, Form
from onnx_lowrank.distil.forms.form import FLOATS, Call, Value, as_tensor, widened
from onnx_lowrank.engines.specified import OPERATORS

_TAKEN = ""  # no value of a graph has this name
_MANY = 64  # floats; scalars and short vectors belong to shapes
_SHAPES = frozenset({"Shape", "Size"})
_DRAWS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


@dataclass(frozen=True, slots=True)
class Kept:
    """The results of a node.

    Attributes:
        operands: What it has read; none for a shape, which is compared instead.
        results: What it has made.
    """

    operands: Sequence[Value]
    results: Sequence[Value]


@dataclass(slots=True)
class Step:
    """A node that is ready to run.

    Attributes:
        node: The node.
        form: The form of its operator.
        attributes: Its attributes, as Python values.
        opset: The version of its operator set.
        reads: The values that it reads: its operands, then those that its bodies take from outside.
        makes: The values that it makes; the empty name for those that are given in its place.
        model: The node alone, for the reference implementation; made when it is needed.
        dead: The values that no later node reads.
        is_steady: Whether its operands change only with shapes (rule 4).
        kept: Its last results, if it is steady or reads a shape.
    """

    node: NodeProto
    form: Form | None
    attributes: dict[str, Any]
    opset: int
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    dead: list[str] = field(default_factory=list)
    model: ReferenceEvaluator | None = None
    is_steady: bool = False
    kept: Kept | None = None


@dataclass(slots=True)
class Program:
    """A model that PyTorch runs.

    Attributes:
        constants: The initializers, by name: floats as tensors if they are many, else arrays.
        steps: The nodes in order.
        outputs: The names of the values to return.
        opsets: The versions of the operator sets.
        device: The device that computes.
        cuts: The values behind which inner values are forgotten and computed again for the gradient; none
            keeps all. Each carries all that later nodes need of trained tensors.
        stops: The types of the operators at which gradients stopped.
        taken: The bytes of the values of the largest run so far.
        vectors: The arrays of floats among the constants, as tensors.
        given: The names of the values that the last run was given.
    """

    constants: dict[str, Value]
    steps: list[Step]
    outputs: tuple[str, ...]
    opsets: Mapping[str, int]
    device: torch.device
    cuts: frozenset[str] = frozenset()
    stops: set[str] = field(default_factory=set)
    taken: int = 0
    vectors: dict[str, Tensor] = field(default_factory=dict)
    given: frozenset[str] | None = None

    def __call__(self, feed: Mapping[str, NDArray[Any]], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model.

        Args:
            feed: Its inputs, or other values in place of the nodes that make them.
            trained: Tensors in place of constants, by name.

        Returns:
            The outputs by name.
        """
        self._settle(frozenset(feed) | frozenset(trained))
        fed = {name: _prepared(array, self.device) for name, array in feed.items()}
        values: dict[str, Value] = {**self.constants, **fed, **trained}
        taken = 0
        for span in self._spans():
            if self.cuts and torch.is_grad_enabled():
                values = checkpoint(self._through, span, values, use_reentrant=False)
            else:
                values = self._through(span, values)
            taken += int(values.pop(_TAKEN))  # type: ignore[arg-type]
        self.taken = max(self.taken, taken)
        return {name: as_tensor(values[name], self.device) for name in self.outputs}

    def _settle(self, given: frozenset[str]) -> None:
        """Find the steady nodes of a run that is given these values."""
        if given == self.given:
            return
        self.given, steady = given, set(self.constants) - given
        for step in self.steps:
            drawn = step.node.op_type in _DRAWS
            step.is_steady = not drawn and all(name in steady for name in step.reads if name)
            step.kept = None
            if step.is_steady or step.node.op_type in _SHAPES:
                steady.update(step.makes)

    def _spans(self) -> Iterator[list[Step]]:
        """The nodes between the cuts."""
        span: list[Step] = []
        for step in self.steps:
            span.append(step)
            if self.cuts and not self.cuts.isdisjoint(step.node.output):
                yield span
                span = []
        yield span

    def _through(self, span: Iterable[Step], values: Mapping[str, Value]) -> dict[str, Value]:
        """The values behind some nodes; those given do not change, as gradients need them again."""
        known, taken = dict(values), 0
        for step in span:
            results = self._results(step, [known[name] if name else None for name in step.reads])
            for name, result in zip(step.makes, results, strict=False):
                taken += getattr(result, "nbytes", 0)  # a sequence has none
                if name:
                    known[name] = result
            for name in step.dead:
                known.pop(name, None)
        return {**known, _TAKEN: np.array(taken)}

    def _results(self, step: Step, operands: list[Value]) -> Sequence[Value]:
        """The results of a node: those that are kept, if they still hold."""
        kept = step.kept
        if (
            kept is not None
            and len(operands) == len(kept.operands)
            and all(map(is_, operands, kept.operands))
        ):
            return kept.results
        results = self._computed(step, operands)
        if step.node.op_type in _SHAPES:  # The operand differs, but seldom its shape.
            if kept is None or not np.array_equal(results[0], kept.results[0]):  # type: ignore[arg-type]
                step.kept = kept = Kept((), results)
            return kept.results
        if step.is_steady:
            step.kept = Kept(operands, results)
        return results

    def _computed(self, step: Step, operands: list[Value]) -> Sequence[Value]:
        if step.form is not None and (step.node.domain or any(map(_is_large, operands))):
            given = [self._vector(*pair) for pair in zip(step.reads, operands, strict=True)]
            try:
                made = step.form(Call(step.attributes, given, step.opset, len(step.makes), self.device))
            except NotImplementedError:
                if step.node.domain:  # The reference implementation has nothing of other domains.
                    raise
            else:
                return made if isinstance(made, tuple) else (made,)
        return self._referred(step, operands)

    def _vector(self, name: str, operand: Value) -> Value:
        """An operand, as the tensor that is ready if it is a constant."""
        return self.vectors[name] if name in self.vectors and operand is self.constants[name] else operand

    def _referred(self, step: Step, operands: list[Value]) -> tuple[Value, ...]:
        """Run a node in the reference implementation; its results carry no gradient."""
        if step.model is None:
            step.model = _alone(step.node, step.reads, self.opsets)
        arrays = {
            name: operand.detach().cpu().numpy() if isinstance(operand, Tensor) else operand
            for name, operand in zip(step.reads, operands, strict=True)
            if name
        }
        results = tuple(_prepared(result, self.device) for result in step.model.run(None, arrays))
        if any(map(_is_derived, operands)) and any(map(_is_float, results)):
            self.stops.add(step.node.op_type)
        named = iter(results)
        return tuple(next(named) if name else None for name in step.node.output)


def program(
    model: ModelProto, outputs: Iterable[str], known: Collection[str] = (), device: str = "cpu"
) -> Program:
    """The program of a model.

    Args:
        model: The model with its weights in it.
        outputs: The names of the values that it returns, any of its main graph.
        known: Values that are fed, so that nothing before them runs.
        device: The device that computes.
    """
    model = _inlined(model)
    opsets, wanted, place = _opsets(model), tuple(dict.fromkeys(outputs)), torch.device(device)
    constants: dict[str, Value] = {
        t.name: _prepared(numpy_helper.to_array(t), place) for t in model.graph.initializer
    }
    outer = {value.name for value in model.graph.input}.union(constants, known)
    outer.update(name for node in model.graph.node for name in node.output if name)
    steps = []
    for node in _needed(model.graph, wanted, known):
        attributes = {a.name: helper.get_attribute_value(a) for a in node.proto.attribute}
        if _kind(node.proto) == ("", "Constant") and "sparse_value" not in attributes:
            constants[node.proto.output[0]] = _prepared(_value(attributes), place)
            continue
        captured = sorted(node.reads.intersection(outer).difference(node.proto.input))
        steps.append(
            Step(
                node.proto,
                FORMS.get(_kind(node.proto)),
                attributes,
                opsets.get(_kind(node.proto)[0], 1),
                (*node.proto.input, *captured),
                tuple("" if name in known else name for name in node.proto.output),
            )
        )
    _mark_dead(steps, wanted)
    vectors = {
        name: as_tensor(value, place)
        for name, value in constants.items()
        if isinstance(value, np.ndarray) and value.dtype in FLOATS
    }
    return Program(constants, steps, wanted, opsets, place, vectors=vectors)


def lacking(model: ModelProto) -> list[str]:
    """The operators of a model that nothing here can run, as domain and type.

    Args:
        model: The model, as `program` takes it.
    """
    model = _inlined(model)
    opsets, found = _opsets(model), dict[str, None]()
    for node in nodes(model.graph):
        if _kind(node.proto) not in FORMS:
            try:
                _alone(node.proto, tuple(node.proto.input), opsets)
            except NotImplementedError:
                found[_title(node.proto)] = None
    return [*found]


def _inlined(model: ModelProto) -> ModelProto:
    return inliner.inline_local_functions(model) if model.functions else model


def _opsets(model: ModelProto) -> dict[str, int]:
    return {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}


def _kind(node: NodeProto) -> tuple[str, str]:
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def _title(node: NodeProto) -> str:
    return ".".join(filter(None, _kind(node)))


def _needed(graph: GraphProto, outputs: Iterable[str], known: Collection[str]) -> list[Node]:
    """The nodes on which values depend, in order; known values need none."""
    needed, kept = set(outputs), []
    for node in reversed(nodes(graph)):
        if needed.difference(known).intersection(node.proto.output):
            kept.append(node)
            needed.update(filter(None, node.reads))
    return kept[::-1]


def _mark_dead(steps: list[Step], outputs: Iterable[str]) -> None:
    made = {name for step in steps for name in step.makes if name}
    seen = set(outputs)
    for step in reversed(steps):
        step.dead.extend(made.intersection((*step.reads, *step.makes)) - seen)
        seen.update(step.reads)


def _alone(node: NodeProto, reads: Sequence[str], opsets: Mapping[str, int]) -> ReferenceEvaluator:
    """A node as a model.

    Raises:
        NotImplementedError: The reference implementation has no such operator.
    """
    inputs = [helper.make_value_info(name, onnx.TypeProto()) for name in dict.fromkeys(reads) if name]
    outs = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name]
    graph = helper.make_graph([node], "node", inputs, outs)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    try:
        return ReferenceEvaluator(helper.make_model(graph, opset_imports=imports), new_ops=list(OPERATORS))
    except Exception as error:  # It raises errors of many classes.
        raise NotImplementedError(
            f"{_title(node)} has neither a form nor a reference implementation"
        ) from error


def _is_large(operand: Value) -> bool:
    if isinstance(operand, Tensor):
        return bool(operand.is_floating_point())
    return isinstance(operand, np.ndarray) and operand.size > _MANY and operand.dtype in FLOATS


def _is_derived(operand: Value) -> bool:
    return isinstance(operand, Tensor) and bool(operand.requires_grad)


def _is_float(value: Value) -> bool:
    if isinstance(value, Tensor):
        return bool(value.is_floating_point())
    return isinstance(value, np.ndarray) and value.dtype in FLOATS


def _prepared(value: Any, device: torch.device) -> Value:
    """A value from outside: many floats as a tensor; all else, sequences too, as it is."""
    if not isinstance(value, np.ndarray) or value.dtype not in FLOATS:
        return value
    return as_tensor(value, device) if value.size > _MANY else widened(value)


def _value(attributes: Mapping[str, Any]) -> NDArray[Any]:
    """The value of a Constant."""
    ((name, value),) = attributes.items()
    if name == "value":
        return numpy_helper.to_array(value)
    kinds = {"f": np.float32, "i": np.int64, "s": object}
    return np.array(value, kinds[name.removeprefix("value_")[0]])
