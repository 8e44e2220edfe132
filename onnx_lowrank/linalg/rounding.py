"""A decoder fitted to a rounded encoder, and an encoder fitted to a rounded decoder, from the weights alone.

An encoder has the canonical shape (groups, features / groups, c, *kernel), and its decoder (groups, f,
features / groups, *kernel), perhaps with other groups. The encoder's features are the decoder's inputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]


def decoder(encoder: Weights, rounded: Weights, plain: Weights) -> Weights:
    """The decoder D' of least ‖D E − D' Ê‖ in the Frobenius norm, for every position of its kernel.

    Args:
        encoder: E.
        rounded: Ê, of the same shape.
        plain: D.

    Returns:
        D' of D's shape; D itself if Ê = E.
    """
    if np.array_equal(encoder, rounded):
        return plain
    before, after = (factor.reshape(*encoder.shape[:2], -1) for factor in (encoder, rounded))
    cross, gram = _blocks(before @ after.swapaxes(1, 2)), _blocks(after @ after.swapaxes(1, 2))
    made = np.empty(plain.shape)
    for group, part in enumerate(_parts(plain.shape[2], len(plain))):
        change = cross[part, part] @ np.linalg.pinv(gram[part, part], hermitian=True)
        made[group] = np.einsum("fj...,ji->fi...", plain[group], change)
    return made


def encoder(decoder: Weights, rounded: Weights, plain: Weights) -> Weights:
    """The encoder E' of least ‖D E − D̂ E'‖ in the Frobenius norm.

    Args:
        decoder: D.
        rounded: D̂, of the same shape.
        plain: E.

    Returns:
        E' of E's shape; E itself if D̂ = D.
    """
    if np.array_equal(decoder, rounded):
        return plain
    before, after = (
        _blocks(np.stack([_columns(group) for group in factor])) for factor in (decoder, rounded)
    )
    made = np.empty(plain.shape)
    for group, part in enumerate(_parts(plain.shape[1], len(plain))):
        change = np.linalg.pinv(after[:, part]) @ before[:, part]
        made[group] = np.einsum("ij,j...->i...", change, plain[group])
    return made


def error(factors: tuple[Weights, Weights], rounded: tuple[Weights, Weights]) -> float:
    """‖D E − D̂ Ê‖² in the Frobenius norm, for encoders and decoders in this order."""
    columns = [_blocks(np.stack([_columns(group) for group in pair[1]])) for pair in (factors, rounded)]
    total = 0.0
    for group, part in enumerate(_parts(factors[0].shape[1], len(factors[0]))):
        products = [
            one[:, part] @ pair[0][group].reshape(pair[0].shape[1], -1)
            for one, pair in zip(columns, (factors, rounded), strict=True)
        ]
        total += float(np.sum((products[0] - products[1]) ** 2))
    return total


def _columns(group: Weights) -> Weights:
    """A decoder's group as a matrix with a column for each of its inputs."""
    return np.moveaxis(group, 1, -1).reshape(-1, group.shape[1])


def _parts(width: int, number: int) -> list[slice]:
    return [slice(index * width, (index + 1) * width) for index in range(number)]


def _blocks(matrices: Weights) -> Weights:
    """One matrix with these on its diagonal."""
    groups, height, width = matrices.shape
    whole = np.zeros((groups * height, groups * width))
    for part, other, matrix in zip(_parts(height, groups), _parts(width, groups), matrices, strict=True):
        whole[part, other] = matrix
    return whole
