"""Times on disk, whoever wrote the file."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import combinations

import pytest

from onnx_lowrank.budgets.latency import cache as module
from onnx_lowrank.budgets.latency.cache import Cache
from tiny import files

ENVIRONMENT = {"runtime": "1.20", "provider": "CPUExecutionProvider", "threads": "2", "caches": "cold"}


def saved(path, **ratios):
    cache = Cache(path)
    for chain, ratio in ratios.items():
        cache.put("layer", chain, ratio)
    cache.save()
    return cache


def changed(path, *statements):
    """Change a database as somebody else could."""
    with closing(sqlite3.connect(path)) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def rows(path):
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT * FROM times ORDER BY rowid").fetchall()


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1e-6, 1e6, 123.456, 0.1 + 0.2])
def test_what_was_saved_is_read_back_to_the_bit(tmp_path, ratio):
    saved(tmp_path / "a" / "b" / "times.sqlite", chain=ratio)
    read = Cache(tmp_path / "a" / "b" / "times.sqlite")
    assert read.get("layer", "chain") == ratio
    assert read.get("layer", "other") is None
    assert read.get("other", "chain") is None


def test_what_was_put_is_known_at_once_and_the_last_counts(tmp_path):
    cache = Cache(tmp_path / "times.sqlite")
    cache.put("layer", "chain", 0.5)
    cache.put("layer", "chain", 0.25)
    assert cache.get("layer", "chain") == 0.25
    assert files(tmp_path) == {}


def test_nothing_is_written_where_nothing_is_new(tmp_path):
    path = tmp_path / "times.sqlite"
    Cache(path).save()
    assert files(tmp_path) == {}
    cache = saved(path, chain=0.5)
    path.unlink()
    cache.save()
    assert files(tmp_path) == {}


def test_what_turned_out_to_be_wrong_is_taken_out_again(tmp_path):
    path = tmp_path / "times.sqlite"
    saved(path, old=0.5)
    cache = saved(path, new=0.25)
    cache.put("other", "newer", 0.125)
    cache.discard()
    read = Cache(path)
    known = [read.get(*key) for key in (("layer", "old"), ("layer", "new"), ("other", "newer"))]
    assert known == [0.5, None, None]
    before = files(tmp_path)
    cache.discard()
    cache.save()
    assert files(tmp_path) == before


def test_what_others_measured_of_the_same_is_not_taken_out(tmp_path):
    path = tmp_path / "times.sqlite"
    cache = saved(path, chain=0.25)
    saved(path, chain=0.5)
    cache.discard()
    assert Cache(path).get("layer", "chain") == 0.5


def test_no_file_keeps_nothing_but_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = Cache(None)
    cache.put("layer", "chain", 0.5)
    cache.save()
    assert cache.get("layer", "chain") == 0.5
    cache.discard()
    assert files(tmp_path) == {}
    assert Cache(None).get("layer", "chain") is None


# --- what is no database of ours ----------------------------------------------------------------------


def database(tmp_path, *statements):
    path = tmp_path / "made.sqlite"
    changed(path, *statements)
    return path.read_bytes()


def good(tmp_path):
    saved(tmp_path / "good.sqlite", chain=0.5, **{f"chain{n}": 0.5 for n in range(200)})
    return (tmp_path / "good.sqlite").read_bytes()


LIKE_OURS = module._TABLE.replace("times", "others")
ROW = "INSERT INTO times VALUES ('', 'layer', 'chain', 0.5)"
FOREIGN = {
    "text": lambda folder: b'{"layer": {"chain": 0.5}}',
    "noise": lambda folder: bytes(range(256)) * 64,
    "a header without a database": lambda folder: b"SQLite format 3\0" + b"\xff" * 5000,
    "cut off": lambda folder: good(folder)[:9000],
    "damaged": lambda folder: good(folder)[:4096] + b"\xa5" * 4096 + good(folder)[8192:],
    "another table": lambda folder: database(folder, "CREATE TABLE notes (text)"),
    "another table beside ours": lambda folder: database(folder, module._TABLE, "CREATE TABLE n (t)", ROW),
    "other columns": lambda folder: database(
        folder, "CREATE TABLE times (environment, layer, chain, ratio)", ROW
    ),
    "a view": lambda folder: database(
        folder,
        LIKE_OURS,
        "CREATE VIEW times AS SELECT '' environment, 'layer' layer, 'chain' chain, 0.5 ratio",
    ),
    "a trigger": lambda folder: database(
        folder,
        module._TABLE,
        ROW,
        "CREATE TRIGGER more AFTER INSERT ON times BEGIN UPDATE times SET ratio = 0.001; END",
    ),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_damaged_or_foreign_file_counts_as_empty_and_is_replaced(tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "times.sqlite"
    path.write_bytes(content(tmp_path))
    assert Cache(path).get("layer", "chain") is None
    saved(path, own=0.25)
    assert rows(path) == [("", "layer", "own", 0.25)]
    assert list(files(folder)) == ["times.sqlite"]


def test_what_becomes_of_times_is_logged(tmp_path, caplog):
    path = tmp_path / "times.sqlite"
    path.write_bytes(b"no database")
    with caplog.at_level("DEBUG", "onnx_lowrank"):
        cache = saved(path, chain=0.5)
        Cache(path)
        cache.discard()
    told = [record.getMessage().replace(str(path), "PATH") for record in caplog.records]
    assert told == [
        "no times are read from PATH: file is not a database",
        "PATH is replaced: file is not a database",
        "wrote 1 times to PATH",
        "1 times are known in this environment, from PATH",
        "the times were disturbed, so 1 are deleted from PATH",
    ]


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_what_lies_beside_a_foreign_file_goes_with_it(tmp_path, suffix):
    path = tmp_path / "times.sqlite"
    path.write_bytes(b"no database")
    (tmp_path / f"times.sqlite{suffix}").write_bytes(b"its journal")
    saved(path, chain=0.5)
    assert list(files(tmp_path)) == ["times.sqlite"]
    assert Cache(path).get("layer", "chain") == 0.5


def test_an_empty_file_is_an_empty_database(tmp_path):
    path = tmp_path / "times.sqlite"
    path.touch()
    assert Cache(path).get("layer", "chain") is None
    saved(path, chain=0.5)
    assert Cache(path).get("layer", "chain") == 0.5


@pytest.mark.parametrize(
    "wrong", ["0.0", "-1.0", "9e-7", "1000001.0", "1e300", "9e999", "-9e999", "'x'", "'0.5'||'x'", "x'00'"]
)
def test_what_is_no_ratio_is_ignored_and_takes_nothing_else_with_it(tmp_path, wrong):
    path = tmp_path / "times.sqlite"
    saved(path, bad=2.0, good=2.0)
    changed(path, f"UPDATE times SET ratio = {wrong} WHERE chain = 'bad'")  # noqa: S608
    cache = Cache(path)
    assert cache.get("layer", "bad") is None
    assert cache.get("layer", "good") == 2.0


@pytest.mark.parametrize("ratio", [0.0, 1e300, float("inf"), float("nan"), -1.0])
def test_what_is_no_ratio_is_not_written(tmp_path, ratio):
    path = tmp_path / "times.sqlite"
    saved(path, bad=ratio, good=0.5)
    assert rows(path) == [("", "layer", "good", 0.5)]


@pytest.mark.parametrize(
    "key", ["x'ff'", "CAST(x'ff' AS TEXT)", "7", "zeroblob(1000000)", "printf('%.999c', 'x')"]
)
def test_keys_may_be_anything(tmp_path, key):
    path = tmp_path / "times.sqlite"
    saved(path, good=2.0)
    changed(path, f"INSERT INTO times VALUES ('', {key}, {key}, 0.5)")  # noqa: S608
    cache = Cache(path)
    assert cache.get("layer", "good") == 2.0
    assert all(len(text) <= module._LONGEST for known in cache._known for text in known)


@pytest.mark.parametrize(("spare", "known"), [(0, 0.5), (-1, None)])
def test_a_huge_file_is_not_read_but_replaced(tmp_path, monkeypatch, spare, known):
    path = tmp_path / "times.sqlite"
    saved(path, chain=0.5)
    monkeypatch.setattr(module, "_LARGEST", path.stat().st_size + spare)
    assert Cache(path).get("layer", "chain") == known
    saved(path, other=0.25)
    assert [row[2] for row in rows(path)] == (["chain"] if known else []) + ["other"]


def test_only_the_newest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 3)
    path = tmp_path / "times.sqlite"
    for name in "abcd":
        saved(path, **{name: 0.5})
    saved(path, b=0.25)
    assert [(row[2], row[3]) for row in rows(path)] == [("c", 0.5), ("d", 0.5), ("b", 0.25)]
    saved(path, **{f"more{n}": 0.5 for n in range(7)})
    assert len(rows(path)) == 3
    monkeypatch.setattr(module, "_MOST", 2)
    assert len(Cache(path)._known) == 2


# --- what the system refuses --------------------------------------------------------------------------


def test_a_folder_in_its_place_stays(tmp_path):
    path = tmp_path / "times.sqlite"
    path.mkdir()
    cache = saved(path, chain=0.5)
    assert cache.get("layer", "chain") == 0.5
    assert files(tmp_path) == {"times.sqlite": None}


@pytest.mark.parametrize("inside", ["", "more"])
def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, inside):
    (tmp_path / "file").write_text("text")
    cache = saved(tmp_path / "file" / inside / "times.sqlite", chain=0.5)
    assert cache.get("layer", "chain") == 0.5
    assert files(tmp_path) == {"file": b"text"}


def test_a_database_that_another_process_does_not_let_go_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    path = tmp_path / "times.sqlite"
    cache = saved(path, chain=0.5)
    cache.put("layer", "more", 0.25)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert Cache(path).get("layer", "chain") is None
        cache.save()
    assert Cache(path).get("layer", "more") is None
    cache.save()
    assert [Cache(path).get("layer", chain) for chain in ("chain", "more")] == [0.5, 0.25]


FULL = """
import resource, signal, sys
from pathlib import Path
from onnx_lowrank.budgets.latency.cache import Cache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cache = Cache(Path(sys.argv[1]))
for n in range(2000):
    cache.put("layer", f"chain{n}", 0.5)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
