"""The command that makes a point's model again from its plan."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

from onnx_lowrank.options import DEFAULTS, Options

_PATH = (str, os.PathLike)

_IN_PLAN = frozenset(
    {"recipe", "budget", "align", "lowering", "target", "then", "recover", "distil", "minutes"}
)
_NO_RESULT = frozenset({"progress", "cache", "workers", "scheduler", "device", "time", "threads", "weights"})
"""Options that do not change the model that a plan makes."""


def command(model: object, out: str, plan: object, options: Options) -> str:
    """The command; "" if an option is no text, such as arrays, or the model is in memory.

    Args:
        model: The input model.
        out: The name of the file to write.
        plan: The path of the plan.
        options: The options of the sweep; those that are a point's own are left out.
    """
    if not isinstance(model, _PATH):
        return ""
    words = ["onnx-lowrank", str(model), out, "--plan", str(plan)]
    for name, value in options.items():
        if name in _IN_PLAN or name in _NO_RESULT or is_default(name, value):
            continue
        given = list(_words(name, value))
        if not given:
            return ""
        words += given
    return shlex.join(words)


def is_default(name: str, value: Any) -> bool:
    """Whether an option has the value that it has when it is left out."""
    # The command line gives empty lists where the default is None.
    default = DEFAULTS.get(name)
    return value is default or (isinstance(value, Sized) and not len(value)) or value == default


def _words(name: str, value: Any) -> Iterator[str]:
    """The words of an option; none if it cannot be written."""
    flag = f"--{name.replace('_', '-')}"
    if name == "input_shape":
        for shapes in (value,) if isinstance(value, Mapping) else value:
            for key, shape in shapes.items():
                yield from (flag, f"{key}={','.join(map(str, shape))}")
    elif name in ("include", "exclude"):
        for pattern in (value,) if isinstance(value, str) else value:
            yield from (flag, pattern)
    elif value is True:
        yield flag
    elif isinstance(value, str | os.PathLike | int | float):
        yield from (flag, str(value))
    elif isinstance(value, Sequence):
        yield from (flag, ",".join(map(str, value)))
