"""Plan files: JSON that can be saved, edited and replayed.

To edit a plan, change fold, k and j of a layer, or set all three to null to keep the layer. A lowering of
null is the native one. A layer with the lowering shared has the key encoder, the id of the first layer that
shares the same encoder. The key merge says whether adjacent operators are multiplied. The other keys can
stay: costs are computed again, except times, and the digest shows that proofs about the original plan no
longer hold.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite, nan
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.layer import Layer, shared_full_rank, sharing
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.plan import Aggregate, Choice, Plan, Round, Solver, Training
from onnx_lowrank.documents import names
from onnx_lowrank.documents.json_text import to_text
from onnx_lowrank.documents.strict import Document
from onnx_lowrank.documents.wording import shown
from onnx_lowrank.errors import PlanError

VERSION = 4

LONGEST = 2000
"""The most rounds of a distillation."""

STEPS = 10_000
"""The most steps of a round."""

_Steps = Annotated[int, Meta(ge=1, le=STEPS, description="a whole number from 1 to 10,000")]
_Rate = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]


class _Solver(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The quality of a plan, as its file holds it."""

    aggregate: Aggregate
    power: float
    objective: float | None
    gap: float | None


class _Training(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The distillation of the model, as the file holds it; a round is [steps, rate, is_again]."""

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="a whole number from 0 to 2⁶³ − 1")]
    torch: str
    device: Literal["cpu", "cuda"]
    data: str
    rounds: Annotated[tuple[tuple[_Steps, _Rate, bool], ...], Meta(max_length=LONGEST)]


class _Layer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The plan's choice for one layer, as its file holds it."""

    id: str
    fold: Fold | None
    k: int | None
    j: int | None
    lowering: Lowering | None
    encoder: str | None = None
    cost: Annotated[int, Meta(ge=0, le=2**63 - 1, description="a whole number from 0 to 2⁶³ − 1")]
    error: float | None
    reason: str

    def __post_init__(self) -> None:
        if len({value is None for value in (self.fold, self.k, self.j)}) > 1:
            fold = None if self.fold is None else self.fold.value
            found = f"fold = {shown(fold)}, k = {shown(self.k)} and j = {shown(self.j)}"
            raise ValueError(f"{found}, and either all three or none of them must be null")


class _Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan, as its file holds it; the keys have the order of the file."""

    version: int
    model: str
    recipe: str
    measure: names.MeasureName
    ratio: Annotated[float, Meta(gt=0, le=1, description="a number above 0 and at most 1")]
    budget: names.BudgetName
    factors: Fit
    recover: bool
    merge: bool
    then: str | None = None
    training: _Training | None = None
    solver: _Solver | None
    digest: str
    layers: tuple[_Layer, ...]

    def __post_init__(self) -> None:
        names.check("measure", self.measure, names.measures())
        names.check("budget", self.budget, names.budgets())
        if self.recover and self.factors is not Fit.ACTIVATIONS:
            raise ValueError(
                f"recover is true and needs factors 'activations', but factors is {self.factors.value!r}"
            )


_DOCUMENT = Document("plan", _Plan, PlanError, "correct it or save it anew", ("version", VERSION))


def to_json(plan: Plan) -> str:
    """Write a plan as JSON, one line per layer; options of kept layers and unknown errors are null."""
    solver = None if plan.solver is None else _solver_row(plan.solver)
    wanted = (plan.recipe, plan.measure, plan.ratio, plan.budget, plan.factors, plan.recover, plan.merge)
    training = None if plan.training is None else _training_row(plan.training)
    values = (VERSION, plan.model, *wanted, plan.then, training, solver, plan.digest)
    pairs = zip(_Plan.__struct_fields__[:-1], values, strict=True)
    absent = {"then": not plan.then, "training": training is None}
    head = [f"  {to_text(key)}: {to_text(value)}," for key, value in pairs if not absent.get(key)]
    rows = ",\n".join(f"    {to_text(_row(choice))}" for choice in plan.choices)
    return "\n".join(["{", *head, '  "layers": [', *([rows] if rows else []), "  ]", "}", ""])


def _row(choice: Choice) -> dict[str, Any]:
    option = choice.option
    values = (None,) * 4 if option is None else (option.fold, option.k, option.j, option.lowering)
    encoder = "" if option is None else option.encoder
    row = (choice.layer, *values, encoder, choice.cost, _finite(choice.error), choice.reason)
    pairs = zip(_Layer.__struct_fields__, row, strict=True)
    return {key: value for key, value in pairs if encoder or key != "encoder"}


def _training_row(training: Training) -> dict[str, Any]:
    rounds = [(one.steps, one.rate, one.is_again) for one in training.rounds]
    values = (training.seed, training.torch, training.device, training.data, rounds)
    return dict(zip(_Training.__struct_fields__, values, strict=True))


def _solver_row(solver: Solver) -> dict[str, Any]:
    values = (solver.aggregate, solver.power, _finite(solver.objective), solver.gap)
    return dict(zip(_Solver.__struct_fields__, values, strict=True))


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def sealed(plan: Plan) -> Plan:
    """The plan with the digest of its current content."""
    return replace(plan, digest=_digest(plan))


def is_edited(plan: Plan) -> bool:
    """Whether a plan has changed since it was made."""
    return plan.digest != _digest(plan)


def _digest(plan: Plan) -> str:
    return hashlib.sha256(to_json(replace(plan, digest="")).encode()).hexdigest()


def read(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: It cannot be read, is not JSON, or has a wrong key or value.
    """
    table = _DOCUMENT.from_json(_DOCUMENT.text(path), path)
    return Plan(
        model=table.model,
        recipe=table.recipe,
        measure=table.measure,
        ratio=table.ratio,
        budget=table.budget,
        choices=tuple(map(_choice, table.layers)),
        solver=None if table.solver is None else _solver(table.solver),
        digest=table.digest,
        factors=table.factors,
        recover=table.recover,
        merge=table.merge,
        then=table.then or "",
        training=None if table.training is None else _training(table.training),
    )


def _training(table: _Training) -> Training:
    rounds = tuple(Round(*row) for row in table.rounds)
    return Training(table.seed, table.torch, table.device, table.data, rounds)


def _solver(table: _Solver) -> Solver:
    objective = nan if table.objective is None else table.objective
    return Solver(table.aggregate, table.power, objective, table.gap)


def _choice(row: _Layer) -> Choice:
    option = None
    if row.fold is not None and row.k is not None and row.j is not None:
        way = row.lowering or Lowering.NATIVE
        encoder = row.encoder or "" if way is Lowering.SHARED else ""
        option = Option(row.fold, row.k, row.j, way, encoder)
    return Choice(row.id, option, row.cost, nan if row.error is None else row.error, row.reason)


def check(plan: Plan, model: str, layers: Sequence[Layer]) -> None:
    """Check that a plan fits a model: the same file, the same layers, and options that these layers have.

    Args:
        plan: The plan.
        model: SHA-256 of the model.
        layers: Its layers.

    Raises:
        PlanError: It does not fit.
    """
    if plan.model != model:
        raise PlanError(
            f"The plan was made for another model (SHA-256 {plan.model[:12]}…, this one has {model[:12]}…): "
            "make a plan for this model with --save-plan."
        )
    known = {layer.id: layer for layer in layers}
    named: set[str] = set()
    advice = "use the same --include and --exclude as for making the plan."
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
    _check_kept(plan, known)


def _check_kept(plan: Plan, layers: Mapping[str, Layer]) -> None:
    """Check that partners of narrowed layers are kept, and that layers that share a factor agree."""
    options = {choice.layer: choice.option for choice in plan.choices}
    for layer, option in options.items():
        if option is not None and option.lowering in _FACTORS:
            _check_joined(layers[layer], option, layers, options)
        if option is None or option.lowering is not Lowering.NARROW:
            continue
        _check_bound(layers[layer], option, layers, options)
        for partner in layers[layer].partners:
            if _is_taken(layers[layer], layers[partner.id], options[partner.id]):
                raise PlanError(
                    f"The plan narrows {layer!r} and decomposes {partner.id!r}, which gets narrower with "
                    "it: set fold, k and j of one of the two to null."
                )


def _is_taken(layer: Layer, partner: Layer, option: Option | None) -> bool:
    """Whether the option of a partner is one that it cannot have beside a narrowing of the layer."""
    is_packed = layer.narrowing is not None and bool(layer.narrowing.rows) and partner.packs_own
    return option is not None and not (is_packed and option.lowering is Lowering.NARROW)


def _check_bound(
    layer: Layer, option: Option, layers: Mapping[str, Layer], options: Mapping[str, Option | None]
) -> None:
    """Check that two layers are narrowed alike whose heads have one size."""
    bound = "" if layer.narrowing is None else layer.narrowing.bound
    if not bound:
        return
    other = options[bound]
    is_narrow = other is not None and other.lowering is Lowering.NARROW
    if other is None or not is_narrow or other.j * layer.width != option.j * layers[bound].width:
        raise PlanError(
            f"The plan narrows {layer.id!r} to j = {option.j}, and {bound!r} differently, but their "
            "heads have one size: give both the same j and lowering, or set them to null."
        )


_FACTORS = {Lowering.SHARED: "an encoder", Lowering.SUMMED: "a decoder"}
"""The factor that layers share."""


def _check_joined(
    layer: Layer, option: Option, layers: Mapping[str, Layer], options: Mapping[str, Option | None]
) -> None:
    """Check that the layers that share a factor have one option, and that those that have to be are there."""
    name, names = f"In the plan, layer {layer.id!r}", sharing(layer, options)
    factor, advice = _FACTORS[option.lowering], "give both the same fold, k, j and lowering."
    if option.lowering is Lowering.SHARED and option.encoder != names[0]:
        given = f"the encoder {option.encoder!r}" if option.encoder else "no encoder"
        raise PlanError(
            f"{name} has {given}, and the first layer with {'it' if option.encoder else 'none'} is "
            f"{names[0]!r}: set encoder to {names[0]!r} for all that share it."
        )
    # The decoder of a sum stands behind all of its layers.
    for other in layer.addends if option.lowering is Lowering.SUMMED else ():
        if other not in names:
            raise PlanError(
                f"{name} shares {factor}, and {other!r}, whose result is added to its own, does not: {advice}"
            )
    others = [other for other in names if other != layer.id]
    if not others:
        raise PlanError(f"{name} shares {factor} with no other layer: choose another lowering.")
    for other in others:
        if options[other] != option:
            raise PlanError(f"{name} shares {factor} with {other!r}, whose option differs: {advice}")
    full = shared_full_rank([layers[each] for each in names], option.lowering)
    if not 1 <= option.j <= full:
        raise PlanError(f"{name} cannot have rank j = {option.j}: choose one between 1 and {full}.")


def _check_shared(layer: Layer, option: Option, name: str) -> None:
    if not layer.joinable(option.lowering):
        raise PlanError(f"{name} reads a tensor that no other layer reads so: choose another lowering.")
    if (option.fold, option.k) != (layer.shared_fold, 1):
        factor = _FACTORS[option.lowering]
        raise PlanError(f"{name} can share {factor} with fold {layer.shared_fold} and k = 1 only: set these.")


def _check_narrow(layer: Layer, option: Option, name: str) -> None:
    if (option.fold, option.k) != (layer.narrow_fold, 1):
        raise PlanError(f"{name} can be narrowed with fold {layer.narrow_fold} and k = 1 only: set these.")
    least = layer.width_step
    if not least <= option.j < layer.width:
        raise PlanError(
            f"{name} cannot keep j = {option.j} channels: choose a number between {least} and "
            f"{layer.width - least}."
        )
    if option.j % least:
        raise PlanError(
            f"{name} cannot keep j = {option.j} channels in {least} heads: choose a multiple of {least}."
        )


def _check_option(layer: Layer, option: Option) -> None:
    name = f"In the plan, layer {layer.id!r}"
    if option.lowering is Lowering.NARROW and layer.narrowing is not None:
        _check_narrow(layer, option, name)
        return
    if option.lowering is Lowering.SHARED or (option.lowering is Lowering.SUMMED and layer.addends):
        _check_shared(layer, option, name)
        return
    keeps_rows = option.lowering is Lowering.SPARSE and layer.kept_per_rank
    if option.fold not in layer.folds:
        raise PlanError(f"{name} has no fold {option.fold}: choose one of {', '.join(layer.folds)}.")
    if option.k not in layer.slices:
        slices = ", ".join(map(str, layer.slices))
        raise PlanError(f"{name} cannot be cut into k = {option.k} slices: choose one of {slices}.")
    if not keeps_rows and option.lowering not in layer.lowerings(option.k):
        ways = ", ".join(layer.lowerings(option.k))
        raise PlanError(f"{name} cannot be lowered as {option.lowering}: choose one of {ways}.")
    full = layer.full_rank(option.fold, option.k)
    if not 1 <= option.j <= full:
        raise PlanError(f"{name} cannot have rank j = {option.j}: choose one between 1 and {full}.")
