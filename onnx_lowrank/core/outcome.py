"""What came out: errors of outputs, trials, times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from onnx_lowrank.core.factors import Certificate


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far one output of the compressed model lies from the input model's, on the same inputs.

    Elements that are NaN or Inf in the input model's output are left out.

    Attributes:
        name: The output; "layer ID" where layers ran alone; elements of sequences as "name[0]".
        relative: ‖y − ŷ‖₂ / ‖y‖₂ in float64: 0 where both are zero, Inf where only y is or where the shapes
            differ. None for strings, and where there is no element to compare.
        largest: Largest |y − ŷ|. None where the relative error is, and where the shapes differ.
        agreement: For floats whose last axis looks like classes (two axes or more, the last of at least
            two elements, the rows no embedding): share of rows with the same largest element. For integers,
            booleans and strings: share of equal elements. None elsewhere.
        note: What else there is to know, a sentence; mostly empty.
        centred: ‖y − ŷ‖₂ / ‖y − ȳ‖₂, ȳ the mean over the samples: the relative error that a constant offset
            does not flatter. None for integers, booleans and strings, for one sample, for samples of several
            shapes, and where y does not vary.
        is_exact: Whether it holds integers, booleans or strings, of which agreement tells and no norm.
        cosine: For an embedding, floats whose rows have norm 1 (see `engines.embedding`): the mean cosine
            between a row and the compressed model's. None elsewhere.
        neighbours: For an embedding: share of rows whose nearest other row is the same in both models, among
            at most 2,048 rows. None elsewhere, and below three rows.
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

    @property
    def kept(self) -> float | None:
        """The agreement, for an embedding that of nearest neighbours; None where there is neither."""
        return self.neighbours if self.agreement is None else self.agreement


def largest_error(outputs: Iterable[OutputError]) -> float | None:
    """The largest error of an output of floats, centred where that tells; None where there is none."""
    floats = (output for output in outputs if not output.is_exact)
    errors = (output.relative if output.centred is None else output.centred for output in floats)
    return max((error for error in errors if error is not None), default=None)


@dataclass(frozen=True, slots=True)
class Validation:
    """What came out when the compressed model ran on the same inputs as the input model.

    Attributes:
        engine: What ran them.
        inputs: Where the inputs came from, with their dtypes and shapes.
        outputs: One per output; none where the model ran nowhere.
        never_ran: The rewritten layers which never ran (an If's other branch); None where unknown.
        notes: What the user should know: a model that the checker or the runtime does not accept.
        alone: One per rewritten layer, run alone, where the model ran nowhere.
    """

    engine: str
    inputs: str
    outputs: tuple[OutputError, ...]
    never_ran: tuple[str, ...] | None
    notes: tuple[str, ...] = ()
    alone: tuple[OutputError, ...] = ()

    @property
    def worst(self) -> float | None:
        """The largest relative error over the outputs; None where none was measured."""
        return max((output.relative for output in self.outputs if output.relative is not None), default=None)


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that was tried, and what its model gives on the held-out calibration inputs.

    Attributes:
        recipe: Name of the recipe.
        ratio: The ratio that was asked for.
        recovered: Whether its layers were recovered from the errors of those before them.
        outputs: One per output of the model; none where the recipe does not reach the ratio.
        chosen: Whether its model was taken.
        note: Why there are no outputs, a sentence.
    """

    recipe: str
    ratio: float
    recovered: bool = False
    outputs: tuple[OutputError, ...] = ()
    chosen: bool = False
    note: str = ""

    @property
    def error(self) -> float | None:
        """The `largest_error` of the outputs."""
        return largest_error(self.outputs)

    @property
    def agreement(self) -> float | None:
        """The least agreement over the outputs, of neighbours for embeddings; None where none has one."""
        return min((output.kept for output in self.outputs if output.kept is not None), default=None)


@dataclass(frozen=True, slots=True)
class LayerTime:
    """How long a rewritten layer takes alone, all uses together, in nanoseconds.

    Attributes:
        before: As it was.
        predicted: Its chain, as the plan reckoned that it takes in the model; None where a plan was replayed.
        after: Its chain, measured for its own rank.
    """

    before: int
    predicted: int | None
    after: int


_STEADY = 1.3


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the whole model takes, in nanoseconds: medians of interleaved runs.

    Attributes:
        engine: What ran it, with how many threads.
        inputs: On which inputs, with their dtypes and shapes.
        before: The input model.
        predicted: The compressed model, as its plan's model with random factors was measured, or as the plan
            reckoned where that was not; None where a plan was replayed.
        after: The compressed model; None in a dry run.
        layers: The rewritten layers, by id; none in a dry run.
        spread: The longest time of the input model over the shortest, of all medians that were measured.
    """

    engine: str
    inputs: str
    before: int
    predicted: int | None
    after: int | None = None
    layers: Mapping[str, LayerTime] = field(default_factory=dict)
    spread: float = 1.0

    @property
    def ratio(self) -> float | None:
        """The compressed model's time over the input model's; None in a dry run."""
        return None if self.after is None else self.after / self.before

    @property
    def is_steady(self) -> bool:
        """Whether no other work on the machine has disturbed the times."""
        return self.spread <= _STEADY


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration inputs were used for.

    Attributes:
        source: Where they came from, a short phrase.
        samples: How many were used.
        held: How many of them were held out.
        unmeasured: The layers of which they tell nothing, each with the reason, a sentence.
        warnings: What the user should know about them, sentences.
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
        first: Name of the node that is gone; a nameless one goes by its output.
        second: Name of the node behind it, which computes both now.
        layers: The layers of whose chains either was a part, sorted.
        elements: Elements of the first one's weight, of the second one's, and of their product, which is
            evaluated where the second one was.
        saved: Parameters saved, biases included.
        certificate: What rounding has done to the product, as it is stored, of the two weights as they were.
    """

    first: str
    second: str
    layers: tuple[str, ...]
    elements: tuple[int, int, int]
    saved: int
    certificate: Certificate
