"""Results of a run: errors of outputs, trials, times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from onnx_lowrank.core.factors import Certificate


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far one output of the compressed model lies from the input model's, on the same inputs.

    Elements that are NaN or Inf in the input model's output are left out.

    Attributes:
        name: The output's name; "layer ID" for a layer alone; "name[0]" for an element of a sequence.
        relative: ‖y − ŷ‖₂ / ‖y‖₂ in float64: 0 if y − ŷ and y are both zero, Inf if only y is zero or if
            the shapes differ. None for strings, and if there is no element to compare.
        largest: Largest |y − ŷ|. None if `relative` is None, and if the shapes differ.
        agreement: For floats whose last axis looks like classes (two axes or more, the last of at least
            two elements, and no embedding): share of rows whose largest element is at the same place. For
            integers, booleans and strings: share of equal elements. None for other outputs.
        note: A further sentence for the user; usually empty.
        centred: ‖y − ŷ‖₂ / ‖y − ȳ‖₂, ȳ the mean over the samples: a constant offset of y does not make this
            error smaller. None for integers, booleans and strings, for one sample, for samples of several
            shapes, and if y does not vary.
        is_exact: Whether the output holds integers, booleans or strings, which agreement judges, not a norm.
        cosine: For an embedding, floats whose rows have norm 1 (see `engines.embedding`): the mean cosine
            between a row and the compressed model's row. None for other outputs.
        neighbours: For an embedding: share of rows whose nearest other row is the same in both models, among
            at most 2,048 rows. None for other outputs, and for fewer than three rows.
        noise: The standard error of `relative` over the samples (`engines.noise`). None for integers,
            booleans and strings, for a single sample, and if y is zero.
    """

    name: str
    relative: float | None
    largest: float | None
    agreement: float | None
    note: str = ""
    centred: float | None = None
    is_exact: bool = False
    cosine: float | None = None
    neighbours: float | None = None
    noise: float | None = None

    @property
    def kept(self) -> float | None:
        """The agreement, or for an embedding the share of kept neighbours; None if there is neither."""
        return self.neighbours if self.agreement is None else self.agreement


def largest_error(outputs: Iterable[OutputError]) -> float | None:
    """The largest error over the float outputs, each centred if that is known; None if no error is known."""
    floats = (output for output in outputs if not output.is_exact)
    errors = (output.relative if output.centred is None else output.centred for output in floats)
    return max((error for error in errors if error is not None), default=None)


