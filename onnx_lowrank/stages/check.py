"""Validation of the compressed model: the ONNX checker, and a run of both models on the same inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from onnx_lowrank.core.outcome import OutputError, Validation
from onnx_lowrank.engines import fused, kinds
from onnx_lowrank.engines.batches import batches
from onnx_lowrank.engines.checker import check
from onnx_lowrank.engines.compare import Comparison, compare
from onnx_lowrank.engines.engine import Deployed, Feed, RejectedError, UnmadeError, UnsupportedError
from onnx_lowrank.engines.inputs import describe, read, specs
from onnx_lowrank.engines.made import make
from onnx_lowrank.engines.padding import NO_PADDING, Padding
from onnx_lowrank.engines.pasts import unmasked
from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.engines.running import Engine, calibrating_engine, first_run, fitting_engine
from onnx_lowrank.engines.runtime import Runtime, runtime
from onnx_lowrank.errors import InputError, ValidationError
from onnx_lowrank.files.load import Model, ModelProto
from onnx_lowrank.report import words

_log = logging.getLogger(__name__)

_CHECKED_ON = "Whether the layers in branches run was checked on {} of these inputs."

__all__ = ["Alone", "Measured", "calibrating_engine", "compared", "fault", "runtime", "unfit", "validate"]

Alone = Callable[[str], tuple[ModelProto, ModelProto] | None]
"""Maps a layer's id to a model of the original layer and a model of its chain, with equal inputs and outputs;
None if its chain was multiplied with another one, or if the layer does not run alone."""


@dataclass(frozen=True, slots=True)
class Measured:
    """An earlier comparison, on more inputs than validation runs.

    Attributes:
        outputs: The errors of the outputs.
        feeds: Some of the inputs, which show which layers run.
        source: A description of all of the inputs.
    """

    outputs: tuple[OutputError, ...]
    feeds: tuple[Feed, ...]
    source: str


def validate(
    original: Model,
    compressed: Model,
    nodes: Mapping[str, tuple[str, ...]],
    *,
    alone: Alone,
    inputs: str | Path | Mapping[str, Any] | None = None,
    measured: Measured | None = None,
    padding: Padding = NO_PADDING,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    provider: str = "CPUExecutionProvider",
    engine: str | None = None,
    max_error: float | None = None,
) -> Validation:
    """Run both models on the same inputs and compare their outputs.

    If ONNX Runtime does not support the input model, onnx's reference implementation runs both models. If
    that fails, too, each rewritten layer runs alone. The result names what ran.

    Args:
        original: The input model.
        compressed: The compressed model.
        nodes: The rewritten layers' ids, each with the names of the last nodes of its chains.
        alone: Cuts a rewritten layer out of both models.
        inputs: An .npz file or a mapping of arrays, by input name; None makes inputs.
        measured: A comparison to take over; None makes one.
        padding: The padding of inputs; errors there do not count.
        input_shapes: Shapes of inputs to make, for dimensions that the model leaves open.
        provider: ONNX Runtime's execution provider.
        engine: The name of the engine that runs both models; None stands for ONNX Runtime.
        max_error: Bound on the largest relative error over the outputs; each output must have an error.

    Raises:
        InputError: The engine or the provider is missing, or the inputs do not fit the model.
        ValidationError: The checker, or the engine that runs the input model, rejects the compressed model;
            or it gives NaN or Inf, and the input model does not; or its error exceeds `max_error` or is
            unknown, so that the bound cannot be judged.
    """
    tool = kinds.engine(engine, provider)
    notes = list(_check(original, compressed))
    whole = None if measured or inputs is None else read(inputs, specs(original.proto))
    given = measured.feeds if measured else _batched(original, tool, whole)
    run = _run_original(original, tool, _feeds(original, given, input_shapes), given is not None, notes)
    if run is None:
        result = _layers_alone(tuple(nodes), alone, tool)
    else:
        got = _run_compressed(compressed, run)
        used = given or (run.feed,)
        result = Validation(
            engine=run.engine.name,
            inputs=measured.source if measured else _described(whole or run.feed, given is not None),
            outputs=measured.outputs
            if measured
            else _compared(original, compressed, run, got, used, padding),
            never_ran=_never_ran(compressed, nodes, run, used),
        )
        if measured and result.never_ran:
            notes.append(_CHECKED_ON.format(len(measured.feeds)))
        if isinstance(tool, Runtime):
            result = replace(result, fused=fused.compare(original, compressed, tool))
    result = replace(result, notes=(*notes, *result.notes))
    _judge(result, max_error)
    return result


def errors(
    original: Model,
    compressed: Model,
    *,
    inputs: str | Path | Mapping[str, Any] | None = None,
    padding: Padding = NO_PADDING,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    provider: str = "CPUExecutionProvider",
    engine: str | None = None,
) -> tuple[OutputError, ...]:
    """The errors of the outputs as in `validate`, without its other checks; () if no engine runs both models.

    Args:
        original: As in `validate`, like all others.
        compressed: The compressed model.
        inputs: The inputs; None makes some.
        padding: Their padding.
        input_shapes: Shapes of inputs to make.
        provider: The execution provider.
        engine: The engine.

    Raises:
        InputError: The engine or the provider is missing, or the inputs do not fit the model.
        ValidationError: The engine that runs the input model rejects the compressed model, or only that one
            gives NaN or Inf.
    """
    tool = kinds.engine(engine, provider)
    given = _batched(original, tool, None if inputs is None else read(inputs, specs(original.proto)))
    run = _run_original(original, tool, _feeds(original, given, input_shapes), given is not None, [])
    if run is None:
        return ()
    return _compared(
        original, compressed, run, _run_compressed(compressed, run), given or (run.feed,), padding
    )


def _batched(model: Model, engine: Deployed, whole: Feed | None) -> tuple[Feed, ...] | None:
    """The given inputs in batches; None without any."""
    return batches(engine, model, whole, specs(model.proto)) if whole else None


def _feeds(
    model: Model, given: tuple[Feed, ...] | None, shapes: Mapping[str, tuple[int, ...]] | None
) -> _Feeds:
    """The given inputs; without any, inputs that are made anew in every call."""
    if given is not None:
        return given.__iter__
    return partial(make, model.proto, specs(model.proto), shapes or {})


def _described(feed: Feed, is_given: bool) -> str:
    origin = "given" if is_given else "made from the graph"
    return f"{origin}: {describe(feed)}" if feed else "the model has none"


_Feeds = Callable[[], Iterable[Feed]]


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of the input model that succeeded."""

    engine: Engine
    feed: Feed
    outputs: Mapping[str, Any]


