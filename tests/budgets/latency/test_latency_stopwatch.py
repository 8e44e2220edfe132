"""The stopwatch, with a runtime that only pretends to run; and once with the real one."""

from __future__ import annotations

import sqlite3
from contextlib import closing, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from onnx_lowrank.budgets.latency import stopwatch as module
from onnx_lowrank.budgets.latency.clock import Pace
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.engines.node_times import Runs
from onnx_lowrank.engines.runtime import Profiled, runtime
from onnx_lowrank.files.load import load, stored_bytes
from onnx_lowrank.probe import micro as probing
from onnx_lowrank.probe.micro import micro
from rewriting import found, model
from timing import Recorded, by_weights
from tiny import files

PACE = Pace(seconds=0.0)
TICK = 10**6
OPTIONS = [Option(Fold.ENCODE, k, j) for k in (1, 2) for j in (1, 2, 3)]


class Machine:
    """A runtime whose models take the times of a rule, on a clock that only they move."""

    module = SimpleNamespace(__version__="1.0")
    provider = "CPUExecutionProvider"
    name = "Machine"
    times_nodes = False

    def __init__(self, refuses=lambda proto: False, fails=lambda proto: False):
        self.now, self.opened, self.together, self.threads = 0, [], [], set()
        self._open = []
        self._refuses, self._fails = refuses, fails

    def __call__(self):
        return self.now

    @contextmanager
    def ready(self, model, feed, threads):
        if self._refuses(model.proto):
            raise UnsupportedError("It does not know the operator")
        self.threads.add(threads)
        self.opened.append(model)
        self._open.append(model)
        self.together.append(sum(map(stored_bytes, self._open)))

        def run():
            if self._fails(model.proto):
                raise RejectedError("It fails")
            self.now += TICK * by_weights(model.proto)

        yield run
        self._open.remove(model)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder in which times are kept."""
    monkeypatch.setattr("onnx_lowrank.budgets.latency.cache.user_cache_path", lambda name: tmp_path / name)
    return tmp_path


def alone(f=8, c=16):
    """One layer of a model."""
    of = found(model(f"g (float[5, {c}] x) => (float[5, {f}] y) {{ y = MatMul (x, w) }}", w=(c, f)))
    return micro(of.walk, of.bindings[0], 0)


def watch(machine, **options):
    return Stopwatch(machine, clock=machine, **options)


def ratios(layer, options=OPTIONS):
    """The times of chains over their layer's, by the rule."""
    own = by_weights(layer.dense().proto)
    return {option: by_weights(chain.proto) / own for option, chain in layer.chains().decomposed(options)}


# --- chains -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_chains_are_measured_against_their_layer(warm, caching):
    layer, machine = alone(), Machine()
    found = watch(machine, warm=warm, caching=caching).chains(layer, OPTIONS, PACE)
    assert found == pytest.approx(ratios(layer), rel=1e-6)
    assert len(machine.opened) == 1 + len(OPTIONS)


def test_no_options_measure_nothing():
    machine = Machine()
    assert watch(machine).chains(alone(), [], PACE) == {}
    assert machine.opened == []


@pytest.mark.parametrize("known", range(len(OPTIONS) + 1))
def test_what_is_known_is_not_measured_again(known):
    layer, machine = alone(), Machine()
    timed = watch(machine, caching=False)
    first = timed.chains(layer, OPTIONS[:known], PACE)
    before = len(machine.opened)
    found = timed.chains(layer, OPTIONS, PACE)
    assert len(machine.opened) - before == (1 + len(OPTIONS) - known if known < len(OPTIONS) else 0)
    assert {option: found[option] for option in first} == first


@pytest.mark.parametrize("known", range(len(OPTIONS) + 1))
def test_what_is_known_is_not_measured_again_by_the_recorded_one_either(known):
    layer, timed = alone(), Recorded(Machine())
    timed.chains(layer, OPTIONS[:known], PACE)
    before = timed.timed
    assert timed.chains(layer, OPTIONS, PACE) == ratios(layer)
    assert timed.timed - before == (1 + len(OPTIONS) - known if known < len(OPTIONS) else 0)


def test_what_was_saved_is_not_measured_by_the_next_one(folder):
    layer, one, other = alone(), Machine(), Machine()
    first = watch(one)
    found = first.chains(layer, OPTIONS, PACE)
    assert files(folder) == {}
    first.cache.save()
    assert watch(other).chains(layer, OPTIONS, PACE) == found
    assert other.opened == []


