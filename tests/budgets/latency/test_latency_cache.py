"""Times on disk, whoever wrote the file."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from onnx_lowrank.budgets.latency import cache as module
from onnx_lowrank.budgets.latency.cache import Cache
from tiny import files

ENVIRONMENT = {"runtime": "1.20", "provider": "CPUExecutionProvider", "threads": "2", "caches": "cold"}


def saved(path, **ratios):
    cache = Cache(path)
    for option, ratio in ratios.items():
        cache.put("layer", option, ratio)
    cache.save()
    return cache


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1e-9, 123.456, 0.1 + 0.2])
def test_what_was_saved_is_read_back_to_the_bit(tmp_path, ratio):
    saved(tmp_path / "a" / "b" / "times.json", option=ratio)
    read = Cache(tmp_path / "a" / "b" / "times.json")
    assert read.get("layer", "option") == ratio
    assert read.get("layer", "other") is None
    assert read.get("other", "option") is None


def test_what_was_put_is_known_at_once_and_the_last_counts(tmp_path):
    cache = Cache(tmp_path / "times.json")
    cache.put("layer", "option", 0.5)
    cache.put("layer", "option", 0.25)
    assert cache.get("layer", "option") == 0.25
    assert files(tmp_path) == {}


def test_nothing_is_written_where_nothing_is_new(tmp_path):
    path = tmp_path / "times.json"
    Cache(path).save()
    assert files(tmp_path) == {}
    cache = saved(path, option=0.5)
    path.unlink()
    cache.save()
    assert files(tmp_path) == {}


def test_what_turned_out_to_be_wrong_is_taken_out_again(tmp_path):
    path = tmp_path / "times.json"
    saved(path, old=0.5)
    cache = saved(path, new=0.25)
    cache.put("other", "newer", 0.125)
    cache.discard()
    read = Cache(path)
    known = [read.get(*of) for of in (("layer", "old"), ("layer", "new"), ("other", "newer"))]
    assert known == [0.5, None, None]
    before = files(tmp_path)
    cache.discard()
    cache.save()
    assert files(tmp_path) == before


def test_no_file_keeps_nothing_but_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = Cache(None)
    cache.put("layer", "option", 0.5)
    cache.save()
    assert cache.get("layer", "option") == 0.5
    assert files(tmp_path) == {}
    assert Cache(None).get("layer", "option") is None


BROKEN = {
    "empty": b"",
    "cut off": b'{"layer": {"option": 0.',
    "no object": b"[1, 2]",
    "null": b"null",
    "a number": b"1",
    "no UTF-8": b'\xff\xfe{"layer": {"option": 0.5}}',
    "too deep": b"[" * 200_000,
    "a number of many digits": b'{"layer": {"option": ' + b"1" * 5000 + b"}}",
    "layers that are none": b'{"layer": 1, "other": [0.5], "more": null}',
    **{
        f"a ratio of {value}": b'{"layer": {"option": ' + value.encode() + b"}}"
        for value in ("0", "-1", "NaN", "Infinity", "-Infinity", "1e999", "true", "null", '"0.5"', "[0.5]")
    },
    "a ratio too large for a float": b'{"layer": {"option": ' + b"1" * 400 + b"}}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_ignored_and_replaced(tmp_path, content):
    path = tmp_path / "times.json"
    path.write_bytes(content)
    assert Cache(path).get("layer", "option") is None
    saved(path, option=0.5)
    assert Cache(path).get("layer", "option") == 0.5
    assert list(files(tmp_path)) == ["times.json"]


@pytest.mark.parametrize("wrong", ["null", "-1", '"x"', "{}", "[]"])
def test_a_wrong_number_takes_nothing_else_with_it(tmp_path, wrong):
    path = tmp_path / "times.json"
    path.write_text(f'{{"layer": {{"bad": {wrong}, "good": 2}}, "other": 1, "more": {{"good": 0.5}}}}')
    cache = Cache(path)
    assert cache.get("layer", "bad") is None
    assert cache.get("layer", "good") == 2.0
    assert cache.get("more", "good") == 0.5


@pytest.mark.parametrize(("spare", "known"), [(0, 0.5), (-1, None)])
def test_a_huge_file_is_not_read(tmp_path, monkeypatch, spare, known):
    path = tmp_path / "times.json"
    saved(path, option=0.5)
    monkeypatch.setattr(module, "_LARGEST", path.stat().st_size + spare)
    assert Cache(path).get("layer", "option") == known


def test_a_folder_in_its_place_is_ignored(tmp_path):
    path = tmp_path / "times.json"
    path.mkdir()
    cache = saved(path, option=0.5)
    assert cache.get("layer", "option") == 0.5
    assert files(tmp_path) == {"times.json": None}


@pytest.mark.parametrize("inside", ["", "more"])
def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, inside):
    (tmp_path / "file").write_text("text")
    cache = saved(tmp_path / "file" / inside / "times.json", option=0.5)
    assert cache.get("layer", "option") == 0.5
    assert files(tmp_path) == {"file": b"text"}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    saved(tmp_path / "times.json", option=0.5)
    assert files(tmp_path) == {}


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "times.json"
    saved(path, option=0.5)
    before = files(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    cache = Cache(path)
    cache.put("layer", "option", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        cache.save()
    assert files(tmp_path) == before


def test_what_two_write_in_turns_is_all_kept(tmp_path):
    path = tmp_path / "times.json"
    one, other = Cache(path), Cache(path)
    one.put("layer", "a", 0.1)
    other.put("layer", "b", 0.2)
    other.put("second", "a", 0.3)
    one.save()
    other.save()
    read = Cache(path)
    assert [read.get("layer", "a"), read.get("layer", "b"), read.get("second", "a")] == [0.1, 0.2, 0.3]


def test_of_two_who_measured_the_same_the_last_counts(tmp_path):
    path = tmp_path / "times.json"
    one, other = Cache(path), Cache(path)
    one.put("layer", "a", 0.1)
    other.put("layer", "a", 0.2)
    one.save()
    other.save()
    assert Cache(path).get("layer", "a") == 0.2


# --- where it lies ----------------------------------------------------------------------------------


def placed(folder, **environment):
    """The file of an environment."""
    cache = Cache.of(environment, folder)
    cache.put("layer", "option", 0.5)
    before = set(files(folder))
    cache.save()
    (new,) = set(files(folder)) - before or {""}
    return new


@pytest.mark.parametrize("key", ENVIRONMENT)
def test_another_environment_has_another_file(tmp_path, key):
    one = placed(tmp_path, **ENVIRONMENT)
    assert one
    assert placed(tmp_path, **ENVIRONMENT | {key: "another"})
    assert Cache.of(ENVIRONMENT, tmp_path).get("layer", "option") == 0.5
    assert Cache.of(ENVIRONMENT | {key: "third"}, tmp_path).get("layer", "option") is None


def test_the_order_of_the_keys_does_not_matter(tmp_path):
    placed(tmp_path, **ENVIRONMENT)
    turned = dict(reversed(ENVIRONMENT.items()))
    assert Cache.of(turned, tmp_path).get("layer", "option") == 0.5


def test_values_do_not_run_into_each_other(tmp_path):
    texts = [{"a": "1", "b": "2"}, {"a": "12", "b": ""}, {"a": "", "b": "12"}, {"a": "1", "c": "2"}]
    names = [placed(tmp_path, **text) for text in texts]
    assert all(one and one != other for one, other in combinations(names, 2))


def test_another_version_of_what_is_measured_has_another_file(tmp_path, monkeypatch):
    placed(tmp_path, **ENVIRONMENT)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert Cache.of(ENVIRONMENT, tmp_path).get("layer", "option") is None


def test_by_default_it_lies_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "user_cache_path", lambda name: tmp_path / name)
    cache = Cache.of(ENVIRONMENT)
    cache.put("layer", "option", 0.5)
    cache.save()
    (path,) = (tmp_path / "onnx-lowrank" / "latency").iterdir()
    assert json.loads(path.read_text()) == {"layer": {"option": 0.5}}