cache.save()
print(cache.get("layer", "chain1999"))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no limit on the size of files")
def test_a_full_disk_leaves_the_database_as_it_was(tmp_path):
    path = tmp_path / "times.sqlite"
    saved(path, chain=0.5)
    done = subprocess.run(
        [sys.executable, "-c", FULL, path], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["0.5"]
    assert rows(path) == [("", "layer", "chain", 0.5)]


# --- several who write --------------------------------------------------------------------------------


def test_what_two_write_in_turns_is_all_kept(tmp_path):
    path = tmp_path / "times.sqlite"
    one, other = Cache(path), Cache(path)
    one.put("layer", "a", 0.1)
    other.put("layer", "b", 0.2)
    other.put("second", "a", 0.3)
    one.save()
    other.save()
    read = Cache(path)
    assert [read.get("layer", "a"), read.get("layer", "b"), read.get("second", "a")] == [0.1, 0.2, 0.3]


def test_of_two_who_measured_the_same_the_last_counts(tmp_path):
    path = tmp_path / "times.sqlite"
    one, other = Cache(path), Cache(path)
    one.put("layer", "a", 0.1)
    other.put("layer", "a", 0.2)
    one.save()
    other.save()
    assert Cache(path).get("layer", "a") == 0.2
    one.put("layer", "b", 0.3)
    one.save()
    assert Cache(path).get("layer", "a") == 0.2, "what was saved before is not written again"


WRITER = """
import sys
from pathlib import Path
from onnx_lowrank.budgets.latency.cache import Cache
path, name, start = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
while not start.exists():
    pass
for n in range(30):
    cache = Cache(path)
    cache.put(name, str(n), 0.5)
    cache.save()
"""


def test_processes_that_write_at_the_same_time_lose_nothing(tmp_path):
    path, start = tmp_path / "times.sqlite", tmp_path / "start"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, name, start], stderr=subprocess.PIPE)
        for name in "abcd"
    ]
    start.touch()
    assert [writer.communicate(timeout=120)[1] for writer in writers] == [b""] * 4
    assert [writer.returncode for writer in writers] == [0] * 4
    read = Cache(path)
    assert sum(read.get(name, str(n)) == 0.5 for name in "abcd" for n in range(30)) == 120
    assert sorted(files(tmp_path)) == ["start", "times.sqlite"]


