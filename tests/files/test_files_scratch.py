"""Temporary folders: a killed run leaves nothing that the next run does not remove."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.files.scratch import roomy, scratch, unnamed
from onnx_lowrank.files.spilling import Spill
from windows import pretend

KILLED = """
import os, signal, sys
from onnx_lowrank.files.scratch import scratch
with scratch(sys.argv[1]) as folder:
    (folder / "weights").write_bytes(b"large")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(folder) -> None:
    command = [sys.executable, "-c", KILLED, str(folder)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def test_a_folder_goes_with_its_files(tmp_path):
    with scratch(tmp_path) as folder:
        (folder / "file").write_bytes(b"content")
        assert [*tmp_path.iterdir()] == [folder]
    assert not [*tmp_path.iterdir()]


def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    killed(tmp_path)
    (left,) = tmp_path.iterdir()
    assert [path.name for path in left.iterdir()] == ["weights"]
    with scratch(tmp_path) as folder:
        assert [*tmp_path.iterdir()] == [folder]


def test_the_folders_of_living_runs_stay(tmp_path):
    with scratch(tmp_path) as first, scratch(tmp_path) as second:
        killed(tmp_path)
        assert {first, second} < {*tmp_path.iterdir()}
        with scratch(tmp_path) as third:
            assert {*tmp_path.iterdir()} == {first, second, third}


def test_only_folders_of_this_package_go(tmp_path):
    (tmp_path / "onnx-lowrank-file.scratch").write_bytes(b"")
    (tmp_path / "onnx-lowrank-link.scratch").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other.scratch").mkdir()
    before = {*tmp_path.iterdir()}
    with scratch(tmp_path):
        pass
    assert {*tmp_path.iterdir()} == before


def test_a_folder_that_was_taken_for_a_dead_ones_is_made_again(tmp_path, monkeypatch):
    lock, removed = os.open, []

    def opened(path, flags, *mode, **more):
        if flags & os.O_DIRECTORY and not removed:
            removed.append(path)
            os.rmdir(path)  # noqa: PTH106 - what another run did before the lock
        return lock(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", opened)
    with scratch(tmp_path) as folder:
        assert folder.is_dir()
    assert len(removed) == 1
    assert not [*tmp_path.iterdir()]


def test_windows_keeps_a_folder_with_a_mapped_file(tmp_path, monkeypatch):
    pretend(monkeypatch)
    with scratch(tmp_path) as folder:
        np.arange(9.0).tofile(folder / "mapped")
        mapped = np.memmap(folder / "mapped", mode="r")
    assert (folder / "mapped").exists()
    assert mapped.sum()


@pytest.mark.parametrize("call", ["mkdir", "rmtree"])
def test_an_interrupt_leaves_no_folder(tmp_path, monkeypatch, call):
    owner = {"mkdir": Path, "rmtree": shutil}[call]
    original, calls = getattr(owner, call), []

    def interrupted(*args, **options):
        calls.append(args)
        if call == "mkdir":
            original(*args, **options)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(owner, call, interrupted)
    with pytest.raises(KeyboardInterrupt), scratch(tmp_path) as folder:
        (folder / "weights").write_bytes(b"large")
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_locked_is_an_error(tmp_path, monkeypatch):
    """The next sweep would take it for a dead run's."""

    def no_more(path, flags, *mode, **more):
        monkeypatch.undo()
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", no_more)
    with pytest.raises(InputError, match=r"takes no temporary file \(Too many open files\)"):
        Spill(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_forked_process_leaves_the_folder_of_its_parent(tmp_path, monkeypatch):
    with scratch(tmp_path) as folder:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with scratch(tmp_path):
            monkeypatch.undo()
        assert folder in {*tmp_path.iterdir()}
        assert len([*tmp_path.iterdir()]) == 2


def test_a_spill_is_in_such_a_folder(tmp_path):
    killed(tmp_path)
    with Spill(tmp_path) as spill:
        ((name, path),) = spill.files.items()
        assert path.name == name
        assert [*tmp_path.iterdir()] == [path.parent]
    assert not [*tmp_path.iterdir()]


def test_a_system_without_a_temporary_folder_is_an_error(monkeypatch):
    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    for use in (Spill, unnamed):
        with pytest.raises(InputError, match=r"No folder takes temporary files \(No usable .*: set TMPDIR"):
            use()


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_named(number):
    with (
        pytest.raises(InputError, match=r"^weights cannot be written \(no\): make room there, or set TMPDIR"),
        roomy(),
    ):
        raise OSError(number, "no", "weights")


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    with pytest.raises(InputError, match="takes no temporary file"):
        Spill(tmp_path / "absent")
