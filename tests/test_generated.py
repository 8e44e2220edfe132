"""What holds for every model: generated ones of all operators, types, versions, bodies and names.

`pytest tests/test_generated.py --hypothesis-profile generated` tries thousands of models.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, TypeProto

import tiny
from onnx_lowrank import BudgetError, InputError, Result, compress
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.layer import Layer, shared_full_rank
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.plan import Choice, Plan
from onnx_lowrank.documents import plans, recipes, reports
from onnx_lowrank.files.load import load
from onnx_lowrank.files.tensors import tensors as all_tensors
from onnx_lowrank.graph.parameters import parameters
from onnx_lowrank.layers.found import Found, find_layers
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.progress import Silent
from onnx_lowrank.stages.build import Built, build
from onnx_lowrank.stages.planning import largest_total
from onnx_lowrank.work.executor import Threads
from rewriting import assert_only_named_changes, evaluate
from strategies import models, recipe_texts, siblings
from strategies.naming import rename

ROUNDINGS = 64
"""Of ‖y − ŷ‖ / ‖y‖ for each layer, in units of the type's eps: both models round, none is the truth."""

JOINED = 64
"""Times as many roundings where the factors are fitted to activations, whose Gram matrices square them."""


# --- running --------------------------------------------------------------------------------------


def session(proto: ModelProto) -> onnxruntime.InferenceSession | None:
    """The model in ONNX Runtime; None if it does not load."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:
        return None


def feeds(proto: ModelProto) -> Iterator[dict[str, Any]]:
    """Inputs of a model without its weights; every choice of its conditions."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    given = [value for value in proto.graph.input if value.name not in stored]
    conditions = [v.name for v in given if v.type.tensor_type.elem_type == TensorProto.BOOL]
    rng = np.random.default_rng(5)
    fixed = {value.name: _drawn(rng, value.type) for value in given if value.name not in conditions}
    for chosen in product((False, True), repeat=min(len(conditions), 2)):
        rest = [True] * (len(conditions) - len(chosen))
        yield fixed | {name: np.asarray(v) for name, v in zip(conditions, [*chosen, *rest], strict=True)}


def _drawn(rng: np.random.Generator, kind: TypeProto) -> Any:
    """A value of a type; open sizes are 2."""
    if kind.HasField("sequence_type"):
        return [_drawn(rng, kind.sequence_type.elem_type)]
    if kind.HasField("optional_type"):
        return _drawn(rng, kind.optional_type.elem_type)
    shape = [dim.dim_value or 2 for dim in kind.tensor_type.shape.dim]
    is_id = kind.tensor_type.elem_type in (TensorProto.INT64, TensorProto.INT32)
    numbers = rng.integers(0, 3, shape) if is_id else rng.standard_normal(shape)
    return np.asarray(numbers).astype(onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))


def outputs(proto: ModelProto, *, must_run: bool = False) -> list[np.ndarray] | None:
    """All outputs of a model; None if nothing runs it."""
    opened = session(proto)
    found: list[np.ndarray] = []
    for feed in feeds(proto):
        try:
            values = opened.run(None, feed) if opened else evaluate(proto, feed)
        except Exception as error:
            if must_run:
                raise
            event(f"runs nowhere: {str(error)[:60]}")
            return None
        for value in values:
            found += value if isinstance(value, list) else [value]
    return found


EPS = {TensorProto.FLOAT: 2.0**-23, TensorProto.FLOAT16: 2.0**-10, TensorProto.BFLOAT16: 2.0**-7}
"""The unit of each type; a float64 result has the error of the factorization itself as well."""


def eps(proto: ModelProto) -> float:
    """The unit of the coarsest type in a model; factors have the type in which their weight is stored."""
    kinds = [tensor.data_type for tensor in all_tensors(proto)]
    kinds += [value.type.tensor_type.elem_type for value in proto.graph.input]
    return max((EPS.get(kind, 0.0) for kind in kinds), default=0.0) or 2.0**-44


