"""A model with its layers, its other operators and their MACs: the basis of a plan."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx_lowrank.core.layer import Between, Evaluations, Layer, Narrowing, Positions, ScopeWork, Skipped
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.core.plan import Choice
from onnx_lowrank.core.routes import running
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.shapes import Shapes, examples, infer, open_inputs
from onnx_lowrank.graph.sizes import check_constants
from onnx_lowrank.graph.walk import Place, Walk, label
from onnx_lowrank.layers.attention import Attention, attention
from onnx_lowrank.layers.beside import beside
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.find import find, matches, unselected
from onnx_lowrank.layers.hidden import hidden_channels
from onnx_lowrank.layers.siblings import siblings
from onnx_lowrank.layers.sums import with_sums
from onnx_lowrank.layers.work import work


@dataclass(frozen=True, slots=True)
class Layered:
    """A model with its layers: the basis of factors and of the compressed model.

    Attributes:
        model: The model.
        walk: Its walk.
        bindings: Its layers with the places of their weights, in graph order.
        spared: Scope and name of the operators that --include and --exclude leave alone.
    """

    model: Model
    walk: Walk
    bindings: tuple[Binding, ...]
    spared: frozenset[tuple[str, str]]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in graph order."""
        return tuple(binding.layer for binding in self.bindings)

    def options(self, choices: Sequence[Choice] = ()) -> list[tuple[Layer, Option | None]]:
        """Every layer with its option in a plan; None for a layer that the plan keeps.

        Args:
            choices: The choices of the plan; by default, it keeps all layers.
        """
        options = {choice.layer: choice.option for choice in choices}
        return [(layer, options.get(layer.id)) for layer in self.layers]


@dataclass(frozen=True, slots=True)
class Found(Layered):
    """A model with its layers and all that stands beside them, which only budgets and the report need.

    A budget may count anything of a model, so `budgets.budget.Budget` gets this whole.

    Attributes:
        skipped: The operators that are left alone.
        work: The MACs of every scope, without those of the layers.
        open_inputs: Names of the inputs with an unknown dimension.
        shape_words: Examples of --input-shape for the open inputs; "" if there are none.
    """

    skipped: tuple[Skipped, ...]
    work: tuple[ScopeWork, ...]
    open_inputs: tuple[str, ...]
    shape_words: str

    def names(self) -> Iterator[str]:
        """All names that --include and --exclude can use for layers and operators."""
        for layer in self.layers:
            yield layer.id
            yield from (use.name for use in layer.uses)
        for skipped in self.skipped:
            yield from _names(skipped)

    def left_alone(self, choices: Sequence[Choice]) -> tuple[Skipped, ...]:
        """The skipped operators that a plan does not change.

        Args:
            choices: The choices of the plan; it narrows depthwise convolutions together with layers.
        """
        narrow = {
            layer.id
            for layer, option in self.options(choices)
            if option is not None and option.lowering is Lowering.NARROW
        }
        changed = {
            (place.scope, label(self.walk.node(place)))
            for binding in self.bindings
            if binding.layer.id in narrow and binding.hidden is not None
            for place in binding.hidden.grouped
        }
        return tuple(skipped for skipped in self.skipped if (skipped.scope, skipped.name) not in changed)


def find_layers(
    model: Model, shapes: Mapping[str, tuple[int, ...]], include: Sequence[str], exclude: Sequence[str]
) -> Found:
    """Find a model's layers, and count the MACs beside them.

    Args:
        model: The model.
        shapes: Shapes of inputs that the model leaves open, by name.
        include: Globs of layer ids or node names; if there are any, only these become layers.
        exclude: Globs of layer ids or node names that become no layers.

    Raises:
        InputError: A shape does not fit the model, a glob matches nothing in it, or it computes far more
            constants than it stores.
    """
    walk = Walk(model.proto)
    inferred = infer(model, shapes)
    check_constants(walk, inferred, model.name)
    bindings, skipped = find(model, walk, inferred, include, exclude)
    places = {Place(use.scope, use.node) for binding in bindings for use in binding.layer.uses}
    scopes = work(walk, inferred, places)
    ran = running(scopes)
    bindings = _acquainted(walk, tuple(_idle(binding, ran) for binding in bindings))
    bindings = with_sums(model, walk, inferred, bindings)
    met = attention(model, walk, bindings, inferred, shapes)
    reasons = {label(walk.node(place)): reason for place, reason in met.left.items()}
    skipped = tuple(_with_heads(operator, reasons) for operator in skipped)
    spared = frozenset(
        (operator.scope, operator.name)
        for operator in skipped
        if unselected(_names(operator), include, exclude)
    )
    skipped += tuple(_with_own_heads(walk, bindings, met.left))
    bindings = _paired(model, walk, inferred, bindings, spared)
    taken = {binding.layer.id for binding in bindings if binding.layer.narrowing is not None}
    bindings = tuple(_attending(binding, met, taken) for binding in bindings)
    unfixed = open_inputs(model, inferred)
    words = examples(model, inferred)
    found = Found(model, walk, bindings, spared, skipped, scopes, unfixed, words)
    for pattern in (*include, *exclude):
        if not matches(found.names(), pattern):
            raise InputError(
                f"No layer or operator of {model.name} is named {pattern!r}: "
                "--ratio 1 --dry-run --report - lists their names."
            )
    return found


