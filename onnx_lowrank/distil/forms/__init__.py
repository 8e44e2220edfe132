"""The differentiable forms of operators, found by the modules of this package."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from onnx_lowrank.distil.forms.form import FORMS, Form

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = ["FORMS", "Form"]
