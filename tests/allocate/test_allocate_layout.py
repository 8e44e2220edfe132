"""Ranks and widths that ONNX Runtime's blocked layout of convolutions holds."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from evaluated import evaluated
from onnx_lowrank import compress
from onnx_lowrank.allocate.cost import Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.layout import holds_ranks, holds_widths
from onnx_lowrank.allocate.options import candidates, narrowings
from onnx_lowrank.allocate.solve import _ratios
from onnx_lowrank.budgets.macs import known_macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.layer import Beside, Between, Layer, Narrowing, Use
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe

PARAMS, MACS = Linear(parameters), Linear(known_macs)
HELD = {j for j in range(1, 64) if j < 8 or j % 4 == 0}
"""The ranks that two convolutions hold with blocks of 8 channels."""


def layer(op="Conv", kernel=(3, 3), groups=1, dtype="float32", f=64, c=48):
    use = Use("", 0, "n", op, 1)
    return evaluated(Layer("w", op, f, c, kernel, groups, dtype, Fold.distinct(kernel), (1, 2), (use,)))


def narrowed(depthwise=False, **fields):
    partner, beside = replace(layer(**fields), id="up", f=48), Beside(has_convolutions=depthwise)
    return replace(layer(**fields), narrowing=Narrowing(Between.CHANNELS, (partner,), beside=beside))


def test_one_convolution_among_the_partners_is_enough():
    of, widths = narrowed(depthwise=True), np.arange(1, 24)
    (partner,) = of.partners
    matrix = replace(partner, op="Gemm", kernel=())
    mixed = replace(of, op="Gemm", kernel=(), narrowing=replace(of.narrowing, partners=(partner, matrix)))
    assert widths[holds_widths(mixed, widths)].tolist() == [4, 8, 12, 16, 20]


OUTSIDE = {
    "matrices": {"op": "Gemm", "kernel": ()},
    "sequences": {"kernel": (3,)},
    "volumes": {"kernel": (3, 3, 3)},
    "half precision": {"dtype": "float16"},
    "transposed": {"op": "ConvTranspose"},
}


def test_small_ranks_and_multiples_of_four_stay():
    ranks = np.arange(1, 48)
    assert set(ranks[holds_ranks(layer(), 1, ranks)]) == HELD & set(ranks)


@pytest.mark.parametrize("fields", OUTSIDE.values(), ids=OUTSIDE)
def test_other_layers_may_have_any_rank_and_width(fields):
    numbers = np.arange(1, 48)
    assert holds_ranks(layer(**fields), 1, numbers).all()
    assert holds_widths(narrowed(**fields), numbers).all()


@pytest.mark.parametrize("op", ["Conv", "FusedConv"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_the_second_convolution_of_several_slices_stays(k, op):
    of, ranks = replace(layer(), op=op), np.arange(1, 24)
    wanted = {j for j in ranks if k * j < 8 or k * j % 4 == 0}
    assert set(ranks[holds_ranks(of, k, ranks)]) == wanted


@pytest.mark.parametrize("k", [1, 2])
def test_convolutions_with_groups_of_their_own_may_have_any_rank(k):
    assert holds_ranks(layer(groups=2), k, np.arange(1, 24)).all()


@pytest.mark.parametrize("depthwise", [False, True])
def test_a_depthwise_convolution_between_needs_multiples_of_four(depthwise):
    widths = np.arange(1, 48)
    wanted = {width for width in HELD & set(widths) if width % 4 == 0 or not depthwise}
    assert set(widths[holds_widths(narrowed(depthwise), widths)]) == wanted


@pytest.mark.parametrize("depthwise", [False, True])
def test_a_depthwise_convolution_in_front_of_a_matrix_needs_multiples_of_four(depthwise):
    of, widths = replace(narrowed(depthwise), op="Gemm", kernel=()), np.arange(1, 48)
    wanted = {width for width in widths if width % 4 == 0 or not depthwise}
    assert set(widths[holds_widths(of, widths)]) == wanted


@pytest.mark.parametrize("blocked", [False, True])
def test_a_grid_offers_them_where_it_is_asked_to(blocked):
    of, grid = layer(), Grid(PARAMS, 1, blocked)
    every = set(Grid(PARAMS).ranks(of, Fold.ENCODE, 1))
    wanted = every & HELD if blocked else every
    assert set(grid.offered(of, Fold.ENCODE, 1)) == wanted
    errors = {(Fold.ENCODE, 1): np.linspace(1, 0, of.full_rank(Fold.ENCODE, 1) + 1)}
    table = candidates(of, errors, Recipe("r", "For the tests.", (Fold.ENCODE,), (1,)), grid)
    assert set(table.j[1:]) == wanted
    every = set(range(1, 48))
    assert set(grid.together(of, 48)) == (every & HELD if blocked else every)
    curve = narrowings(narrowed(), np.linspace(1, 0, 49), grid, every=True)
    assert set(curve.j[1:]) == (every & HELD if blocked else every)


def test_a_grid_with_other_costs_offers_the_same_ranks():
    assert Grid(PARAMS, 4, blocked=True).at(MACS) == Grid(MACS, 4, blocked=True)


def test_the_uniform_rule_takes_the_next_lower_rank():
    of = layer()
    errors = {(Fold.ENCODE, 1): np.linspace(1, 0, of.full_rank(Fold.ENCODE, 1) + 1)}
    how = Recipe("r", "For the tests.", (Fold.ENCODE,), (1,), aggregate=Aggregate.UNIFORM)
    table = candidates(of, errors, how, Grid(PARAMS, blocked=True))
    begin, end = _ratios(table)
    np.testing.assert_array_equal(begin[1:], end[:-1])
    assert begin[0] == 0
    np.testing.assert_array_equal(begin[1:], table.j[2:] / 64)
    assert (begin[-1], end[-1]) == (52 / 64, 56 / 64)


NCHWC = "com.microsoft.nchwc"


# --- ONNX Runtime --------------------------------------------------------------------------------


def blocks(j, middle=False):
    """Convolutions to j channels and back, with a depthwise one or a Relu in the middle."""
    rng = np.random.default_rng(j)
    weights = {"e": (j, 32, 1, 1), "w": (j, 1, 3, 3), "d": (32, j, 1, 1)}
    between = f"n = Conv <group = {j}, pads = [1,1,1,1]> (m, w)" if middle else "n = Relu (m)"
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,32,8,8] x) => (float[1,32,8,8] y) {{ m = Conv (x, e) {between} y = Conv (n, d) }}""")
    for name, shape in weights.items():
        if middle or name != "w":
            tensor = numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            proto.graph.initializer.append(tensor)
    return proto


