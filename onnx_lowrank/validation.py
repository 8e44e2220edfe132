"""The comparison of a compressed model with its input model, on all data that a run has for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from onnx_lowrank.core.option import Lowering
from onnx_lowrank.core.outcome import Continuation, OutputError, Trial, Validation
from onnx_lowrank.engines.engine import Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.padding import NO_PADDING
from onnx_lowrank.engines.running import Engine, fitting_engine
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.load import Model, ModelProto
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.material import Material, held_out
from onnx_lowrank.probe.excerpt import excerpts
from onnx_lowrank.request import Setting
from onnx_lowrank.stages import settling
from onnx_lowrank.stages.build import Built, judge
from onnx_lowrank.stages.check import Measured, errors, fault, validate

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.calibration import Calibration

_TOGETHER = (Lowering.NARROW, Lowering.SHARED, Lowering.SUMMED)
"""The ways to rewrite a layer that change the nodes of others, too."""

_SHOWN = 16
"""Number of calibration samples that show which layers run."""


@dataclass(frozen=True, slots=True)
class Validator:
    """Compares compressed models with the input model.

    Attributes:
        material: The input model and the data.
        setting: The tools and the bounds of the run.
    """

    material: Material
    setting: Setting

    def __call__(
        self, built: Built, calibration: Calibration | None, trials: tuple[Trial, ...]
    ) -> Validation:
        """Compare a compressed model with the input model.

        Args:
            built: The compressed model.
            calibration: The calibration inputs; None without any.
            trials: The plans that were tried; the chosen one has its errors on held-out inputs.

        Raises:
            ValidationError: As for `stages.check.validate`.
            InputError: The models fail on the data.
        """
        rewritten = built.rewritten
        bindings = {binding.layer.id: binding for binding in self.material.found.bindings}

        @cache
        def new_walk() -> Walk:
            return Walk(rewritten.model.proto)

        # No chain of these reads the layer's own input, so none can be compared alone.
        shared = {layer for merged in built.merges for layer in merged.layers}
        options = settling.options(built.plan).items()
        shared |= {layer for layer, option in options if option.lowering in _TOGETHER}

        def alone(layer: str) -> tuple[ModelProto, ModelProto] | None:
            if layer in shared:
                return None
            chain = rewritten.chains[layer][0]
            model, walk = self.material.found.model, self.material.found.walk
            return excerpts(model, walk, rewritten.model, new_walk(), bindings[layer], chain)

        given, others = self.material.given, self.material.others
        padding = NO_PADDING if calibration is None else calibration.statistics.padding
        held = None
        if calibration is not None and (given is None or others is not None):
            held = self._held(built, calibration, trials)
        last = {layer: tuple(chain[-1] for chain in chains) for layer, chains in rewritten.chains.items()}
        validation = validate(
            self.material.found.model,
            rewritten.model,
            last,
            alone=alone,
            inputs=given,
            measured=held if given is None else None,
            padding=padding,
            input_shapes=self.setting.sets[0],
            provider=self.setting.provider,
            engine=self.setting.engine,
            max_error=self.setting.max_error,
        )
        validation = replace(validation, continuation=self._continuation(rewritten.model, calibration))
        if others is None:
            return validation
        from onnx_lowrank.stages.other import compare_on

        familiar, kind = (validation.outputs, "inputs") if given is not None else ((), "")
        if held is not None and calibration is not None:
            familiar, kind = held.outputs, "held-out" if calibration.samples.held else "calibration"
        if self.setting.has_own_engine:
            others = replace(others, engine=self.setting.tool)
        other = compare_on(others, self.material.found.model, rewritten.model, familiar, kind, padding)
        return replace(validation, other=other)

    def errors(self, built: Built, calibration: Calibration | None) -> tuple[OutputError, ...]:
        """The errors of a model's outputs on the inputs of the comparison, without its other checks.

        Args:
            built: The model.
            calibration: The calibration inputs; None without any.

        Raises:
            ValidationError: As for `stages.check.errors`.
            InputError: The models fail on the data.
        """
        given = self.material.given
        if given is None and calibration is not None:
            return self._held(built, calibration, ()).outputs
        return errors(
            self.material.found.model,
            built.rewritten.model,
            inputs=given,
            padding=NO_PADDING if calibration is None else calibration.statistics.padding,
            input_shapes=self.setting.sets[0],
            provider=self.setting.provider,
            engine=self.setting.engine,
        )

    def _continuation(self, compressed: Model, calibration: Calibration | None) -> Continuation | None:
        """The agreement of greedy continuations, of a decoder with texts."""
        if calibration is None and self.material.given is None:
            return None
        from onnx_lowrank.engines.continuation import PROMPTS, continued

        engine: Engine = fitting_engine(self.material.found.model, runtime(self.setting.provider))
        feeds: Iterable[Feed] = (self.material.given or {},)
        if calibration is not None:
            engine, feeds = calibration.engine, held_out(calibration.samples, PROMPTS)
        try:
            return continued(self.material.found.model, compressed, engine, feeds)
        except (UnsupportedError, RejectedError) as error:
            raise fault(engine, error) from error

    def _held(self, built: Built, calibration: Calibration, trials: tuple[Trial, ...]) -> Measured:
        """The comparison on held-out calibration inputs, or on all of them if none are held out."""
        chosen = next((trial.outputs for trial in trials if trial.chosen), None)
        if self.setting.has_own_engine:
            chosen, calibration = None, calibration.on(self.setting.tool)
        outputs = chosen or judge(self.material.found.model, built, calibration)
        samples = calibration.samples
        source = f"{samples.held or samples.count} {'held-out ' if samples.held else ''}calibration inputs"
        return Measured(outputs, tuple(held_out(samples, _SHOWN)), source)
