"""Measured times on disk: one SQLite database for all machines, runtimes and settings.

Rules:

1. The key of a time consists of the digests of everything that it depends on: the environment, the layer's
   model and the chain's model. There are no versions: a change of any of these changes a digest.
2. New times are written in one transaction, so processes that write at the same time lose nothing.
3. The file is untrusted data. Its schema has to equal the one below before any statement touches its table,
   so no view or trigger runs. A damaged or foreign file counts as empty and is replaced.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Self

from platformdirs import user_cache_path

from onnx_lowrank.allocate.times import SANE

_log = logging.getLogger(__name__)

_FILE = "times.sqlite"
_TABLE = (
    "CREATE TABLE times (environment TEXT NOT NULL, layer TEXT NOT NULL, chain TEXT NOT NULL, "
    "ratio REAL NOT NULL, UNIQUE (environment, layer, chain))"
)
_SCHEMA = {("table", "times", _TABLE), ("index", "sqlite_autoindex_times_1", None)}
_MOST = 50_000
"""The number of newest times that are kept; they take about 25 MB."""

_LARGEST = 64 * 2**20
_LONGEST = 256  # characters of a key
_PATIENCE = 10.0  # seconds to wait for other processes that write

_Key = tuple[str, str]
_Change = Callable[[sqlite3.Connection], object]


class _ForeignError(Exception):
    """The file is not a database of this cache."""


class Cache:
    """The known relative times of layers' chains in one environment."""

    def __init__(self, path: Path | None, environment: str = "") -> None:
        """Read a database; a missing or damaged file, and values that are no ratios, count as absent.

        Args:
            path: The database; None keeps nothing.
            environment: A digest of everything else that times depend on, beside the layer and its chain.
        """
        self._path = path
        self._environment = environment
        self._known = {} if path is None else _read(path, environment)
        self._new: dict[_Key, float] = {}
        self._unsaved = set[_Key]()

    @classmethod
    def for_environment(cls, environment: Mapping[str, str], folder: Path | None = None) -> Self:
        """The cache for an environment.

        Args:
            environment: Everything that times depend on, beside the layer and its chain.
            folder: The folder of the database; by default the user's cache folder.
        """
        text = json.dumps(dict(environment), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls((folder or user_cache_path("onnx-lowrank")) / _FILE, digest)

    def get(self, layer: str, chain: str) -> float | None:
        """The time of a chain over that of its layer, or None if it is unknown.

        Args:
            layer: Digest of the layer's model.
            chain: Digest of the chain's model.
        """
        return self._known.get((layer, chain))

    def put(self, layer: str, chain: str, ratio: float) -> None:
        """Note a relative time."""
        self._known[layer, chain] = self._new[layer, chain] = ratio
        self._unsaved.add((layer, chain))

    def save(self) -> None:
        """Write the new times, in one transaction; a full disk is no error."""
        if self._path is None or not self._unsaved:
            return
        unsaved = ((key, self._new[key]) for key in sorted(self._unsaved))
        rows = [(self._environment, *key, ratio) for key, ratio in unsaved if _is_sane(ratio)]

        def insert(database: sqlite3.Connection) -> None:
            database.executemany("INSERT OR REPLACE INTO times VALUES (?, ?, ?, ?)", rows)
            old = "SELECT rowid FROM times ORDER BY rowid DESC LIMIT -1 OFFSET ?"
            database.execute(f"DELETE FROM times WHERE rowid IN ({old})", (_MOST,))  # noqa: S608

        if _changed(self._path, insert):
            _log.debug("wrote %d times to %s", len(rows), self._path)
            self._unsaved.clear()

    def discard(self) -> None:
        """Delete the new times from the database, because they turned out to be wrong."""
        rows = [(self._environment, *key, ratio) for key, ratio in self._new.items()]
        self._new.clear()
        self._unsaved.clear()
        if self._path is None or not rows or not self._path.exists():
            return
        _log.debug("the times were disturbed, so %d are deleted from %s", len(rows), self._path)
        # Keep a time of the same chain that another process has measured: its ratio differs.
        where = "environment = ? AND layer = ? AND chain = ? AND ratio = ?"
        _changed(self._path, lambda database: database.executemany(f"DELETE FROM times WHERE {where}", rows))  # noqa: S608


def _read(path: Path, environment: str) -> dict[_Key, float]:
    """The times of an environment; none if the file is not a database of this cache."""
    statement = (
        "SELECT layer, chain, ratio FROM times WHERE environment = ? AND typeof(ratio) = 'real' "
        "AND length(layer) <= ? AND length(chain) <= ? LIMIT ?"
    )
    try:
        with _opened(path, "rw") as database:
            database.execute("BEGIN")  # so the schema cannot change between the check and the read
            _check(database)
            rows = database.execute(statement, (environment, _LONGEST, _LONGEST, _MOST)).fetchall()
    except (OSError, ValueError, sqlite3.Error, _ForeignError) as error:
        _log.debug("no times are read from %s: %s", path, error)
        return {}
    _log.debug("%d times are known in this environment, from %s", len(rows), path)
    return {(str(layer), str(chain)): ratio for layer, chain, ratio in rows if _is_sane(ratio)}


def _changed(path: Path, change: _Change) -> bool:
    """Change a database, and replace a damaged or foreign one; tells whether that succeeded."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _change(path, change)
        except (sqlite3.DatabaseError, _ForeignError) as error:
            if isinstance(error, sqlite3.OperationalError):  # a full disk, or another process that writes
                raise
            _log.debug("%s is replaced: %s", path, error)
            _remove(path)
            _change(path, change)
    except (OSError, ValueError, sqlite3.OperationalError) as error:
        _log.debug("%s is left as it is: %s", path, error)
        return False
    return True


def _change(path: Path, change: _Change) -> None:
    """Change a database in one transaction; a missing one is created."""
    with _opened(path, "rwc") as database:
        database.execute("BEGIN IMMEDIATE")
        if not database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall():
            database.execute(_TABLE)
        _check(database)
        change(database)
        database.execute("COMMIT")


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """A connection to a database of bounded size; a transaction that is open at the end is rolled back."""
    if path.exists() and (not path.is_file() or path.stat().st_size > _LARGEST):
        raise _ForeignError("it is not a file, or it is too large")
    address = f"{path.absolute().as_uri()}?mode={mode}"
    # Only the statements in this module begin and end transactions.
    connection = sqlite3.connect(address, _PATIENCE, isolation_level=None, uri=True)
    with closing(connection) as database:
        database.text_factory = lambda text: text.decode("ascii", "replace")
        database.execute("PRAGMA trusted_schema = OFF")
        yield database


def _check(database: sqlite3.Connection) -> None:
    """Check that a database has exactly the schema of this cache (rule 3).

    Raises:
        _ForeignError: It has another schema.
    """
    found = database.execute("SELECT type, name, sql FROM sqlite_master LIMIT ?", (len(_SCHEMA) + 1,))
    if set(found.fetchall()) != _SCHEMA:
        raise _ForeignError("it has another schema")


def _remove(path: Path) -> None:
    """Delete a damaged or foreign database, its journals first: a new database must not find them."""
    for suffix in ("-journal", "-wal", "-shm", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _is_sane(ratio: float) -> bool:
    # Not `not (ratio < … or ratio > …)`, which is true for NaN.
    return SANE[0] <= ratio <= SANE[1]
