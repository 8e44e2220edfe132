"""Measures: how the error of an option is computed.

Every module of this package is one measure. It defines `MEASURE`, and its file gives the name under which
plans and recipes know it, with "-" for "_": `spectral_bound.py` is "spectral-bound". `names` lists them in
alphabetical order. The formula of every measure stands in `passes/README.md`, too: a test compares them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Spectra
from onnx_lowrank.core.option import Fold
from onnx_lowrank.errors import InputError

Floats = NDArray[np.float64]
Errors = Mapping[tuple[Fold, int], Floats]
"""For (fold, k): the errors at the ranks 0, 1, …, at least up to the largest rank that is cheaper."""


class Needs(Flag):
    """The evidence that a measure needs.

    WEIGHTS are the singular values of a layer's weight. MOMENTS are errors of the layer's activations,
    computed from the moments of its calibration inputs. OUTPUTS are errors of the model's outputs on these
    inputs, with a few options in place of the layer.
    """

    WEIGHTS = auto()
    MOMENTS = auto()
    OUTPUTS = auto()


@dataclass(frozen=True, slots=True)
class Evidence:
    """The known facts about one layer. The fields that a measure needs are filled.

    Attributes:
        spectra: WEIGHTS: singular values of slices, with k = 1 for every fold that occurs.
        activation: MOMENTS and OUTPUTS: E‖(W − Ŵ) x‖² / E‖W x‖² of all options, with a ridge.
        power: MOMENTS and OUTPUTS: the denominator of `activation`.
        effects: OUTPUTS: pairs of an activation error and the error at the model's outputs that it causes.
    """

    spectra: Spectra = field(default_factory=dict)
    activation: Errors = field(default_factory=dict)
    power: float = 1.0
    effects: Sequence[tuple[float, float]] = ()


class Function(Protocol):
    """Computes the errors of all options of a layer."""

    def __call__(self, evidence: Evidence, *, relative: bool) -> Errors:
        """The errors by (fold, k), for all ranks of each.

        Args:
            evidence: The known facts about the layer.
            relative: Divide the errors by the size of the weight or of its outputs.
        """


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure.

    Attributes:
        summary: The formula in one line, for the documentation of recipes.
        needs: The evidence that it needs.
        errors: Computes the errors.
        legend: Description of the errors for the legend of the report.
    """

    summary: str
    needs: Needs
    errors: Function
    legend: str = "as the recipe scores it"

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration inputs."""
        return self.needs != Needs.WEIGHTS


def names() -> tuple[str, ...]:
    """The names of all measures, sorted."""
    return tuple(_found())


def named(name: str) -> Measure:
    """Find the measure with this name.

    Raises:
        InputError: There is none with this name.
    """
    if name not in _found():
        raise InputError(f"There is no measure {name!r}: choose one of {', '.join(names())}.")
    return _found()[name]


@cache
def _found() -> Mapping[str, Measure]:
    """The measures by name, from the modules of this package."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {
        module.replace("_", "-"): importlib.import_module(f"{__name__}.{module}").MEASURE
        for module in modules
    }


def of_spectra(formula: Callable[[Floats, Floats], tuple[Floats, np.float64]]) -> Function:
    """Make a function of the weight's spectra from a formula for one fold and one number of slices.

    Args:
        formula: Computes the errors at the ranks 0, 1, …, full rank − 1 and the norm of the weight from the
            singular values of the slices, shape (groups, k, full rank), and those of the whole weight.
    """

    def errors(evidence: Evidence, *, relative: bool) -> Errors:
        table = {}
        for (fold, k), values in evidence.spectra.items():
            residual, norm = formula(values, evidence.spectra[fold, 1])
            # A weight of zeros has no norm, and loses nothing.
            table[fold, k] = np.asarray(residual / norm if relative and norm > 0 else residual, np.float64)
        return table

    return errors
