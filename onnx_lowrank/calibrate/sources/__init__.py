"""Sources: the kinds of files and folders that hold samples.

Each module in this package that defines `KIND` is one kind of source; it needs no entry anywhere else. This
module gives only the list of kinds; `registry` chooses one for a path.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any


@cache
def found() -> tuple[Any, ...]:
    """All kinds of sources, in the order of their modules; the first call imports these modules."""
    stems = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{stem}") for stem in stems)
    return tuple(module.KIND for module in modules if hasattr(module, "KIND"))
