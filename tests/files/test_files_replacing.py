"""What a file is replaced by, and in which order, on any file system."""

import os
import shutil
import signal
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from onnx_lowrank.errors import InputError
from onnx_lowrank.files import atomic
from onnx_lowrank.files.atomic import check_writable, finish, hidden, locked, permissions, replacing, sweep
from onnx_lowrank.files.deferring import deferred_signals


def write(*targets: Path) -> None:
    with replacing(*targets) as files:
        for file in files:
            file.write(b"new")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def failing(monkeypatch: pytest.MonkeyPatch, target: Path, error: BaseException) -> None:
    """Make the rename over a target fail."""
    original = Path.replace

    def replace(self: Path, other: Path) -> Path:
        if other == target:
            raise error
        return original(self, other)

    monkeypatch.setattr(Path, "replace", replace)


# --- targets --------------------------------------------------------------------------------------


def test_a_target_that_cannot_be_written_is_refused_with_the_reason(tmp_path, monkeypatch):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.touch()
    os.mkfifo(pipe)
    told = {
        tmp_path / "no" / "file": f"cannot be written, as there is no folder {tmp_path / 'no'}: create it.",
        tmp_path: "is a folder: name a file to write.",
        pipe: "is no regular file: name another to write.",
        file / "file": "cannot be written (Not a directory): choose another name.",
        tmp_path / "\0": "cannot be written (embedded null byte): choose another name.",
    }
    for target, sentence in told.items():
        with pytest.raises(InputError) as caught:
            check_writable(target)
        assert str(caught.value) == f"{target} {sentence}"
    asked = []
    monkeypatch.setattr(os, "access", lambda path, way: asked.append((path, way)))
    for target in (file, tmp_path / "new"):
        with pytest.raises(InputError, match=r"cannot be written: change its permissions or choose another"):
            check_writable(target)
    assert asked == [(file, os.W_OK), (tmp_path, os.W_OK)]


def test_every_target_is_checked_before_anything_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder is a folder: name a file"), replacing(tmp_path / "folder"):
        pytest.fail("the block has begun")


def test_the_reason_of_the_system_is_told(tmp_path, monkeypatch):
    target = tmp_path / "a"
    failing(monkeypatch, target, OSError(28, "No space left on device"))
    with pytest.raises(InputError) as caught:
        write(target)
    assert str(caught.value) == (
        f"{target} cannot be written (No space left on device): make room or choose another place."
    )
    failing(monkeypatch, target, OSError("odd"))
    with pytest.raises(InputError, match=r"cannot be written \(odd\)"):
        write(target)
    assert contents(tmp_path) == {}


# --- order ----------------------------------------------------------------------------------------


def test_all_bytes_are_on_the_disk_before_the_first_rename(tmp_path, monkeypatch):
    targets, seen = [tmp_path / "a", tmp_path / "b"], []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(number: int) -> None:
        seen.append(("fsync", os.fstat(number).st_size))
        fsync(number)

    def noting_replace(self: Path, other: Path) -> Path:
        seen.append(("replace", other.name))
        return replace(self, other)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    write(*targets)
    assert seen == [("fsync", 3), ("fsync", 3), ("replace", "a"), ("replace", "b")]


def test_finishing_twice_is_finishing_once(tmp_path, monkeypatch):
    with hidden(tmp_path, None) as (path, file):
        file.write(b"new")
        finish(file)
        assert not file.closed
        assert path.read_bytes() == b"new"
        monkeypatch.setattr(sys, "platform", "win32")
        finish(file)
        assert file.closed, "Windows renames no open file"
        finish(file)
        assert locked(0) is False, "Windows has no such locks"


def led(*targets: Path) -> None:
    with replacing(*targets, leads=True) as files:
        for file in files:
            file.write(b"new")


def old_and_others(folder: Path) -> list[Path]:
    targets = [folder / name for name in ("model", "plan", "report")]
    for target in targets[:2]:
        target.write_bytes(b"old")
    return targets


