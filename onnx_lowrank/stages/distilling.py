"""Distillation after the decomposition: all tensors fitted together, without labels, by gradients.

Rules:

1. The trained numbers take the place of the stored ones: no node, shape or dtype changes.
2. Held-out inputs judge. A model that errs more there than before keeps its numbers, and the report says so.
3. Factors are certified anew. Layers whose factors are not both in the file lose their certificate: narrowed
   ones, whose partners are trained, too, and multiplied ones.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.passes import digest_of
from onnx_lowrank.core.factors import Certificate
from onnx_lowrank.core.outcome import Distilled, OutputError, Validation, largest_error
from onnx_lowrank.core.plan import Training
from onnx_lowrank.documents import plans
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.engines.pasts import caches
from onnx_lowrank.errors import InputError, ValidationError
from onnx_lowrank.files.load import array
from onnx_lowrank.files.tensors import tensors
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.graph.weights import resolve
from onnx_lowrank.layers.found import Found
from onnx_lowrank.progress import Progress
from onnx_lowrank.rewrite import notes as metadata
from onnx_lowrank.rewrite import stored
from onnx_lowrank.rewrite.edits import Edits
from onnx_lowrank.stages import settling
from onnx_lowrank.stages.build import Built, described, storage
from onnx_lowrank.stages.quantizing import Low, Validate
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.fitting import CertificateItem, certificate
from onnx_lowrank.work.weights import reference

if TYPE_CHECKING:
    from onnx_lowrank.distil.distillation import Distilled as Result

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """The distillation that the user asks for.

    Attributes:
        seconds: The bound on its time; None trains until the held-out loss stops falling.
        device: The device that computes: "cpu", "cuda" or "auto".
        known: An earlier training to repeat; None for a new one.
    """

    seconds: float | None
    device: str
    known: Training | None = None


def follow(
    low: Low, asked: Asked, found: Found, executor: Executor, progress: Progress, validate: Validate
) -> tuple[Built, Validation]:
    """Train the tensors of a low-rank model, and compare the result with the input model.

    Args:
        low: The low-rank model; the result takes over its files.
        asked: The request.
        found: The input model with its layers.
        executor: Certifies the factors.
        progress: Where to show progress.
        validate: Compares a model with the input model.

    Returns:
        The trained model, or the one before if that errs less; and its comparison, with what was done.

    Raises:
        InputError: No output has a gradient, or the disk is full.
        ValidationError: As for `stages.check.validate`.
    """
    calibration = low.calibration
    if calibration is None:
        raise RuntimeError("a distillation needs inputs")
    try:
        result = _learned(low, asked, found, calibration, progress)
    except KeyboardInterrupt:
        _log.warning("interrupted before its first round: the model is the one before the distillation")
        return low.built, low.validation
    _log.debug("distilled: %s", replace(result, values={}))
    done = _summary(result, low.validation.outputs)
    before = low.built, replace(low.validation, distilled=replace(done, is_kept=False))
    if not result.learned.rounds:
        return before
    with ExitStack() as stack:
        trained = _trained(low.built, result.values)
        stack.enter_context(trained.resources)
        try:
            with progress.stage("validate"):
                validation = validate(trained, calibration, ())
        except ValidationError as error:
            _log.debug("the distilled model is refused: %s", error)
            return before
        if _is_worse(validation.outputs, low.validation.outputs, caches(found.model.proto)):
            return before
        with progress.stage("certify"):
            certified = _certified(trained, low.built, found, executor)
        training = _training(result, asked, calibration)
        stack.enter_context(low.built.resources.pop_all())
        plan = plans.sealed(replace(low.built.plan, training=training))
        notes = (*validation.notes, *_differences(asked.known, training))
        return (
            replace(certified, plan=plan, resources=stack.pop_all()),
            replace(validation, distilled=done, notes=notes),
        )


def _learned(low: Low, asked: Asked, found: Found, calibration: Calibration, progress: Progress) -> Result:
    """Train.

    Raises:
        InputError: No output has a gradient, or the original does not run with further outputs.
    """
    from onnx_lowrank.distil.distillation import distil  # It loads PyTorch.

    try:
        with progress.stage("distil", 1) as step:
            return distil(
                found.model,
                low.built.rewritten.model,
                calibration,
                seconds=asked.seconds,
                rounds=None if asked.known is None else asked.known.rounds,
                device=asked.device if asked.known is None else asked.known.device,
                report=lambda share, last, best: step(share, f"held-out loss {last:.4f}, best {best:.4f}"),
            )
    except (UnsupportedError, RejectedError) as error:
        raise InputError(
            f"{found.model.name} does not run with its inner values as outputs ({error}): leave --distil out."
        ) from error


def _differences(known: Training | None, made: Training) -> Iterator[str]:
    """Why a repeated training may give other bytes, sentences."""
    if known is None:
        return
    if known.data != made.data:
        yield "The plan was distilled on other inputs, so the bytes differ from those of its first model."
    if known.torch != made.torch:
        yield f"The plan was distilled by PyTorch {known.torch}, and {made.torch} may give other last digits."


def _is_worse(after: tuple[OutputError, ...], before: tuple[OutputError, ...], ignored: Set[str]) -> bool:
    """Whether the error of an output that counts has grown."""
    old = {output.name: output for output in before if output.name not in ignored and not output.is_exact}
    pairs = (
        (largest_error([output]), largest_error([old[output.name]])) for output in after if output.name in old
    )
    return any(new is not None and one is not None and new > one for new, one in pairs)


def _summary(result: Result, alone: tuple[OutputError, ...]) -> Distilled:
    learned = result.learned
    return Distilled(
        tensors=len(result.values),
        elements=sum(value.size for value in result.values.values()),
        steps=learned.steps,
        loss=(learned.before, learned.after),
        losses=result.losses,
        features=result.features,
        changes=result.changes,
        unreached=result.unreached,
        stops=result.stops,
        is_kept=True,
        is_ended=learned.is_ended,
        alone=alone,
    )


def _training(result: Result, asked: Asked, calibration: Calibration) -> Training:
    """The record that repeats a training to the same bits."""
    return Training(
        seed=result.seed,
        torch=result.torch,
        device=result.device,
        data=digest_of(calibration.samples),
        rounds=result.learned.rounds,
    )


def _trained(built: Built, values: Mapping[str, NDArray[Any]]) -> Built:
    """The model with trained numbers; it needs the files of the model before, too."""
    model = built.rewritten.model
    walk = Walk(model.proto)
    with ExitStack() as stack:
        store, placed = storage(model, stack)
        edits = Edits(model, walk, store)
        for place in walk.places():
            for operand in range(len(walk.node(place).input)):
                found = resolve(walk, walk.operand(place, operand))
                if not isinstance(found, str) and not found.source.scope and found.source.name in values:
                    edits.renew(found.source, values[found.source.name])
        proto, _ = edits.apply()
        rewritten = replace(built.rewritten, model=placed(replace(model, proto=proto)))
        return replace(built, rewritten=rewritten, resources=stack.pop_all())


def _certified(trained: Built, before: Built, found: Found, executor: Executor) -> Built:
    """The trained model with its own certificates, in its metadata, too (rule 3)."""
    proofs = dict(_proofs(trained, found, executor))
    run = described(before.plan)
    metadata.unstamp(trained.rewritten, run, trained.merges)
    options = {layer: option for layer, (option, _) in trained.rewritten.proofs.items()}
    rewritten = replace(
        trained.rewritten, proofs={layer: (option, proofs.get(layer)) for layer, option in options.items()}
    )
    merges = tuple(replace(merged, certificate=None) for merged in trained.merges)
    metadata.stamp(rewritten, run, merges)
    # The errors of single layers are those of the factors before.
    fits = {layer: replace(fit, error=None) for layer, fit in trained.fits.items()}
    return replace(trained, rewritten=rewritten, merges=merges, certificates=proofs, fits=fits)


def _proofs(trained: Built, found: Found, executor: Executor) -> Iterator[tuple[str, Certificate]]:
    """The certificates of the layers whose new numbers can be read back."""
    model = trained.rewritten.model
    values = {tensor.name: array(model, tensor) for tensor in tensors(model.proto)}
    nodes = {node.name: node for node in model.proto.graph.node}
    options = settling.options(trained.plan)
    named: list[str] = []

    def items() -> Iterator[CertificateItem]:
        for binding in found.bindings:
            layer = binding.layer.id
            if layer not in options:
                continue
            chain = [nodes[name] for name in trained.rewritten.chains[layer][0] if name in nodes]
            made = stored.factors(found.walk, binding, options[layer], chain, values)
            if made is not None:
                named.append(layer)
                yield CertificateItem(reference(found.model, found.walk, binding), made)

    for number, proof in enumerate(executor.map(certificate, items())):
        yield named[number], proof
