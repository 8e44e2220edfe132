"""Faults of disks and of data files: one clear sentence each, and nothing half-written."""

from __future__ import annotations

import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError, cli, compress, session
from onnx_lowrank.engines import checker
from onnx_lowrank.progress import Silent
from onnx_lowrank.stages import score
from onnx_lowrank.work.executor import Threads
from tiny import cnn, decaying, files


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A model with a data file, in a folder of its own; another folder takes temporary files."""
    for name in ("model", "temporary", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = tmp_path / "model" / "in.onnx"
    onnx.save(cnn(), path, save_as_external_data=True, location="in.data", size_threshold=0)
    return path


@contextmanager
def room_for(size: int):
    """Let no file grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failure(capsys, *arguments: object) -> str:
    """The one sentence with which the command refuses."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    text = capsys.readouterr().err.strip()
    assert ended.value.code == 2, text
    message = text.splitlines()[-1]
    assert message.startswith("onnx-lowrank: ")
    assert "Traceback" not in text
    return message


@pytest.mark.parametrize(
    ("kind", "sizes", "blamed"),
    [
        # New tensors in a temporary file, the checker's folder, and the data file.
        ("external", (0, 8000, 14_000, 15_000), {".spill", "", ".onnx"}),
        # The plan and the report, and the model.
        ("inline", (0, 2000, 15_000), {".json", ".onnx"}),
    ],
)
def test_a_disk_that_fills_at_any_write_changes_nothing(model, tmp_path, capsys, kind, sizes, blamed):
    """Every bound makes another write fail."""
    if kind == "inline":
        onnx.save(cnn(fc=decaying(1, 400, 16)), model)  # larger than its report
    out = tmp_path / "out"
    targets = [out / "out.onnx", "--save-plan", out / "plan.json", "--report", out / "report.json"]
    command = [model, *targets, "--ratio", "0.5", "--no-cache", "--quiet"]
    for name in ("out.onnx", "plan.json", "report.json"):
        (out / name).write_text("old")
    before = files(tmp_path)
    found = set()
    for size in sizes:
        with room_for(size):
            message = failure(capsys, *command)
        assert "cannot be written (File too large): make room" in message
        assert files(tmp_path) == before
        found.add(Path(message.split()[1]).suffix)
    assert found == blamed
    with pytest.raises(SystemExit, match="0"):
        cli.main([str(argument) for argument in command])
    onnx.checker.check_model(str(out / "out.onnx"))


def test_a_disk_that_is_full_for_spectra(model, monkeypatch):
    monkeypatch.setattr(score, "_SPECTRA", 0)
    with room_for(0), pytest.raises(InputError, match=r"temporary cannot be written \(File too large\)"):
        compress(model, 0.5, dry_run=True)


def test_a_disk_that_is_full_for_the_checker(model, monkeypatch):
    def full(proto, names):
        raise OSError(28, "No space left on device", "folder/model.onnx")

    monkeypatch.setattr(checker, "relocated", full)
    with pytest.raises(InputError, match=r"^folder/model\.onnx cannot be written \(No space left"):
        compress(model, 0.5)


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    other.replace(path)


CHANGES = {
    "replaced": replaced,
    "removed": Path.unlink,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
}


@pytest.mark.parametrize("name", ["in.data", "in.onnx"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_files_of_the_model_that_change_during_a_run(model, tmp_path, capsys, monkeypatch, change, name):
    original = session.build

    def build(*args):
        made = original(*args)
        change(model.with_name(name))
        return made

    monkeypatch.setattr(session, "build", build)
    message = failure(capsys, model, tmp_path / "out" / "out.onnx", "--ratio", "0.5", "--no-cache", "--quiet")
    assert f"{name} has changed since it was read: restore it, or run with the new one." in message
    assert not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("size", [0, 100])
def test_a_data_file_that_shrinks_while_it_is_read(model, tmp_path, capsys, monkeypatch, size):
    original = Threads.map

    def shrinking(self, function, items):
        drawn = list(items)
        os.truncate(model.with_name("in.data"), size)
        return original(self, function, drawn)

    monkeypatch.setattr(Threads, "map", shrinking)
    message = failure(capsys, model, tmp_path / "out" / "out.onnx", "--ratio", "0.5", "--no-cache", "--quiet")
    assert "in.data cannot be read" in message
    assert "restore it as it was, and run again" in message
    assert not list((tmp_path / "out").iterdir())


def test_a_data_file_that_shrinks_before_an_engine_reads_it(model):
    class Shrinking(Silent):
        def stage(self, name, total=None):
            if name.startswith("compare"):
                os.truncate(model.with_name("in.data"), 0)
            return super().stage(name, total)

    images = np.random.default_rng(5).standard_normal((20, 8, 6, 6), np.float32)
    with pytest.raises(InputError, match=r"in\.data has changed since it was read"):
        compress(model, 0.5, calibration={"x": images}, progress=Shrinking())


def test_a_data_file_that_changes_before_the_model_is_saved(model, tmp_path):
    with compress(model, 0.5) as result:
        os.utime(model.with_name("in.data"), ns=(1, 1))
        with pytest.raises(InputError, match=r"in\.data has changed since it was read"):
            result.save(tmp_path / "out" / "out.onnx")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe", "device"])
def test_data_that_is_no_file_is_refused_without_waiting_for_it(model, capsys, tmp_path, kind):
    data = model.with_name("in.data")
    data.unlink()
    if kind == "folder":
        data.mkdir()
    elif kind == "pipe":
        os.mkfifo(data)
    elif kind == "link to a pipe":
        os.mkfifo(model.with_name("pipe"))
        data.symlink_to("pipe")
    else:
        data.symlink_to("/dev/zero")
    message = failure(capsys, model, tmp_path / "out" / "out.onnx", "--ratio", "0.5")
    assert ("links to /dev/zero" if kind == "device" else "in.data that is no file") in message
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts file systems")
def test_a_file_system_without_room(model, tmp_path, capsys):
    """A real one: it also fails where no single file is too large."""
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=8k none {small} 2>/dev/null"):  # noqa: S605 - a path of ours
        pytest.skip("this machine mounts nothing")
    try:
        message = failure(capsys, model, small / "out.onnx", "--ratio", "0.9", "--no-cache", "--quiet")
        assert f"{small}/out.onnx cannot be written (No space left on device): make room" in message
        assert not list(small.iterdir())
    finally:
        os.system(f"umount {small}")  # noqa: S605
