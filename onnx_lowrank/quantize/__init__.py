"""Kinds of quantization that can follow the decomposition (`--then`).

Each module in this package that defines `KIND` is one kind; it needs no entry anywhere else. Help and
messages list kinds by their `order`, then by name. This module gives only the names; `registry` gives the
kinds.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any


def names() -> tuple[str, ...]:
    """The names of all kinds, in the order of help and messages."""
    return tuple(found())


@cache
def found() -> Mapping[str, Any]:
    """The kinds by name; the first call imports the modules of this package."""
    stems = (module.name for module in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{stem}") for stem in stems)
    kinds = [module.KIND for module in modules if hasattr(module, "KIND")]
    kinds.sort(key=lambda kind: (kind.order, kind.name))
    return {kind.name: kind for kind in kinds}
