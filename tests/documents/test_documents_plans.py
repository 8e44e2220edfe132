import json
from dataclasses import replace
from math import inf, isnan, nan

import pytest

from evaluated import evaluated
from onnx_lowrank import compress
from onnx_lowrank.budgets import registry
from onnx_lowrank.budgets.budget import Tools
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.plan import Aggregate, Choice, Plan, Round, Solver, Training
from onnx_lowrank.documents import plans
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import PlanError
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.stages import planning
from timing import Recorded
from tiny import cnn

PLAN = Plan(
    model="ab" * 32,
    recipe="power",
    measure="spectral",
    ratio=0.5,
    budget="macs",
    choices=(
        Choice("conv1", None, 100, 0.0, "it is small"),
        Choice("body/größe\n", Option(Fold.DECODE, 2, 2), 48, 0.123456789),
        Choice("fc", Option(Fold.ENCODE, 1, 3), 60, 1e-300),
    ),
    solver=Solver(Aggregate.SUM, 4.0, 0.1, 1e-17),
    digest="cd" * 32,
)
LAYERS = (
    Layer("conv1", "Conv", 8, 8, (3, 3), 1, "float32", tuple(Fold), (1, 2, 4, 8), ()),
    Layer("body/größe\n", "Conv", 8, 8, (3, 3), 2, "float32", (Fold.ENCODE, Fold.DECODE), (1, 2, 4), ()),
    Layer("fc", "MatMul", 8, 4, (), 1, "float16", (Fold.ENCODE,), (1,), ()),
)
TABLE = json.loads(plans.to_json(PLAN))
ROW = TABLE["layers"][1]


def read(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    return plans.read(path)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        replace(PLAN, choices=()),
        replace(PLAN, ratio=1.0, measure="nuclear"),
        replace(PLAN, budget="latency"),
        replace(PLAN, choices=(Choice("fc", Option(Fold.ENCODE, 1, 3, Lowering.MATMUL), 60, 0.5),)),
        replace(PLAN, choices=(Choice("fc", Option(Fold.ENCODE, 1, 3, Lowering.CONV), 2**40, 0.5),)),
        replace(PLAN, solver=None, digest=""),
        replace(PLAN, measure="activation", factors=Fit.ACTIVATIONS),
        replace(PLAN, measure="output", factors=Fit.ACTIVATIONS, recover=True),
        replace(PLAN, measure="output", factors=Fit.SCALED),
        replace(PLAN, solver=Solver(Aggregate.UNIFORM, 1.0, 0.5, None)),
        replace(PLAN, budget="latency", merge=False),
    ],
)
def test_a_plan_reads_back_as_it_was_written(tmp_path, plan):
    text = plans.to_json(plan)
    assert read(tmp_path, text) == plan
    assert plans.to_json(read(tmp_path, text)) == text


def test_the_file_has_one_line_for_each_layer():
    lines = plans.to_json(PLAN).splitlines()
    assert lines[0] == "{"
    assert lines[1] == '  "version": 4,'
    assert lines[7:10] == ['  "factors": "weights",', '  "recover": false,', '  "merge": true,']
    assert lines[10] == '  "solver": {"aggregate": "sum", "power": 4.0, "objective": 0.1, "gap": 1e-17},'
    assert lines[12] == '  "layers": ['
    assert lines[13].startswith('    {"id": "conv1", "fold": null, "k": null, "j": null, "lowering": null, ')
    assert lines[13].endswith('"error": 0.0, "reason": "it is small"},')
    assert lines[14].startswith(
        '    {"id": "body/größe\\n", "fold": "decode", "k": 2, "j": 2, "lowering": "native", '
    )
    assert lines[-2:] == ["  ]", "}"]


def test_an_error_that_is_unknown_is_null(tmp_path):
    plan = replace(PLAN, choices=(Choice("fc", Option(Fold.ENCODE, 1, 2), 24, nan),))
    text = plans.to_json(plan)
    assert json.loads(text)["layers"][0]["error"] is None
    assert isnan(read(tmp_path, text).choices[0].error)


