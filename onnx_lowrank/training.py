"""The request for a distillation, checked before any work begins."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from numbers import Real
from types import NoneType

from onnx_lowrank.core.plan import Plan, Training
from onnx_lowrank.errors import InputError
from onnx_lowrank.options import Options, flag, require

_LONGEST = 10_000.0  # minutes, a week


@dataclass(frozen=True, slots=True)
class Distillation:
    """The distillation that the user asks for.

    Attributes:
        seconds: The bound on its time; None trains until the held-out loss stops falling.
        known: The training of a replayed plan; None for a new one.
    """

    seconds: float | None = None
    known: Training | None = None


def distillation(options: Options, plan: Plan | None, *, calibrated: bool) -> Distillation | None:
    """Check the options of a distillation; None if neither the user nor the plan asks for one.

    Args:
        options: All options of `compress`, with their defaults.
        plan: The plan to replay; None without one.
        calibrated: Whether there is calibration data.

    Raises:
        InputError: One of them is wrong, or PyTorch is not installed.
    """
    known = None if plan is None else plan.training
    asked = flag("distil", options["distil"])
    _check_minutes(options["minutes"], asked=asked, known=known)
    _check_synthetic(options, asked=asked or known is not None)
    if asked and known is not None:
        raise InputError("The plan has a distillation of its own, which is repeated: leave out --distil.")
    if not asked and known is None:
        return None
    if not calibrated:
        raise InputError("A distillation is fitted to inputs, without labels: pass some with --calibration.")
    if options["dry_run"]:
        raise InputError("--dry-run makes no model that could be distilled: leave it out, or --distil.")
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            'PyTorch, which --distil needs, is not installed: run `pip install "onnx-lowrank[distil]"`.'
        )
    minutes = options["minutes"]
    return Distillation(None if minutes is None else 60.0 * float(minutes), known)


def _check_minutes(minutes: float | None, *, asked: bool, known: Training | None) -> None:
    require("minutes", minutes, (Real, NoneType), "a number")
    if minutes is None:
        return
    if known is not None:
        raise InputError("The plan has a distillation of its own, which is repeated: leave out --minutes.")
    if not asked:
        raise InputError(f"--minutes {minutes:g} bounds a distillation: pass --distil, too, or leave it out.")
    if not 0 < minutes <= _LONGEST:
        raise InputError(f"--minutes is {minutes:g}, but it must be above 0 and at most {_LONGEST:g}.")


def _check_synthetic(options: Options, *, asked: bool) -> None:
    if not options["synthetic"]:
        return
    if options["calibration"] is not None:
        raise InputError("--synthetic makes inputs, and --calibration gives some: leave one of them out.")
    if not asked:
        raise InputError("--synthetic makes inputs for a distillation: pass --distil, too, or leave it out.")
