"""The error of a weight whose columns are scaled by the size of the layer's inputs.

Yuan et al., ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models, 2023
(arXiv 2312.05821): W S is approximated by its singular value decomposition, where S is diagonal and holds the
mean absolute value of every input to the power ½, and S⁻¹ goes into the encoder. That minimizes ‖(W − Ŵ) S‖²,
a quadratic with the moments S². Here the root mean square stands for the mean absolute value: second moments
have it, and for inputs of one distribution the two differ by a constant factor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Moments
from onnx_lowrank.linalg.quadratic import Quadratic, of_weight

_LEAST = 1e-6  # the ridge of inputs that are always zero, relative to the mean size


def sizes(inputs: Moments) -> NDArray[np.float64]:
    """The root mean square of every input, about zero; shape (g, p)."""
    squares = np.diagonal(inputs.second, axis1=1, axis2=2) + inputs.mean**2
    return np.asarray(np.sqrt(np.maximum(squares, 0.0)))


def of_scaled(weight: NDArray[Any], inputs: Moments) -> Quadratic:
    """The error ‖(W − Ŵ) S‖² of an approximation of a weight, S² the sizes of its inputs.

    Args:
        weight: Canonical weight W, shape (g, f, c, *kernel), any real dtype.
        inputs: Moments of the patches.

    Raises:
        InputError: The moments are not finite.
    """
    size = sizes(inputs)
    diagonal = np.zeros_like(inputs.second)
    index = np.arange(size.shape[1])
    diagonal[:, index, index] = size
    scaling = Moments(inputs.count, np.zeros_like(size), diagonal)
    return of_weight(weight, scaling, centred=True, ridge=_LEAST)
