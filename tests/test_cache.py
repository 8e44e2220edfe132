"""The cache of whole runs: the bytes of a run do not depend on it, whatever happens to it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError, cli, compress, means
from onnx_lowrank.calibrate import measurement, sensitivity
from onnx_lowrank.documents import plans
from onnx_lowrank.files.store import Store
from onnx_lowrank.work import kept
from onnx_lowrank.work.executor import Threads
from tiny import cnn

RNG = np.random.default_rng(11)
IMAGES = RNG.standard_normal((20, 8, 6, 6)).astype(np.float32)
CALIBRATED = {"calibration": IMAGES, "recipe": "output", "budget": "params"}
"""A run with moments, errors of activations, widths and shared factors, and probes."""


def outcome(ratio=0.5, **options):
    """All that a run gives."""
    with compress(cnn(), ratio, **options) as result:
        model = result.proto.SerializeToString(deterministic=True)
        return model, plans.to_json(result.plan), result.report.to_json()


@pytest.fixture(scope="module")
def alone():
    """Runs without a cache, by ratio."""
    return {ratio: outcome(ratio, cache=False, **CALIBRATED) for ratio in (0.5, 0.6)}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache that one run has filled."""
    folder = tmp_path_factory.mktemp("cache")
    made = outcome(cache=folder, **CALIBRATED)
    return folder, made


@pytest.fixture
def copied(filled, tmp_path):
    """The entries of a filled cache, to be changed."""
    (tmp_path / "results").mkdir()
    for path in (filled[0] / "results").iterdir():
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_run_with_an_empty_cache_gives_the_same(filled, alone):
    assert filled[1] == alone[0.5]


@pytest.mark.parametrize("ratio", [0.5, 0.6])
def test_a_run_with_a_filled_cache_measures_nothing_and_gives_the_same(copied, alone, ratio, monkeypatch):
    for module, name in ((measurement, "Task"), (measurement, "Lookups"), (sensitivity, "Overridable")):
        monkeypatch.setattr(module, name, None)
    map_, computed = Threads.map, []

    def noting(self, function, items):
        def noted():
            for item in items:
                computed.append(function)
                yield item

        return map_(self, function, noted())

    monkeypatch.setattr(Threads, "map", noting)
    before = {path.name: path.read_bytes() for path in (copied / "results").iterdir()}
    assert outcome(ratio, cache=copied, **CALIBRATED) == alone[ratio]
    assert not set(computed) & set(kept._KINDS)
    assert {path.name: path.read_bytes() for path in (copied / "results").iterdir()} == before


def test_what_was_found_is_logged(copied, caplog):
    with caplog.at_level(logging.DEBUG, "onnx_lowrank"):
        outcome(cache=copied, **CALIBRATED)
    assert "activations, pass 1: 3 layers are in the cache" in caplog.text
    assert "activation_errors: 3 results are in the cache, 0 were computed" in caplog.text
    assert "the effects of 3 layers are in the cache, 0 are measured" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_damaged_lost_and_foreign_entries_change_nothing(copied, alone, seed):
    rng = np.random.default_rng(seed)
    paths = sorted((copied / "results").iterdir())
    right = {path: path.read_bytes() for path in paths}
    for path in paths:
        kind = rng.integers(5)
        if kind == 0:
            path.unlink()
        elif kind == 1:
            path.write_bytes(right[path][: rng.integers(len(right[path]))])
        elif kind == 2:
            at = rng.integers(len(right[path]))
            path.write_bytes(right[path][:at] + bytes([right[path][at] ^ 1]) + right[path][at + 1 :])
        elif kind == 3:
            path.write_bytes(right[paths[rng.integers(len(paths))]])
    assert outcome(cache=copied, **CALIBRATED) == alone[0.5]
    assert {path: path.read_bytes() for path in paths} == right