def test_layers_that_are_alike_share_their_times_and_others_do_not():
    machine = Machine()
    timed = watch(machine)
    timed.chains(alone(), OPTIONS, PACE)
    before = len(machine.opened)
    timed.chains(alone(), OPTIONS, PACE)
    assert len(machine.opened) == before
    timed.chains(alone(f=9), OPTIONS, PACE)
    assert len(machine.opened) == 2 * before


@pytest.mark.parametrize(
    ("change", "is_known"),
    [
        ({}, True),
        ({"threads": 2}, False),
        ({"warm": True}, False),
        ({"caching": False}, False),
    ],
)
def test_another_setting_has_its_own_times(change, is_known):
    layer, machine = alone(), Machine()
    first = watch(Machine())
    first.chains(layer, OPTIONS, PACE)
    first.cache.save()
    watch(machine, **change).chains(layer, OPTIONS, PACE)
    assert bool(machine.opened) != is_known


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("module", SimpleNamespace(__version__="1.1")), ("provider", "CUDAExecutionProvider")],
)
def test_another_runtime_has_its_own_times(attribute, value):
    layer, machine = alone(), Machine()
    first = watch(Machine())
    first.chains(layer, OPTIONS, PACE)
    first.cache.save()
    setattr(machine, attribute, value)
    watch(machine).chains(layer, OPTIONS, PACE)
    assert machine.opened


def test_another_processor_has_its_own_times(monkeypatch):
    layer, machine = alone(), Machine()
    first = watch(Machine())
    first.chains(layer, OPTIONS, PACE)
    first.cache.save()
    monkeypatch.setattr(module, "processor", lambda provider: "another")
    watch(machine).chains(layer, OPTIONS, PACE)
    assert machine.opened


def test_chains_that_are_written_otherwise_are_measured_anew(monkeypatch):
    layer, machine = alone(), Machine()
    first = watch(Machine())
    first.chains(layer, OPTIONS, PACE)
    first.cache.save()
    rewrite = probing.rewrite

    def otherwise(*arguments):
        """Writes chains of two slices with one node more."""
        rewritten = rewrite(*arguments)
        if len(rewritten.model.proto.graph.node) > 2:
            rewritten.model.proto.graph.node.add(op_type="Identity", input=["x"], output=["more"])
        return rewritten

    monkeypatch.setattr(probing, "rewrite", otherwise)
    watch(machine).chains(layer, OPTIONS, PACE)
    of_two_slices = [option for option in OPTIONS if option.k == 2]
    assert len(machine.opened) == 1 + len(of_two_slices)
    watch(machine).chains(layer, OPTIONS, PACE)
    assert len(machine.opened) == 2 * (1 + len(of_two_slices)), "what is not saved is not known"


@pytest.mark.parametrize("ratio", ["1e300", "-1.0", "0.0"])
def test_a_time_that_cannot_be_one_is_measured_anew(folder, ratio):
    layer, machine = alone(), Machine()
    first = watch(Machine())
    expected = first.chains(layer, OPTIONS, PACE)
    first.cache.save()
    (path,) = (folder / "onnx-lowrank").iterdir()
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"UPDATE times SET ratio = {ratio}")  # noqa: S608
        database.commit()
    assert watch(machine).chains(layer, OPTIONS, PACE) == expected
    assert len(machine.opened) == 1 + len(OPTIONS)


def test_without_caching_nothing_is_written(folder):
    timed = watch(Machine(), caching=False)
    timed.chains(alone(), OPTIONS, PACE)
    timed.cache.save()
    assert files(folder) == {}


def test_times_are_kept_in_a_chosen_folder(folder):
    machine, layer = Machine(), alone()
    for _ in range(2):
        timed = watch(machine, caching=folder / "chosen")
        assert timed.chains(layer, OPTIONS, PACE) == pytest.approx(ratios(layer), rel=1e-6)
        timed.cache.save()
    assert len(machine.opened) == 1 + len(OPTIONS)
    assert set(files(folder)) == {"chosen", "chosen/times.sqlite"}


def test_lowerings_are_told_apart():
    layer, machine = alone(), Machine()
    both = [Option(Fold.ENCODE, 2, 1, lowering) for lowering in (Lowering.NATIVE, Lowering.CONV)]
    timed = watch(machine)
    assert timed.chains(layer, both, PACE) == pytest.approx(ratios(layer, both), rel=1e-6)
    assert timed.chains(layer, both[1:], PACE).keys() == set(both[1:])


# --- what the runtime refuses -----------------------------------------------------------------------


def has_rank(*ranks):
    """Whether a model is the chain of one of these ranks, by the shapes of its weights."""
    return lambda proto: any(
        rank == dim for tensor in proto.graph.initializer for dim in tensor.dims for rank in ranks
    )


