"""Parameters against the sizes of the factors."""

from math import prod

import pytest

from layers_alone import ALL, layer
from onnx_lowrank.allocate.cost import Linear
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.option import Option


def factor_shapes(of, fold, k, j):
    """The shapes of `Factors`."""
    g, f, c, *_ = of.shape
    encoder, decoder = fold.kernels(of.kernel)
    return (g, k, j, c // k, *encoder), (g, f, k, j, *decoder)


@pytest.mark.parametrize("fold", ALL)
@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("j", [1, 2, 5])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(3, 5), (1, 1), (5, 1), (2, 2)])
def test_parameters_are_the_sizes_of_the_factors(fold, k, j, groups, kernel):
    of = layer(8 * groups, 6 * groups, kernel, groups, folds=ALL, freed=7, added=11)
    encoder, decoder = factor_shapes(of, fold, k, j)
    assert parameters(of, Option(fold, k, j)) == prod(encoder) + prod(decoder) + 11
    assert parameters(of) == 8 * groups * 6 * prod(kernel) + 7
    line = Linear(parameters).line(of, fold, k)
    assert line.slope * j + line.constant == parameters(of, Option(fold, k, j))
    assert (line.keep, line.constant) == (parameters(of), 11)