@pytest.mark.parametrize("written", [0, 1, 2, 4, 6, 9])
def test_an_interrupted_run_goes_on(tmp_path, alone, monkeypatch, written):
    put, left = Store.put, [written]

    def interrupted(self, key, entry):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        put(self, key, entry)

    monkeypatch.setattr(Store, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outcome(cache=tmp_path, **CALIBRATED)
    monkeypatch.undo()
    assert len(list((tmp_path / "results").glob("*"))) == written or not written
    assert outcome(cache=tmp_path, **CALIBRATED) == alone[0.5]


def test_entries_that_go_during_a_run_do_not_break_it(tmp_path, alone, monkeypatch):
    """Another run with a full cache removes every entry as soon as it is written or read."""
    get, put = Store.get, Store.put

    def emptied(self):
        for path in self.folder.glob("*.entry"):
            path.unlink()

    def reading(self, *given):
        found = get(self, *given)
        emptied(self)
        return found

    def writing(self, *given):
        put(self, *given)
        if np.random.default_rng(len(given[0])).random() < 0.5:
            emptied(self)

    monkeypatch.setattr(Store, "get", reading)
    monkeypatch.setattr(Store, "put", writing)
    for _ in range(2):
        assert outcome(cache=tmp_path, **CALIBRATED) == alone[0.5]


KILLED = """
import os, signal, sys
import numpy as np, onnx
from onnx_lowrank import cli
from onnx_lowrank.files import store
write, left = store._write, [5]
def killed(file, key, entry):
    left[0] -= 1
    if left[0] < 0:
        file.write(b"half of an entry")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, key, entry)
store._write = killed
cli.main()
"""


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(cnn(), "in.onnx")
    np.save("x.npy", IMAGES)
    files = ["out.onnx", "--save-plan", "plan.json", "--report", "report.json"]
    command = ["in.onnx", *files, "--ratio", "0.5", "--calibration", "x.npy", "--pass", "output"]
    names = ("out.onnx", "plan.json", "report.json")

    def written_by(*options):
        ran = subprocess.run([sys.executable, "-m", "onnx_lowrank", *command, *options], capture_output=True)
        assert ran.returncode == 0, ran.stderr
        return [Path(name).read_bytes() for name in names]

    wanted = written_by("--no-cache")
    for name in names:
        Path(name).unlink()
    killed = [sys.executable, "-c", KILLED, *command, "--cache", "cache"]
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    assert not any(Path(name).exists() for name in names)
    assert len(list(Path("cache/results").glob(".onnx-lowrank-*"))) == 1
    assert written_by("--cache", "cache") == wanted
    assert not list(Path("cache/results").glob(".onnx-lowrank-*"))


def test_spectra_are_kept_without_data(tmp_path, caplog):
    wanted = outcome(cache=False)
    for found in (0, 3):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "onnx_lowrank"):
            assert outcome(cache=tmp_path) == wanted
        assert f"singular_values: {found} results are in the cache, {3 - found} were computed" in caplog.text


@pytest.mark.parametrize(("least", "kept_"), [(2**30, False), (0, True)])
def test_large_models_are_kept_unasked(tmp_path, monkeypatch, least, kept_):
    monkeypatch.setattr(means, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(means, "_LARGE", least)
    outcome()
    assert (tmp_path / "onnx-lowrank" / "results").is_dir() == kept_
    outcome(0.6, cache=False)
    assert (tmp_path / "onnx-lowrank" / "results").is_dir() == kept_


# --- the command ----------------------------------------------------------------------------------


def run(capsys, *options):
    """The exit code of the command, and its output on stderr."""
    with pytest.raises(SystemExit) as exited:
        cli.main(["in.onnx", "out.onnx", "--ratio", "0.5", *options])
    return exited.value.code, " ".join(capsys.readouterr().err.split())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(cnn(), "in.onnx")
    return tmp_path


def test_the_command_keeps_results_in_its_folder(folder, capsys):
    assert run(capsys, "--cache", "kept")[0] == 0
    assert len(list(Path("kept/results").iterdir())) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cache", "in.onnx"), "The cache in.onnx cannot be used, as"),
        (("--cache", "in.onnx/below"), "in.onnx is a file: name a folder."),
        (("--cache", ""), "--cache: the path is empty"),
        (("--cache", "kept", "--no-cache"), "--cache and --no-cache contradict each other"),
    ],
)
def test_a_wrong_cache_is_one_error(folder, capsys, options, words):
    code, text = run(capsys, *options)
    assert code == 2
    assert text.startswith("onnx-lowrank: ")
    assert words in text
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize("cache", ["", 3, None, b"kept"])
def test_a_cache_is_a_folder_or_a_flag(cache):
    with pytest.raises(InputError, match=r"^cache is "):
        compress(cnn(), 0.5, cache=cache)


@pytest.mark.parametrize(("name", "reason"), [("a\0b", "embedded null byte"), ("x" * 300, "name too long")])
def test_a_cache_with_an_impossible_name_is_refused(name, reason):
    with pytest.raises(InputError, match=rf"^The cache {name} cannot be used \(.*{reason}\): name another"):
        compress(cnn(), 0.5, cache=name)


@pytest.mark.parametrize(("quiet", "warnings"), [((), 1), (("--quiet",), 0)])
def test_a_cache_that_cannot_be_written_costs_one_warning(folder, capsys, monkeypatch, quiet, warnings):
    def refused(self, size):
        raise PermissionError(13, "Permission denied")

    assert run(capsys, "--no-cache", "--quiet")[0] == 0
    wanted = Path("out.onnx").read_bytes()
    monkeypatch.setattr(Store, "_make_room", refused)
    code, text = run(capsys, "--cache", "kept", *quiet)
    assert code == 0
    assert text.count("cannot be written (Permission denied), so nothing more is kept there.") == warnings
    assert Path("out.onnx").read_bytes() == wanted


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_cache_is_read(folder, capsys):
    assert run(capsys, "--cache", "kept")[0] == 0
    wanted = Path("out.onnx").read_bytes()
    Path("kept/results").chmod(0o500)
    code, text = run(capsys, "--cache", "kept")
    assert (code, text.count("cannot be written")) == (0, 0)
    assert Path("out.onnx").read_bytes() == wanted
    Path("kept/results").chmod(0o700)