def assert_alike(proto: ModelProto, new: ModelProto, layers: int) -> None:
    """Both models compute the same, but for roundings."""
    before = outputs(proto)
    if before is None:
        return
    after = outputs(new, must_run=True)
    assert after is not None
    for one, other in zip(before, after, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        x, y = one.astype(np.float64), other.astype(np.float64)
        if np.isfinite(x).all():
            assert np.linalg.norm(x - y) <= ROUNDINGS * (1 + layers) * eps(proto) * np.linalg.norm(x)


# --- building -------------------------------------------------------------------------------------


def written(proto: ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def reached(proto: ModelProto, ratio: float, **options: Any) -> Result:
    """The compressed model, at the smallest ratio that can be reached if this one cannot."""
    try:
        return compress(proto, ratio, cache=False, **options)
    except BudgetError as error:
        event("another ratio")
        return compress(proto, error.smallest_ratio or 0, cache=False, **options)


def found_in(proto: ModelProto) -> Found:
    return find_layers(load(proto), {}, (), ())


def built(found: Found, plan: Plan) -> Built:
    with Threads(resolve("cpu")) as executor:
        return build(found, plan, None, executor, Silent())


def assert_valid(proto: ModelProto, new: ModelProto) -> None:
    """The checker accepts the model, and the runtime loads it if it loads the input."""
    onnx.checker.check_model(new, full_check=True)
    if session(proto) is not None:
        assert session(new) is not None


def full(layer: Layer, index: int) -> Option:
    """One of the options of full rank."""
    options = [
        Option(fold, k, layer.full_rank(fold, k), lowering)
        for fold in layer.folds
        for k in layer.slices
        for lowering in layer.lowerings(k)
    ]
    return options[index % len(options)]


def planned(found: Found, options: Sequence[Option | None], *, merge: bool) -> Plan:
    choices = [Choice(layer.id, option, 0, 0.0) for layer, option in zip(found.layers, options, strict=True)]
    return Plan(found.model.sha256, "test", "spectral", 1.0, "params", tuple(choices), merge=merge)


def joined(layers: Sequence[Layer], lowering: Lowering) -> list[Option | None]:
    """Options of full rank that share an encoder, or a decoder, wherever layers can."""
    by_id = {layer.id: layer for layer in layers}
    found: list[Option | None] = []
    for layer in layers:
        group = [by_id[name] for name in layer.joinable(lowering)]
        encoder = group[0].id if group and lowering is Lowering.SHARED else ""
        rank = shared_full_rank(group, lowering) if group else 0
        found.append(Option(layer.shared_fold, 1, rank, lowering, encoder) if group else None)
    return found


def one_of(number: int) -> settings:
    """Try one of so many of the profile's examples."""
    # A model of several operators takes more draws than the usual example.
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=max(1, settings.default.max_examples // number), suppress_health_check=slow)


# --- properties -----------------------------------------------------------------------------------


@one_of(2)
@given(models(), st.sampled_from([0.3, 0.5, 0.7, 0.8, 0.9]))
def test_a_run_keeps_its_ratio_and_changes_what_the_plan_names(proto: ModelProto, ratio: float) -> None:
    onnx.checker.check_model(proto, full_check=True)
    before = written(proto)
    result = reached(proto, ratio)
    assert written(proto) == before
    assert_valid(proto, result.proto)
    assert parameters(result.model) <= largest_total(result.plan.ratio, parameters(load(proto)))
    assert written(reached(proto, ratio).proto) == written(result.proto)
    # The same plan, with nothing multiplied, so that the names of the chains say what is new.
    found = found_in(proto)
    apart = built(found, replace(result.plan, merge=False))
    chosen = [layer for layer, option in found.options(result.plan.choices) if option is not None]
    event(f"{min(len(chosen), 3)} layers rewritten")
    assert_only_named_changes(proto, apart.rewritten.model.proto, chosen, apart.rewritten.chains)
    assert_alike(result.proto, apart.rewritten.model.proto, len(chosen))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        path.write_text(result.report.to_json())
        reports.read(path)
        path = Path(folder) / "plan.json"
        result.save_plan(path)
        assert plans.to_json(plans.read(path)) == plans.to_json(result.plan)
        replayed = compress(proto, plan=path, cache=False)
    assert written(replayed.proto) == written(result.proto)


@one_of(2)
@given(models(), st.lists(st.integers(0, 99), min_size=1, max_size=6), st.booleans())
def test_full_rank_is_exact(proto: ModelProto, picks: list[int], is_merged: bool) -> None:
    found = found_in(proto)
    assume(found.layers)
    options = [full(layer, picks[n % len(picks)]) for n, layer in enumerate(found.layers)]
    new = built(found, planned(found, options, merge=is_merged)).rewritten.model.proto
    assert_valid(proto, new)
    assert_alike(proto, new, len(options))


@one_of(8)
@given(models(), st.sampled_from(["macs", "bytes"]), st.sampled_from([0.6, 0.8]))
def test_other_budgets_hold(proto: ModelProto, budget: str, ratio: float) -> None:
    tensors = {v.name for v in proto.graph.input if v.type.HasField("tensor_type")}
    shapes = {name: np.shape(feed) for name, feed in next(feeds(proto)).items() if name in tensors}
    try:
        result = reached(proto, ratio, budget=budget, input_shape=shapes)
    except InputError as error:
        # Functions, and values out of sequences, may have no known shapes.
        if "MACs are unknown" not in str(error):
            raise
        event("MACs are unknown")
        return
    total = result.report.totals.amount(budget)
    assert total.before is not None
    assert total.after is not None
    assert total.after <= largest_total(result.plan.ratio, total.before)
    assert_valid(proto, result.proto)


@one_of(4)
@given(siblings(), st.sampled_from([Lowering.SHARED, Lowering.SUMMED]), st.integers(0, 2**16))
def test_joined_layers_of_full_rank_are_exact(proto: ModelProto, lowering: Lowering, seed: int) -> None:
    found = found_in(proto)
    options = joined(found.layers, lowering)
    event(f"{sum(option is not None for option in options)} {lowering} layers")
    plan = planned(found, options, merge=False)
    plan = replace(plan, measure="activation", factors=Fit.ACTIVATIONS)
    shape = [dim.dim_value or 200 for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    data = {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}
    new = compress(proto, plan=plan, calibration=data, cache=False).proto
    assert_valid(proto, new)
    assert_alike(proto, new, JOINED * len(options))


@one_of(1)
@given(recipe_texts())
def test_a_recipe_survives_its_file(recipe: tuple[str, dict[str, Any]]) -> None:
    text, keys = recipe
    parsed = recipes.parse(text, "drawn")
    assert parsed.summary == keys["summary"]
    assert [fold.value for fold in parsed.folds] == [f.value for f in Fold if f.value in keys["folds"]]
    assert parsed.groups == (None if keys["groups"] == "divisors" else tuple(sorted(set(keys["groups"]))))
    assert (parsed.measure, parsed.aggregate) == (keys["measure"], keys["aggregate"])
    assert (parsed.relative, parsed.power) == (keys["normalize"] == "relative", keys.get("power", 1.0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.toml"
        path.write_text(text, encoding="utf-8")
        assert recipes.load(path) == parsed


@one_of(10)
@given(models(), recipe_texts())
def test_any_recipe_keeps_its_ratio(proto: ModelProto, recipe: tuple[str, dict[str, Any]]) -> None:
    result = reached(proto, 0.7, recipe=recipes.parse(recipe[0], "drawn"))
    assert parameters(result.model) <= largest_total(result.plan.ratio, parameters(load(proto)))
    assert_valid(proto, result.proto)


@one_of(50)
@given(models())
def test_processes_give_what_threads_give(proto: ModelProto) -> None:
    assert written(reached(proto, 0.7, workers=2).proto) == written(reached(proto, 0.7).proto)


def test_names_may_be_a_megabyte_long(tmp_path: Path) -> None:
    proto = tiny.cnn()
    rename(proto, lambda name: name * 2**18 if name else "", lambda _, name: name * 2**18)
    result = compress(proto, 0.5, cache=False)
    assert_valid(proto, result.proto)
    result.save_plan(tmp_path / "plan.json")
    assert written(compress(proto, plan=tmp_path / "plan.json", cache=False).proto) == written(result.proto)
