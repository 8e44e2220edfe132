"""Passes that an earlier run has finished: their moments have the bits of measured ones."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
from test_calibrate_measurement import Samples, chain

from onnx_lowrank.calibrate import jobs
from onnx_lowrank.calibrate import measurement as module
from onnx_lowrank.calibrate.measured import Statistics
from onnx_lowrank.calibrate.measurement import measure
from onnx_lowrank.calibrate.passes import Pass, Passes, digest_of
from onnx_lowrank.engines.engine import RejectedError
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.files.keeping import Keeper, digest
from onnx_lowrank.files.store import Store
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.work.executor import Threads
from onnx_lowrank.work.moments import LayerMoments
from rewriting import draw, found, model

ENGINE = runtime("CPUExecutionProvider")
THREADS = Threads(resolve("cpu"))
PASSES = 5
MEMORY = jobs.moments_bytes((1, 6))


def digests(proto, samples, keeper=None, memory=MEMORY, engine=ENGINE):
    """The digest of every layer's moments or reason, and the batch size."""
    seen = found(proto)
    options = {"memory": memory, "keeper": keeper}
    with measure(seen.model, seen.walk, seen.bindings, samples, engine, THREADS, **options) as statistics:
        return {layer: digest(statistics[layer]) for layer in statistics}, statistics.batch


@pytest.fixture
def measured(monkeypatch):
    """The layers of every task, in the order of measurement."""
    names, task = [], module.Task
    monkeypatch.setattr(module, "Task", lambda job, layers: names.extend(layers) or task(job, layers))
    return names


class Interrupted(Store):
    """A store in which the run ends when it has written so many entries."""

    def __init__(self, folder, left):
        super().__init__(folder)
        self.left = left

    def put(self, key, entry):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        super().put(key, entry)


