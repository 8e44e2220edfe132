import io
import threading

import pytest
from rich.console import Console

from onnx_lowrank.progress import Labelled, Silent, Terminal, over


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def piped(clock=None):
    file = io.StringIO()
    return file, Terminal(Console(file=file, width=80), *([clock] if clock else []))


def watched(clock=None):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    return file, Terminal(console, *([clock] if clock else []))


def test_silence(capsys):
    with Silent().stage("spectra", total=2) as step:
        step()
        step(0.5)
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_one_line_for_each_stage():
    file, progress = piped()
    with progress.stage("spectra", total=3) as step:
        step()
    with progress.stage("[plan]"):
        pass
    with progress.stage("activations", total=1) as step:
        step(0.5)
    with progress.stage("factorize", total=0):
        pass
    assert file.getvalue() == "spectra (3)\n[plan]\nactivations\nfactorize (0)\n"


def test_a_stage_tells_what_it_is_done_for():
    file, progress = piped()
    with Labelled(progress, "output at 0.5").stage("recover", total=3) as step:
        step()
    assert file.getvalue() == "recover (output at 0.5) (3)\n"


def test_a_long_stage_tells_a_pipe_how_far_it_is():
    clock = Clock()
    file, progress = piped(clock)
    with progress.stage("recover", total=100) as step:
        for _ in range(100):
            clock.now += 1
            step()
    assert file.getvalue().splitlines() == [
        "recover (100)",
        "recover: 10/100, 0:01:30 left",
        "recover: 40/100, 0:01:00 left",
        "recover: 70/100, 0:00:30 left",
    ]


def test_a_long_stage_of_shares_tells_a_pipe_how_far_it_is():
    clock = Clock()
    file, progress = piped(clock)
    with progress.stage("activations", total=1) as step:
        for done in range(1, 129):
            clock.now += 1
            step(done / 128)
    assert file.getvalue().splitlines() == [
        "activations",
        "activations: 8 %, 0:01:58 left",
        "activations: 31 %, 0:01:28 left",
        "activations: 55 %, 0:00:58 left",
        "activations: 78 %, 0:00:28 left",
    ]


@pytest.mark.parametrize("total", [1, 4, None])
def test_a_short_stage_tells_a_pipe_nothing_more(total):
    clock = Clock()
    file, progress = piped(clock)
    with progress.stage("errors", total) as step:
        for done in range(9):
            clock.now += 1
            step(done / 9)
    assert len(file.getvalue().splitlines()) == 1


def test_the_first_step_of_a_long_stage_knows_no_time_left():
    clock = Clock()
    file, progress = piped(clock)
    with progress.stage("recover", total=4) as step:
        clock.now += 3600
        step()
    assert file.getvalue() == "recover (4)\nrecover: 1/4\n"


def test_a_stage_of_unknown_length_tells_a_pipe_no_share():
    clock = Clock()
    file, progress = piped(clock)
    with progress.stage("plan") as step:
        for _ in range(9):
            clock.now += 20
            step()
            step(0.5)
    assert file.getvalue() == "plan\n"


def test_steps_and_shares_of_a_count_go_together():
    clock = Clock()
    file, progress = piped(clock)
    with progress.stage("recover", total=8) as step:
        clock.now += 6
        step()
        clock.now += 6
        step(0.5)
        clock.now += 31
        step()
    assert [line.split(",")[0] for line in file.getvalue().splitlines()] == [
        "recover (8)",
        "recover: 4/8",
        "recover: 5/8",
    ]


def test_threads_may_step_together():
    clock = Clock()
    file, progress = piped(clock)
    with progress.stage("spectra", total=800) as step:
        threads = [threading.Thread(target=lambda: [step() for _ in range(99)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        clock.now += 20
        step()
    assert [line.split(",")[0] for line in file.getvalue().splitlines()] == [
        "spectra (800)",
        "spectra: 793/800",
    ]


@pytest.mark.parametrize(("total", "shown"), [(3, "3/3"), (1, "100%"), (None, "plan")])
def test_a_terminal_reaches_the_end(total, shown):
    file, progress = watched()
    with progress.stage("plan", total) as step:
        for done in range(total or 0):
            step((done + 1) / total)
    assert shown in file.getvalue()
    assert "left" not in file.getvalue().splitlines()[-1]


def test_a_terminal_shows_the_time_elapsed_and_the_time_left():
    clock = Clock()
    file, progress = watched(clock)
    with progress.stage("recover", total=5) as step:
        for _ in range(3):
            clock.now += 40
            step()
    assert "3/5 0:02:00 0:01:20 left" in file.getvalue()


def test_a_terminal_shows_all_parts_above_a_stage():
    clock = Clock()
    file, progress = watched(clock)
    clock.now += 60
    with over(progress, "points", 2, 5, begun=100.0).stage("spectra", total=3) as step:
        step()
    first, second, *_ = file.getvalue().splitlines()
    assert "points" in first
    assert "2/5 0:01:00 0:01:30 left" in first
    assert "spectra" in second


def test_parts_do_not_change_other_progress():
    silent = Silent()
    assert over(silent, "points", 2, 5, begun=0.0) is silent


@pytest.mark.parametrize("width", [20, 40, 60, 80])
def test_a_bar_fits_the_terminal(width):
    file = io.StringIO()
    progress = Terminal(Console(file=file, force_terminal=True, width=width, color_system=None))
    with progress.stage("activations", total=7) as step:
        step(0.5)
    plain = file.getvalue().replace("\r", "\n")
    assert "activ" in plain


@pytest.mark.parametrize("make", [piped, watched])
def test_errors_are_handed_on(make):
    with pytest.raises(ZeroDivisionError), make()[1].stage("x", 2):
        raise ZeroDivisionError