def test_an_objective_that_is_too_large_for_a_number_is_null(tmp_path):
    text = plans.to_json(replace(PLAN, solver=replace(PLAN.solver, objective=inf)))
    assert json.loads(text)["solver"]["objective"] is None
    assert isnan(read(tmp_path, text).solver.objective)


TRAINING = Training(3, "2.13.0", "cpu", "ab" * 32, (Round(50, 0.01), Round(4, 1e-05, is_again=True)))


def test_a_training_survives_a_round_trip(tmp_path):
    plan = plans.sealed(replace(PLAN, training=TRAINING))
    assert read(tmp_path, plans.to_json(plan)).training == TRAINING
    assert "training" not in json.loads(plans.to_json(PLAN))


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": [[0, 0.01, False]]},
        {"rounds": [[10_001, 0.01, False]]},
        {"rounds": [[5, 1.5, False]]},
        {"rounds": [[5, 0.01]]},
        {"rounds": [[1, 0.01, False]] * 2001},
        {"device": "tpu"},
        {"seed": -1},
        {"torch": None},
        {"steps": 3},
    ],
)
def test_a_wrong_training_is_refused(tmp_path, changes):
    table = json.loads(plans.to_json(replace(PLAN, training=TRAINING)))
    table["training"] |= changes
    with pytest.raises(PlanError, match="training"):
        read(tmp_path, json.dumps(table))


@pytest.mark.parametrize("replayed", [False, True])
def test_the_digest_tells_whether_a_plan_was_edited(tmp_path, replayed):
    plan = plans.sealed(PLAN)
    if replayed:
        plan = read(tmp_path, plans.to_json(plan))
    assert not plans.is_edited(plan)
    assert plans.sealed(plan) == plan
    assert plans.is_edited(PLAN)
    edits = {"model": "ef" * 32, "recipe": "svd", "measure": "nuclear", "ratio": 0.25}
    edits |= {"budget": "params", "choices": PLAN.choices[:2], "solver": None, "digest": "0" * 64}
    edits |= {"factors": Fit.ACTIVATIONS, "recover": True, "merge": False, "then": "int8"}
    edits |= {"training": TRAINING}
    assert edits.keys() == PLAN.__dataclass_fields__.keys()
    for name, value in edits.items():
        assert plans.is_edited(replace(plan, **{name: value})), name


@pytest.mark.parametrize("cost", [0, 10, 2**62])
@pytest.mark.parametrize("error", [0, 1, 2.5, 1e300])
def test_numbers_may_be_written_as_a_person_writes_them(tmp_path, cost, error):
    table = {**TABLE, "ratio": 1, "layers": [{**ROW, "cost": cost, "error": error}]}
    plan = read(tmp_path, json.dumps(table, indent=7))
    assert plan.ratio == 1.0
    assert (plan.choices[0].cost, plan.choices[0].error) == (cost, error)


def table(**changes):
    return json.dumps(TABLE | changes)


def layer(**changes):
    return json.dumps({**TABLE, "layers": [ROW | changes]})


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


