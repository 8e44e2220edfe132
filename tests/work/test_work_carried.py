"""The way of items to other machines: which files they name, what they carry, and the room that they take."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from threading import Event, Thread
from types import SimpleNamespace

import distributed
import pytest
from test_work_items import moments_of, weight_of

from devices import fake
from onnx_lowrank.core.option import Fold
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.keeping import digest
from onnx_lowrank.work import carried
from onnx_lowrank.work.carried import Room, computed, differing, mark, packed, sees, versions
from onnx_lowrank.work.scoring import ActivationItem, WeightItem, activation_errors, singular_values


def item_of(folder):
    weight = weight_of((1, 40, 60), folder=folder)
    (folder / "moments").mkdir()
    inputs = moments_of(folder / "moments", 1, 60)
    outputs = moments_of(folder / "moments", 1, 40, of_outputs=True, number=1)
    return ActivationItem(weight, replace(inputs, transposed=outputs), True, {(Fold.ENCODE, 1): 4})


def test_an_item_names_its_files_or_carries_what_they_hold(tmp_path):
    item = item_of(tmp_path)
    named = packed(activation_errors, item, (), "cpu", {})
    moments = {path.name for path in (tmp_path / "moments").iterdir()}
    assert {given.path.name for given in named.marks} == {"0.data"} | moments
    assert len(named.data) < 3000
    assert named.nbytes == item.nbytes
    places = (tmp_path / "0.data", tmp_path / "moments")
    whole = packed(activation_errors, item, places, "cpu", {})
    assert whole.marks == ()
    wanted = digest(item.weight.read(), item.weight.read().strides, item.moments.read())
    for path in places[1].iterdir():
        path.unlink()
    places[0].unlink()
    function, arrived = pickle.loads(whole.data)  # noqa: S301
    assert function is activation_errors
    assert digest(arrived.weight.read(), arrived.weight.read().strides, arrived.moments.read()) == wanted


def test_a_weight_brings_its_own_bytes_only(tmp_path):
    weight = weight_of((1, 400, 60), folder=tmp_path)
    part = replace(weight, offset=240, shape=(1, 2, 60), strides=(480, 240, 4))
    whole = packed(singular_values, WeightItem(part, {Fold.ENCODE: (1,)}), {weight.source}, "cpu", {})
    assert len(whole.data) < 1500


def test_a_file_that_is_gone_is_an_error(tmp_path):
    item = WeightItem(weight_of((1, 4, 6), folder=tmp_path), {Fold.ENCODE: (1,)})
    (tmp_path / "0.data").unlink()
    for places in ((), {tmp_path / "0.data"}):
        with pytest.raises(InputError, match=r"0\.data cannot be read \(.*restore it as it was"):
            packed(singular_values, item, places, "cpu", {})


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 10**6])
def test_a_mark_is_that_of_one_file(tmp_path, size):
    path = tmp_path / "data"
    path.write_bytes(bytes(size))
    made, state = mark(path), path.stat()
    assert sees([made])
    assert not sees([made, replace(made, path=tmp_path / "other")])
    path.write_bytes(bytes(size) + b"x")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not sees([made]), "longer"
    path.write_bytes(bytes(size))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    assert not sees([made]), "newer"
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert sees([made])


@pytest.mark.parametrize(
    ("size", "place"), [(2**18, 2**17 + 77), (10**6, 0), (10**6, 4095), (10**6, 10**6 - 1)]
)
def test_another_content_of_the_same_size_and_time_is_noticed(tmp_path, size, place):
    """Anywhere in a file of as many pieces as a mark covers, and at the ends of a larger one."""
    path, content = tmp_path / "data", bytearray(size)
    path.write_bytes(content)
    made, state = mark(path), path.stat()
    content[place] = 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    carried._mark.cache_clear()  # that of another process is empty, too
    assert not sees([made])


def test_versions_differ_in_all_but_the_processor():
    own = versions("cpu")
    assert {"onnx-lowrank", "distributed", "code", "numpy", "scipy", "onnx", "blas"} < set(own)
    assert "cores" not in own["processor"]
    assert differing(own, own) == ()
    assert differing({**own, "processor": "Z80"}, own) == ()
    assert differing({**own, "scipy": ""}, own) == ("scipy",)
    assert differing({name: own[name] for name in own if name != "code"}, own) == ("code",)


def smallest_number(item, backend):
    """The place and the memory of a computation, and its result."""
    with backend.lane(10**6) as place:
        return place.name, place.nbytes, float(min(place.to_numpy(place.asarray(item.weight.read())).flat))


@pytest.mark.parametrize("trouble", ["none", "small", "broken"])
def test_a_worker_with_a_gpu_computes_as_this_process_does(monkeypatch, caplog, trouble):
    item = WeightItem(weight_of((1, 40, 60)), {Fold.ENCODE: (1,)})
    device = fake(capacity=item.nbytes - 1 if trouble == "small" else 2**40)
    device.device.broken = trouble == "broken"
    monkeypatch.setattr(carried, "_backend", lambda name: device)
    monkeypatch.setattr(carried, "versions", lambda name: {})
    worker = SimpleNamespace(address="w", memory_manager=SimpleNamespace(memory_limit=None))
    monkeypatch.setattr(distributed, "get_worker", lambda: worker)
    found = pickle.loads(computed(packed(smallest_number, item, (), "cuda", {})))  # noqa: S301
    place = ("cuda", item.nbytes) if trouble == "none" else ("cpu", 0)
    assert found == (*place, float(item.weight.read().min()))
    assert ("so the CPU takes it over" in caplog.text) == (trouble != "none")


def test_items_wait_for_room_and_a_large_one_runs_alone():
    room, order, entered = Room(10), [], Event()

    def run(name, nbytes):
        with room.taken(nbytes):
            order.append(name)

    with room.taken(6):
        waiting = Thread(target=run, args=("large", 100))
        waiting.start()
        with room.taken(4):
            order.append("small")
        entered.wait(0.1)
        assert order == ["small"]
    waiting.join(60)
    assert order == ["small", "large"]


def test_an_error_leaves_the_room_free():
    room = Room(10)
    with pytest.raises(InputError, match="no"), room.taken(100):
        raise InputError("no")
    with room.taken(100):
        pass