@dataclass(frozen=True, slots=True)
class Other:
    """The comparison of both models on inputs of another kind, beside that on inputs of the familiar kind.

    Attributes:
        source: The source of the inputs, a short phrase.
        outputs: One error per output on these inputs.
        familiar: The errors of the same outputs on inputs of the familiar kind; empty without such inputs.
        kind: The familiar inputs in a word: "held-out", "calibration" or "inputs"; "" without them.
        warnings: Sentences for the user about the inputs.
    """

    source: str
    outputs: tuple[OutputError, ...]
    familiar: tuple[OutputError, ...] = ()
    kind: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def pairs(self) -> tuple[tuple[OutputError, OutputError | None], ...]:
        """Every output's error on these inputs, with that on the familiar ones if it is known."""
        known = {output.name: output for output in self.familiar}
        return tuple((output, known.get(output.name)) for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Continuation:
    """The agreement of texts that both models write: greedy continuations of prompts, each with its cache.

    Attributes:
        prompts: Number of prompts.
        tokens: Number of tokens that each model wrote.
        agreed: Number of these that are the same at the same place.
    """

    prompts: int
    tokens: int
    agreed: int

    @property
    def agreement(self) -> float:
        """The share of tokens that agree."""
        return self.agreed / self.tokens


@dataclass(frozen=True, slots=True)
class Fused:
    """The operators of its own that ONNX Runtime's optimizer puts in place of several.

    Attributes:
        before: Their numbers in the optimized input model, by operator type.
        after: Their numbers in the optimized compressed model; empty if the input model has none.
        note: Why they were not counted; "" if they were.
    """

    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def lost(self) -> Mapping[str, int]:
        """How many fewer the compressed model has, by operator type; only types that it has fewer of."""
        fewer = {name: count - self.after.get(name, 0) for name, count in self.before.items()}
        return {name: count for name, count in fewer.items() if count > 0}


@dataclass(frozen=True, slots=True)
class Undecomposed:
    """The input model after the same quantization, without a decomposition.

    Attributes:
        size: Its bytes; None if it was not made.
        outputs: One error per output, on the same inputs as those of the compressed model; empty if unknown.
        note: Why it was not made or not compared, a sentence; else empty.
    """

    size: int | None = None
    outputs: tuple[OutputError, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Quantized:
    """The quantization of a compressed model.

    Attributes:
        kind: Its name in `--then`.
        method: The method of ONNX Runtime's tool, a short phrase.
        reason: Why this method was chosen, a phrase; "" if there is only one.
        refitted: Number of weights that were fitted to it beforehand.
        floats: Number of elements of the float32 weights of the main graph before and after it.
        size: Bytes of the model before and after it.
        alone: One error per output of the low-rank model before it, on the same inputs as those after it.
        undecomposed: The quantization alone; None if no layer is rewritten, as that is the compressed model.
    """

    kind: str
    method: str
    reason: str
    refitted: int
    floats: tuple[int, int]
    size: tuple[int, int]
    alone: tuple[OutputError, ...]
    undecomposed: Undecomposed | None = None


@dataclass(frozen=True, slots=True)
class Distilled:
    """The distillation of a compressed model: all its tensors fitted together to the original's outputs.

    Attributes:
        tensors: Number of tensors that were trained.
        elements: Number of their elements.
        steps: Number of steps that were made.
        loss: The held-out loss before it and after it.
        losses: The names of the losses of every output.
        features: Number of inner features that were compared.
        changes: The names of the changes of inputs.
        unreached: The outputs that no gradient reaches.
        stops: The operators at which gradients stop.
        is_kept: Whether the model has the trained tensors: they do no worse on held-out inputs.
        is_ended: Whether an interrupt ended it.
        alone: One error per output of the model before it, on the same inputs as those after it.
    """

    tensors: int
    elements: int
    steps: int
    loss: tuple[float, float]
    losses: Mapping[str, tuple[str, ...]]
    features: int
    changes: tuple[str, ...]
    unreached: tuple[str, ...]
    stops: tuple[str, ...]
    is_kept: bool
    is_ended: bool
    alone: tuple[OutputError, ...]


@dataclass(frozen=True, slots=True)
class Validation:
    """The result of running both models on the same inputs.

    Attributes:
        engine: The engine that ran them.
        inputs: The source of the inputs, with their dtypes and shapes.
        outputs: One error per output; empty if no engine could run the model.
        never_ran: The rewritten layers that never ran (an If's other branch); None if that is unknown.
        notes: Sentences for the user, such as: the checker or the runtime does not accept the model.
        alone: One error per rewritten layer, run alone, if no engine could run the model.
        other: The comparison on inputs of another kind; None if the user gave none.
        continuation: The agreement of greedy continuations; None for models without a cache, and if there are
            no texts.
        fused: The operators that ONNX Runtime fuses in both models; None if that is not compared.
        quantized: The quantization whose model this is about; None without one.
        distilled: The distillation before that; None without one.
    """

    engine: str
    inputs: str
    outputs: tuple[OutputError, ...]
    never_ran: tuple[str, ...] | None
    notes: tuple[str, ...] = ()
    alone: tuple[OutputError, ...] = ()
    other: Other | None = None
    continuation: Continuation | None = None
    fused: Fused | None = None
    quantized: Quantized | None = None
    distilled: Distilled | None = None

    @property
    def worst(self) -> float | None:
        """The largest relative error over the outputs; None if no error was measured."""
        return max((output.relative for output in self.outputs if output.relative is not None), default=None)


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that was tried, and the errors of its model on the held-out calibration inputs.

    Attributes:
        recipe: Name of the recipe.
        ratio: The ratio that was asked for.
        recovered: Whether its layers were fitted to correct the errors of the layers before them.
        outputs: One error per output of the model; empty if the recipe does not reach the ratio.
        chosen: Whether its model is the result.
        note: A sentence that says why `outputs` is empty.
        caches: The outputs that a decoder keeps for its next call; their errors do not judge the plan.
    """

    recipe: str
    ratio: float
    recovered: bool = False
    outputs: tuple[OutputError, ...] = ()
    chosen: bool = False
    note: str = ""
    caches: frozenset[str] = frozenset()

    @property
    def error(self) -> float | None:
        """The `largest_error` of the outputs that are no caches."""
        return largest_error(output for output in self.outputs if output.name not in self.caches)

    @property
    def agreement(self) -> float | None:
        """The smallest `OutputError.kept` over the outputs; None if no output has one."""
        return min((output.kept for output in self.outputs if output.kept is not None), default=None)


@dataclass(frozen=True, slots=True)
class LayerTime:
    """How long a rewritten layer takes alone, all uses together, in nanoseconds.

    Attributes:
        before: Time of the original layer.
        predicted: Time of its chain inside the model, as the plan predicted it; None for a replayed plan.
        after: Time of its chain, measured at the chosen rank.
    """

    before: int
    predicted: int | None
    after: int


@dataclass(frozen=True, slots=True)
class CallTime:
    """How long the whole model takes on one of several sets of inputs, in nanoseconds.

    Attributes:
        inputs: The source of the inputs, with their dtypes and shapes.
        weight: The share of such calls among all.
        before: Time of the input model.
        after: Time of the compressed model; None in a dry run.
    """

    inputs: str
    weight: float
    before: int
    after: int | None = None


_STEADY = 1.3


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the whole model takes, in nanoseconds: medians of interleaved runs.

    Attributes:
        engine: The engine that ran it, and its number of threads.
        inputs: The source of the inputs, with their dtypes and shapes.
        before: Time of the input model.
        predicted: Time of the compressed model: measured with random factors, or predicted by the plan if
            that model was not measured; None for a replayed plan.
        after: Time of the compressed model; None in a dry run.
        layers: Times of the rewritten layers, by id; empty in a dry run.
        spread: The longest over the shortest of all medians that were measured for the input model.
        calls: The times on every set of inputs; empty if there is only one. The other times are the means of
            these by their weights.
    """

    engine: str
    inputs: str
    before: int
    predicted: int | None
    after: int | None = None
    layers: Mapping[str, LayerTime] = field(default_factory=dict)
    spread: float = 1.0
    calls: tuple[CallTime, ...] = ()

    @property
    def ratio(self) -> float | None:
        """The compressed model's time over the input model's; None in a dry run."""
        return None if self.after is None else self.after / self.before

    @property
    def is_steady(self) -> bool:
        """Whether the times vary little, so that no other work on the machine has disturbed them."""
        return self.spread <= _STEADY


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The calibration inputs and their use.

    Attributes:
        source: Their source, a short phrase.
        samples: Number of samples that were used.
        held: Number of these samples that were held out.
        unmeasured: The layers without moments, each with the reason, a sentence.
        warnings: Sentences for the user about the inputs.
    """

    source: str
    samples: int
    held: int
    unmeasured: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Merge:
    """Two nodes that became one.

    Attributes:
        first: Name of the node that was removed; the name of its output if it has no name.
        second: Name of the node after it, which now computes both.
        layers: The layers whose chains contained one of the nodes, sorted.
        elements: Number of elements of the first weight, of the second weight, and of their product. The
            product is evaluated at the positions of the second weight.
        saved: Number of parameters saved, biases included.
        certificate: Bounds on the error of the stored product, relative to the exact product of the original
            two weights; None if it was trained afterwards.
    """

    first: str
    second: str
    layers: tuple[str, ...]
    elements: tuple[int, int, int]
    saved: int
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a graph.

    Attributes:
        op: Its operator type.
        name: Its name; the name of its first output if it has none.
        weights: The shapes of the initializers that it reads, in the order of its inputs.
    """

    op: str
    name: str
    weights: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """A place where the nodes of two graphs differ.

    Attributes:
        scope: Path of the graph or function.
        same: The nodes before this place that both have, since the last change: their numbers by operator
            type.
        gone: The nodes here that only the first one has.
        new: The nodes here that only the second one has; empty with `gone` at the end of a scope.
    """

    scope: str
    same: Mapping[str, int]
    gone: tuple[Node, ...] = ()
    new: tuple[Node, ...] = ()


@dataclass(frozen=True, slots=True)
class Differences:
    """How many things two models share.

    Attributes:
        same: Those that both have.
        changed: Those of one name that have other contents.
        gone: Those that only the first one has.
        new: Those that only the second one has.
    """

    same: int
    changed: int
    gone: int
    new: int
