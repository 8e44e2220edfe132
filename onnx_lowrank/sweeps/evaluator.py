"""The user's score of a model: a function that takes the path of an .onnx file and returns a number."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import EvaluatorError, InputError

Score = Callable[[str], float]

_NAME = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A function of the user that scores models.

    Attributes:
        name: Its name, `module:function`.
        function: The function.
        is_named: Whether the name tells the function: several functions of a program may have one name.
    """

    name: str
    function: Callable[[str], Any]
    is_named: bool = False

    def __call__(self, model: Path) -> float:
        """The score of a model file.

        Raises:
            EvaluatorError: The function fails, or does not return a finite number.
        """
        try:
            score = self.function(str(model))
        except (Exception, SystemExit) as error:
            raise EvaluatorError(
                f"The evaluator {self.name} failed on {model} ({type(error).__name__}, {error}): repair it "
                "and run again, since the points that are done stay."
            ) from error
        # A NumPy scalar or an array of one element is a number, too.
        number = score.item() if getattr(score, "size", None) == 1 and hasattr(score, "item") else score
        if isinstance(number, bool) or not isinstance(number, Real) or not _is_finite(number):
            raise EvaluatorError(
                f"The evaluator {self.name} returned {str(score)[:60]!r} for {model}: change it to return "
                "a finite number."
            )
        return float(number)


def evaluator(given: str | Score) -> Evaluator:
    """The evaluator that a user names or passes.

    Args:
        given: `module:function`, looked up in the current folder first, or a function.

    Raises:
        InputError: There is no such function.
    """
    if not isinstance(given, str):
        if not callable(given):
            raise InputError(f"The evaluator is {str(given)[:60]!r}: give a function, or module:function.")
        name = getattr(given, "__qualname__", type(given).__qualname__)
        return Evaluator(f"{getattr(given, '__module__', '')}:{name}", given)
    if not _NAME.fullmatch(given):
        raise InputError(f"The evaluator is {given!r}: write it like mymodule:accuracy.")
    module, _, name = given.partition(":")
    found: Any = _imported(module, given)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise InputError(f"The module {module} has no function {name!r}: check --evaluate {given}.")
    return Evaluator(given, found, is_named=True)


def _is_finite(number: Real) -> bool:
    try:
        return isfinite(number)
    except OverflowError:  # a whole number beyond the range of a float
        return False


def _imported(module: str, given: str) -> Any:
    here = str(Path.cwd())
    is_added = here not in sys.path
    if is_added:  # A command's path begins with the folder of the script, not with the user's folder.
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise InputError(
            f"The module of --evaluate {given} cannot be imported ({type(error).__name__}, {error}): "
            "run in its folder, or put it on PYTHONPATH."
        ) from error
    finally:
        if is_added and here in sys.path:
            sys.path.remove(here)
