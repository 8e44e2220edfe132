"""Plan files: JSON that can be saved, edited and replayed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank.errors import PlanError
from onnx_lowrank.types import Budget, Choice, Fold, Layer, Measure, Option, Plan

VERSION = 1
_KEYS = {"version": int, "model": str, "recipe": str, "measure": str, "ratio": float, "budget": str, "layers": list}
_LAYER_KEYS = ("id", "fold", "k", "j", "cost", "error")


def to_json(plan: Plan) -> str:
    """A plan as JSON, one line per layer; kept layers have fold, k and j null."""
    head = {
        "version": VERSION,
        "model": plan.model,
        "recipe": plan.recipe,
        "measure": plan.measure,
        "ratio": plan.ratio,
        "budget": plan.budget,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in head.items()]
    layers = ",\n".join(f"    {json.dumps(_row(choice), ensure_ascii=False)}" for choice in plan.choices)
    return "\n".join(["{", *lines, '  "layers": [', layers, "  ]", "}", ""])


def _row(choice: Choice) -> dict[str, Any]:
    option = choice.option
    values = (None, None, None) if option is None else (str(option.fold), option.k, option.j)
    return dict(zip(_LAYER_KEYS, (choice.layer, *values, choice.cost, choice.error), strict=True))


def read(path: str | Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: It cannot be read, is no JSON, or a key or value in it is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise PlanError(f"The plan {path} cannot be read: {reason}.") from error
    try:
        table = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"The plan {path} is not valid JSON ({error}): save it anew with --save-plan.") from error
    try:
        return _parse(table)
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"The plan {path} is wrong: {error}.") from error


def _parse(table: Any) -> Plan:
    if not isinstance(table, dict) or set(table) != set(_KEYS):
        raise ValueError("it has to be an object with the keys " + ", ".join(_KEYS))
    for key, kind in _KEYS.items():
        if not isinstance(table[key], (float, int) if kind is float else kind):
            raise ValueError(f"{key} is {table[key]!r}, which is no {kind.__name__}")
    if table["version"] != VERSION:
        raise ValueError(f"its version is {table['version']}, and this program reads version {VERSION}")
    choices = tuple(_choice(row) for row in table["layers"])
    ids = [choice.layer for choice in choices]
    if len(set(ids)) != len(ids):
        raise ValueError("a layer is named twice")
    measure, budget = Measure(table["measure"]), Budget(table["budget"])
    return Plan(table["model"], table["recipe"], measure, float(table["ratio"]), budget, choices)


def _choice(row: Any) -> Choice:
    if not isinstance(row, dict) or set(row) != set(_LAYER_KEYS):
        raise ValueError("every layer has to be an object with the keys " + ", ".join(_LAYER_KEYS))
    values = row["fold"], row["k"], row["j"]
    option = None
    if values != (None, None, None):
        fold, k, j = values
        if type(k) is not int or type(j) is not int:
            raise ValueError(f"layer {row['id']!r} has k = {k!r} and j = {j!r}, which have to be integers")
        option = Option(Fold(fold), k, j)
    return Choice(str(row["id"]), option, int(row["cost"]), float(row["error"]))


def check(plan: Plan, model: str, layers: Sequence[Layer]) -> None:
    """Check that a plan fits a model: the same file, the same layers, options that they have.

    Raises:
        PlanError: It does not.
    """
    if plan.model != model:
        raise PlanError(
            f"The plan was made for another model (SHA-256 {plan.model[:12]}…, this one has {model[:12]}…): "
            "make a plan for this model with --save-plan."
        )
    known = {layer.id: layer for layer in layers}
    named = {choice.layer for choice in plan.choices}
    if known.keys() != named:
        odd = min(named ^ known.keys())
        problem = "names the layer {!r}, which the model does not have" if odd in named else "lacks the layer {!r}"
        raise PlanError(f"The plan {problem.format(odd)}: use the same --include and --exclude as when it was made.")
    for choice in plan.choices:
        if choice.option is not None:
            _check_option(known[choice.layer], choice.option)


def _check_option(layer: Layer, option: Option) -> None:
    if option.fold not in layer.folds:
        raise PlanError(f"Layer {layer.id!r} has no fold {option.fold}: choose one of {', '.join(layer.folds)}.")
    if option.k not in layer.slices:
        choices = ", ".join(map(str, layer.slices))
        raise PlanError(f"Layer {layer.id!r} cannot be cut into k = {option.k} slices: choose one of {choices}.")
    full = layer.full_rank(option.fold, option.k)
    if not 1 <= option.j <= full:
        raise PlanError(f"Layer {layer.id!r} cannot have rank j = {option.j}: choose one between 1 and {full}.")