@pytest.mark.parametrize("how", ["refuses", "fails"])
@pytest.mark.parametrize("ranks", [(), (2,), (1, 3), (1, 2, 3)])
def test_a_chain_that_the_runtime_refuses_is_left_out(how, ranks):
    layer = alone()
    options = [option for option in OPTIONS if option.k == 1]
    timed = watch(Machine(**{how: has_rank(*ranks)}))
    found = timed.chains(layer, options, PACE)
    accepted = [option for option in options if option.j not in ranks]
    assert found == pytest.approx(ratios(layer, accepted), rel=1e-6)


@pytest.mark.parametrize("how", ["refuses", "fails"])
def test_a_layer_that_the_runtime_refuses_has_no_chains(how):
    layer = alone()
    timed = watch(Machine(**{how: lambda proto: True}))
    assert timed.chains(layer, OPTIONS, PACE) == {}
    assert not timed.accepts(layer)
    assert watch(Machine()).accepts(layer)


# --- together in memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 400, 1000, 10**6])
def test_bunches_respect_the_memory(monkeypatch, together):
    monkeypatch.setattr(module, "_TOGETHER", together)
    layer, machine = alone(), Machine()
    options = [Option(Fold.ENCODE, 1, j) for j in range(1, 8)]
    found = watch(machine).chains(layer, options, PACE)
    assert found == pytest.approx(ratios(layer, options), rel=1e-6)
    sizes = [stored_bytes(chain) for _, chain in layer.chains().decomposed(options)]
    dense = stored_bytes(layer.dense())
    assert max(machine.together) <= dense + max(together, *sizes)
    if together == 1:
        assert len(machine.opened) == 2 * len(options)
    if together == 10**6:
        assert len(machine.opened) == 1 + len(options)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_bunches_are_not_too_long(count):
    machine = Machine()
    layer = alone(64, 64)
    options = [Option(Fold.ENCODE, 1, j) for j in range(1, count + 1)]
    found = watch(machine).chains(layer, options, PACE)
    assert list(found) == options
    assert len(machine.opened) == count + -(-count // module._MOST)


@pytest.mark.parametrize(
    ("sizes", "bunches"),
    [
        ([], []),
        ([9], [[9]]),
        ([99], [[99]]),
        ([3, 3, 4, 1], [[3, 3, 4], [1]]),
        ([5, 6, 5, 5], [[5], [6], [5, 5]]),
        ([99, 1, 99], [[99], [1], [99]]),
        ([0] * 20, [[0] * 16, [0] * 4]),
    ],
)
def test_bunches_keep_the_order(monkeypatch, sizes, bunches):
    monkeypatch.setattr(module, "_TOGETHER", 10)
    assert list(module._bunches(sizes, lambda size: size)) == bunches


# --- whole models -----------------------------------------------------------------------------------


def whole():
    proto = model(
        "g (float[5, 16] x) => (float[5, 4] y) { a = MatMul (x, w)\n y = MatMul (a, v) }", w=(16, 8), v=(8, 4)
    )
    of = found(proto)
    return (load(proto), {}), [micro(of.walk, binding, 0) for binding in of.bindings]


@pytest.mark.parametrize("together", [1, 10**6])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_layers_are_measured_in_turns_with_the_model(monkeypatch, together, count):
    monkeypatch.setattr(module, "_TOGETHER", together)
    machine = Machine()
    timed, layers = whole()
    time, shares = watch(machine).shares(timed, layers[:count], PACE)
    assert time == TICK * by_weights(timed[0].proto)
    expected = [TICK * by_weights(layer.dense().proto) / time for layer in layers[:count]]
    assert shares == pytest.approx(expected, rel=1e-6)
    bunches = max(1, count) if together == 1 else 1
    assert len(machine.opened) == bunches + count


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_models_run_with_the_threads_that_were_asked_for(threads):
    machine = Machine()
    timed = watch(machine, threads=threads)
    timed.times([whole()[0]], PACE)
    assert machine.threads == {threads}
    words = {0: "all threads", 1: "1 thread", 3: "3 threads"}[threads]
    assert timed.name == f"Machine, {words}"


@pytest.mark.parametrize(
    ("how", "error"), [("refuses", UnsupportedError), ("fails", RejectedError)], ids=["refuses", "fails"]
)
def test_a_model_that_does_not_run_is_an_error(how, error):
    machine = Machine(**{how: lambda proto: True})
    with pytest.raises(error):
        watch(machine).times([whole()[0]], PACE)
    with pytest.raises(error):
        watch(machine).shares(*whole(), PACE)


# --- profiles ---------------------------------------------------------------------------------------


class Profiling(Machine):
    """Notes the times of nodes: those of the rule after two slow runs, and as much again beside them.

    With `warm`, only every second run takes the time of the rule. Runs beyond the first `most` are not noted.
    """

    times_nodes = True

    def __init__(self, *, warm=False, most=None):
        super().__init__()
        self.warm, self.most = warm, most

    @contextmanager
    def profiled(self, model, feed, threads):
        with self.ready(model, feed, threads) as run:
            count = 0

            def counted():
                nonlocal count
                count += 1
                run()

            def finish():
                time = by_weights(model.proto)
                is_slow = [n < 2 or (self.warm and n % 2 == 0) for n in range(count)]
                times = tuple((time * (9 if slow else 1),) for slow in is_slow)
                return Runs(("MatMul",), times[: self.most], ((time,) * count)[: self.most])

            yield Profiled(counted, finish)


@pytest.mark.parametrize("warm", [False, True])
def test_chains_take_the_times_of_their_nodes(warm):
    layer, machine = alone(), Profiling(warm=warm)
    found = watch(machine, warm=warm).chains(layer, OPTIONS, PACE)
    assert found == pytest.approx(ratios(layer), rel=1e-6)
    assert len(machine.opened) == 1 + len(OPTIONS)


def test_shares_are_those_of_the_whole_run():
    machine = Profiling()
    timed, layers = whole()
    time, shares = watch(machine).shares(timed, layers, PACE)
    assert time == TICK * by_weights(timed[0].proto)
    model_time = 2 * by_weights(timed[0].proto)
    expected = [by_weights(layer.dense().proto) / model_time for layer in layers]
    assert shares == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("warm", "most"), [(False, 0), (False, 2), (False, 8), (True, 14)])