def convolutions(proto, folder):
    """The convolutions of the optimized model, by domain."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "o.onnx"), 3
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(folder / "o.onnx").graph.node
    return Counter(node.domain for node in nodes if "Conv" in node.op_type)


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("j", [4, 6, 8, 12, 17, 18, 20, 22, 24, 28, 30, 32, 36])
def test_onnx_runtime_keeps_what_the_rules_allow_in_its_layout(tmp_path, j, middle):
    if not convolutions(blocks(32), tmp_path).get(NCHWC):
        pytest.skip("this processor has no blocked layout in ONNX Runtime")
    found = convolutions(blocks(j, middle), tmp_path)
    if holds_widths(narrowed(middle), np.array([j]))[0]:
        assert found == {NCHWC: 3 if middle else 2}
    elif j >= 16:
        assert found[NCHWC] < (3 if middle else 2)


# --- the command ---------------------------------------------------------------------------------


def network(seed=0):
    """Two convolutions of 48 channels with decaying spectra."""
    rng = np.random.default_rng(seed)
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1,48,6,6] x) => (float[1,48,6,6] y) {
            a = Conv <pads = [1,1,1,1]> (x, v) r = Relu (a) y = Conv <pads = [1,1,1,1]> (r, w) }""")
    for name in "vw":
        left, right = (np.linalg.qr(rng.standard_normal((432, 48)))[0].T for _ in range(2))
        weight = (left[:, :48] * np.exp(-np.arange(48) / 9)[:, None]).T @ right
        shaped = weight.reshape(48, 48, 3, 3).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(shaped, name))
    return proto


@pytest.mark.parametrize("ratio", [0.3, 0.45, 0.6])
@pytest.mark.parametrize("budget", ["params", "macs"])
def test_by_default_all_convolutions_stay_in_the_layout(tmp_path, budget, ratio):
    if set(convolutions(network(), tmp_path)) != {NCHWC}:
        pytest.skip("this processor has no blocked layout in ONNX Runtime")
    result = compress(network(), ratio, budget=budget, recipe="svd")
    assert any(choice.option is not None for choice in result.plan.choices)
    assert set(convolutions(result.proto, tmp_path)) == {NCHWC}


@pytest.mark.parametrize("ratio", [0.3, 0.45, 0.6])
def test_with_slices_only_those_leave_the_layout(tmp_path, ratio):
    result = compress(network(), ratio)
    chosen = [choice.option for choice in result.plan.choices if choice.option is not None]
    assert chosen
    assert all(option.k * option.j in HELD or option.k * option.j % 4 == 0 for option in chosen)


def test_any_rank_can_be_asked_for():
    found = set()
    for ratio in np.linspace(0.3, 0.7, 9):
        result = compress(network(), float(ratio), align=1, recipe="svd")
        found |= {choice.option.j for choice in result.plan.choices if choice.option is not None}
    assert found - HELD
