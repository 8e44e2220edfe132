"""Results of earlier runs: found by content alone, in the order of the items, with the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_work_items import every_item, moments_of, weight_of

from onnx_lowrank.core.option import Fold
from onnx_lowrank.files.keeping import Keeper, digest
from onnx_lowrank.files.store import Store
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.work import kept
from onnx_lowrank.work.executor import Processes, Threads
from onnx_lowrank.work.fitting import fitted
from onnx_lowrank.work.joins import joined_errors
from onnx_lowrank.work.kept import Kept
from onnx_lowrank.work.narrowing import WidthItem, width_errors
from onnx_lowrank.work.scoring import ActivationItem, WeightItem, activation_errors, singular_values
from onnx_lowrank.work.sharing import SharedItem, likeness
from onnx_lowrank.work.sparse import SparseItem, sparse_errors
from onnx_lowrank.work.sums import SummedItem
from onnx_lowrank.work.weights import refer

CPU = resolve("cpu")
THREADS = Threads(CPU)


class Counting(Threads):
    """Notes the items that it computes."""

    def __init__(self):
        super().__init__(CPU)
        self.computed = []

    def map(self, function, items):
        def noted():
            for item in items:
                self.computed.append(item)
                yield item

        return super().map(function, noted())


def kept_items(folder):
    """Items of every function with results to keep."""
    folder.mkdir(exist_ok=True)
    weights = tuple(weight_of((1, 6, 8), seed) for seed in (1, 2))
    inputs, sums = moments_of(folder, 1, 8, number=1), moments_of(folder, 1, 6, of_outputs=True, number=2)
    rows = moments_of(folder, 1, 5, of_outputs=True, number=3)
    rows.count({False: np.arange(20), True: np.ones(20, np.int64)})
    shared = SharedItem(weights, 3, inputs, (True, False))
    yield singular_values, WeightItem(weights[0], {Fold.ENCODE: (1, 2)})
    yield activation_errors, ActivationItem(weights[0], inputs, True, {(Fold.ENCODE, 1): 4})
    yield width_errors, WidthItem(weights[0], inputs, True)
    yield likeness, shared
    yield joined_errors, shared
    yield joined_errors, SummedItem(weights, 3, sums, (inputs, inputs), (True, True), np.zeros(6))
    yield sparse_errors, SparseItem(weight_of((1, 5, 20), 3), rows, 1, 1)


def test_all_kinds_are_tried(tmp_path):
    assert {function for function, _ in kept_items(tmp_path)} == set(kept._KINDS)


@pytest.mark.parametrize("number", range(7))
def test_a_kept_result_has_the_bits_of_a_computed_one(tmp_path, number):
    function, item = list(kept_items(tmp_path / "first"))[number]
    (alone,) = THREADS.map(function, [item])
    # Another run reads its weights and moments from other places.
    _, again = list(kept_items(tmp_path / "second"))[number]
    for each, computed in ((item, 1), (again, 0)):
        executor = Counting()
        (found,) = Kept(executor, Keeper(Store(tmp_path / "store"), "test")).map(function, [each])
        assert digest(found) == digest(alone)
        assert len(executor.computed) == computed


@pytest.mark.parametrize(
    "change",
    [
        lambda item: replace(item, weight=weight_of((1, 6, 8), 9)),
        lambda item: replace(item, weight=refer(item.weight.read(), np.ones(6))),
        lambda item: replace(item, weight=refer(np.asfortranarray(item.weight.read()))),
        lambda item: replace(item, weight=refer(item.weight.read().astype(np.float64))),
        lambda item: replace(item, wanted={Fold.ENCODE: (1, 2, 4)}),
        lambda item: replace(item, wanted={Fold.DECODE: (1, 2)}),
    ],
)
def test_another_question_is_computed(tmp_path, change):
    item = WeightItem(weight_of((1, 6, 8)), {Fold.ENCODE: (1, 2)})
    executor = Counting()
    map_ = Kept(executor, Keeper(Store(tmp_path), "test")).map
    list(map_(singular_values, [item]))
    list(map_(singular_values, [change(item)]))
    assert len(executor.computed) == 2


def test_other_moments_are_another_question(tmp_path):
    (tmp_path / "m").mkdir()
    moments = [moments_of(tmp_path / "m", 1, 8, number=n, count=count) for n, count in enumerate((500, 501))]
    weight = weight_of((1, 6, 8))
    keeper = Keeper(Store(tmp_path / "store"), "test")
    items = [ActivationItem(weight, each, True, {(Fold.ENCODE, 1): 4}) for each in moments]
    assert keeper.key(items[0]) != keeper.key(items[1])


ITEMS = [WeightItem(weight_of((1, 6, 8), seed), {Fold.ENCODE: (1, 2)}) for seed in range(8)]
ALONE = [digest(found) for found in THREADS.map(singular_values, ITEMS)]


@settings(max_examples=30)
@given(st.lists(st.sampled_from(range(8)), max_size=12), st.lists(st.sampled_from(range(8)), max_size=12))
def test_results_come_in_the_order_of_the_items(tmp_path_factory, known, asked):
    keeper = Keeper(Store(tmp_path_factory.mktemp("store")), "test")
    list(Kept(THREADS, keeper).map(singular_values, [ITEMS[n] for n in known]))
    executor = Counting()
    found = list(Kept(executor, keeper).map(singular_values, [ITEMS[n] for n in asked]))
    assert [digest(each) for each in found] == [ALONE[n] for n in asked]
    assert {id(item) for item in executor.computed} == {id(ITEMS[n]) for n in set(asked) - set(known)}


def test_results_are_kept_although_a_later_item_fails(tmp_path):
    keeper = Keeper(Store(tmp_path), "test")

    def items():
        yield from ITEMS[:3]
        raise KeyboardInterrupt

    class Serial(Threads):
        def map(self, function, items):
            return (function(item, self.backend) for item in items)

    with pytest.raises(KeyboardInterrupt):
        list(Kept(Serial(CPU), keeper).map(singular_values, items()))
    assert len(list(tmp_path.iterdir())) == 3


def test_factors_are_not_kept(tmp_path):
    items = [item for function, item in every_item(tmp_path / "items") if function is fitted]
    assert items
    list(Kept(THREADS, Keeper(Store(tmp_path / "store"), "test")).map(fitted, items))
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_processes_and_threads_share_results(tmp_path):
    keeper = Keeper(Store(tmp_path), "test")
    with Processes(1, CPU) as workers:
        found = list(Kept(workers, keeper).map(singular_values, ITEMS))
    executor = Counting()
    again = list(Kept(executor, keeper).map(singular_values, ITEMS))
    assert [digest(each) for each in found] == [digest(each) for each in again] == ALONE
    assert executor.computed == []
