"""The commands: one module each, whose `command` is a click command.

The first word of the command line chooses one: `onnx-lowrank sweep IN.onnx FOLDER`. Without such a word it is
`compress`.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

import click

DEFAULT = "compress"


def names() -> tuple[str, ...]:
    """The names of all commands."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def command(name: str) -> click.Command:
    """The command of a name."""
    found: click.Command = import_module(f"{__name__}.{name}").command
    return found
