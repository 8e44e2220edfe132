"""The engines that a user can choose to compare and to time models.

Each module in this package that defines `KIND` is one engine; it needs no entry anywhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from onnx_lowrank.engines.engine import Deployed, Kind
from onnx_lowrank.errors import InputError

DEFAULT = "onnxruntime"


def names() -> tuple[str, ...]:
    """The names of all engines, the default one first."""
    return tuple(sorted(_found(), key=lambda name: (name != DEFAULT, name)))


def engine(name: str | None, provider: str) -> Deployed:
    """The engine with this name; None is the default one.

    Args:
        name: Its name.
        provider: ONNX Runtime's execution provider.

    Raises:
        InputError: There is no such engine, or it is not installed.
    """
    name = DEFAULT if name is None else name
    if name not in _found():
        raise InputError(f"There is no engine {str(name)[:60]!r}: choose one of {', '.join(names())}.")
    return _found()[name].make(provider)


@cache
def _found() -> Mapping[str, Kind]:
    """The engines by name; the first call imports their modules, which import no runtime."""
    stems = (module.name for module in pkgutil.iter_modules(__path__))
    kinds = [importlib.import_module(f"{__name__}.{stem}").KIND for stem in stems]
    return {kind.name: kind for kind in kinds}
