"""The commands: one module each, whose `command` is a click command.

The first word of the command line chooses one: `onnx-lowrank sweep IN.onnx FOLDER`. Without such a word it is
`compress`. A module has the name of its command, with underscores for hyphens, and one more behind if Python
has a module of that name.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

import click

DEFAULT = "compress"


def names() -> tuple[str, ...]:
    """The names of all commands."""
    return tuple(sorted(_modules()))


def command(name: str) -> click.Command:
    """The command of a name."""
    found: click.Command = import_module(f"{__name__}.{_modules()[name]}").command
    return found


def _modules() -> dict[str, str]:
    """The names of the modules, by those of their commands."""
    return {
        module.name.rstrip("_").replace("_", "-"): module.name for module in pkgutil.iter_modules(__path__)
    }