@pytest.mark.parametrize("written", range(2 * PASSES))
def test_an_interrupted_measurement_goes_on_at_the_first_missing_pass(tmp_path, measured, written):
    proto, names = chain(PASSES)
    samples = Samples(h0=draw(np.random.default_rng(1), (40, 6)))
    alone = digests(proto, samples)
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        digests(proto, samples, Keeper(Interrupted(tmp_path, written)))
    measured.clear()
    assert digests(proto, samples, Keeper(Store(tmp_path))) == alone
    # A pass takes two entries: its only moments, and how it went.
    assert measured == names[written // 2 :]
    measured.clear()
    assert digests(proto, samples, Keeper(Store(tmp_path))) == alone
    assert measured == []


class Failing:
    """ONNX Runtime, without memory for more than one output."""

    name = ENGINE.name

    @contextmanager
    def open(self, proto):
        with ENGINE.open(proto) as run:

            def checked(feed):
                if len(made := run(feed)) > 1:
                    raise RejectedError("no memory")
                return made

            yield checked


def test_a_pass_that_failed_is_measured_again(tmp_path):
    proto, names = chain(PASSES)
    samples = Samples(h0=draw(np.random.default_rng(8), (40, 6)))
    alone, keeper = digests(proto, samples, memory=2**30), Keeper(Store(tmp_path))
    failed = digests(proto, samples, keeper, memory=2**30, engine=Failing())
    assert all(failed[0][name] != alone[0][name] for name in names)
    assert digests(proto, samples, keeper, memory=2**30) == alone


@pytest.mark.parametrize("number", range(2 * PASSES))
def test_a_lost_entry_costs_its_pass_alone(tmp_path, measured, number):
    proto, _ = chain(PASSES)
    samples = Samples(h0=draw(np.random.default_rng(2), (40, 6)))
    alone = digests(proto, samples, Keeper(Store(tmp_path)))
    sorted(tmp_path.iterdir())[number].write_bytes(b"damaged")
    measured.clear()
    assert digests(proto, samples, Keeper(Store(tmp_path))) == alone
    assert len(measured) == 1


def test_a_model_whose_parts_do_not_run_goes_on_without_parts(tmp_path, measured, monkeypatch):
    proto, names = chain(PASSES)
    samples = Samples(h0=draw(np.random.default_rng(3), (40, 6)))
    part = module.Relay.part

    def refused(self, number, *given):
        if number == 2:
            raise module.UnsupportedError("no such part")
        return part(self, number, *given)

    monkeypatch.setattr(module.Relay, "part", refused)
    alone = digests(proto, samples)
    for written in (2, 4, 6, 8):
        folder = tmp_path / str(written)
        with pytest.raises(KeyboardInterrupt):
            digests(proto, samples, Keeper(Interrupted(folder, written)))
        measured.clear()
        assert digests(proto, samples, Keeper(Store(folder))) == alone
        assert measured[-1] == names[-1]
        assert set(measured) == {*names[written // 2 :]}


def test_layers_without_moments_have_their_reasons(tmp_path, measured):
    """One branch never runs, so its layer has a reason in place of moments."""
    proto = model(
        """g (bool k, float[4,8] x) => (float[] y) { h = MatMul (x, w0) y = If (k) <
            then_branch = t () => (float[4,8] p) { p = MatMul (h, w1) },
            else_branch = e () => (float[4,8] q) { q = MatMul (h, w2) }> }""",
        **{f"w{n}": draw(np.random.default_rng(n), (8, 8)) for n in range(3)},
    )

    class Feeds:
        count = 6

        def batches(self, size):
            for number in range(self.count):
                x = draw(np.random.default_rng(number), (4, 8))
                yield module.Batch({"k": np.array(True), "x": x}, False)

    alone = digests(proto, Feeds(), memory=2**20)
    for _ in range(2):
        measured.clear()
        assert digests(proto, Feeds(), Keeper(Store(tmp_path)), memory=2**20) == alone
    assert measured == []


def test_counts_of_looked_up_rows_come_back(tmp_path, monkeypatch):
    table = draw(np.random.default_rng(5), (30, 6))
    proto = model("g (int64[N,3] i) => (float[] y) { y = Gather (w, i) }", w=table)
    samples = Samples(i=np.random.default_rng(23).integers(0, 30, (25, 3)))
    alone, keeper = digests(proto, samples), Keeper(Store(tmp_path))
    assert digests(proto, samples, keeper) == alone
    monkeypatch.setattr(module, "Lookups", None)
    assert digests(proto, samples, keeper) == alone


def test_other_groups_are_other_passes(tmp_path, measured):
    proto, names = chain(PASSES)
    samples = Samples(h0=draw(np.random.default_rng(6), (40, 6)))
    keeper = Keeper(Store(tmp_path))
    digests(proto, samples, keeper)
    measured.clear()
    digests(proto, samples, keeper, memory=2 * MEMORY)
    assert measured == names


@pytest.mark.parametrize(
    "forged",
    [
        Pass((("w0",),), {}),
        Pass((("w0", "w1"), ("w2", "w3", "w4")), {}),  # with empty moments
        Pass((), {f"w{n}": "no reason" for n in range(6)}),
        LayerMoments(reason="it is empty"),
    ],
)
def test_a_pass_of_other_layers_counts_as_absent(tmp_path, forged):
    keeper = Keeper(Store(tmp_path))
    with Statistics(f"w{n}" for n in range(5)) as statistics:
        passes = Passes(keeper, statistics, "test", (), 2**20)
        own = keeper.of("test", statistics.padding, ())
        own.put(own.key(0), forged)
        own.put(own.key(0, 0), LayerMoments(reason="it is empty"))
        assert passes.known(0, [f"w{n}" for n in range(5)]) is None
        assert not statistics.reasons


def test_the_digest_of_samples_is_that_of_their_values():
    x = draw(np.random.default_rng(7), (70, 6))
    other = x.copy()
    other[69, 5] = np.nextafter(other[69, 5], np.float32(9))
    kinds = [Samples(x=x), Samples(x=other), Samples(z=x), Samples(x=x[:69]), Samples(x=x[::-1])]
    assert len({digest_of(samples) for samples in kinds}) == len(kinds)
    assert digest_of(Samples(x=x)) == digest_of(Samples(x=x.copy()))


def test_without_keeper_nothing_is_known():
    with Statistics(()) as statistics:
        passes = Passes(None, statistics, "test", (), 2**20)
        passes.keep(0, [])
        assert passes.known(0, []) is None
