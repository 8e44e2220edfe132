"""Closed-form recovery: every layer compensates for the errors of the compressed layers before it.

Rules:

1. The layers are walked in execution order. Each is fitted to its outputs y in the original model, from its
   inputs x̂ in the compressed model: E‖y − Ŵ x̂‖². If a residual connection is added to y, the error that the
   compressed layers made in the residual is added to the target, too.
2. Held-out inputs are the judge. The ridge is the best one for them, refinement continues while their error
   falls, and the layer's factors for its own inputs (`work.fitting`) are taken if they do better.
3. Layers that share an encoder get it from the inputs x̂ of the first of them. Each of their decoders is then
   fitted by the rules above. Layers that share a decoder get the one for their inputs in the original model
   (`linalg.sums`), and each of their encoders is fitted so.
4. Before a Relu, only the error behind it counts: the layer is refitted to lower that error.
   This is the nonlinear asymmetric reconstruction of Zhang, Zou, He, Sun, "Accelerating Very Deep
   Convolutional Networks for Classification and Detection", 2016, by majorization.
5. Layers that the plan keeps behind compressed ones are fitted by the same rules, without a rank: they cost
   nothing more. One that does no better on held-out inputs keeps its weight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.calibrate.prefix import Prefix
from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import narrow_layers
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.operators import registry
from onnx_lowrank.rewrite.refit import Refitted, can_refit
from onnx_lowrank.rewrite.replace import Replacement
from onnx_lowrank.stages.fit import Fitted
from onnx_lowrank.stages.gather import sums_bytes
from onnx_lowrank.stages.walked import Joint, Recovered, Recovery, Refit
from onnx_lowrank.work.executor import Executor
from onnx_lowrank.work.fitting import CertificateItem, certificate
from onnx_lowrank.work.weights import reference


def can_recover(model: Model, walk: Walk, binding: Binding, statistics: Statistics) -> bool:
    """Whether a layer can be recovered: it has one use, in the main graph, and moments of its inputs.

    A layer with a bias that cannot change is not recovered: its weight would be fitted to the bias, too.

    Args:
        model: The model.
        walk: Its walk.
        binding: The layer.
        statistics: The moments of its layers.
    """
    return statistics.has_inputs(binding.layer.id) and is_walked(model, walk, binding)


def is_walked(model: Model, walk: Walk, binding: Binding) -> bool:
    """Whether a walk can fit a layer: it has one use, in the main graph, and no bias that cannot change.

    Args:
        model: The model.
        walk: Its walk.
        binding: The layer.
    """
    use = binding.layer.uses[0]
    if len(binding.layer.uses) > 1 or use.scope or not use.is_recovered:
        return False
    node = walk.node(Place(use.scope, use.node))
    operand = registry.family(node).bias
    fixed = operand is not None and len(node.input) > operand and bool(node.input[operand])
    return not fixed or bias(model, walk, binding) is not None


def refittable(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    recovered: Sequence[Binding],
    options: Mapping[str, Option],
    statistics: Statistics,
) -> list[Binding]:
    """The layers without an option that the walk refits, too (rule 5).

    The moments of none of them are larger than those of the recovered layers: a refit of a language model's
    head would take more time and memory than all the rest.

    Args:
        model: The model.
        walk: Its walk.
        bindings: All layers.
        recovered: The layers that are recovered; at least one.
        options: The options of the plan, by id.
        statistics: The moments of the layers.
    """
    most = max(sums_bytes(binding.layer.shape) for binding in recovered)
    walked = {binding.layer.id for binding in recovered}
    # A layer that is narrowed, but not recovered, is written before the walk, with its partners as they are.
    early = ((b.layer, options.get(b.layer.id)) for b in bindings if b.layer.id not in walked)
    narrowed = narrow_layers(early).keys()
    return [
        binding
        for binding in bindings
        if binding.layer.id not in options
        and binding.layer.id not in narrowed
        and sums_bytes(binding.layer.shape) <= most
        and can_recover(model, walk, binding, statistics)
        and can_refit(model, walk, binding)
    ]


def recover(
    model: Model,
    walk: Walk,
    bindings: Sequence[Binding],
    options: Mapping[str, Option],
    calibration: Calibration,
    executor: Executor,
) -> Iterator[Fitted]:
    """Recover layers in the order in which they run; each is certified while the next ones are recovered.

    A narrow layer comes after its partners, because the rewriter narrows their new weights.

    Args:
        model: The model.
        walk: Its walk.
        bindings: The layers; each can be recovered, and those without an option can be refitted.
        options: Their options, by id.
        calibration: The inputs to fit to.
        executor: Certifies the layers; the walk itself runs in this process.

    Raises:
        InputError: The model fails on the calibration inputs, or the disk is full.
    """
    batches = calibration.trimmed.batches(calibration.statistics.batch)
    waiting: deque[tuple[Binding, Recovered]] = deque()
    joint = Joint(model, walk, bindings, options, calibration.statistics, executor.threads)
    narrowed = narrow_layers((binding.layer, options.get(binding.layer.id)) for binding in bindings)
    padding = calibration.statistics.padding
    memory = calibration.memory.activations
    with Prefix(
        model, walk, bindings, batches, calibration.engine, padding, executor.threads, memory
    ) as prefix:

        def items() -> Iterator[CertificateItem]:
            for step in prefix.steps():
                binding = step.binding
                option = options.get(binding.layer.id)
                if option is None:
                    recovered = None
                    if step.changed:
                        recovered = Refit(model, walk, binding, calibration, executor.threads).run(step)
                else:
                    layer = Recovery(model, walk, binding, option, calibration, executor.threads, joint)
                    recovered = layer.run(step)
                if recovered is not None:
                    waiting.append((binding, recovered))
                    yield CertificateItem(reference(model, walk, binding), recovered.made)

        def finished() -> Iterator[Fitted]:
            for proof in executor.map(certificate, items()):
                binding, layer = waiting.popleft()
                option = options.get(binding.layer.id)
                if option is None or not isinstance(layer.made, Factors):
                    weight = np.asarray(layer.made)
                    is_narrowed = binding.layer.id in narrowed
                    yield Refitted(binding, weight, proof, layer.bias, is_narrowed), layer.fit
                else:
                    yield Replacement(binding, option, layer.made, proof, layer.bias), layer.fit

        yield from _partners_first(finished())


def _partners_first(fitted: Iterator[Fitted]) -> Iterator[Fitted]:
    """Hold narrow layers back until the walk is past their partners."""
    held: list[tuple[int, Fitted]] = []
    for item in fitted:
        binding = item[0].binding
        node = binding.layer.uses[0].node
        yield from (early for last, early in held if last < node)
        held = [(last, early) for last, early in held if last >= node]
        is_narrow = isinstance(item[0], Replacement) and item[0].option.lowering is Lowering.NARROW
        last = max((partner.uses[0].node for partner in binding.layer.partners), default=node)
        if is_narrow and last > node:
            held.append((last, item))
        else:
            yield item
    yield from (item for _, item in held)
