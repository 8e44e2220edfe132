"""An executor that takes results of earlier runs from a store, and keeps new ones there.

A work item describes one computation completely, so its digest, with those of its weight and its moments, is
the key of its result. A result is kept as soon as its turn comes: a run that is killed loses the items in
flight alone.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Spectra
from onnx_lowrank.files.keeping import Keeper
from onnx_lowrank.work.executor import Executor, Function, I, R, Threads
from onnx_lowrank.work.joins import joined_errors
from onnx_lowrank.work.narrowing import WidthErrors, width_errors
from onnx_lowrank.work.scoring import ActivationErrors, activation_errors, singular_values
from onnx_lowrank.work.sharing import likeness
from onnx_lowrank.work.sparse import sparse_errors

_log = logging.getLogger(__name__)

_Curve = NDArray[np.float64]

_KINDS: dict[Callable[..., Any], Any] = {
    singular_values: Spectra,
    activation_errors: ActivationErrors,
    width_errors: WidthErrors,
    joined_errors: list[_Curve],
    likeness: _Curve,
    sparse_errors: _Curve,
}
"""The functions with results to keep, and the types of these. Factors change with the plan: none is kept."""


class Kept:
    """An executor that hands to another one the items without known results."""

    def __init__(self, executor: Executor, keeper: Keeper) -> None:
        """Use an executor; its owner ends it.

        Args:
            executor: Computes the items.
            keeper: Keeps results.
        """
        self._executor = executor
        self._keeper = keeper
        self.threads: Threads = executor.threads
        self.processors = executor.processors

    def __enter__(self) -> Self:
        """Use the executor until the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the executor to its owner."""

    def reaches(self, files: Iterable[Path]) -> bool:
        """Whether the workers of the executor see these files."""
        return self._executor.reaches(files)

    def map(self, function: Function[I, R], items: Iterable[I]) -> Iterator[R]:
        """Like `Executor.map`."""
        kind = _KINDS.get(function)
        return self._executor.map(function, items) if kind is None else self._map(function, items, kind)

    def _map(self, function: Function[I, R], items: Iterable[I], kind: Any) -> Iterator[R]:
        name = getattr(function, "__name__", "")
        known: dict[int, R] = {}
        asked: deque[tuple[int, str]] = deque()

        def unknown() -> Iterator[I]:
            for number, item in enumerate(items):
                key = self._keeper.key(name, item)
                result = self._keeper.get(key, kind)
                if result is None:
                    asked.append((number, key))
                    yield item
                else:
                    known[number] = result

        due = found = computed = 0
        for result in self._executor.map(function, unknown()):
            number, key = asked.popleft()
            self._keeper.put(key, result)
            # The items before this one were all drawn before it.
            for earlier in range(due, number):
                yield known.pop(earlier)
            yield result
            due, found, computed = number + 1, found + number - due, computed + 1
        _log.debug("%s: %d results are in the cache, %d were computed", name, found + len(known), computed)
        yield from (known[number] for number in sorted(known))
