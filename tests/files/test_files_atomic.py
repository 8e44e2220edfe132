"""What is left of a target, of its data and of temporary files, however a run ends."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from onnx_lowrank.files import save as saving
from onnx_lowrank.files.atomic import replacing
from onnx_lowrank.files.load import array, load
from onnx_lowrank.files.save import save
from onnx_lowrank.files.tensors import tensors
from windows import pretend

X = np.ones((1, 4), np.float32)


def stored(path: Path, factor: float, data: str | None) -> Path:
    """A model x → x W on disk, W `factor` throughout, in a data file of that name or inline."""
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1,4] x) => (float[1,300] y) {y = MatMul(x, w)}'
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.full((4, 300), factor, np.float32), "w"))
    path.parent.mkdir(exist_ok=True)
    onnx.save(proto, path, save_as_external_data=data is not None, location=data)
    return path


def result(path: Path) -> float:
    """What the model gives for ones, over 4: the factor of its weight."""
    return float(onnxruntime.InferenceSession(path).run(None, {"x": X})[0].mean() / 4)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def location(path: Path) -> str:
    (weight,) = onnx.load(path, load_external_data=False).graph.initializer
    return next(entry.value for entry in weight.external_data if entry.key == "location")


def save_new(tmp_path: Path, target: Path, factor: float = 3.0, data: str | None = "in.data") -> None:
    save(load(stored(tmp_path / "source" / "in.onnx", factor, data)), target)


KILLED = """
import os, signal, sys
from pathlib import Path
from onnx_lowrank.files.load import load
from onnx_lowrank.files.save import save

original, calls = Path.replace, []

def replace(self, target):
    calls.append(target)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)

Path.replace = replace
save(load(sys.argv[1]), sys.argv[2])
"""


UNLINKING = """
import os, signal, sys
from pathlib import Path
from onnx_lowrank.files.load import load
from onnx_lowrank.files.save import save

original, calls = Path.unlink, []
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this in the background

def unlink(self, **options):
    if self.name == "out.onnx.data" and not calls:
        calls.append(self)
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    original(self, **options)

Path.unlink = unlink
try:
    save(load(sys.argv[1]), sys.argv[2])
except KeyboardInterrupt:
    sys.exit(1)