def test_there_is_no_plan_while_its_model_changes(tmp_path, monkeypatch):
    targets, seen = old_and_others(tmp_path), []
    original = Path.replace

    def noting(self: Path, other: Path) -> Path:
        seen.append([path.name for path in targets if path.exists()])
        return original(self, other)

    monkeypatch.setattr(Path, "replace", noting)
    led(*targets)
    assert seen == [["model"], ["model"], ["model", "plan"]]
    assert contents(tmp_path) == dict.fromkeys(("model", "plan", "report"), b"new")


@pytest.mark.parametrize("failed", range(3))
def test_a_model_and_its_plan_come_back_together(tmp_path, monkeypatch, failed):
    targets = old_and_others(tmp_path)
    original, left = Path.replace, [targets[failed]]

    def replace(self: Path, other: Path) -> Path:
        if other in left:
            left.remove(other)
            raise OSError(5, "Input/output error")
        return original(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(InputError, match=r"model cannot be written \(Input/output error\)"):
        led(*targets)
    assert contents(tmp_path) == {"model": b"old", "plan": b"old"}


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("at", range(3))
def test_a_signal_between_renames_waits_for_the_last_one(tmp_path, monkeypatch, at):
    targets = old_and_others(tmp_path)
    original = Path.replace

    def interrupted(self: Path, other: Path) -> Path:
        if other == targets[at]:
            signal.raise_signal(signal.SIGINT)
        return original(self, other)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        led(*targets)
    assert contents(tmp_path) == dict.fromkeys(("model", "plan", "report"), b"new")


def test_signals_wait_and_handlers_stay():
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda number, frame: came.append(number)) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        ours = [signal.getsignal(number) for number in numbers]
        with deferred_signals():
            for number in numbers:
                signal.raise_signal(number)
            assert not came
        assert came == [signal.SIGINT, signal.SIGTERM]
        assert [signal.getsignal(number) for number in numbers] == ours
        with ThreadPoolExecutor() as threads, deferred_signals():
            threads.submit(_pass_through).result()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _pass_through() -> None:
    """In another thread, which can set no handler."""
    handler = signal.getsignal(signal.SIGINT)
    with deferred_signals():
        assert signal.getsignal(signal.SIGINT) is handler


# --- undoing --------------------------------------------------------------------------------------