def shown(value):
    """A value as messages show it: the beginning of a long one."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


MALFORMED = {
    "empty": ("", "not valid JSON"),
    "cut": (plans.to_json(PLAN)[:-3], "not valid JSON"),
    "TOML": ("[plan]\nversion = 1\n", "not valid JSON"),
    "deep": ("[" * 200_000, "not valid JSON"),
    "a huge integer": (
        table().replace('"version": 4', '"version": ' + "9" * 5000),
        "not valid JSON",
    ),
    "half a character": (
        table(recipe="\ud83d x"),
        "a text in it has '\\ud83d', which is half of a character",
    ),
    "a byte order mark": ("\ufeff" + table(), "not valid JSON"),
    "comments": ("// a plan\n" + table(), "not valid JSON"),
    "deep objects": ('{"a":' * 200_000, "not valid JSON (it nests too deep)"),
    "a key twice": (
        table().replace('"ratio": 0.5', '"ratio": 0.5, "ratio": 0.25'),
        "the key 'ratio' occurs twice in one object",
    ),
    "a key of a layer twice": (layer().replace('"k": 2', '"k": 2, "k": 4'), "the key 'k' occurs twice"),
    "a key that looks like a place": (table(**{"x` - at `$.layers[7].id": 1}), "has an unknown key 'x"),
    "a key of another line": (table(**{"x\ny": 1}), "it has an unknown key 'x\\ny', the keys are version, "),
    "another version with other keys": (table(version=5, speed=1), "version is 5, and this program reads"),
    "a list": ("[]", "it must be an object with the keys version, model"),
    "null": ("null", "it must be an object"),
    "a number": ("3", "it must be an object"),
    "an unknown key": (table(speed=1), "it has an unknown key 'speed'"),
    **{f"no {key}": (json.dumps(without(TABLE, key)), f"it lacks the key {key!r}") for key in TABLE},
    "version 1": (table(version=1), "version is 1, and this program reads version 4"),
    "version true": (table(version=True), "version is true"),
    "version text": (table(version="1"), "version is '1'"),
    "model 3": (table(model=3), "model is 3"),
    "model null": (table(model=None), "model is null"),
    "recipe list": (table(recipe=[]), "recipe is []"),
    "measure": (
        table(measure="magic"),
        "measure is 'magic', but it must be one of activation, frobenius",
    ),
    "measure list": (table(measure=["spectral"]), "measure is ['spectral']"),
    "budget": (table(budget="time"), "budget is 'time', but it must be one of params, macs, latency, bytes"),
    **{
        f"ratio {value!r}": (table(ratio=value), f"ratio is {shown(value)}, but it must be a number above 0")
        for value in (0, -0.5, 1.5, float("inf"), float("nan"), "0.5", None, True, [0.5], 10**400)
    },
    "factors": (table(factors="biases"), "factors is 'biases', but it must be one of weights, activations"),
    "factors null": (table(factors=None), "factors is null, but it must be one of"),
    **{
        f"{name} {value!r}": (
            table(**{name: value}),
            f"{name} is {shown(value)}, but it must be true or false",
        )
        for name in ("recover", "merge")
        for value in (None, 0, 1, "true", [])
    },
    "recovered weights": (
        table(recover=True),
        "recover is true and needs factors 'activations', but factors is 'weights'",
    ),
    "digest 3": (table(digest=3), "digest is 3, but it must be a text"),
    "solver text": (
        table(solver="best"),
        "solver is 'best', but it must be an object with the keys aggregate, power, objective, gap or null",
    ),
    **{
        f"solver {key} {value!r}": (
            table(solver=TABLE["solver"] | {key: value}),
            f"solver has {key} = {shown(value)}, but it must be ",
        )
        for key, value in [
            ("aggregate", "mean"),
            ("power", None),
            ("power", "4"),
            ("objective", []),
            ("gap", True),
        ]
    },
    "layers null": (table(layers=None), "layers is null, but it must be a list"),
    "layers object": (table(layers={}), "layers is {}, but it must be a list"),
    "layer text": (
        table(layers=["fc"]),
        "layers[0] is 'fc', but it must be an object with the keys id, fold",
    ),
    "layer with an unknown key": (
        layer(rank=3),
        "layers[0] ('body/größe\\n') has an unknown key 'rank', the keys are id, fold, k, j, lowering",
    ),
    **{
        f"layer without {key}": (
            json.dumps({**TABLE, "layers": [without(ROW, key)]}),
            f"lacks the key {key!r}",
        )
        for key in ROW
    },
    "id 3": (layer(id=3), "layers[0] has id = 3, but it must be a text"),
    "fold": (
        layer(fold="diagonal"),
        "has fold = 'diagonal', but it must be one of encode, rows, cols, decode or null",
    ),
    "fold 1": (layer(fold=1), "has fold = 1, but it must be one of"),
    "lowering": (
        layer(lowering="gemm"),
        "layers[0] ('body/größe\\n') has lowering = 'gemm', but it must be one of native, conv",
    ),
    "fold null": (
        layer(fold=None),
        "has fold = null, k = 2 and j = 2, and either all three or none of them must be null",
    ),
    **{
        f"{key} {value!r}": (layer(**{key: value}), f"{key} = {shown(value)}")
        for key in ("k", "j")
        for value in (None, 1.0, "1", True, [])
    },
    **{
        f"cost {value!r}": (layer(cost=value), f"cost = {shown(value)}, but it must be a whole number")
        for value in (None, 1.5, "1", True, 10**30, -(10**30))
    },
    "reason 3": (layer(reason=3), "reason = 3, but it must be a text"),
    **{
        f"error {value!r}": (layer(error=value), f"error = {shown(value)}, but it must be a number or null")
        for value in ("0.1", True, [], float("nan"), float("inf"), 10**400)
    },
}


@pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_plan_is_told_in_one_sentence(tmp_path, text, message):
    with pytest.raises(PlanError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert str(error.value).startswith(f"The plan {tmp_path / 'plan.json'} is wrong: ")
    assert str(error.value).endswith("; correct it or save it anew.")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(PlanError, match="cannot be read \\(No such file or directory\\)"):
        plans.read(tmp_path / "no.json")
    with pytest.raises(PlanError, match="cannot be read \\(Is a directory\\)"):
        plans.read(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"version": "\xe9"}')
    with pytest.raises(PlanError, match="not UTF-8 text"):
        plans.read(tmp_path / "latin.json")
    with pytest.raises(PlanError, match="cannot be read \\(embedded null byte\\)"):
        plans.read("a\0b")


def test_a_file_that_does_not_end_is_not_read_to_its_end():
    with pytest.raises(PlanError, match="cannot be read \\(it has more than 64 MiB\\): check the path"):
        plans.read("/dev/zero")


def test_a_plan_fits_its_model_in_any_order():
    plans.check(PLAN, PLAN.model, LAYERS)
    plans.check(replace(PLAN, choices=PLAN.choices[::-1]), PLAN.model, LAYERS)


@pytest.mark.parametrize(
    ("option", "legal"),
    [
        *((Option(fold, 2, 2), fold in (Fold.ENCODE, Fold.DECODE)) for fold in Fold),
        *((Option(Fold.ENCODE, k, 1), k in (1, 2, 4)) for k in range(-1, 10)),
        *((Option(Fold.ENCODE, 1, j), 1 <= j <= 4) for j in range(-1, 8)),
        *((Option(Fold.DECODE, 4, j), j == 1) for j in (0, 1, 2)),
    ],
)
def test_an_option_has_to_be_one_of_the_layers(option, legal):
    # Two groups of 4 features and 4 channels, kernel 3×3: the full rank is min(4, 36 / k) for encode and
    # min(36, 4 / k) for decode.
    plan = replace(PLAN, choices=(PLAN.choices[0], Choice("body/größe\n", option, 1, 0.0), PLAN.choices[2]))
    if legal:
        plans.check(plan, PLAN.model, LAYERS)
    else:
        with pytest.raises(PlanError, match="In the plan, layer 'body/größe"):
            plans.check(plan, PLAN.model, LAYERS)


@pytest.mark.parametrize(
    ("choices", "model", "message"),
    [
        (PLAN.choices, "cd" * 32, "made for another model"),
        (PLAN.choices[:2], PLAN.model, "lacks the layer 'fc': use the same --include and --exclude"),
        ((*PLAN.choices, Choice("new", None, 1, 0.0)), PLAN.model, "names the layer 'new', which"),
        ((*PLAN.choices, PLAN.choices[0]), PLAN.model, "names the layer 'conv1' twice"),
    ],
)
def test_a_plan_for_something_else_is_told(choices, model, message):
    with pytest.raises(PlanError, match=message):
        plans.check(replace(PLAN, choices=choices), model, LAYERS)


# --- plans of times -----------------------------------------------------------------------------------


def pointwise(*, groups=1, **options):
    kernel = (1, 1)
    use = Use("", 0, "n", "Conv", 1, rank=4, **({"pointwise": True} | options))
    folds = Fold.distinct(kernel)
    return evaluated(Layer("w", "Conv", 8, 8, kernel, groups, "float32", folds, (1, 2), (use,)))


def matrix(op="MatMul", operand=1, rank=2):
    use = Use("", 0, "n", op, operand, rank=rank, positions=Positions(5))
    return evaluated(Layer("w", op, 8, 8, (), 1, "float32", (Fold.ENCODE,), (1, 2), (use,)))


@pytest.mark.parametrize(
    ("layer", "k", "lowerings"),
    [
        (pointwise(), 1, ("native", "matmul")),
        (pointwise(), 2, ("native", "split")),
        (pointwise(positions=Positions(1, (6, 6), (6, 6))), 1, ("native", "matmul")),
        (pointwise(pointwise=False), 1, ("native",)),
        (pointwise(groups=2), 1, ("native",)),
        (matrix(), 1, ("native", "pointwise")),
        (matrix(), 2, ("native", "conv", "pointwise")),
        (matrix(rank=3), 2, ("native", "conv", "pointwise")),
        (matrix(rank=4), 2, ("native",)),
        (matrix(rank=None), 2, ("native",)),
        (matrix("Gemm"), 2, ("native", "conv", "pointwise")),
        (matrix("Gemm", operand=0), 2, ("native",)),
        (matrix("Gather"), 2, ("native",)),
    ],
)
def test_the_operators_of_a_chain_have_to_be_some_that_the_layer_allows(layer, k, lowerings):
    for lowering in Lowering:
        option = Option(layer.folds[0], k, 1, lowering)
        plan = replace(PLAN, choices=(Choice("w", option, 1, 0.0),))
        if lowering in lowerings:
            plans.check(plan, PLAN.model, (layer,))
            continue
        with pytest.raises(PlanError) as caught:
            plans.check(plan, PLAN.model, (layer,))
        reasons = {
            Lowering.SHARED: "reads a tensor that no other layer reads so: choose another lowering.",
        }
        other = f"cannot be lowered as {lowering}: choose one of {', '.join(lowerings)}."
        assert str(caught.value) == f"In the plan, layer 'w' {reasons.get(lowering, other)}"


def test_no_operators_are_the_layers_own(tmp_path):
    table = json.loads(plans.to_json(PLAN))
    table["layers"][1]["lowering"] = None
    assert read(tmp_path, json.dumps(table)).choices[1].option.lowering is Lowering.NATIVE
    assert read(tmp_path, json.dumps(table)) == PLAN


@pytest.mark.parametrize("edited", [False, True])
def test_a_replayed_plan_of_times_keeps_them_unless_it_was_edited(edited):
    proto = cnn()
    shape = {"x": (2, 8, 6, 6)}
    plan = compress(proto, 0.6, budget="latency", align=1, input_shape=shape, dry_run=True).plan
    found = find_layers(load(proto), shape, (), ())
    if edited:
        option = Option(Fold.DECODE, 2, 2)
        plan = replace(plan, choices=(replace(plan.choices[0], option=option), *plan.choices[1:]))
    tools = Tools(Recorded(runtime("CPUExecutionProvider")), shapes=shape)
    replayed = planning.replay(plan, found.model, found.layers, registry.named("latency").on(found, tools))
    if not edited:
        assert replayed == plan
        return
    assert replayed.solver is None
    assert replayed.digest != plan.digest
    assert not plans.is_edited(replayed)
    for old, new in zip(plan.choices, replayed.choices, strict=True):
        assert new.option == old.option
        assert isnan(new.error) if new.option else new.error == 0
        assert new.reason == ("" if new.option else "the replayed plan keeps it")
