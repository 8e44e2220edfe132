"""Inputs made from the original model alone: noise, changed until the statistics of BatchNormalizations fit.

A BatchNormalization stores the mean and the variance of its inputs over the training data. Inputs whose inner
values have these statistics are like the training data as far as the statistics tell: no more than that. From
Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", 2020.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnx_lowrank.distil.distillation import settings, whole_proto
from onnx_lowrank.distil.program import program
from onnx_lowrank.engines.inputs import Spec, specs
from onnx_lowrank.engines.made import one_sample
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.graph.weights import constant

_log = logging.getLogger(__name__)

COUNT = 256
"""Number of inputs."""

_BATCH = 32
_STEPS = 100
_RATE = 0.1  # of the standard deviation of noise
_SMOOTH = 1e-3  # the weight of differences between neighbouring pixels
_SEED = 0


@dataclass(frozen=True, slots=True)
class _Norm:
    """The stored statistics of the inputs of one BatchNormalization, shape (channels,) each."""

    value: str
    mean: Tensor
    variance: Tensor


def synthesized(
    model: Model, shapes: Mapping[str, tuple[int, ...]], step: Callable[[float], None], count: int = COUNT
) -> dict[str, NDArray[np.float32]]:
    """Make inputs for a model.

    Args:
        model: The model.
        shapes: The shapes of inputs whose dimensions the model leaves open, by name.
        step: Is told the share that is done.
        count: Number of inputs.

    Raises:
        InputError: The model has no BatchNormalization, or other inputs than one of floats.
    """
    spec, shape, batch = _shape(model, shapes)
    norms = _norms(model)
    if not norms:
        raise InputError(
            f"{model.name} has no BatchNormalization whose statistics --synthetic could match (they may be "
            "folded into weights): pass inputs with --calibration."
        )
    made = program(whole_proto(model), [norm.value for norm in norms])
    draws, found = torch.Generator().manual_seed(_SEED), []
    with settings():
        for start in range(0, count, batch):
            x = torch.randn(batch, *shape, generator=draws).requires_grad_()
            adam = torch.optim.Adam([x], _RATE)
            for number in range(_STEPS):
                values = made({spec.name: x}, {})
                loss = _misfit([values[norm.value] for norm in norms], norms) + _SMOOTH * _roughness(x)
                adam.zero_grad()
                loss.backward()
                adam.step()
                step((start + x.shape[0] * (number + 1) / _STEPS) / count)
            _log.debug("made %d inputs; the statistics differ by %.3g", len(x), loss.item())
            found.append(x.detach().numpy())
    return {spec.name: np.concatenate(found)[:count]}


def _shape(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Spec, tuple[int, ...], int]:
    """The only input, the shape of one sample without its first axis, and the samples of a batch."""
    wanted = specs(model.proto)
    if len(wanted) != 1 or wanted[0].dtype != np.dtype(np.float32):
        given = ", ".join(f"{spec.name!r} ({spec.dtype})" for spec in wanted)
        raise InputError(
            f"--synthetic makes a single input of float32, and {model.name} has {given}: pass inputs with "
            "--calibration."
        )
    (spec,) = wanted
    stated = spec.shape or ()
    known = shapes.get(spec.name) or one_sample(model.proto, wanted, shapes).get(spec.name) or stated
    sizes = tuple(size for size in known if isinstance(size, int))
    if len(sizes) < max(2, len(known)):
        raise InputError(f"The shape of {spec.name!r} is open: state it with --input-shape.")
    return spec, sizes[1:], stated[0] if isinstance(stated[0], int) else _BATCH


def _norms(model: Model) -> list[_Norm]:
    """The BatchNormalizations of the main graph that read inner values."""
    walk, found = Walk(model.proto), []
    for place in walk.places():
        node = walk.node(place)
        if place.scope or node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        stored = [constant(walk, model, walk.operand(place, operand)) for operand in (3, 4)]
        if stored[0] is not None and stored[1] is not None:
            mean, variance = (torch.from_numpy(np.array(value, np.float32)) for value in stored)
            found.append(_Norm(node.input[0], mean, variance))
    return found


def _misfit(values: Sequence[Tensor], norms: Sequence[_Norm]) -> Tensor:
    """The mean distance of the statistics of values from the stored ones, relative to the stored variance."""
    total = torch.zeros(())
    for value, norm in zip(values, norms, strict=True):
        axes = [axis for axis in range(value.ndim) if axis != 1]
        variance = norm.variance.clamp_min(1e-6)
        shift = (value.mean(axes) - norm.mean).square() / variance
        spread = (value.var(axes, unbiased=False) / variance).clamp_min(1e-6).log().square()
        total = total + (shift + spread).mean()
    return total / len(norms)


def _roughness(x: Tensor) -> Tensor:
    """The mean squared difference between neighbours along the last two axes."""
    axes = range(2, x.ndim)
    return sum((x.diff(dim=axis).square().mean() for axis in axes), torch.zeros(()))
