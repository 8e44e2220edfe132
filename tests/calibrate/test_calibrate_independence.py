"""How many independent vectors the moments of dependent ones are worth, and the ridge that follows."""

from __future__ import annotations

import numpy as np
import pytest

import onnx_lowrank
from onnx_lowrank.calibrate.independence import Blocks
from onnx_lowrank.calibrate.moments import Accumulator, merged
from onnx_lowrank.linalg.quadratic import shrinkage
from onnx_lowrank.work.moments import LayerMoments, MomentsRef
from tiny import built, decaying

SCALE = np.arange(1, 13)


def moments(blocks, groups=1):
    """Moments of blocks of shape (number, g n)."""
    size = blocks[0].shape[-1] // groups
    accumulator = Accumulator("x", groups, size)
    for block in blocks:
        rows = block.reshape(len(block), groups, size)
        for start in range(0, len(rows), 7):
            accumulator.add(rows[start : start + 7])
        accumulator.close_block()
    return accumulator.moments()


def drawn(seed, blocks=40, number=30, mean=0.0):
    """Independent Gaussian vectors."""
    rng = np.random.default_rng(seed)
    return [mean + rng.standard_normal((number, 12)) * SCALE for _ in range(blocks)]


@pytest.mark.parametrize("chunk", [7, 13, 30, 50, 60, 70, 1200])
def test_samples_in_one_batch_are_blocks(chunk):
    """A batch in chunks of any size gives what its samples give one by one."""
    blocks = drawn(2)
    accumulator = Accumulator("x", 1, 12)
    rows = np.concatenate(blocks)
    for start in range(0, len(rows), chunk):
        accumulator.add(
            rows[start : start + chunk, None], np.arange(start, min(start + chunk, len(rows))) // 30
        )
    accumulator.close_block()
    assert accumulator.moments().independent == pytest.approx(moments(blocks).independent, rel=1e-2)


def exact(blocks):
    """The definition, with the matrices of all blocks."""
    every = np.concatenate(blocks)
    mean = every.mean(axis=0)
    whole = (every - mean).T @ (every - mean) / len(every)
    number = len(blocks)
    parts = [
        (len(b) / len(every)) ** 2 * np.sum(((b - mean).T @ (b - mean) / len(b) - whole) ** 2) for b in blocks
    ]
    variance = number / (number - 1) * sum(parts)
    return (np.sum(whole**2) + np.trace(whole) ** 2) / variance


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("sizes", [(30, 30, 30, 30), (5, 80, 33)])
def test_the_estimate_is_that_of_the_definition_over_many_signs(sizes, mean, monkeypatch):
    monkeypatch.setattr("onnx_lowrank.calibrate.independence._PAIRS", 20_000)
    rng = np.random.default_rng(3)
    # Each block has a scale of its own, so the vectors are worth far fewer.
    blocks = [
        mean + s * rng.standard_normal((n, 12)) * SCALE for n, s in zip(sizes, (1, 2, 3, 1), strict=False)
    ]
    found = moments(blocks).independent
    assert found < 0.7 * sum(sizes)
    assert found == pytest.approx(exact(blocks), rel=0.03)


def test_independent_vectors_are_worth_their_number():
    found = [moments(drawn(seed)).independent / 1200 for seed in range(20)]
    assert np.mean(found) == pytest.approx(1, abs=0.05)
    assert max(found) <= 1


@pytest.mark.parametrize("times", [2, 5])
def test_repeated_vectors_give_the_ridge_of_the_distinct_ones(times):
    """Tokens that occur twice in every sample tell nothing new."""
    rng = np.random.default_rng(0)
    # Samples with a scale of their own: their vectors are not independent, and none is cut off at the number.
    blocks = [block * rng.uniform(0.5, 2) for block in drawn(1)]
    once = moments(blocks)
    again = moments([np.repeat(block, times, axis=0) for block in blocks])
    assert again.count == times * once.count
    assert once.independent < once.count / 2
    assert again.independent == pytest.approx(once.independent, rel=1e-9)
    assert shrinkage(again) == pytest.approx(shrinkage(once), rel=1e-9)
    assert shrinkage(once) > 1.5 * shrinkage(_without(once))


def _without(known):
    return type(known)(known.count, known.mean, known.second)