def _check(original: Model, compressed: Model) -> tuple[str, ...]:
    """Run the checker; return a note if it also rejects the input model, else raise.

    The checker names the first fault that it meets, so its messages for the two models may differ.
    """
    complaints = check(compressed)
    if not complaints:
        return ()
    known = check(original)
    if not known:
        raise ValidationError(
            f"The ONNX checker rejects the compressed model ({complaints[0]}), which is a fault of this "
            "program: report it with the model."
        )
    return (f"The ONNX checker rejects the input model, and so the compressed one: {known[0]}.",)


def _run_original(
    model: Model, engine: Deployed, feeds: _Feeds, given: bool, notes: list[str]
) -> _Run | None:
    """Run the input model; return None if no engine can, with the reasons in the notes."""
    fitting = fitting_engine(model, engine)
    try:
        return _Run(fitting, *first_run(fitting, model, feeds()))
    except UnmadeError as error:
        notes.append(f"No inputs can be made for the input model: {error}.")
        return None
    except UnsupportedError as error:
        notes.append(f"{fitting.name} cannot run the input model: {error}.")
        if fitting is not engine:
            return None  # The reference implementation would hold all of it.
    except RejectedError as error:
        if given:
            wanted = specs(model.proto)
            reason = next(filter(None, (unmasked(wanted, feed) for feed in feeds())), None)
            raise unfit(error, reason) from error
        notes.append(
            f"The input model fails on inputs made from its graph ({error}): pass --inputs or --input-shape."
        )
        return None
    reference = Reference()
    try:
        return _Run(reference, *first_run(reference, model, feeds()))
    except UnsupportedError as error:
        notes.append(f"{reference.name} cannot run it either: {error}.")
    except RejectedError as error:
        kind, advice = ("given", "other --inputs") if given else ("made", "--inputs or --input-shape")
        notes.append(f"{reference.name} fails on {kind} inputs ({error}): pass {advice}.")
    return None


def _run_compressed(model: Model, run: _Run) -> Mapping[str, Any]:
    try:
        return first_run(run.engine, model, (run.feed,))[1]
    except (UnsupportedError, RejectedError) as error:
        raise fault(run.engine, error) from error


def unfit(error: Exception, reason: str | None = None, purpose: str = "given") -> InputError:
    """The error for inputs on which the input model fails.

    Args:
        error: The engine's error.
        reason: The reason why the inputs do not fit each other, if it is known.
        purpose: The inputs in messages, an adjective.
    """
    if reason is not None:
        return InputError(f"The {purpose} inputs do not fit each other ({reason}): correct them.")
    return InputError(f"The input model fails on the {purpose} inputs ({error}): check them.")


def fault(engine: Engine, error: Exception) -> ValidationError:
    """The error for a compressed model that fails where the input model runs."""
    return ValidationError(
        f"{engine.name} runs the input model and rejects the compressed one ({error}), which is "
        "a fault of this program: report it with the model."
    )


