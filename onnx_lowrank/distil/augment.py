"""Changes of inputs that give more of them: the original model itself says what their outputs are.

Rules:

1. Images are mirrored and shifted, pairs of samples are mixed, and floats get noise.
2. A change of single samples is used only if the original takes the changed inputs for inputs of the same
   kind: on them it is as sure of its classes, and its outputs vary as much, as on the given ones. So mirrored
   photographs are used, and mirrored text is not.
3. Integers stay: a token that is no neighbour of another has none between.

Mixing is from Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.engines.engine import Feed

Floats = NDArray[np.floating]
Draws = np.random.Generator
Change = Callable[[Floats, Draws], Floats]
"""Changes a batch of one input."""

_CHANNELS = (1, 3, 4)
_LEAST = 16  # pixels; smaller ones are no images
_SHIFT = 8  # the largest shift is this part of a side
_NOISE = 0.05  # of the standard deviation of the input
_SHARE = 0.5  # of the samples of a batch that are changed
_KEPT = 0.9  # of the sureness
_FEW = 8  # samples; fewer do not show how sure the original is


@dataclass(frozen=True, slots=True)
class Named:
    """A change.

    Attributes:
        name: Its name in reports.
        change: Makes it.
        is_joint: Whether it joins samples: on such inputs the original is less sure, and rule 2 says nothing.
    """

    name: str
    change: Change
    is_joint: bool = False


def sides(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The axes of the height and the width of a batch of images; None for other inputs."""
    for axes, channel in (((2, 3), 1), ((1, 2), 3)):
        if len(shape) == 4 and shape[channel] in _CHANNELS and min(shape[axes[0]], shape[axes[1]]) >= _LEAST:
            return axes
    return None


def changes(shape: tuple[int, ...]) -> tuple[Named, ...]:
    """The changes of an input of floats.

    Args:
        shape: The shape of a batch of it, samples first.
    """
    axes = sides(shape)
    if axes is None:
        return (Named("noisy", _noisy), Named("mixed", _mixed, is_joint=True))
    return (
        Named("mirrored", partial(_mirrored, axis=axes[1])),
        Named("shifted", partial(_shifted, axes=axes)),
        Named("mixed", _mixed, is_joint=True),
        Named("pasted", partial(_pasted, axes=axes), is_joint=True),
    )


def _mirrored(x: Floats, draws: Draws, axis: int) -> Floats:
    """Half of the images, mirrored."""
    return np.where(_some(x, draws), np.flip(x, axis), x)


def _shifted(x: Floats, draws: Draws, axes: tuple[int, int]) -> Floats:
    """All images, shifted by up to an eighth of each side; edges are repeated."""
    made = np.empty_like(x)
    for number, image in enumerate(x):
        for axis in axes:
            most = x.shape[axis] // _SHIFT
            places = np.arange(x.shape[axis]) + draws.integers(-most, most + 1)
            image = np.take(image, places.clip(0, x.shape[axis] - 1), axis - 1)
        made[number] = image
    return made


def _noisy(x: Floats, draws: Draws) -> Floats:
    noise = draws.standard_normal(x.shape, np.float32) * (_NOISE * x.std(axis=0, keepdims=True))
    return np.where(_some(x, draws), x + noise, x).astype(x.dtype)


def _mixed(x: Floats, draws: Draws) -> Floats:
    """Half of the samples, each a weighted mean of two."""
    share = draws.random((len(x), *[1] * (x.ndim - 1)))
    others = x[draws.permutation(len(x))]
    return np.where(_some(x, draws), share * x + (1 - share) * others, x).astype(x.dtype)


def _pasted(x: Floats, draws: Draws, axes: tuple[int, int]) -> Floats:
    """Half of the images, with a rectangle of another image."""
    made, others = x.copy(), x[draws.permutation(len(x))]
    for number in np.flatnonzero(_some(x, draws)):
        side = np.sqrt(draws.random())
        place: list[slice] = [slice(None)] * (x.ndim - 1)
        for axis in axes:
            length = int(side * x.shape[axis])
            start = int(draws.integers(x.shape[axis] - length + 1))
            place[axis - 1] = slice(start, start + length)
        made[number][tuple(place)] = others[number][tuple(place)]
    return made


def _some(x: Floats, draws: Draws) -> NDArray[np.bool_]:
    """A random half of the samples; broadcasts to them."""
    return (draws.random(len(x)) < _SHARE).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The changes in use.

    Attributes:
        used: The changes of every input.
    """

    used: Mapping[str, tuple[Named, ...]]

    def __call__(self, feed: Feed, draws: Draws) -> Feed:
        """A batch with changed inputs.

        Args:
            feed: The batch, samples first.
            draws: Draws the changes.
        """
        made = dict(feed)
        for name, listed in self.used.items():
            for one in listed:
                made[name] = np.ascontiguousarray(one.change(made[name], draws))
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the changes."""
        return tuple(dict.fromkeys(one.name for listed in self.used.values() for one in listed))


def chosen(feed: Feed, sureness: Callable[[Feed], Sequence[float]], draws: Draws) -> Augmentation:
    """The changes that the original takes for inputs of the same kind (rule 2).

    Several inputs belong together, so that none of them may change alone.

    Args:
        feed: A batch of inputs, samples first.
        sureness: For each output, how sure the original is, or how much it varies, on a batch.
        draws: Draws the changes.
    """
    arrays = [name for name, array in feed.items() if array.ndim]
    if len(arrays) != 1 or feed[arrays[0]].dtype.kind != "f" or feed[arrays[0]].ndim < 2:
        return Augmentation({})
    (name,) = arrays
    if len(feed[name]) < _FEW:
        return Augmentation({})
    given = sureness(feed)

    def fits(one: Named) -> bool:
        changed = sureness(Augmentation({name: (one,)})(feed, draws))
        return all(new >= _KEPT * old for old, new in zip(given, changed, strict=True))

    return Augmentation({name: tuple(one for one in changes(feed[name].shape) if one.is_joint or fits(one))})
