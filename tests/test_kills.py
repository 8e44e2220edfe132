"""Commands that are killed, or meet an error or a signal, at every change of files that they make.

The ordinary tests compress once, and let every command write the result. Those marked `faults` let every
command do all its work.
"""

from __future__ import annotations

import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from injecting import Commands
from tiny import cnn, files

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")

TARGETS = ("out.onnx", "plan.json", "report.json")
MESSAGE = "onnx-lowrank: Interrupted; no file is half-written.\n"
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
WORKS = {
    "data-free": [],
    "calibrated": ["--calibration", "{folder}/cal.npz", "--calibration-samples", "20"],
    "cached": ["--cache", "{folder}/cache"],
    "workers": ["--workers", "2"],
}


@dataclass
class Place:
    """A folder of outputs and what belongs there before and after a run.

    Attributes:
        folder: Where IN.onnx, OUT.onnx and temporary files have their folders.
        old: The outputs before the run.
        new: Those after an undisturbed run.
    """

    folder: Path
    old: dict[str, bytes]
    new: dict[str, bytes]

    @property
    def model(self):
        return self.folder / "in" / "in.onnx"

    @property
    def out(self):
        return self.folder / "out"

    @property
    def temporary(self):
        return self.folder / "temporary"

    def command(self, work="data-free"):
        options = [option.format(folder=self.folder) for option in WORKS[work]]
        targets = [
            self.out / TARGETS[0],
            "--save-plan",
            self.out / TARGETS[1],
            "--report",
            self.out / TARGETS[2],
        ]
        return [
            self.model,
            *targets,
            "--ratio",
            "0.5",
            "-q",
            *options,
            *(["--no-cache"] * (work != "cached")),
        ]

    def restore(self):
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        for path in self.out.iterdir():
            path.unlink()
        for name, content in self.old.items():
            (self.out / name).write_bytes(content)

    def check(self, *, killed=False):
        """Check that all outputs are whole, and the old ones or the new ones.

        A kill may leave a model without its plan or report, but none of another model.
        """
        now = files(self.out)
        model = self.new if now["out.onnx"] == self.new["out.onnx"] else self.old
        for name in {*TARGETS, *data(model)}:
            assert now.get(name) == model[name] or (killed and name in TARGETS[1:] and name not in now), name
        return now

    def left(self):
        """The temporary files, without one that ONNX Runtime makes when it is imported."""
        return files(self.temporary).keys() - {".ses"}


def data(outputs):
    return {name: content for name, content in outputs.items() if name.endswith(".data")}


@pytest.fixture(params=["external", "inline"])
def place(request, tmp_path):
    made = Place(tmp_path, {}, {})
    for folder in (made.out, made.temporary, made.model.parent):
        folder.mkdir()
    for path, proto in ((made.model, cnn()), (made.out / TARGETS[0], cnn(fc=np.zeros((4, 16), np.float32)))):
        kept = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 0}
        onnx.save(proto, path, **(kept if request.param == "external" else {}))
    np.savez(tmp_path / "cal.npz", x=np.random.default_rng(5).standard_normal((60, 8, 6, 6), np.float32))
    for name in TARGETS[1:]:
        (made.out / name).write_bytes(b"old")
    made.old.update(files(made.out))
    return made


def moments(place, commands, fault, work="data-free"):
    """Run a command without a fault, and then with one at each of its moments."""
    undisturbed = commands.run(*place.command(work), fault=fault)
    assert (undisturbed.code, undisturbed.err) == (0, "")
    place.new.update(files(place.out))
    assert all(place.new[name] != place.old[name] for name in TARGETS)
    assert len(place.new) == len(place.old), "the old data is gone"
    for at in range(1, undisturbed.reached + 1):
        place.restore()
        yield commands.run(*place.command(work), at=at, fault=fault)


def check_kills(place, commands, work="data-free"):
    count = 0
    for ended in moments(place, commands, "SIGKILL", work):
        assert ended.code == -signal.SIGKILL
        place.check(killed=True)
        assert commands.run(*place.command(work)).code == 0
        assert files(place.out) == place.new, "the next run leaves nothing of the killed one"
        assert not place.left()
        count += 1
    return count


def check_errors(place, commands, fault, work="data-free"):
    for ended in moments(place, commands, fault, work):
        now = place.check()
        if ended.code == 0:
            assert all(now[name] == place.new[name] for name in TARGETS)
            # What a broken disk keeps is left to the next run.
            assert commands.run(*place.command(work)).code == 0
        else:
            assert ended.code == 2
            assert ended.err.startswith("onnx-lowrank: ")
            assert ended.err.count("\n") == 1
            assert "cannot be written" in ended.err or "takes no temporary file" in ended.err
            assert now == place.old
        assert not place.left()


def check_signals(place, commands, fault, work="data-free"):
    for ended in moments(place, commands, fault, work):
        assert (ended.code, ended.err.lstrip()) in [(128 + getattr(signal, fault), MESSAGE), (0, "")]
        now = place.check()
        assert now == place.old or now.keys() == place.new.keys()
        assert not place.left()
        assert not ended.living


def commands_of(place, prepared=None):
    return Commands(place.out, place.temporary, prepared)


def test_a_kill_at_any_moment_of_writing(place):
    with commands_of(place, place.model) as commands:
        assert check_kills(place, commands) > 30


def test_an_error_at_any_moment_of_writing(place):
    with commands_of(place, place.model) as commands:
        check_errors(place, commands, "EIO")


def test_a_signal_at_any_moment_of_writing(place):
    with commands_of(place, place.model) as commands:
        check_signals(place, commands, "SIGINT")


@pytest.mark.faults
@pytest.mark.parametrize("work", WORKS)
def test_a_kill_at_any_moment(place, work):
    with commands_of(place) as commands:
        print(work, check_kills(place, commands, work), "kills")


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["EIO", "ENOSPC", "EDQUOT", "EROFS"])
@pytest.mark.parametrize("work", WORKS)
def test_an_error_at_any_moment(place, work, fault):
    with commands_of(place) as commands:
        check_errors(place, commands, fault, work)


@pytest.mark.faults
@pytest.mark.parametrize("fault", SIGNALS)
@pytest.mark.parametrize("work", WORKS)
def test_a_signal_at_any_moment(place, work, fault):
    with commands_of(place) as commands:
        check_signals(place, commands, fault, work)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["SIGKILL", *SIGNALS])
@pytest.mark.parametrize("work", WORKS)
def test_a_kill_or_a_signal_at_random_times(place, work, fault):
    """100 in all for every kind of model and work."""
    rng = np.random.default_rng(len(work) + len(fault))
    with commands_of(place) as commands:
        begin = time.monotonic()
        assert commands.run(*place.command(work)).code == 0
        whole = time.monotonic() - begin
        place.new.update(files(place.out))
        for _ in range(25):
            place.restore()
            ended = commands.run(*place.command(work), fault=fault, after=whole * rng.random())
            now = place.check(killed=fault == "SIGKILL")
            assert not ended.living
            if fault == "SIGKILL":
                assert ended.code in (-signal.SIGKILL, 0)
                assert commands.run(*place.command(work)).code == 0
                assert files(place.out) == place.new
            else:
                # A signal may come before the command has its handlers, or after it has taken them down.
                assert ended.code in (128 + getattr(signal, fault), 0, -getattr(signal, fault))
                assert now == place.old or now.keys() == place.new.keys()
            assert not place.left()