# --- which environment --------------------------------------------------------------------------------


def placed(folder, **environment):
    """Save a time in an environment."""
    cache = Cache.for_environment(environment, folder)
    cache.put("layer", "chain", 0.5)
    cache.save()


def is_known(folder, environment):
    return Cache.for_environment(environment, folder).get("layer", "chain") == 0.5


@pytest.mark.parametrize("key", ENVIRONMENT)
def test_another_environment_has_its_own_times(tmp_path, key):
    placed(tmp_path, **ENVIRONMENT)
    assert is_known(tmp_path, ENVIRONMENT)
    assert not is_known(tmp_path, ENVIRONMENT | {key: "another"})
    placed(tmp_path, **ENVIRONMENT | {key: "another"})
    assert is_known(tmp_path, ENVIRONMENT | {key: "another"})
    assert not is_known(tmp_path, ENVIRONMENT | {key: "third"})
    assert len(files(tmp_path)) == 1


def test_the_order_of_the_keys_does_not_matter(tmp_path):
    placed(tmp_path, **ENVIRONMENT)
    assert is_known(tmp_path, dict(reversed(ENVIRONMENT.items())))


def test_values_do_not_run_into_each_other(tmp_path):
    texts = [{"a": "1", "b": "2"}, {"a": "12", "b": ""}, {"a": "", "b": "12"}, {"a": "1", "c": "2"}]
    for index, text in enumerate(texts):
        placed(tmp_path / str(index), **text)
    assert all(not is_known(tmp_path / str(one), texts[other]) for one, other in combinations(range(4), 2))
    assert all(is_known(tmp_path / str(index), text) for index, text in enumerate(texts))


def test_by_default_it_lies_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "user_cache_path", lambda name: tmp_path / name)
    placed(None, **ENVIRONMENT)
    ((environment, *row),) = rows(tmp_path / "onnx-lowrank" / "times.sqlite")
    assert row == ["layer", "chain", 0.5]
    assert len(environment) == 64