def _compared(
    original: Model,
    compressed: Model,
    run: _Run,
    got: Mapping[str, Any],
    feeds: tuple[Feed, ...],
    padding: Padding,
) -> tuple[OutputError, ...]:
    """Compare the outputs on all feeds; of several feeds, only the outputs on one are in memory.

    Args:
        original: The input model.
        compressed: The compressed model.
        run: The run of the input model on the first feed.
        got: The outputs of the compressed model on the first feed.
        feeds: All feeds.
        padding: The padding of the inputs.
    """
    if len(feeds) == 1:
        return compare(run.outputs, got, run.feed, padding)
    return compared(original, compressed, run.engine, feeds, padding=padding)


def compared(
    original: Model,
    compressed: Model,
    engine: Engine,
    feeds: Iterable[Feed],
    purpose: str = "given",
    padding: Padding = NO_PADDING,
) -> tuple[OutputError, ...]:
    """Compare the outputs of both models on feeds, one after the other.

    Args:
        original: The input model.
        compressed: The compressed model.
        engine: Runs both.
        feeds: The inputs.
        purpose: The inputs in messages, an adjective.
        padding: The padding of the inputs; errors there do not count.

    Raises:
        InputError: The input model fails on a feed.
        ValidationError: Only the compressed model fails, or only it gives NaN or Inf.
    """
    comparison = Comparison(padding)
    with engine.open(original) as theirs, engine.open(compressed) as ours:
        for feed in feeds:
            try:
                wanted = theirs(feed)
            except (UnsupportedError, RejectedError) as error:
                raise unfit(error, purpose=purpose) from error
            try:
                given = ours(feed)
            except (UnsupportedError, RejectedError) as error:
                raise fault(engine, error) from error
            comparison.add(wanted, given, feed)
    return comparison.errors()


def _never_ran(
    model: Model, nodes: Mapping[str, tuple[str, ...]], run: _Run, feeds: Iterable[Feed]
) -> tuple[str, ...] | None:
    """The layers without a node that ran; None if the engine does not report executed nodes."""
    always = {node.name for node in model.proto.graph.node}
    hidden = {layer: names for layer, names in nodes.items() if always.isdisjoint(names)}
    if not hidden:
        return ()
    if not isinstance(run.engine, Runtime):
        return None
    executed = run.engine.executed(model, feeds)
    return tuple(layer for layer, names in hidden.items() if not any(map(executed.count, names)))


def _layers_alone(layers: Iterable[str], alone: Alone, engine: Deployed) -> Validation:
    """Compare every rewritten layer with its chain, each in a model of its own."""
    outputs: list[OutputError] = []
    notes: list[str] = []
    used: dict[str, None] = {}
    for layer in layers:
        pair = alone(layer)
        if pair is None:
            notes.append(
                f"The layer {layer!r} did not run alone: it was multiplied with its neighbour, reads more "
                "than one computed tensor, or needs an input above 1 GiB."
            )
            continue
        dense, chain = (Model(proto, layer, {}, "") for proto in pair)
        silent: list[str] = []
        run = _run_original(dense, engine, partial(make, dense.proto, specs(dense.proto), {}), False, silent)
        if run is None:
            notes.append(f"The layer {layer!r} ran nowhere: {silent[-1]}")
            continue
        used[run.engine.name] = None
        errors = compare(run.outputs, _run_compressed(chain, run), run.feed)
        outputs += [replace(error, name=f"layer {layer}") for error in errors]
    return Validation(
        engine=f"layers alone ({', '.join(used) or 'none ran'})",
        inputs="made for every layer",
        outputs=(),
        never_ran=(),
        notes=tuple(notes),
        alone=tuple(outputs),
    )


def _judge(result: Validation, max_error: float | None) -> None:
    """Check the outputs of the whole model against a bound; an output without an error fails."""
    error, notes = words.error(result.worst), "".join(f"; {note.rstrip('.')}" for note in result.notes)
    _log.debug("compared on %s, %s: worst error %s%s", result.engine, result.inputs, error, notes)
    if max_error is None:
        return
    bound = f"--max-error {max_error:g}"
    if not result.outputs:
        why = f" ({result.notes[-1].rstrip('.')})" if result.notes else ""
        raise ValidationError(
            f"No output of the model could be compared{why}, so {bound} cannot be judged: pass --inputs on "
            "which the model runs, or leave out --max-error."
        )
    for output in result.outputs:
        # Texts have no norm: if all of them are equal, that counts as an error of 0.
        if output.relative is None and output.agreement != 1:
            raise ValidationError(
                f"The output {output.name!r} has no relative error ({output.note.rstrip('.')}), so {bound} "
                "cannot be judged: pass --inputs for which it has one, or leave out --max-error."
            )
    worst = max(result.outputs, key=lambda output: output.relative or 0.0)
    if worst.relative is not None and worst.relative > max_error:
        raise ValidationError(
            f"The relative error of {worst.name!r} is {worst.relative:.4g}, above {bound}: choose a larger "
            "ratio, a stricter target or a larger bound."
        )