def _acquainted(walk: Walk, bindings: tuple[Binding, ...]) -> tuple[Binding, ...]:
    """The layers; those that read the same tensor know each other."""
    groups = siblings(walk, bindings)
    return tuple(
        replace(binding, layer=replace(binding.layer, siblings=groups.get(binding.layer.id, ())))
        for binding in bindings
    )


def _paired(
    model: Model,
    walk: Walk,
    shapes: Shapes,
    bindings: tuple[Binding, ...],
    spared: Container[tuple[str, str]],
) -> tuple[Binding, ...]:
    """The layers; those with hidden channels before them know their producers."""
    hidden = hidden_channels(model, walk, shapes, bindings, spared)

    def paired(binding: Binding) -> Binding:
        channels = hidden.get(binding.layer.id)
        if channels is None:
            return binding
        partners = tuple(producer.layer for producer in channels.producers)
        narrowing = Narrowing(Between.CHANNELS, partners, beside=beside(model, walk, shapes, channels))
        return replace(binding, layer=replace(binding.layer, narrowing=narrowing), hidden=channels)

    return tuple(map(paired, bindings))


def _attending(binding: Binding, met: Attention, taken: Container[str]) -> Binding:
    """The layer; if attention connects it with a partner, it knows it. Hidden channels come first.

    Args:
        binding: The layer.
        met: The layers that attention connects.
        taken: Ids of the layers with hidden channels before them.
    """
    found = met.pairs.get(binding.layer.id)
    if found is None or binding.layer.id in taken or found[0].bound in taken:
        return binding
    narrowing, between = found
    return replace(binding, layer=replace(binding.layer, narrowing=narrowing), hidden=between)


def _with_heads(operator: Skipped, reasons: Mapping[str, str]) -> Skipped:
    """An operator that is left alone; one of attention also says why its heads stay as they are."""
    reason = "" if operator.scope else reasons.get(operator.name, "")
    return replace(operator, reason=f"{operator.reason}; its heads stay: {reason}") if reason else operator


def _with_own_heads(walk: Walk, bindings: Sequence[Binding], left: Mapping[Place, str]) -> Iterator[Skipped]:
    """The operators with a layer of their own whose heads stay as they are, each with the reason."""
    for binding in bindings:
        (use, *_) = binding.layer.uses
        if reason := left.get(Place(use.scope, use.node)):
            name = label(walk.node(Place(use.scope, use.node)))
            yield Skipped(use.scope, name, use.op, binding.layer.id, f"its heads stay: {reason}")


def _idle(binding: Binding, running: Container[str]) -> Binding:
    """The layer, with no evaluations for its uses in functions that nothing calls."""
    layer = binding.layer
    never = Evaluations(0, dict.fromkeys(layer.folds, (0, 0)))
    uses = tuple(
        use if use.scope in running else replace(use, positions=_nowhere(layer), evaluations=never)
        for use in layer.uses
    )
    return replace(binding, layer=replace(layer, uses=uses))


def _nowhere(layer: Layer) -> Positions:
    return Positions(0, (0,) * len(layer.kernel), (0,) * len(layer.kernel))


def _names(skipped: Skipped) -> tuple[str, str, str]:
    """The names that --include and --exclude can use for an operator."""
    return skipped.name, skipped.weight, f"{skipped.scope}/{skipped.weight}"
