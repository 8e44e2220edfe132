"""Plan files: JSON that can be saved, edited and replayed.

To edit a plan, change fold, k and j of a layer; all three null keep it. A lowering of null is the native one,
and merge tells whether adjacent operators are multiplied. The rest may stay as it is: costs are computed
anew, times excepted, and the digest tells that what was proven of the plan does not hold any more.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from enum import StrEnum
from math import isfinite, nan
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from onnx_lowrank import measures
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.plan import Aggregate, Budget, Choice, Plan, Solver
from onnx_lowrank.errors import PlanError

VERSION = 4
_KEYS = (
    "version",
    "model",
    "recipe",
    "measure",
    "ratio",
    "budget",
    "factors",
    "recover",
    "merge",
    "solver",
    "digest",
    "layers",
)
_LAYER_KEYS = ("id", "fold", "k", "j", "lowering", "cost", "error", "reason")
_SOLVER_KEYS = tuple(field.name for field in fields(Solver))
_INTEGERS = 2**63  # what JSON readers and ONNX take for an integer

E = TypeVar("E", bound=StrEnum)


def to_json(plan: Plan) -> str:
    """A plan as JSON, one line per layer; kept layers have null for an option, and so have unknown errors."""
    solver = None if plan.solver is None else _solver_row(plan.solver)
    wanted = (plan.recipe, plan.measure, plan.ratio, plan.budget, plan.factors, plan.recover, plan.merge)
    values = (VERSION, plan.model, *wanted, solver, plan.digest)
    head = [f"  {_text(key)}: {_text(value)}," for key, value in zip(_KEYS[:-1], values, strict=True)]
    rows = ",\n".join(f"    {_text(_row(choice))}" for choice in plan.choices)
    return "\n".join(["{", *head, '  "layers": [', *([rows] if rows else []), "  ]", "}", ""])


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _row(choice: Choice) -> dict[str, Any]:
    option = choice.option
    values = (None,) * 4 if option is None else (option.fold, option.k, option.j, option.lowering)
    row = (choice.layer, *values, choice.cost, _finite(choice.error), choice.reason)
    return dict(zip(_LAYER_KEYS, row, strict=True))


def _solver_row(solver: Solver) -> dict[str, Any]:
    values = (solver.aggregate, solver.power, _finite(solver.objective), solver.gap)
    return dict(zip(_SOLVER_KEYS, values, strict=True))


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def sealed(plan: Plan) -> Plan:
    """The plan with the digest of what it is now."""
    return replace(plan, digest=_digest(plan))


def is_edited(plan: Plan) -> bool:
    """Whether a plan is another than when it was made."""
    return plan.digest != _digest(plan)


def _digest(plan: Plan) -> str:
    return hashlib.sha256(to_json(replace(plan, digest="")).encode()).hexdigest()


def read(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: It cannot be read, is no JSON, or a key or value in it is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise PlanError(f"The plan {path} cannot be read ({reason}): check the path.") from error
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"The plan {path} is not valid JSON ({error}): save it anew.") from error
    try:
        return _parse(table)
    except PlanError as error:
        raise PlanError(f"The plan {path} is wrong: {error}; correct it or save it anew.") from error


def _parse(table: object) -> Plan:
    fields = _fields(table, _KEYS, "it")
    version, model, recipe, measure, ratio, budget, factors, recover, merge, solver, digest, rows = fields
    if version != VERSION or isinstance(version, bool):
        raise PlanError(f"version is {version!r}, and this program reads version {VERSION}")
    if not isinstance(model, str) or not isinstance(recipe, str):
        raise PlanError(f"model is {model!r} and recipe is {recipe!r}, which have to be texts")
    if not isinstance(digest, str):
        raise PlanError(f"digest is {digest!r}, which has to be a text")
    if not _is_number(ratio) or not 0 < ratio <= 1:
        raise PlanError(f"ratio is {ratio!r}, which has to be a number above 0 and at most 1")
    for name, switch in (("recover", recover), ("merge", merge)):
        if not isinstance(switch, bool):
            raise PlanError(f"{name} is {switch!r}, which has to be true or false")
    fit = _member(Fit, factors, "factors")
    if recover and fit is not Fit.ACTIVATIONS:
        raise PlanError(f"recover is true and factors is {factors!r}, which has to be 'activations' then")
    if not isinstance(rows, list):
        raise PlanError("layers has to be a list")
    return Plan(
        model=model,
        recipe=recipe,
        measure=_one_of(measures.names(), measure, "measure"),
        ratio=float(ratio),
        budget=_member(Budget, budget, "budget"),
        choices=tuple(_choice(row) for row in rows),
        solver=None if solver is None else _solver(solver),
        digest=digest,
        factors=fit,
        recover=recover,
        merge=merge,
    )


def _solver(table: object) -> Solver:
    aggregate, power, objective, gap = _fields(table, _SOLVER_KEYS, "solver")
    for key, value, optional in (("power", power, False), ("objective", objective, True), ("gap", gap, True)):
        if not _is_number(value) and not (optional and value is None):
            raise PlanError(f"solver has {key} = {value!r}, which has to be a number")
    return Solver(
        aggregate=_member(Aggregate, aggregate, "aggregate"),
        power=float(power),
        objective=nan if objective is None else float(objective),
        gap=None if gap is None else float(gap),
    )


def _choice(row: object) -> Choice:
    layer, fold, k, j, lowering, cost, error, reason = _fields(row, _LAYER_KEYS, "every layer")
    if not isinstance(layer, str):
        raise PlanError(f"a layer's id is {layer!r}, which has to be a text")
    if type(cost) is not int or not 0 <= cost < _INTEGERS:
        raise PlanError(f"layer {layer!r} has cost = {cost!r}, which has to be a whole number")
    if error is not None and not _is_number(error):
        raise PlanError(f"layer {layer!r} has error = {error!r}, which has to be a number or null")
    if not isinstance(reason, str):
        raise PlanError(f"layer {layer!r} has reason = {reason!r}, which has to be a text")
    option = None
    if (fold, k, j) != (None, None, None):
        if type(k) is not int or type(j) is not int:
            raise PlanError(f"layer {layer!r} has k = {k!r} and j = {j!r}, which have to be whole numbers")
        option = Option(
            _member(Fold, fold, f"fold of layer {layer!r}"),
            k,
            j,
            Lowering.NATIVE
            if lowering is None
            else _member(Lowering, lowering, f"lowering of layer {layer!r}"),
        )
    return Choice(layer, option, cost, nan if error is None else float(error), reason)


def _fields(table: object, keys: Sequence[str], what: str) -> list[Any]:
    """The values of an object that has to have exactly these keys."""
    if not isinstance(table, dict):
        raise PlanError(f"{what} has to be an object with the keys {', '.join(keys)}")
    for key in [*table, *keys]:
        if key not in keys:
            raise PlanError(f"{what} has an unknown key {key!r}, the keys are {', '.join(keys)}")
        if key not in table:
            raise PlanError(f"{what} lacks the key {key!r}")
    return [table[key] for key in keys]


def _member(kind: type[E], value: object, what: str) -> E:
    return kind(_one_of([member.value for member in kind], value, what))


def _one_of(known: Sequence[str], value: object, what: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise PlanError(f"{what} is {value!r}, which is none of {', '.join(known)}")
    return value


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, of a size that a float can have."""
    largest = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def check(plan: Plan, model: str, layers: Sequence[Layer]) -> None:
    """Check that a plan fits a model: the same file, the same layers, options that they have.

    Args:
        plan: The plan.
        model: SHA-256 of the model.
        layers: Its layers.

    Raises:
        PlanError: It does not.
    """
    if plan.model != model:
        raise PlanError(
            f"The plan was made for another model (SHA-256 {plan.model[:12]}…, this one has {model[:12]}…): "
            "make a plan for this model with --save-plan."
        )
    known = {layer.id: layer for layer in layers}
    named: set[str] = set()
    advice = "use the same --include and --exclude as when it was made."
    for choice in plan.choices:
        if choice.layer in named:
            raise PlanError(f"The plan names the layer {choice.layer!r} twice: delete one of its lines.")
        if choice.layer not in known:
            raise PlanError(
                f"The plan names the layer {choice.layer!r}, which the model does not have: {advice}"
            )
        named.add(choice.layer)
        if choice.option is not None:
            _check_option(known[choice.layer], choice.option)
    for layer in layers:
        if layer.id not in named:
            raise PlanError(f"The plan lacks the layer {layer.id!r}: {advice}")


def _check_option(layer: Layer, option: Option) -> None:
    name = f"In the plan, layer {layer.id!r}"
    if option.fold not in layer.folds:
        raise PlanError(f"{name} has no fold {option.fold}: choose one of {', '.join(layer.folds)}.")
    if option.k not in layer.slices:
        slices = ", ".join(map(str, layer.slices))
        raise PlanError(f"{name} cannot be cut into k = {option.k} slices: choose one of {slices}.")
    if option.lowering not in layer.lowerings(option.k):
        ways = ", ".join(layer.lowerings(option.k))
        raise PlanError(f"{name} cannot be lowered as {option.lowering}: choose one of {ways}.")
    full = layer.full_rank(option.fold, option.k)
    if not 1 <= option.j <= full:
        raise PlanError(f"{name} cannot have rank j = {option.j}: choose one between 1 and {full}.")
