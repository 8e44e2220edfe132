"""One process that runs the command, for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from trying import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server
