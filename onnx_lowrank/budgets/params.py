"""Parameters: the elements of all float tensors that a model stores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from onnx_lowrank.allocate.cost import own_sizes
from onnx_lowrank.budgets.budget import Budget, Counted, Run, Tools
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.core.plan import Choice
from onnx_lowrank.graph.parameters import parameters as model_parameters
from onnx_lowrank.layers.found import Found, Layered
from onnx_lowrank.report.content import Total


def parameters(layer: Layer, option: Option | None = None) -> int:
    """Parameters of a layer: its weight, and the tensors that are replaced with it (BatchNorm, biases).

    Args:
        layer: The layer.
        option: Its decomposition, or None for the kept layer.
    """
    if option is None:
        return layer.size + layer.freed
    if option.lowering is Lowering.NARROW:
        beside = layer.beside.stored * option.j // layer.width - layer.beside.owned
        return layer.narrowed(option.j, parameters) + beside
    encoder, decoder = own_sizes(layer, option)
    kept = 0
    if option.lowering is Lowering.SPARSE:
        # A row of zeros is added to rows that are not kept.
        kept = (option.j * layer.kept_per_rank + 1) * layer.f
    added = layer.summed_bias if option.lowering is Lowering.SUMMED else layer.added
    return option.j * (encoder + decoder) + kept + added


class Params(Budget):
    """The number of parameters."""

    name = "params"
    order = 0
    figure = "params"
    title = "parameters"
    narrows = True
    shares = frozenset((Lowering.SHARED, Lowering.SUMMED))
    keeps_rows = True

    def on(self, found: Found, tools: Tools | None = None) -> Counted:
        """The meter of a model's parameters."""
        return _Meter(found)

    def total(self, run: Run) -> Total:
        """The parameters of both models."""
        # A rewrite can remove more than its plan predicts: tensors that only rewritten layers share.
        after = (
            _Meter(run.found).of_model(run.plan.choices)
            if run.rewritten is None
            else model_parameters(run.rewritten.model)
        )
        return Total(model_parameters(run.found.model), after)


class _Meter(Counted):
    """The parameters of one model."""

    def __init__(self, source: Layered) -> None:
        self.budget = BUDGET
        self._source = source

    @cached_property
    def total(self) -> int:
        """The parameters of the input model."""
        return model_parameters(self._source.model)

    def of_layer(self, layer: Layer, option: Option | None) -> int:
        """The parameters of a layer."""
        return parameters(layer, option)

    def of_model(self, choices: Sequence[Choice]) -> int:
        """The parameters of the model under a plan."""
        options = self._source.options(choices)
        return self.total - sum(parameters(layer) - parameters(layer, option) for layer, option in options)


BUDGET = Params()
