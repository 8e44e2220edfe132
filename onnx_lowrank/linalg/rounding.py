"""The decoder that goes with a rounded encoder, from the weights alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]


def refitted(encoder: Weights, rounded: Weights, decoder: Weights) -> Weights:
    """The decoder D' of least ‖D E − D' Ê‖ in the Frobenius norm, for every position of its kernel.

    Args:
        encoder: E, a canonical weight, shape (groups, features / groups, c, *kernel).
        rounded: Ê, of the same shape.
        decoder: D, a canonical weight, shape (groups, f, features / groups, *kernel); its groups may be
            others than those of the encoder.

    Returns:
        D' of D's shape; D itself if Ê = E.
    """
    if np.array_equal(encoder, rounded):
        return decoder
    before, after = (factor.reshape(*encoder.shape[:2], -1) for factor in (encoder, rounded))
    cross, gram = _blocks(before @ after.swapaxes(1, 2)), _blocks(after @ after.swapaxes(1, 2))
    made = np.empty(decoder.shape)
    width = decoder.shape[2]
    for group in range(len(decoder)):
        part = slice(group * width, (group + 1) * width)
        change = cross[part, part] @ np.linalg.pinv(gram[part, part], hermitian=True)
        made[group] = np.einsum("fj...,ji->fi...", decoder[group], change)
    return made


def _blocks(matrices: Weights) -> Weights:
    """One matrix with these on its diagonal: features of different groups read different inputs."""
    groups, size, _ = matrices.shape
    whole = np.zeros((groups * size, groups * size))
    for group, matrix in enumerate(matrices):
        part = slice(group * size, (group + 1) * size)
        whole[part, part] = matrix
    return whole
