"""The effect of every layer's error on the model's outputs, one layer at a time.

Each layer in turn is replaced by substitutes, on a few of the calibration inputs. Only the part of the model
that a few layers can change runs for each (`calibrate.tails`). The model's outputs are compared with those of
the unchanged model:

    error = mean over the float outputs of Σ ‖y − ŷ‖² / Σ ‖y − ȳ‖²,

with the mean output ȳ over the samples. For an output that does not vary, the denominator is Σ ‖y‖². The
scores of a language model are compared as distributions (`calibrate.divergence`). Outputs that are not float,
that are all zero, or whose shape a substitute changes are left out; so are the caches of a decoder
(`engines.pasts.caches`): errors of keys and values count by the scores that they change.

Texts with removable padding are tried on the shorter ones: they take less time. In a pooled output, the
errors of many tokens average out, so short texts err most, and decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.divergence import are_token_scores, divergence, log_shares
from onnx_lowrank.calibrate.divergence import spread as divergence_spread
from onnx_lowrank.calibrate.shares import Samples, spaced
from onnx_lowrank.calibrate.tails import Tails
from onnx_lowrank.calibrate.trimming import Trimmed
from onnx_lowrank.engines.batches import samples as samples_of
from onnx_lowrank.engines.engine import Feed, RejectedError, Run, UnsupportedError
from onnx_lowrank.engines.inputs import Spec, specs
from onnx_lowrank.engines.padding import NO_PADDING, Padding
from onnx_lowrank.engines.pasts import caches
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.engines.spread import Spread, is_batched
from onnx_lowrank.engines.vocabularies import vocabularies
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.graph.weights import FLOATS
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.probe.override import Overridable
from onnx_lowrank.probe.segments import Substitute
from onnx_lowrank.work.executor import Threads

Errors = NDArray[np.float64]
_Each = Callable[[Callable[[Feed], Errors], Iterable[Feed]], Iterable[Errors]]

LOST = 1e6
"""The largest error; an output with NaN or Inf has this one."""

MEMORY = 2**28
"""Bytes of inputs and outputs that are kept."""

_GROUP = 4
"""Layers that are overridden in one session. Fewer make it faster, but need more sessions."""

_BATCH = 16
_FEWEST_VECTORS = 8
"""Vectors of every output that a trial compares at least."""
_FEWEST_SAMPLES = 2
_MOST_SAMPLES = 128
_PASSES = 3
"""The most that all trials together cost, in runs of all calibration samples."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one layer.

    Attributes:
        found: The output errors of its substitutes, in their order; or the reason why there are none.
        compared: The outputs of the whole model that are compared, known since the layer's group ran.
        is_failure: Whether the session of its group failed at this layer, or before it.
    """

    found: NDArray[np.float64] | str
    compared: frozenset[str]
    is_failure: bool = False


class Memory(Protocol):
    """Keeps outcomes for other runs."""

    def get(self, layer: str) -> Outcome | None:
        """The outcome of a layer, if it is known."""

    def put(self, layer: str, outcome: Outcome) -> None:
        """Keep the outcome of a layer."""


class _Nothing:
    """Keeps no outcomes."""

    def get(self, layer: str) -> Outcome | None:
        return None

    def put(self, layer: str, outcome: Outcome) -> None:
        pass


NOTHING = _Nothing()
"""The memory that keeps no outcomes."""


class Sensitivities(Mapping[str, NDArray[np.float64]]):
    """For each measured layer, by id: the output errors of its substitutes, in their order.

    Attributes:
        reasons: For each other layer, the reason why it was not measured, a sentence.
    """

    def __init__(self, outcomes: Mapping[str, NDArray[np.float64] | str]) -> None:
        """Separate errors from reasons."""
        self.reasons = {layer: found for layer, found in outcomes.items() if isinstance(found, str)}
        self._errors = {layer: found for layer, found in outcomes.items() if not isinstance(found, str)}

    def __getitem__(self, layer: str) -> NDArray[np.float64]:
        return self._errors[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._errors)

    def __len__(self) -> int:
        return len(self._errors)


def measure(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    substitutes: Callable[[Binding], Iterable[Substitute]],
    samples: Samples,
    engine: Engine,
    *,
    threads: Threads | None = None,
    padding: Padding = NO_PADDING,
    trials: int = 3,
    memory: Memory = NOTHING,
    step: Callable[[float], None] | None = None,
) -> Sensitivities:
    """Measure the effect of every layer's substitutes on the model's outputs.

    Args:
        model: The model.
        walk: Its walk.
        bindings: The layers.
        substitutes: Gives the substitutes of a layer; they are used one by one, and not kept.
        samples: The calibration inputs. Only samples to fit to are used; `probe` gives their number.
        engine: Runs the model.
        threads: Try a few substitutes at the same time, if the engine allows it; None for one by one.
        padding: The padding of the inputs; errors there do not count.
        trials: The approximate number of substitutes of a layer.
        memory: Gives and takes outcomes, so that known ones are not measured again.
        step: Receives the share of the work that is done, after every layer.

    Returns:
        The errors, and reasons for the layers that cannot be overridden. If the model does not run, or has no
        output to compare, all layers have reasons.

    Raises:
        InputError: A data file has changed, or a substitute has a bias but its layer has no bias that can be
            changed.
    """
    groups = _groups(bindings)
    outcomes = _known(bindings, memory)
    if len(outcomes) == len(bindings):
        return _sensitivities(outcomes)
    try:
        with engine.open(model) as run:
            # The mean of every position's output needs outputs of one shape.
            read = samples if padding.axes else Trimmed(samples, padding, shortest=True)
            feeds = _chosen(
                run, read, specs(model.proto), partial(probe, samples.count, len(bindings), trials)
            )
    except (UnsupportedError, RejectedError) as error:
        reason = f"{engine.name} does not run the model ({error})"
        return Sensitivities({binding.layer.id: reason for binding in bindings})
    counted = _Counted(padding, feeds, caches(model.proto), vocabularies(model.proto))
    tails = Tails(model, walk, groups, feeds, engine, MEMORY)
    compared: frozenset[str] = frozenset()
    for number, group in enumerate(groups):
        missing = [binding for binding in group if binding.layer.id not in outcomes]
        if missing:
            overridable = Overridable(model, walk, group)
            tail = tails.tail(number, overridable.model) if compared else (overridable.model, feeds)
            trying = _Trying(overridable, *tail, compared, counted, engine, threads)
            for layer, outcome in trying.outcomes(missing, substitutes):
                outcomes[layer] = outcome
                # A failure, as for lack of memory, may be gone in the next run.
                if not outcome.is_failure:
                    memory.put(layer, outcome)
                if step is not None:
                    step(len(outcomes) / len(bindings))
        compared = outcomes[group[-1].layer.id].compared
    return _sensitivities(outcomes)


def unknown(bindings: Sequence[Binding], memory: Memory) -> Sequence[Binding]:
    """The layers whose substitutes `measure` tries, in order: all others have known outcomes."""
    known = _known(bindings, memory)
    return [binding for binding in bindings if binding.layer.id not in known]


def probe(samples: int, layers: int, trials: int, rows: int = 1) -> int:
    """The number of samples for each trial, so that all trials together cost at most 3 runs of all samples.

    Args:
        samples: Number of calibration samples.
        layers: Number of layers.
        trials: Number of substitutes for each layer.
        rows: The least number of vectors that an output has for each sample, as for each token of a text.

    Returns:
        3 · samples / (layers · trials), but at most 128, and enough for 8 vectors of every output, and for 2
        samples.
    """
    fewest = max(-(-_FEWEST_VECTORS // max(rows, 1)), _FEWEST_SAMPLES)
    return min(max(_PASSES * samples // max(layers * trials, 1), fewest), _MOST_SAMPLES)


def _groups(bindings: Sequence[Binding]) -> Sequence[Sequence[Binding]]:
    return [bindings[start : start + _GROUP] for start in range(0, len(bindings), _GROUP)]


def _known(bindings: Sequence[Binding], memory: Memory) -> dict[str, Outcome]:
    """The known outcomes, by id."""
    names = (binding.layer.id for binding in bindings)
    return {name: outcome for name in names if (outcome := memory.get(name)) is not None}


def _sensitivities(outcomes: Mapping[str, Outcome]) -> Sensitivities:
    return Sensitivities({layer: outcome.found for layer, outcome in outcomes.items()})


def _chosen(run: Run, samples: Samples, inputs: tuple[Spec, ...], number: Callable[[int], int]) -> list[Feed]:
    """Batches evenly spaced over the data; fewer if memory is short.

    Args:
        run: Runs the model.
        samples: The data.
        inputs: The inputs of the model.
        number: Gives the number of wanted samples for the rows of a sample's outputs.
    """
    first = next(iter(samples.batches(1))).feed
    given = run(first)
    taken = max(_bytes(first) + _bytes(given), 1)
    wanted = number(_rows(given))
    size = max(1, min(wanted, _BATCH, MEMORY // taken))
    held, sizes = [], []
    for batch in samples.batches(size):
        held.append(batch.held)
        if (rows := samples_of(batch.feed, inputs)) is not None:
            sizes.append(rows)
    # Without sizes, a batch is one sample, or as many as the model fixes.
    in_batch = float(np.mean(sizes)) if sizes else samples.count / len(held)
    most = max(1, min(round(wanted / in_batch), MEMORY // (size * taken)))
    places = set(spaced(held.count(False), most).tolist())
    fit = (batch.feed for batch in samples.batches(size) if not batch.held)
    return [feed for place, feed in enumerate(fit) if place in places]


def _rows(outputs: Mapping[str, Any]) -> int:
    """The least number of vectors in an output of floats; 1 for outputs that are not stacks of vectors."""
    arrays = (value for value in outputs.values() if isinstance(value, np.ndarray))
    floats = (array for array in arrays if array.dtype.name in FLOATS.values() and array.size)
    return min((array.size // array.shape[-1] if array.ndim > 1 else 1 for array in floats), default=1)


def _bytes(arrays: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in arrays.values() if isinstance(value, np.ndarray))


@dataclass(frozen=True, slots=True)
class _Output:
    """One output of the unchanged model.

    Attributes:
        name: The name of the output.
        values: Its values in every batch, log p for scores of tokens; NaN where they do not count.
        power: Σ ‖y − ȳ‖², or Σ ‖y‖² if that is zero; Σ KL(p ‖ p̄) for scores of tokens.
        has_scores: Whether it holds scores of tokens.
    """

    name: str
    values: Sequence[NDArray[Any]]
    power: float
    has_scores: bool = False

    def residual(self, batch: int, given: Any) -> float:
        """The error of one batch before it is divided; infinite if it is not finite, NaN for other shapes."""
        wanted = self.values[batch]
        if given.shape != wanted.shape:
            return np.nan
        return divergence(wanted, given) if self.has_scores else _residual(wanted, given)


@dataclass(frozen=True, slots=True)
class _Counted:
    """The elements of outputs that count: those without padding.

    Attributes:
        padding: The padding of the inputs.
        feeds: The inputs of the whole model, batch by batch.
        unseen: The outputs that do not count.
        vocabulary: The number of tokens for each input of ids.
    """

    padding: Padding
    feeds: Sequence[Feed]
    unseen: frozenset[str]
    vocabulary: Mapping[str, int]

    def of(self, name: str, values: Sequence[Any]) -> Sequence[NDArray[Any]]:
        """An output of every batch, with NaN for the elements that do not count."""
        return [self.padding.hide(name, v, feed) for v, feed in zip(values, self.feeds, strict=True)]


@dataclass(frozen=True, slots=True)
class _Trying:
    """A session in which some layers of a group are overridden.

    Attributes:
        overridable: The model with the group's weights as inputs.
        tail: The part of it that runs.
        given: The inputs of the tail.
        compared: The outputs of the whole model that are compared, as far as they are known.
        counted: The elements of outputs that count.
        engine: Runs the tail.
        threads: Try substitutes at the same time.
    """

    overridable: Overridable
    tail: Model
    given: Sequence[Feed]
    compared: frozenset[str]
    counted: _Counted
    engine: Engine
    threads: Threads | None

    def outcomes(
        self, bindings: Iterable[Binding], substitutes: Callable[[Binding], Iterable[Substitute]]
    ) -> Iterator[tuple[str, Outcome]]:
        """The outcomes of layers, with their ids; those of layers that cannot be overridden come last."""
        reasons, compared = self.overridable.reasons, self.compared
        left = [binding for binding in bindings if binding.layer.id not in reasons]
        closed = [binding.layer.id for binding in bindings if binding.layer.id in reasons]
        try:
            with self.engine.open(self.tail) as run:
                trial = _Trial(run, self.given, compared, self.counted, self._each)
                compared = trial.compared
                while left:
                    binding = left[0]
                    fed = (self.overridable.feeds(binding, made) for made in substitutes(binding))
                    outcome = Outcome(trial.errors(fed), compared)
                    yield left.pop(0).layer.id, outcome
        except (UnsupportedError, RejectedError) as error:
            reason = f"{self.engine.name} does not run the model with its weights as inputs ({error})"
            for binding in left:
                yield binding.layer.id, Outcome(reason, compared, is_failure=True)
        for layer in closed:
            yield layer, Outcome(reasons[layer], compared)

    def _each(self, function: Callable[[Feed], Errors], feeds: Iterable[Feed]) -> Iterable[Errors]:
        if self.threads is None:
            return map(function, feeds)
        return self.threads.together(function, feeds, self.engine.concurrent)


class _Trial:
    """The outputs of the unchanged model, with which those of the model with substitutes are compared.

    Attributes:
        compared: The outputs of the whole model that are compared.
    """

    def __init__(
        self, run: Run, feeds: Sequence[Feed], compared: Set[str], counted: _Counted, each: _Each
    ) -> None:
        """Run the unchanged model, or a tail.

        Args:
            run: Runs it.
            feeds: Its inputs.
            compared: The outputs of the whole model that are compared. Those that the tail does not return
                have no error.
            counted: The elements of outputs that count.
            each: Applies a function to the feeds of substitutes.
        """
        self._run = run
        self._each = each
        self._counted = counted
        self._feeds = feeds
        given = [run(feed) for feed in feeds]
        names = [name for name in given[0] if name not in counted.unseen]
        outputs = (self._output(name, [values[name] for values in given]) for name in names)
        self._outputs = [output for output in outputs if output is not None]
        self.compared = frozenset(compared).union(output.name for output in self._outputs)

    def errors(self, fed: Iterable[Feed]) -> NDArray[np.float64] | str:
        """The output error of every substitute, given the feed that overrides the layer; or a reason."""
        if not self._outputs:
            return "the model has no output of floats that differ from zero"
        table = np.array(list(self._each(self._row, fed))).reshape(-1, len(self._outputs))
        same = ~np.isnan(table).any(axis=0)
        if not same.any():
            return "its substitutes change the shapes of the model's outputs"
        absent = len(self.compared) - len(self._outputs)
        return np.asarray(table[:, same].sum(axis=1) / (np.count_nonzero(same) + absent))

    def _row(self, override: Feed) -> Errors:
        """The error of every output; NaN if its shape changes."""
        residuals = np.zeros(len(self._outputs))
        for batch, feed in enumerate(self._feeds):
            given = self._run({**feed, **override})
            residuals += [output.residual(batch, given[output.name]) for output in self._outputs]
        with np.errstate(over="ignore"):
            return np.minimum(residuals / [output.power for output in self._outputs], LOST)

    def _output(self, name: str, values: Sequence[Any]) -> _Output | None:
        """One output, or None if it cannot be compared."""
        if not all(isinstance(v, np.ndarray) and v.dtype.name in FLOATS.values() for v in values):
            return None
        feeds = self._counted.feeds
        tokens = self._counted.vocabulary
        if all(are_token_scores(v, f, tokens) for v, f in zip(values, feeds, strict=True)) and all(
            np.isfinite(v).all() for v in values
        ):
            values = self._counted.of(name, [log_shares(v) for v in values])
            power = divergence_spread(values)
            return _Output(name, values, power, True) if 0 < power < np.inf else None
        values, spread = self._counted.of(name, values), Spread()
        for feed, value in zip(self._feeds, values, strict=True):
            spread.add(value.astype(np.float64), batched=is_batched(feed, value))
        power = spread.power() or spread.energy
        return _Output(name, values, power) if 0 < power < np.inf else None


def _residual(wanted: NDArray[Any], given: Any) -> float:
    """‖y − ŷ‖² over the finite elements of y; infinite if ŷ is not finite there."""
    finite = np.isfinite(wanted)
    if not np.isfinite(given[finite]).all():
        return np.inf
    with np.errstate(over="ignore"):
        lost = given[finite].astype(np.float64) - wanted[finite]
        return float(np.sum(np.square(lost)))
