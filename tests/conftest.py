"""Fixtures for all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from timing import Recorded

# A deadline would fail tests on a busy machine. Every run tries the same examples.
hypothesis.settings.register_profile("ordinary", deadline=None, derandomize=True)
hypothesis.settings.register_profile("generated", deadline=None, max_examples=4000, print_blob=True)
hypothesis.settings.load_profile("ordinary")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the checkout."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not folder.is_dir():
        if os.environ.get("ONNX_LOWRANK_REQUIRE_SHARED"):
            pytest.fail("the folder ../shared with the real models is absent, and is required here")
        pytest.skip("the folder ../shared with the real models is absent")
    return folder


@pytest.fixture(autouse=True)
def recorded_times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on how fast a machine is; those marked `clock` measure, and bound no time."""
    if "clock" not in request.keywords:
        monkeypatch.setattr("onnx_lowrank.budgets.latency.stopwatch.Stopwatch", Recorded)


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals have their usual handlers: a job in the background of a shell ignores some of them."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A worker that has nothing left takes tests from another one: the last files take minutes."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have counted, since the output of tests that pass is hidden."""
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, value in report.user_properties:
            if name == "counts":
                terminalreporter.write_line(value)
