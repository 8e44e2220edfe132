"""Einsum that is a matrix product: exact at full rank, and left alone where it is none."""

from __future__ import annotations

import numpy as np
import pytest

from fused import check_exact, feed, model
from onnx_lowrank import compress
from onnx_lowrank.layers.find import geometry
from onnx_lowrank.operators.geometry import outputs, patches
from rewriting import found, read_of, run

# Equation with w in the second place, shapes of x and w, and (g, f, c).
PRODUCTS = {
    "matrix": ("bc,cf->bf", (5, 12), (12, 16), (1, 16, 12)),
    "sequence": ("bsc,cf->bsf", (2, 5, 12), (12, 16), (1, 16, 12)),
    "transposed weight": ("bsc,fc->bsf", (2, 5, 12), (16, 12), (1, 16, 12)),
    "features first": ("bcs,fc->bfs", (2, 12, 5), (16, 12), (1, 16, 12)),
    "to heads": ("bsc,chd->bshd", (2, 5, 12), (12, 4, 6), (1, 24, 12)),
    "to heads, transposed": ("bsc,chd->bhsd", (2, 5, 12), (12, 4, 6), (1, 24, 12)),
    "from heads": ("bshd,hdc->bsc", (2, 5, 4, 6), (4, 6, 12), (1, 12, 24)),
    "per head": ("bhsd,hde->bhse", (2, 3, 5, 12), (3, 12, 16), (3, 16, 12)),
    "per head, mixed": ("bshd,ehd->bhse", (2, 5, 3, 12), (16, 3, 12), (3, 16, 12)),
    "no rows": ("c,cf->f", (12,), (12, 16), (1, 16, 12)),
    "ellipsis": ("...j,kj->...k", (2, 5, 12), (16, 12), (1, 16, 12)),
    "ellipsis of one axis": ("...c,cf->...f", (5, 12), (12, 16), (1, 16, 12)),
    "ellipsis of no axis": ("...c,cf->...f", (12,), (12, 16), (1, 16, 12)),
    "ellipsis inside": ("b...hd,hde->h...be", (2, 5, 4, 3, 12), (3, 12, 16), (3, 16, 12)),
    "implicit": ("bij, jk", (2, 5, 12), (12, 16), (1, 16, 12)),
    "implicit, other order": ("bz, za", (5, 12), (12, 16), (1, 16, 12)),
    "implicit ellipsis": ("...j, jk", (2, 5, 12), (12, 16), (1, 16, 12)),
    "capital letters": ("B c, c F -> B F", (5, 12), (12, 16), (1, 16, 12)),
}


def einsum(equation, x, w, weight_first=False):
    terms, arrow, result = equation.partition("->")
    left, right = terms.split(",")
    if weight_first:
        equation = f"{right},{left}{arrow}{result}"
    operands = "w, x" if weight_first else "x, w"
    sizes = ",".join(map(str, x))
    return model(f"float[{sizes}] x", f'y = Einsum <equation = "{equation}"> ({operands})', w=w)


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_exact_at_full_rank(name, weight_first):
    equation, x, w, shape = PRODUCTS[name]
    seen = check_exact(einsum(equation, x, w, weight_first))
    assert seen.layer.shape == shape


@pytest.mark.parametrize("name", PRODUCTS)
def test_patches_times_the_weight_are_the_outputs(name):
    equation, x, w, (g, _, c) = PRODUCTS[name]
    proto = einsum(equation, x, w)
    seen = found(proto)
    (binding,) = seen.bindings
    form, given = geometry(seen.walk, binding, 0), feed(proto)
    rows = np.concatenate(list(patches(form, given["x"])))
    results = np.concatenate(list(outputs(form, run(proto, given)[0])))
    assert rows.shape[1:] == (g, c)
    products = np.einsum("gfc,rgc->rgf", read_of(seen).astype(np.float64), rows.astype(np.float64))
    np.testing.assert_allclose(products, results, atol=1e-4)


REFUSED = {
    "an ellipsis in the weight": ("bc,...cf->b...f", (5, 12), (3, 12, 16)),
    "a sum over an ellipsis": ("...c,cf->f", (5, 12), (12, 16)),
    "implicit, of both cases": ("bc,cF", (5, 12), (12, 16)),
    "a sum over rows": ("bc,cf->f", (5, 12), (12, 16)),
    "a sum over outputs": ("bc,cf->b", (5, 12), (12, 16)),
    "a diagonal": ("bc,cc->bc", (5, 12), (12, 12)),
    "element by element": ("bc,bc->bc", (12, 16), (12, 16)),
    "an outer product": ("b,cf->bcf", (5,), (12, 16)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_product_is_left_alone(name):
    equation, x, w = REFUSED[name]
    seen = found(einsum(equation, x, w))
    assert "equation" in seen.reason or "element by element" in seen.reason


def test_macs_are_those_of_the_product():
    before = found(einsum("bsc,chd->bshd", (2, 5, 12), (12, 4, 6))).layer.uses[0].evaluations
    assert before.dense == 10
    assert set(before.factors.values()) == {(10, 10)}


def test_products_of_activations_are_counted():
    proto = model("float[2,3,5,4] x, float[2,3,7,4] z", 'y = Einsum <equation = "bhqd,bhkd->bhqk"> (x, z)')
    (scope,) = found(proto).work
    assert scope.macs == 2 * 3 * 5 * 7 * 4


@pytest.mark.parametrize("equation", ["bsc,chd->bhsd", "...c,chd->...hd", "bsc, chd"])
def test_an_einsum_is_compressed_from_end_to_end(equation):
    rng = np.random.default_rng(2)
    weight = (
        (rng.standard_normal((24, 5)) @ rng.standard_normal((5, 32))).reshape(24, 4, 8).astype(np.float32)
    )
    proto = model("float[n,5,24] x", f'y = Einsum <equation = "{equation}"> (x, w)', w=weight)
    data = {"x": rng.standard_normal((40, 5, 24)).astype(np.float32)}
    for options in ({"recipe": "schatten"}, {"recipe": "activation", "calibration": data}):
        with compress(proto, 0.5, **options) as result:
            (row,) = result.report.layers
            assert row.option is not None
            assert result.report.validation.worst < 1e-3
