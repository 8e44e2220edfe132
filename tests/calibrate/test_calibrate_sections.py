"""Sections of a pass: their sums have the same bits wherever they are computed."""

from __future__ import annotations

import pickle

import numpy as np
import onnx
import pytest
from test_calibrate_independence import drawn, exact
from test_calibrate_measurement import Samples, chain

from onnx_lowrank.calibrate import jobs
from onnx_lowrank.calibrate import measurement as module
from onnx_lowrank.calibrate.measurement import measure
from onnx_lowrank.calibrate.moments import Accumulator
from onnx_lowrank.calibrate.sections import SECTIONS, section_sums
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.keeping import digest
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.work.carried import packed
from onnx_lowrank.work.executor import Threads
from rewriting import draw

CPU = resolve("cpu")
ENGINE = runtime("CPUExecutionProvider")
GIB = 2**30


class Elsewhere(Threads):
    """Threads that get their items as another machine does; counts them."""

    def __init__(self):
        super().__init__(CPU, number=2)
        self.sections = 0

    def reaches(self, files):
        return True

    def map(self, function, items):
        assert function is section_sums

        def sent():
            for item in items:
                self.sections += 1
                assert item.nbytes > 0
                yield Sent(packed(function, item, (), "cpu", {}).data)

        return super().map(arrived, sent())


class Sent:
    nbytes = 1

    def __init__(self, data):
        self.data = data


def arrived(sent, backend):
    function, item = pickle.loads(sent.data)  # noqa: S301
    return pickle.loads(pickle.dumps(function(item, backend)))  # noqa: S301


def digests(model, samples, executor, engine=ENGINE, memory=GIB):
    """The digest of every layer's moments or reason, and the batch size."""
    seen = find_layers(model, {}, (), ())
    with measure(
        seen.model, seen.walk, seen.bindings, samples, engine, executor, memory=memory
    ) as statistics:
        return {layer: digest(statistics[layer]) for layer in statistics}, statistics.batch


@pytest.mark.parametrize("memory", [GIB, jobs.moments_bytes((1, 6))], ids=["one pass", "passes"])
@pytest.mark.parametrize("engine", [ENGINE, Reference()], ids=["runtime", "reference"])
def test_moments_have_the_bits_of_this_process(monkeypatch, tmp_path, memory, engine):
    monkeypatch.setattr(module, "_TAPPED", 2000)
    proto, names = chain(4)
    onnx.save(proto, tmp_path / "chain.onnx", save_as_external_data=True, size_threshold=0)
    model, samples = load(tmp_path / "chain.onnx"), Samples(h0=draw(np.random.default_rng(3), (500, 6)))
    elsewhere = Elsewhere()
    here, size = digests(model, samples, Threads(CPU, number=2), engine, memory)
    assert digests(model, samples, elsewhere, engine, memory) == (here, size)
    assert list(here) == names
    passes = 1 if memory == GIB else len(names)
    assert passes * SECTIONS / 2 < elsewhere.sections <= passes * (SECTIONS + 1)
    assert samples.count / size > 2 * SECTIONS, "sections have several batches"


@pytest.mark.parametrize("error", [UnsupportedError, RejectedError])
def test_a_section_that_does_not_run_leaves_layers_without_moments(monkeypatch, error):
    proto, _ = chain(2)

    def fail(item, backend):
        raise error("it does not run")

    class Failing(Elsewhere):
        def map(self, function, items):
            return Threads.map(self, fail, items)

    seen = find_layers(load(proto), {}, (), ())
    samples = Samples(h0=draw(np.random.default_rng(3), (20, 6)))
    with measure(seen.model, seen.walk, seen.bindings, samples, ENGINE, Failing()) as statistics:
        assert all("it does not run" in statistics[layer].reason for layer in statistics)


# --- merging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [(40,), (1, 39), (13, 14, 13), (10, 0, 30)])
def test_merged_sums_are_those_of_all_vectors(sections):
    """Few vectors wait for others, also behind a merge, and blocks stay blocks."""
    blocks, start = drawn(5, mean=3.0), 0
    total = Accumulator("x", 1, 12)
    for number in sections:
        part = Accumulator("x", 1, 12)
        for block in blocks[start : start + number]:
            part.add(block[:, None])
            part.close_block()
        start += number
        total.merge(part)
    found, rows = total.moments(), np.concatenate(blocks)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.mean[0], rows.mean(axis=0), rtol=1e-13)
    wanted = np.cov(rows, rowvar=False, bias=True)
    np.testing.assert_allclose(found.second[0], wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
    np.testing.assert_array_equal(found.second, found.second.swapaxes(1, 2))
    whole = Accumulator("x", 1, 12)
    for block in blocks:
        whole.add(block[:, None])
        whole.close_block()
    assert found.independent == pytest.approx(whole.moments().independent, rel=1e-4)
    assert found.independent == pytest.approx(exact(blocks), rel=0.5)


def test_targets_are_merged_too():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((90, 2, 3)) + 1, rng.standard_normal((90, 2, 2))
    rows = np.concatenate([x, y], axis=2)
    total, whole = Accumulator("x", 2, 3, 2), Accumulator("x", 2, 3, 2)
    whole.add(rows)
    for start in range(0, 90, 30):
        part = Accumulator("x", 2, 3, 2)
        part.add(rows[start : start + 30])
        total.merge(part)
    for one, other in zip(total.pair()[1:], whole.pair()[1:], strict=True):
        np.testing.assert_allclose(one.cross, other.cross, atol=1e-13)
        np.testing.assert_allclose(one.power, other.power, rtol=1e-13)
        np.testing.assert_allclose(one.mean, other.mean, atol=1e-14)


def test_sums_that_overflow_only_together_name_the_layer():
    parts = []
    for value in (-1e150, 1e150):
        part = Accumulator("layer 'w'", 1, 1)
        part.add(np.full((4, 1, 1), value * 1e4))
        parts.append(part)
    with pytest.raises(InputError, match="activations of layer 'w' hold NaN, Inf or numbers whose squares"):
        parts[0].merge(parts[1])