def test_the_variance_of_the_moments_is_that_of_so_many_vectors():
    """Over repeated draws, the second moments of dependent vectors vary as the estimate says."""

    def dependent(seed):
        rng = np.random.default_rng(seed)
        # Vectors of a block share most of their signs and sizes.
        shared = rng.standard_normal((25, 1, 12))
        return list((0.9 * shared + 0.3 * rng.standard_normal((25, 20, 12))) * SCALE)

    made = [moments(dependent(seed)) for seed in range(200)]
    truth = 0.9 * np.diag(SCALE**2.0)
    variance = np.mean([np.sum((one.second - truth) ** 2) for one in made])
    worth = (np.sum(truth**2) + np.trace(truth) ** 2) / variance
    assert worth < 60  # of 500 vectors
    assert np.median([one.independent for one in made]) == pytest.approx(worth, rel=0.15)


def test_the_group_with_the_fewest_counts():
    rng = np.random.default_rng(0)
    one, other = drawn(0), [block * rng.uniform(0.3, 3) for block in drawn(1)]
    both = [np.concatenate([a, b], axis=1) for a, b in zip(one, other, strict=True)]
    blocks = Blocks(2, 12)
    for block in both:
        blocks.add(block.reshape(-1, 2, 12))
        blocks.close()
    known = moments(both, groups=2)
    assert known.independent == pytest.approx(blocks.independent(known.mean, known.second), rel=1e-12)
    assert known.independent < 0.7 * moments(one).independent


def test_one_block_tells_nothing():
    assert moments(drawn(0, blocks=1)).independent is None
    assert moments([*drawn(0, blocks=1), np.zeros((0, 12))]).independent is None
    assert Blocks(1, 3).independent(np.zeros((1, 3)), np.zeros((1, 3, 3))) is None
    known = moments(drawn(0, blocks=1))
    assert shrinkage(known) == shrinkage(_without(known))


def test_vectors_that_never_vary_are_worth_their_number():
    assert moments([np.ones((4, 3)), np.ones((5, 3))]).independent == 9


def test_streams_are_worth_what_their_variances_say():
    parts = [moments(drawn(seed, number=number)) for seed, number in ((0, 10), (1, 50))]
    parts = [
        type(p)(p.count, p.mean, p.second, worth) for p, worth in zip(parts, (100.0, 600.0), strict=True)
    ]
    share = parts[0].count / (parts[0].count + parts[1].count)
    joint = merged(parts)
    assert joint.independent == pytest.approx(1 / (share**2 / 100 + (1 - share) ** 2 / 600), rel=1e-12)
    assert merged([parts[0], _without(parts[1])]).independent is None
    assert merged(parts[:1]).independent == pytest.approx(100)


@pytest.mark.parametrize("worth", [None, 12.5])
def test_the_number_is_kept_on_disk(tmp_path, worth):
    known = _without(moments(drawn(0, blocks=2)))
    known = type(known)(known.count, known.mean, known.second, worth)
    ref = MomentsRef(tmp_path, 0, of_outputs=False)
    ref.write(known, None)
    found = ref.read()
    assert isinstance(found, LayerMoments)
    assert (found.inputs.count, found.inputs.independent) == (known.count, worth)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_the_plan_of_repeated_tokens_is_that_of_the_distinct_ones(batched, flat):
    """Sequences with repeated tokens are scored and fitted like the distinct tokens, also in one batch."""
    body = "y = MatMul (x, w)"
    if flat:  # as exporters do before a Gemm: the tokens of all samples are rows of one axis
        body = "rows = Reshape (x, flat) out = Gemm (rows, w) shape = Shape (x) y = Reshape (out, shape)"
    proto = built(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, T, 24] x) => (float[N, T, 24] y) '
        f"<int64[2] flat = {{-1, 24}}> {{ {body} }}",
        {"w": decaying(1, 24, 24)},
    )
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((60, 4, 24)) * rng.uniform(0.2, 3, (60, 1, 1))).astype(np.float32)
    errors = []
    for tokens in (x, np.repeat(x, 4, axis=1)):
        given = {"x": tokens} if batched else [{"x": one[None]} for one in tokens]
        shape = {"x": (1, 4, 24)}
        result = onnx_lowrank.compress(
            proto, 0.6, recipe="pca", budget="macs", calibration=given, input_shape=shape
        )
        errors.append(result.report.layers[0].error)
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
