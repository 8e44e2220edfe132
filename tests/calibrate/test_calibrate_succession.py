"""Whether samples that follow each other are alike: the ratio of von Neumann, and its warning."""

import numpy as np
import pytest

from onnx_lowrank import compress
from onnx_lowrank.calibrate.succession import Succession
from rewriting import model

NET = """g (float[N,16] x) => (float[N,6] y) { a = MatMul (x, w1) r = Relu (a) y = MatMul (r, w2) }"""


def walk(number, share, seed=0, size=16):
    """Samples of which each is this share of the one before, and new beside it."""
    rng = np.random.default_rng(seed)
    made = [rng.standard_normal(size)]
    for _ in range(number - 1):
        made.append(share * made[-1] + (1 - share**2) ** 0.5 * rng.standard_normal(size))
    return np.array(made, np.float32)


def of(y, *cuts, feed=None):
    """The succession of outputs that come in batches."""
    found = Succession()
    for number, part in enumerate(np.split(y, cuts)):
        found.add(number, {"y": part}, feed or {"x": part})
    return found


@pytest.mark.parametrize("cuts", [(), (1,), (10, 11, 40)])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_the_correlation_is_the_ratio_of_von_neumann(share, cuts):
    y = walk(60, share)
    wide = y.astype(float)
    steps, around = np.square(np.diff(wide, axis=0)).sum(), np.square(wide - wide.mean(axis=0)).sum()
    assert of(y, *cuts).correlation == pytest.approx(1 - 60 / 59 * steps / (2 * around), rel=1e-9)
    assert of(y, *cuts).correlation == pytest.approx(share, abs=0.15)


def test_a_batch_counts_once():
    y = walk(60, 0.5)
    found = of(y, 30)
    known = found.correlation
    found.add(0, {"y": y[:30]}, {"x": y[:30]})
    assert found.correlation == known


def test_outputs_of_every_size_weigh_alike():
    fast, slow = walk(60, 0.0, size=400), 100 * walk(60, 0.9)
    found = Succession()
    found.add(0, {"fast": fast, "slow": slow}, {"x": fast})
    assert found.correlation == pytest.approx((of(fast).correlation + of(slow).correlation) / 2)


@pytest.mark.parametrize(
    "y",
    [
        walk(24, 0.9),
        np.ones((60, 4), np.float32),
        np.arange(60)[:, None],
        np.full((60, 4), np.nan, np.float32),
        np.full((60, 4), 1e300) * np.array([[1.0], [-1.0]] * 30),
        np.ones(60, dtype=object),
    ],
    ids=["few", "constant", "integers", "NaN", "overflow", "texts"],
)
def test_nothing_is_said_of_other_outputs(y):
    assert of(y).correlation is None
    assert of(y).warnings == ()


def test_nothing_is_said_of_outputs_without_an_axis_of_samples():
    y = walk(60, 0.9)
    assert of(y, feed={"x": np.zeros((1, 60))}).correlation is None


def test_nothing_is_said_of_outputs_of_several_shapes():
    found = of(walk(30, 0.9))
    found.add(1, {"y": walk(30, 0.9, size=8)}, {"x": np.zeros((30, 2))})
    assert found.correlation is None


@pytest.mark.parametrize(("share", "warned"), [(0.99, True), (0.0, False)])
def test_the_report_warns(share, warned):
    rng = np.random.default_rng(1)
    weights = {"w1": rng.standard_normal((16, 24)), "w2": rng.standard_normal((24, 6))}
    proto = model(NET, **{name: weight.astype(np.float32) for name, weight in weights.items()})
    result = compress(proto, 0.7, recipe="activation", calibration={"x": walk(200, share)}, device="cpu")
    said = [text for text in result.report.warnings if text.startswith("Samples that follow each other")]
    assert len(said) == warned
