"""Find an engine that runs a model, and inputs that the model accepts."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from onnx_lowrank.engines.engine import Deployed, Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.parted import Parted, is_large
from onnx_lowrank.engines.reference import Reference
from onnx_lowrank.engines.runtime import Runtime, runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model

_log = logging.getLogger(__name__)

Engine = Deployed | Reference | Parted


def fitting_engine(model: Model, engine: Deployed) -> Deployed | Parted:
    """The engine itself, or one that runs a model part by part if a session would hold too much of it."""
    return Parted(engine) if isinstance(engine, Runtime) and is_large(model) else engine


def first_run(engine: Engine, model: Model, feeds: Iterable[Feed]) -> tuple[Feed, dict[str, Any]]:
    """Run a model on the first inputs that it accepts; returns these inputs and the outputs.

    Raises:
        UnsupportedError: The engine does not accept the model.
        RejectedError: The model fails on all inputs; the message is that of the first failure.
    """
    failure: RejectedError | None = None
    with engine.open(model) as run:
        for feed in feeds:
            try:
                return feed, run(feed)
            except RejectedError as error:
                failure = failure or error
    raise failure or RejectedError("there are no inputs to run it on")


def calibrating_engine(
    model: Model, feed: Feed, provider: str, purpose: str = "calibration"
) -> tuple[Engine, dict[str, Any] | None]:
    """The engine that runs a model on given inputs, and the outputs on one; None if that run fails.

    Args:
        model: The input model.
        feed: One of the inputs.
        provider: ONNX Runtime's execution provider.
        purpose: The name of the option that gives the inputs, for messages.

    Raises:
        InputError: ONNX Runtime has no such provider, or no engine runs the model.
    """
    engine = fitting_engine(model, runtime(provider))
    try:
        return engine, first_run(engine, model, (feed,))[1]
    except RejectedError:
        return engine, None
    except UnsupportedError as error:
        reason = error
    _log.debug("%s runs the %s inputs, because %s cannot: %s", Reference().name, purpose, engine.name, reason)
    try:
        return Reference(), first_run(Reference(), model, (feed,))[1]
    except (UnsupportedError, RejectedError) as error:
        raise InputError(
            f"--{purpose} has to run the model, and {engine.name} cannot ({reason}), nor can "
            f"{Reference().name} ({error}): leave --{purpose} out."
        ) from error


def slowness(engine: Engine) -> tuple[str, ...]:
    """The reason why calibration with an engine is slow, a sentence for the report; () if it is not."""
    if isinstance(engine, Reference):
        return (f"ONNX Runtime cannot run the model, and {engine.name} calibrates it slowly.",)
    if isinstance(engine, Parted):
        return ("The model is too large for one session: every batch of inputs opens its parts again.",)
    return ()