def test_profiles_that_miss_runs_give_way_to_the_times_of_whole_models(warm, most):
    """Those of the rule alone, as the time beside the nodes is only in profiles; in whole microseconds."""
    timed, layers = whole()
    watched = watch(Profiling(warm=warm, most=most), warm=warm)
    _, shares = watched.shares(timed, layers, PACE)
    own = by_weights(timed[0].proto)
    assert shares == pytest.approx([by_weights(layer.dense().proto) / own for layer in layers], rel=1e-4)
    assert watched.chains(alone(), OPTIONS, PACE) == pytest.approx(ratios(alone()), rel=1e-4)


def test_times_of_nodes_and_of_runs_are_kept_apart():
    layer, machine = alone(), Machine()
    first = watch(Profiling())
    first.chains(layer, OPTIONS, PACE)
    first.cache.save()
    watch(machine).chains(layer, OPTIONS, PACE)
    assert machine.opened


@pytest.mark.parametrize("make", [Machine, Profiling])
def test_other_layers_are_measured_against_a_layer(make):
    layer, machine = alone(), make()
    others = {size: alone(*size) for size in ((4, 16), (8, 8), (2, 3))}
    timed = watch(machine, caching=False)
    own = by_weights(layer.dense().proto)
    expected = {size: by_weights(other.dense().proto) / own for size, other in others.items()}
    assert timed.others(layer, others, PACE) == pytest.approx(expected, rel=1e-6)
    assert timed.others(layer, others, PACE) == pytest.approx(expected, rel=1e-6)
    assert len(machine.opened) == 1 + len(others)


# --- the real runtime -------------------------------------------------------------------------------


@pytest.mark.clock
@pytest.mark.parametrize("warm", [False, True])
def test_the_real_runtime_measures(warm):
    timed = Stopwatch(runtime("CPUExecutionProvider"), 1, warm=warm)
    layer = alone()
    found = timed.chains(layer, OPTIONS, PACE)
    assert list(found) == OPTIONS
    assert min(found.values()) > 0
    assert timed.name == "ONNX Runtime CPUExecutionProvider, 1 thread"
    (first, second) = timed.times([(layer.dense(), layer.feed())] * 2, PACE)
    assert min(first, second) >= 1


@pytest.mark.clock
def test_the_real_runtime_leaves_out_what_it_does_not_know():
    """It has no convolution for double."""
    of = found(model("g (double[5, 16] x) => (double[5, 8] y) { y = MatMul (x, w) }", w=np.ones((16, 8))))
    layer = micro(of.walk, of.bindings[0], 0)
    both = [Option(Fold.ENCODE, 2, 1, lowering) for lowering in (Lowering.NATIVE, Lowering.CONV)]
    timed = Stopwatch(runtime("CPUExecutionProvider"), 1, caching=False)
    assert list(timed.chains(layer, both, PACE)) == both[:1]
