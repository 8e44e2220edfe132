"""How much every layer's error matters: what it does, alone, at the model's outputs.

Every layer in turn computes a substitute in place of its own map, on a few of the calibration inputs,
and the outputs are compared with those of the model as it is:

    error = mean over the float outputs of Σ ‖y − ŷ‖² / Σ ‖y − ȳ‖²,

ȳ the mean output over the samples. An output that does not vary is compared with Σ ‖y‖². Left out are
outputs that are not float, that are zero throughout, or whose shape a substitute changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.shares import spaced
from onnx_lowrank.calibrate.statistics import Samples
from onnx_lowrank.engines.engine import Feed, RejectedError, Run, UnsupportedError
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.engines.spread import Spread, is_batched
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.graph.weights import FLOATS
from onnx_lowrank.layers.find import Binding
from onnx_lowrank.probe.override import Overridable
from onnx_lowrank.probe.segments import Substitute

LOST = 1e6
"""The error of an output that becomes NaN or infinite, and the largest one."""

MEMORY = 2**28
"""Bytes of inputs and outputs that are kept."""

_GROUP = 4
"""Layers that are overridden in one session: the fewer, the faster it runs, the more often one is opened."""

_BATCH = 16
_FEWEST, _MOST = 8, 128
_PASSES = 5
"""What all trials cost together, about, in evaluations of all calibration samples."""


class Sensitivities(Mapping[str, NDArray[np.float64]]):
    """The output errors of every measured layer's substitutes, in their order, by the layer's id.

    Attributes:
        reasons: Why the other layers were not measured, a sentence each.
    """

    def __init__(self, outcomes: Mapping[str, NDArray[np.float64] | str]) -> None:
        """Part errors from reasons."""
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
    trials: int = 5,
    step: Callable[[float], None] | None = None,
) -> Sensitivities:
    """Measure what substitutes of every layer do to the model's outputs.

    Args:
        model: The model.
        walk: Its walk.
        bindings: The layers.
        substitutes: Gives the substitutes of a layer; they are taken one by one, and not kept.
        samples: The calibration inputs. Those to fit to are used, `probe` says how many.
        engine: What runs the model.
        trials: How many substitutes a layer has, about.
        step: Told the share of the work that is done, after every layer.

    Returns:
        The errors; layers that cannot be overridden, and all of them where the model has no output to
        compare or does not run, are among the reasons.

    Raises:
        InputError: A data file has changed, or a substitute has a bias where its layer has none that could
            be changed.
    """
    outcomes: dict[str, NDArray[np.float64] | str] = {}
    try:
        with engine.open(model) as run:
            feeds = _chosen(run, samples, probe(samples.count, len(bindings), trials))
    except (UnsupportedError, RejectedError) as error:
        reason = f"{engine.name} does not run the model ({error})"
        return Sensitivities({binding.layer.id: reason for binding in bindings})
    for start in range(0, len(bindings), _GROUP):
        overridable = Overridable(model, walk, bindings[start : start + _GROUP])
        outcomes.update(overridable.reasons)
        opened = [b for b in bindings[start : start + _GROUP] if b.layer.id in overridable.inputs]
        try:
            with engine.open(overridable.model) as run:
                trial = _Trial(run, feeds)
                for binding in opened:
                    fed = (overridable.feeds(binding, substitute) for substitute in substitutes(binding))
                    outcomes[binding.layer.id] = trial.errors(fed)
                    if step is not None:
                        step(len(outcomes) / len(bindings))
        except (UnsupportedError, RejectedError) as error:
            reason = f"{engine.name} does not run the model with its weights as inputs ({error})"
            outcomes.update({b.layer.id: reason for b in opened if b.layer.id not in outcomes})
    return Sensitivities(outcomes)


def probe(samples: int, layers: int, trials: int) -> int:
    """How many samples to run every trial on: all trials cost 5 evaluations of all samples, about.

    Args:
        samples: Number of calibration samples.
        layers: Number of layers.
        trials: Number of substitutes for each layer.

    Returns:
        5 · samples / (layers · trials), but at least 8 and at most 128.
    """
    return min(max(_PASSES * samples // max(layers * trials, 1), _FEWEST), _MOST)


def _chosen(run: Run, samples: Samples, wanted: int) -> list[Feed]:
    """About so many samples, fewer where they take too much memory: batches evenly spaced over the data."""
    first = next(iter(samples.batches(1))).feed
    taken = max(_bytes(first) + _bytes(run(first)), 1)
    size = max(1, min(wanted, _BATCH, MEMORY // taken))
    held = [batch.held for batch in samples.batches(size)]
    in_batch = samples.count / len(held)  # more than `size` where the model fixes it
    number = max(1, min(round(wanted / in_batch), MEMORY // (size * taken)))
    places = set(spaced(held.count(False), number).tolist())
    fit = (batch.feed for batch in samples.batches(size) if not batch.held)
    return [feed for place, feed in enumerate(fit) if place in places]


def _bytes(arrays: Mapping[str, Any]) -> int:
    return sum(value.nbytes for value in arrays.values() if isinstance(value, np.ndarray))


@dataclass(frozen=True, slots=True)
class _Output:
    """What the model itself gives for one output.

    Attributes:
        name: The output.
        values: Its values in every batch.
        power: Σ ‖y − ȳ‖², or Σ ‖y‖² where that vanishes.
    """

    name: str
    values: Sequence[NDArray[Any]]
    power: float


class _Trial:
    """The model's own outputs, to which those with substitutes are compared."""

    def __init__(self, run: Run, feeds: Sequence[Feed]) -> None:
        self._run = run
        self._feeds = feeds
        given = [run(feed) for feed in feeds]
        outputs = (self._output(name, [values[name] for values in given]) for name in given[0])
        self._outputs = [output for output in outputs if output is not None]

    def errors(self, fed: Iterable[Feed]) -> NDArray[np.float64] | str:
        """The output error of every substitute, given what to feed for it; or why there are none."""
        if not self._outputs:
            return "the model has no output of floats that differ from zero"
        table = np.array([self._row(own) for own in fed]).reshape(-1, len(self._outputs))
        same = ~np.isnan(table).any(axis=0)
        if not same.any():
            return "its substitutes change the shapes of the model's outputs"
        return np.asarray(table[:, same].mean(axis=1))

    def _row(self, own: Feed) -> NDArray[np.float64]:
        """The error of every output; NaN where its shape changes."""
        residuals = np.zeros(len(self._outputs))
        for batch, feed in enumerate(self._feeds):
            given = self._run({**feed, **own})
            residuals += [_residual(output.values[batch], given[output.name]) for output in self._outputs]
        with np.errstate(over="ignore"):
            return np.minimum(residuals / [output.power for output in self._outputs], LOST)

    def _output(self, name: str, values: Sequence[Any]) -> _Output | None:
        """One output, or None where it cannot be compared."""
        if not all(isinstance(v, np.ndarray) and v.dtype.name in FLOATS.values() for v in values):
            return None
        spread = Spread()
        for feed, value in zip(self._feeds, values, strict=True):
            spread.add(value.astype(np.float64), batched=is_batched(feed, value))
        power = spread.power() or spread.energy
        return _Output(name, values, power) if 0 < power < np.inf else None


def _energy(values: NDArray[Any]) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def _residual(wanted: NDArray[Any], given: Any) -> float:
    """‖y − ŷ‖² where y is finite: infinite where ŷ is not, NaN where its shape is another."""
    if given.shape != wanted.shape:
        return np.nan
    finite = np.isfinite(wanted)
    if not np.isfinite(given[finite]).all():
        return np.inf
    with np.errstate(over="ignore"):
        return _energy(given[finite].astype(np.float64) - wanted[finite])