def test_a_new_file_goes_again_if_a_later_one_cannot_be_renamed(tmp_path, monkeypatch):
    failing(monkeypatch, tmp_path / "b", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", tmp_path / "b")
    assert contents(tmp_path) == {}


def test_a_new_file_that_somebody_removed_meanwhile_is_no_error(tmp_path, monkeypatch):
    original, (first, last) = Path.replace, (tmp_path / "a", tmp_path / "b")

    def replace(self: Path, other: Path) -> Path:
        if other == last:
            first.unlink()
            raise KeyboardInterrupt
        return original(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(first, last)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("is_link", [True, False])
def test_an_old_file_comes_back_on_any_file_system(tmp_path, monkeypatch, has_links, is_link):
    first, last = tmp_path / "a", tmp_path / "b"
    (tmp_path / "elsewhere").write_bytes(b"old")
    if is_link:
        first.symlink_to("elsewhere")
    else:
        shutil.move(tmp_path / "elsewhere", first)
        first.chmod(0o640)
    before = sorted(path.name for path in tmp_path.iterdir())
    if not has_links:

        def link(*_: object, **__: object) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    failing(monkeypatch, last, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write(first, last)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert first.is_symlink() == is_link
    assert first.read_bytes() == b"old"
    assert is_link or stat.S_IMODE(first.stat().st_mode) == 0o640


def test_a_link_to_nothing_comes_back(tmp_path, monkeypatch):
    first, last = tmp_path / "a", tmp_path / "b"
    first.symlink_to("nothing")
    failing(monkeypatch, last, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write(first, last)
    assert [(path.name, path.readlink().name) for path in tmp_path.iterdir()] == [("a", "nothing")]


def test_an_old_file_comes_back_though_another_run_sweeps_meanwhile(tmp_path, monkeypatch):
    original, (first, last) = Path.replace, (tmp_path / "a", tmp_path / "b")
    first.write_bytes(b"old")

    def replace(self: Path, other: Path) -> Path:
        if other == last:
            sweep(tmp_path)
            raise KeyboardInterrupt
        return original(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(first, last)
    assert contents(tmp_path) == {"a": b"old"}


# --- hidden files ---------------------------------------------------------------------------------


def test_a_hidden_file_that_another_run_removed_before_its_lock_is_made_anew(tmp_path, monkeypatch):
    made = []

    def removing(file: int, *, waiting: bool = False) -> bool:
        assert waiting, "another run may hold the lock for a moment"
        made.append(next(tmp_path.glob(".onnx-lowrank-*.tmp")))
        if len(made) == 1:
            made[0].unlink()
        return locked(file, waiting=waiting)

    monkeypatch.setattr(atomic, "locked", removing)
    with hidden(tmp_path, 0o640) as (path, file):
        assert path == made[1] != made[0]
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        file.write(b"new")
        file.flush()
        assert contents(tmp_path) == {path.name: b"new"}
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(("mode", "first"), [(None, 0o666), (0o640, 0o600)])
def test_a_hidden_file_is_private_before_it_has_its_mode(tmp_path, monkeypatch, mode, first):
    modes, original = [], os.open

    def noting(path: str, flags: int, mode: int) -> int:
        modes.append(mode)
        return original(path, flags, mode)

    monkeypatch.setattr(os, "open", noting)
    with hidden(tmp_path, mode):
        assert modes == [first]


def test_a_hidden_file_without_locks_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "locked", lambda file, *, waiting=False: False)
    with hidden(tmp_path, None) as (path, _):
        path.unlink()
    assert contents(tmp_path) == {}


def test_a_lock_is_waited_for_only_when_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(atomic.fcntl, "flock", lambda file, way: asked.append((file, way)))
    assert locked(7)
    assert locked(7, waiting=True)
    assert asked == [(7, atomic.fcntl.LOCK_EX | atomic.fcntl.LOCK_NB), (7, atomic.fcntl.LOCK_EX)]
    monkeypatch.undo()
    with (tmp_path / "a").open("wb") as one, (tmp_path / "a").open("rb") as other:
        assert locked(one.fileno())
        assert locked(other.fileno()) is False


def test_sweeping_tells_every_model_before_it_goes(tmp_path):
    dead = [tmp_path / f".onnx-lowrank-{name}.tmp" for name in ("a", "b.model", "c.model")]
    for path in (*dead, tmp_path / ".onnx-lowrank-c", tmp_path / "d.tmp"):
        path.touch()
    (tmp_path / ".onnx-lowrank-folder.tmp").mkdir()
    seen = []
    sweep(tmp_path, lambda path: seen.append((path, path.exists())))
    assert seen == [(path, True) for path in dead[1:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".onnx-lowrank-c",
        ".onnx-lowrank-folder.tmp",
        "d.tmp",
    ]


def test_models_stay_where_nobody_asks_for_them(tmp_path):
    dead = [tmp_path / f".onnx-lowrank-{name}.tmp" for name in ("a", "b.model")]
    for path in dead:
        path.touch()
    sweep(tmp_path)
    assert [path.exists() for path in dead] == [False, True]


def test_a_model_that_cannot_be_removed_stays_and_the_next_one_goes(tmp_path):
    dead = [tmp_path / f".onnx-lowrank-{name}.model.tmp" for name in "ab"]
    for path in dead:
        path.touch()

    def refuse(path: Path) -> None:
        if path == dead[0]:
            raise PermissionError(13, "Permission denied")

    sweep(tmp_path, refuse)
    assert [path.exists() for path in dead] == [True, False]


def test_a_folder_that_cannot_be_listed_is_no_error(tmp_path, monkeypatch):
    def refuse(self: Path, pattern: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "glob", refuse)
    sweep(tmp_path)


def test_permissions_are_those_of_everybody_and_none_without_a_file(tmp_path):
    path = tmp_path / "a"
    assert permissions(path) is None
    path.touch()
    path.chmod(0o4751)
    assert permissions(path) == 0o751
