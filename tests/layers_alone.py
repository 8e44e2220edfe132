"""Layers without a model, for tests of what they cost."""

from math import prod

from evaluated import evaluated
from onnx_lowrank.core.layer import Layer, Use
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe

ALL = tuple(Fold)


def use(op="Conv", positions=None, transposed=False):
    return Use("", 0, "node", op, 1, transposed=transposed, positions=positions)


def layer(f, c, kernel=(), groups=1, uses=(), folds=None, slices=None, **fields):
    if folds is None:
        folds = ALL if prod(kernel) > 1 and len(kernel) == 2 else (Fold.ENCODE,)
    if slices is None:
        slices = tuple(k for k in range(1, c // groups + 1) if c // groups % k == 0)
    op = uses[0].op if uses else "Conv"
    return evaluated(Layer("w", op, f, c, kernel, groups, "float32", folds, slices, tuple(uses), **fields))


def recipe(folds=ALL, groups=None):
    return Recipe("test", "A test.", folds, groups, aggregate=Aggregate.MAX)