"""


def killed(source: Path, target: Path, rename: int) -> int:
    """Save in a process that is killed right before it renames for the so-manyth time."""
    command = [sys.executable, "-c", KILLED, str(source), str(target), str(rename)]
    return subprocess.run(command, check=False).returncode


@pytest.mark.parametrize("rename", [1, 2, 3])
@pytest.mark.parametrize("old", ["new style", "old style"])
def test_a_run_that_is_killed_leaves_the_old_model_with_its_old_weights(tmp_path, rename, old):
    target = tmp_path / "out" / "out.onnx"
    if old == "old style":
        stored(target, 2.0, "out.onnx.data")
    else:
        target.parent.mkdir()
        save_new(tmp_path, target, 2.0)
    code = killed(stored(tmp_path / "source" / "in.onnx", 3.0, "in.data"), target, rename)
    assert code == (-signal.SIGKILL if rename < 3 else 0)
    assert result(target) == (2.0 if rename < 3 else 3.0)


@pytest.mark.parametrize("rename", [1, 2])
def test_the_next_run_removes_what_a_killed_one_left(tmp_path, rename):
    target = stored(tmp_path / "out" / "out.onnx", 2.0, "out.onnx.data")
    killed(stored(tmp_path / "source" / "in.onnx", 3.0, "in.data"), target, rename)
    assert len(names(target.parent)) > 2
    save_new(tmp_path, target, 4.0)
    assert result(target) == 4.0
    assert names(target.parent) == ["out.onnx", location(target)]


def test_an_interrupt_right_after_the_last_rename_leaves_the_new_model(tmp_path, monkeypatch):
    target = stored(tmp_path / "out" / "out.onnx", 2.0, "out.onnx.data")
    original = Path.replace

    def replace(self: Path, other: Path) -> Path:
        original(self, other)
        if other == target:
            raise KeyboardInterrupt
        return other

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_new(tmp_path, target)
    assert result(target) == 3.0


def test_a_name_that_is_no_unicode_can_be_replaced(tmp_path):
    target = tmp_path / "out" / os.fsdecode(b"\xff.onnx")
    for factor in (2.0, 3.0):
        target.parent.mkdir(exist_ok=True)
        save_new(tmp_path, target, factor, None)
    assert names(target.parent) == [target.name]


@pytest.mark.parametrize("name", [b"a:b.onnx", b"a\\b.onnx", b"..\\b.onnx", b"\xff.onnx"])
def test_the_data_has_a_name_that_every_system_takes(tmp_path, name):
    target = tmp_path / "out" / os.fsdecode(name)
    target.parent.mkdir()
    for factor in (2.0, 3.0):
        save_new(tmp_path, target, factor)
        model = load(target)
        (weight,) = tensors(model.proto)
        assert (array(model, weight) == factor).all()
        assert names(target.parent) == sorted([target.name, *model.files])
        assert not any(character in location(target) for character in "\\:")


def test_the_temporary_file_of_a_living_run_stays(tmp_path):
    (tmp_path / ".onnx-lowrank-0123456789abcdef.tmp").write_bytes(b"of a dead run")
    (tmp_path / ".onnx-lowrank-link.tmp").symlink_to("elsewhere")
    (tmp_path / "elsewhere").write_bytes(b"")
    with replacing(tmp_path / "living") as (file,):
        file.write(b"living")
        with replacing(tmp_path / "other") as (other,):
            other.write(b"other")
    assert names(tmp_path) == [".onnx-lowrank-link.tmp", "elsewhere", "living", "other"]
    assert (tmp_path / "living").read_bytes() == b"living"


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_old_data_goes_though_the_run_ends_before_it_removes_it(tmp_path, death):
    """A run that is killed leaves it to the next run."""
    target = stored(tmp_path / "out" / "out.onnx", 2.0, "out.onnx.data")
    new = stored(tmp_path / "source" / "in.onnx", 3.0, "in.data")
    code = subprocess.run([sys.executable, "-c", UNLINKING, new, target, death.name], check=False).returncode
    assert code == (-death if death == signal.SIGKILL else 1)
    assert result(target) == 3.0
    if death == signal.SIGKILL:
        assert len(names(target.parent)) == 4  # with the old data and a second name of the old model
        save_new(tmp_path, target, 4.0)
    assert names(target.parent) == ["out.onnx", location(target)]


class Meeting:
    """Lets another run save at a moment of this one; that run may have to wait for this one."""

    def __init__(self, other):
        self.thread = threading.Thread(target=other)
        self.main = threading.get_ident()

    def here(self):
        if threading.get_ident() == self.main and self.thread.ident is None:
            self.thread.start()
            self.thread.join(0.3)


def test_a_run_waits_before_it_takes_data_into_use_that_another_one_removes(tmp_path, monkeypatch):
    target = tmp_path / "out" / "out.onnx"
    target.parent.mkdir()
    save_new(tmp_path, target, 2.0)
    again, unlink = load(stored(tmp_path / "again" / "in.onnx", 2.0, "in.data")), Path.unlink
    meeting = Meeting(lambda: save(again, target))

    def unlinking(self, **options):
        if self.suffix == ".data":
            meeting.here()
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", unlinking)
    save_new(tmp_path, target, 3.0)
    meeting.thread.join()
    assert result(target) == 2.0
    assert names(target.parent) == ["out.onnx", location(target)]


def test_data_of_a_run_that_was_faster_goes(tmp_path, monkeypatch):
    target = stored(tmp_path / "out" / "out.onnx", 2.0, "out.onnx.data")
    faster, pack = load(stored(tmp_path / "faster" / "in.onnx", 4.0, "in.data")), saving.pack
    meeting = Meeting(lambda: save(faster, target))

    def packing(*given, **options):
        meeting.here()
        if threading.get_ident() == meeting.main:
            meeting.thread.join()
        return pack(*given, **options)

    monkeypatch.setattr(saving, "pack", packing)
    save_new(tmp_path, target, 3.0)
    assert result(target) == 3.0
    assert names(target.parent) == ["out.onnx", location(target)]


def test_the_name_of_the_data_follows_from_its_bytes(tmp_path):
    targets = [tmp_path / name / "out.onnx" for name in ("a", "b", "c")]
    for target, factor in zip(targets, (3.0, 3.0, 4.0), strict=True):
        target.parent.mkdir()
        save_new(tmp_path, target, factor)
    first, same, other = ({p.name: p.read_bytes() for p in t.parent.iterdir()} for t in targets)
    assert first == same
    assert location(targets[0]) != location(targets[2])
    assert set(first) == {"out.onnx", location(targets[0])}
    assert set(other) == {"out.onnx", location(targets[2])}


@pytest.mark.parametrize("data", ["in.data", None])
@pytest.mark.parametrize("old", ["out.onnx.data", "out.onnx.0123456789abcdef.data"])
def test_data_of_the_replaced_model_goes(tmp_path, old, data):
    target = stored(tmp_path / "out" / "out.onnx", 2.0, old)
    save_new(tmp_path, target, data=data)
    assert names(target.parent) == ["out.onnx", *([location(target)] if data else [])]
    assert result(target) == 3.0


@pytest.mark.parametrize("name", ["out.onnx.data", "out.onnx.0123456789abcdef.data"])
def test_data_that_another_model_in_the_folder_names_stays(tmp_path, name):
    target = stored(tmp_path / "out" / "out.onnx", 2.0, name)
    backup = target.with_name("backup.onnx")
    backup.write_bytes(target.read_bytes())
    save_new(tmp_path, target)
    assert result(backup) == 2.0
    assert result(target) == 3.0
    backup.unlink()
    save_new(tmp_path, target, 4.0)
    assert names(target.parent) == sorted(["out.onnx", location(target), name])


@pytest.mark.parametrize("size", [1, 7, 40, 1 << 20])
def test_a_name_is_found_wherever_the_chunks_of_a_file_end(tmp_path, monkeypatch, size):
    monkeypatch.setattr(saving, "_CHUNK", size)
    target = stored(tmp_path / "out" / "out.onnx", 2.0, "out.onnx.0123456789abcdef.data")
    backup = target.with_name("backup.onnx")
    backup.write_bytes(target.read_bytes())
    save_new(tmp_path, target)
    assert names(target.parent) == sorted(
        ["backup.onnx", "out.onnx", location(target), "out.onnx.0123456789abcdef.data"]
    )


@pytest.mark.parametrize(
    "name", ["weights.data", "out.onnx.old.data", "other.onnx.0123456789abcdef.data", "out.onnx.data.bak"]
)
def test_data_of_another_name_stays_though_nothing_refers_to_it(tmp_path, name):
    target = stored(tmp_path / "out" / "out.onnx", 2.0, name)
    save_new(tmp_path, target)
    assert names(target.parent) == sorted(["out.onnx", location(target), name])


def test_data_stays_that_only_looks_like_the_replaced_models(tmp_path):
    target = stored(tmp_path / "out" / "out.onnx", 2.0, None)
    for name in ("out.onnx.data", "out.onnx.0123456789abcdef.data"):
        target.with_name(name).write_bytes(b"of somebody")
    save_new(tmp_path, target)
    assert len(names(target.parent)) == 4


def test_a_model_that_replaces_itself_keeps_the_data_that_it_reads(tmp_path):
    path = stored(tmp_path / "out" / "out.onnx", 2.0, "out.onnx.data")
    model = load(path)
    save(model, path)
    assert result(path) == 2.0
    assert names(path.parent) == sorted(["out.onnx", "out.onnx.data", location(path)])
    save(model, tmp_path / "again.onnx")
    assert result(tmp_path / "again.onnx") == 2.0


def test_saving_twice_changes_nothing(tmp_path):
    target = tmp_path / "out" / "out.onnx"
    target.parent.mkdir()
    for _ in range(2):
        save_new(tmp_path, target)
    assert result(target) == 3.0
    assert names(target.parent) == ["out.onnx", location(target)]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o644])
def test_a_replaced_file_keeps_its_mode(tmp_path, kept):
    target = tmp_path / "plan.json"
    target.touch()
    target.chmod(kept)
    with replacing(target) as (file,):
        (hidden,) = tmp_path.glob(".onnx-lowrank-*")
        assert mode(hidden) == kept, "nobody else may read it while it is written, either"
        file.write(b"new")
    assert mode(target) == kept


@pytest.mark.parametrize(
    ("model", "data", "kept"), [(0o600, 0o600, 0o600), (0o644, 0o600, 0o600), (0o600, 0o644, 0o600)]
)
def test_new_data_is_as_private_as_what_it_replaces(tmp_path, model, data, kept):
    target = stored(tmp_path / "out" / "out.onnx", 2.0, "out.onnx.data")
    target.chmod(model)
    target.with_name("out.onnx.data").chmod(data)
    save_new(tmp_path, target)
    assert mode(target) == model
    assert mode(target.with_name(location(target))) == kept


def test_new_files_have_the_default_mode(tmp_path):
    old = os.umask(0o027)
    try:
        save_new(tmp_path, tmp_path / "out.onnx")
    finally:
        os.umask(old)
    assert [mode(path) for path in tmp_path.glob("out.onnx*")] == [0o640, 0o640]


def test_two_targets_are_new_if_an_interrupt_comes_right_after_the_last_rename(tmp_path, monkeypatch):
    targets = [tmp_path / "a", tmp_path / "b"]
    for target in targets:
        target.write_bytes(b"old")
    original = Path.replace

    def replace(self: Path, other: Path) -> Path:
        original(self, other)
        if other == targets[1]:
            raise KeyboardInterrupt
        return other

    def write() -> None:
        with replacing(*targets) as files:
            for file in files:
                file.write(b"new")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"new"}


def test_what_a_broken_disk_keeps_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "b").write_bytes(b"old")

    def broken(self: Path, **options: bool) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", broken)
        with replacing(tmp_path / "b", tmp_path / "a") as files:
            for file in files:
                file.write(b"new")
    (left,) = tmp_path.glob(".onnx-lowrank-*")
    assert left.read_bytes() == b"old"
    with replacing(tmp_path / "a"):
        pass
    assert not left.exists()


def test_two_targets_change_together_or_not_at_all(tmp_path, monkeypatch):
    targets = [tmp_path / "a", tmp_path / "b"]
    for target in targets:
        target.write_bytes(b"old")
    original, seen = Path.replace, []

    def fail(self: Path, other: Path) -> Path:
        seen.append([target.exists() for target in targets])
        if other == targets[1]:
            raise KeyboardInterrupt
        return original(self, other)

    def write() -> None:
        with replacing(*targets) as files:
            for file in files:
                file.write(b"new")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert all(map(all, seen)), "no target is ever missing"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old", "b": b"old"}
    write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"new"}


def unsupported(*given: object, **more: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("has_links", [True, False])
def test_windows_replaces_several_files(tmp_path, monkeypatch, has_links):
    pretend(monkeypatch)
    if not has_links:
        monkeypatch.setattr(os, "link", unsupported)
    targets = [tmp_path / "a", tmp_path / "b"]
    for content in (b"old", b"new"):
        with replacing(*targets) as files:
            for file in files:
                file.write(content)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": content, "b": content}
