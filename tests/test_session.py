import gc
import json
import math
import re
import tempfile
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from rich.console import Console

import onnx_lowrank
from decoders import decoder
from onnx_lowrank import (
    BudgetError,
    InputError,
    PlanError,
    RecipeError,
    Result,
    ValidationError,
    budgets,
    compress,
)
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.documents import recipes
from onnx_lowrank.report.content import Detail
from onnx_lowrank.request import DEFAULT_RECIPE
from tiny import CNN, DIGITS, built, cnn, decaying, files

FREE = [recipe.name for recipe in recipes.load_all() if recipe.price is None and not recipe.calibrated]
INPUT = np.random.default_rng(7).standard_normal((2, 8, 6, 6)).astype(np.float32)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def external(tmp_path):
    """The digits model with its weights in a file beside it."""
    folder = tmp_path / "input"
    folder.mkdir()
    path = folder / "digits.onnx"
    onnx.save(onnx.load(DIGITS), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def run(model, x=INPUT):
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def plain(plan):
    """A plan without the digest, which covers all of it."""
    return replace(plan, digest="")


def kept(result):
    return {row.id: row.reason for row in result.report.layers if row.option is None}


# --- the interface ------------------------------------------------------------------------------------


def test_the_public_names():
    assert sorted(onnx_lowrank.__all__) == onnx_lowrank.__all__
    for name in onnx_lowrank.__all__:
        assert getattr(onnx_lowrank, name).__doc__


@pytest.mark.parametrize("kind", [str, Path, onnx.load])
def test_a_model_is_a_path_or_a_proto(tmp_path, kind):
    onnx.save(cnn(), tmp_path / "in.onnx")
    with compress(kind(tmp_path / "in.onnx"), 0.5) as result:
        assert isinstance(result, Result)
        assert result.proto.SerializeToString() == compress(cnn(), 0.5).proto.SerializeToString()


def test_the_input_is_never_changed():
    proto = cnn()
    before = proto.SerializeToString(deterministic=True)
    result = compress(proto, 0.3)
    assert result.proto is not proto
    assert proto.SerializeToString(deterministic=True) == before


def test_a_result_is_saved_as_often_as_one_likes(tmp_path):
    result = compress(cnn(), 0.5)
    for name in ("one.onnx", "two.onnx", "two.onnx"):
        result.save(tmp_path / name)
    result.save(str(tmp_path / "three.onnx"))
    written = files(tmp_path)
    assert sorted(written) == ["one.onnx", "three.onnx", "two.onnx"]
    assert len(set(written.values())) == 1
    np.testing.assert_array_equal(run(tmp_path / "one.onnx"), run(result.proto))


def test_a_result_explains_itself():
    result = compress(cnn(), 0.5)
    console = Console(width=100, record=True, file=StringIO())
    result.report.table(console)
    assert "conv2" in console.export_text()
    assert [row["id"] for row in json.loads(result.report.to_json())["layers"]] == ["conv1", "conv2", "fc"]
    assert result.plan.ratio == result.report.asked == 0.5
    assert [choice.layer for choice in result.plan.choices] == ["conv1", "conv2", "fc"]


def test_the_model_says_how_it_was_made_where_something_was_done():
    result = compress(cnn(), 0.5)
    entries = {entry.key: entry.value for entry in result.proto.metadata_props}
    assert json.loads(entries["onnx_lowrank.run"])["recipe"] == DEFAULT_RECIPE
    proofs = json.loads(entries["onnx_lowrank.layers"])
    rows = {row.id: row for row in result.report.layers if row.option}
    assert proofs.keys() == rows.keys()
    for name, row in rows.items():
        assert proofs[name]["option"] == f"{row.option.fold} k={row.option.k} j={row.option.j}"
        assert tuple(proofs[name]["spectral"]) == row.certificate.spectral
        assert tuple(proofs[name]["frobenius"]) == row.certificate.frobenius


@pytest.mark.parametrize("recipe", FREE)
def test_ratio_1_gives_the_model_back(recipe):
    result = compress(cnn(), 1, recipe=recipe)
    assert result.proto == cnn()
    assert result.report.reached == 1
    assert result.report.validation.worst == 0
    assert set(kept(result).values()) == {"the ratio asks for no decomposition"}
    assert result.report.warnings == ("No layer is rewritten, the output is the input model.",)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("recipe", FREE)
def test_outputs_are_those_of_the_validation(recipe, ratio):
    result = compress(cnn(), ratio, recipe=recipe, inputs={"x": INPUT})
    before, after = run(cnn()), run(result.proto)
    error = np.linalg.norm((after - before).astype(float)) / np.linalg.norm(before.astype(float))
    (output,) = result.report.validation.outputs
    assert output.relative == pytest.approx(error, rel=1e-6)
    assert 0 < error < 1
    assert result.report.reached <= ratio


@pytest.mark.parametrize("inputs", [{"x": INPUT}, "npz"])
def test_inputs_are_arrays_or_a_file(tmp_path, inputs):
    if inputs == "npz":
        inputs = tmp_path / "x.npz"
        np.savez(inputs, x=INPUT)
    validation = compress(cnn(), 0.5, inputs=inputs).report.validation
    assert validation.inputs == "given: x float32 2×8×6×6"


def test_a_recipe_is_a_name_a_file_or_an_object(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'summary = "s"\nfolds = ["encode"]\ngroups = "divisors"\nmeasure = "spectral"\naggregate = "max"\n'
    )
    by_file, by_name = compress(cnn(), 0.5, recipe=path).plan, compress(cnn(), 0.5, recipe="alds").plan
    assert plain(by_file) == replace(plain(by_name), recipe="mine")
    assert compress(cnn(), 0.5, recipe=recipes.load("alds")).plan == by_name
    assert plain(by_name) != replace(plain(compress(cnn(), 0.5, recipe="svd").plan), recipe="alds")


def test_a_plan_is_replayed_from_memory_and_can_be_edited():
    plan = compress(cnn(), 0.5, dry_run=True).plan
    first, second = compress(cnn(), 0.5), compress(cnn(), plan=plan)
    assert first.proto.SerializeToString() == second.proto.SerializeToString()
    assert second.plan == plan
    choices = [replace(choice, option=None) for choice in plan.choices]
    choices[0] = replace(choices[0], option=Option(compress(cnn(), 0.5).plan.choices[1].option.fold, 1, 2))
    edited = compress(cnn(), plan=replace(plan, choices=tuple(reversed(choices))))
    assert set(kept(edited)) == {"conv2", "fc"}
    assert [choice.layer for choice in edited.plan.choices] == ["conv1", "conv2", "fc"]


def without_choices(report):
    """A report without what its plan has chosen from."""
    return replace(report, layers=tuple(replace(row, detail=Detail()) for row in report.layers))


@pytest.mark.parametrize("recipe", FREE)
def test_a_replayed_plan_reports_what_the_first_run_did(recipe):
    first = compress(cnn(), 0.5, recipe=recipe)
    second = compress(cnn(), plan=first.plan)
    assert second.report != first.report, "a replay has nothing to choose from"
    assert second.report == without_choices(first.report)
    assert second.report.solver is not None


EDITS = {
    "ratio": lambda plan: replace(plan, ratio=0.4),
    "option": lambda plan: replace(
        plan, choices=(replace(plan.choices[0], option=Option(Fold.ENCODE, 1, 1)), *plan.choices[1:])
    ),
    "layer kept": lambda plan: replace(plan, choices=tuple(replace(c, option=None) for c in plan.choices)),
    "error": lambda plan: replace(plan, choices=(replace(plan.choices[0], error=0.125), *plan.choices[1:])),
    "proof": lambda plan: replace(plan, solver=replace(plan.solver, objective=0.0)),
    "digest": lambda plan: replace(plan, digest=""),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_nothing_is_proven_of_an_edited_plan(edit):
    plan = compress(cnn(), 0.5, dry_run=True).plan
    result = compress(cnn(), plan=edit(plan))
    assert result.report.solver is result.plan.solver is None
    assert compress(cnn(), plan=result.plan).report == result.report


def test_a_plan_at_other_costs_is_not_proven_optimal():
    plan = compress(cnn(), 0.5, budget="macs", input_shape={"x": (1, 8, 6, 6)}, dry_run=True).plan
    assert plan.solver.gap == 0
    assert compress(cnn(), plan=plan, input_shape={"x": (1, 8, 6, 6)}, dry_run=True).plan == plan
    other = compress(cnn(), plan=plan, input_shape={"x": (2, 8, 6, 6)}, dry_run=True)
    assert other.report.solver is None


NORMS = """
<ir_version: 8, opset_import: ["": 17]>
g (float[1, 16, 6, 6] x) => (float[1, 16, 6, 6] y) {
  a = Conv (x, one)
  b = BatchNormalization (a, scale, bias, mean, var)
  c = Conv (b, two)
  y = BatchNormalization (c, scale, bias, mean, var)
}
"""


def test_parameters_are_counted_in_the_model_that_is_written():
    norm = {name: np.full(16, value, np.float32) for name, value in zip("smbv", (1, 0, 0, 1), strict=True)}
    names = dict(zip("smbv", ("scale", "mean", "bias", "var"), strict=True))
    convs = {"one": decaying(1, 16, 16, 1, 1), "two": decaying(2, 16, 16, 1, 1)}
    model = built(NORMS, convs | {names[key]: array for key, array in norm.items()})
    planned, result = compress(model, 0.6, dry_run=True).report, compress(model, 0.6)
    assert all(row.option for row in result.report.layers)
    stored = sum(int(np.prod(tensor.dims)) for tensor in result.proto.graph.initializer)
    assert result.report.totals.amount("params").after == stored
    assert result.report.reached == stored / (2 * 256 + 4 * 16)
    assert planned.totals.amount("params").after - stored == 4 * 16, "the BatchNorm that both layers share"


@pytest.mark.parametrize("names", ["conv1", ["conv1"], ("n.a",)])
def test_one_glob_may_be_a_plain_string(names):
    assert [row.id for row in compress(cnn(), 0.9, include=names).report.layers] == ["conv1"]
    assert [row.id for row in compress(cnn(), 0.9, exclude=names).report.layers] == ["conv2", "fc"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, InputError, "Give exactly one of these: a ratio"),
        ({"ratio": 0.5, "plan": "p.json"}, InputError, "Give exactly one of these: a ratio"),
        ({"ratio": 0}, InputError, "The ratio is 0, but it must be"),
        ({"ratio": float("nan")}, InputError, "The ratio is nan"),
        ({"ratio": 1.01}, InputError, "The ratio is 1.01"),
        (
            {"ratio": 0.5, "budget": "time"},
            InputError,
            "no budget 'time': choose one of params, macs, latency, bytes",
        ),
        ({"ratio": 0.5, "threads": -1}, InputError, "--threads is -1"),
        ({"ratio": 0.5, "threads": 1025}, InputError, "--threads is 1025"),
        ({"ratio": 0.5, "threads": "2"}, InputError, "threads is '2'"),
        ({"ratio": 0.5, "cache": 1}, InputError, "cache is '1' of type int: give a folder, True or False"),
        ({"ratio": 0.5, "recipe": "magic"}, RecipeError, "no recipe 'magic'"),
        ({"ratio": 0.5, "device": "tpu"}, InputError, "no device 'tpu'"),
        ({"ratio": 0.5, "provider": "Magic"}, InputError, "'Magic'"),
        ({"ratio": 0.5, "max_error": -1}, InputError, "largest accepted error is -1"),
        ({"ratio": 0.5, "max_error": 1e-9}, ValidationError, "relative error of 'y'"),
        ({"ratio": 0.5, "include": "conv9"}, InputError, "is named 'conv9'"),
        ({"ratio": 0.5, "inputs": {"z": INPUT}}, InputError, "no input 'z'"),
        ({"ratio": 0.5, "inputs": {}}, InputError, "lack 'x'"),
        ({"ratio": 0.5, "input_shape": {"x": (2, 9, 6, 6)}}, InputError, "2×9×6×6"),
        *(
            (
                {"ratio": 0.5, "input_shape": {"x": shape}},
                InputError,
                "The shape of input 'x' is .* positive whole",
            )
            for shape in ((0, 8, 6, 6), (-1, 8, 6, 6), (2.0, 8, 6, 6), ("N", 8, 6, 6), (10**30, 8, 6, 6))
        ),
        ({"ratio": 0.5, "input_shape": {"x": (10**9, 8, 6, 6)}}, InputError, "more than 1 GiB"),
        ({"ratio": 0.001}, BudgetError, "cannot be reached"),
        ({"plan": "no.json"}, PlanError, "cannot be read"),
        ({"plan": "no.json", "recipe": "svd"}, InputError, "leave out --pass"),
        ({"plan": "no.json", "budget": "macs"}, InputError, "--budget and --align"),
    ],
)
def test_a_wrong_argument_is_told(arguments, error, message):
    with pytest.raises(error, match=message) as info:
        compress(cnn(), **arguments)
    assert str(info.value).endswith(".")


def test_what_is_wrong_is_told_before_the_work(monkeypatch):
    monkeypatch.setattr("onnx_lowrank.stages.planning.make", None)
    for arguments in ({"inputs": {"z": INPUT}}, {"provider": "Magic"}, {"device": "tpu"}, {"max_error": -1}):
        with pytest.raises(InputError):
            compress(cnn(), 0.5, **arguments)


def test_the_smallest_ratio_is_a_number_that_works():
    with pytest.raises(BudgetError) as info:
        compress(cnn(), 0.001)
    smallest = info.value.smallest_ratio
    assert compress(cnn(), smallest).report.reached <= smallest
    with pytest.raises(BudgetError):
        compress(cnn(), smallest - 0.001)
    with pytest.raises(BudgetError) as info:
        compress(cnn(), 0.5, exclude="*")
    assert info.value.smallest_ratio == 1


# --- If: the dearer branch counts ---------------------------------------------------------------------

BRANCHES = """
<ir_version: 8, opset_import: ["": 17]>
g (float[4, 32] x, bool c) => (float[4, 32] y) {
  y = If (c) <
    then_branch = t () => (float[4, 32] p) { p = MatMul (x, one) },
    else_branch = e () => (float[4, 32] q) { h = MatMul (x, two)  r = Relu (h)  q = MatMul (r, three) }
  >
}
"""


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.9])
def test_macs_of_an_if_stay_within_the_ratio(ratio):
    model = built(BRANCHES, {name: decaying(i, 32, 32) for i, name in enumerate(("one", "two", "three"))})
    report = compress(model, ratio, budget="macs").report
    assert report.totals.amount("macs").before == 2 * 4 * 32 * 32
    after = {row.id: row.macs.after for row in report.layers}
    assert report.totals.amount("macs").after == max(after["one"], after["two"] + after["three"])
    assert report.reached == report.totals.amount("macs").after / report.totals.amount("macs").before <= ratio
    with pytest.raises(BudgetError) as info:
        compress(model, 0.001, budget="macs")
    assert (
        compress(model, info.value.smallest_ratio, budget="macs").report.reached <= info.value.smallest_ratio
    )


# --- what the report adds -----------------------------------------------------------------------------


def test_kept_layers_have_their_reason():
    small = cnn(conv1=np.ones((16, 8, 3, 3), np.float32))
    reasons = kept(compress(small, 0.7))
    assert reasons
    assert set(reasons.values()) == {"the other layers reach the ratio at less error"}
    impossible = replace(recipes.load("alds"), groups=(7,))
    assert set(kept(compress(small, 1, recipe=impossible)).values()) == {"no option of the recipe is cheaper"}
    plan = compress(small, 0.7).plan
    assert kept(compress(small, plan=plan)) == reasons
    assert set(kept(compress(small, plan=replace(plan, ratio=0.6))).values()) == {
        "the replayed plan keeps it"
    }
    result = compress(small, 0.7)
    assert {row.id for row in result.report.layers if row.option} | set(kept(result)) == {
        "conv1",
        "conv2",
        "fc",
    }
    assert all(row.reason == "" for row in result.report.layers if row.option)


def warned(**arguments):
    return " ".join(compress(**arguments).report.warnings)


def test_an_ordinary_run_has_no_warning():
    assert warned(model=cnn(), ratio=0.6) == ""


def test_a_large_error_is_a_warning_that_depends_on_the_inputs():
    noise = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    arguments = {"model": cnn(conv2=noise), "ratio": 0.12}
    assert "on inputs made from the graph, which say little: pass real ones as --inputs" in warned(
        **arguments
    )
    assert "choose a larger ratio or another recipe" in warned(**arguments, inputs={"x": INPUT})


def test_a_coarse_result_is_a_warning():
    matrix = built(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) { y = MatMul (x, w) }',
        {"w": decaying(0, 3, 3)},
    )
    assert "The ratio is 0.6667 where 0.99 was asked for" in warned(model=matrix, ratio=0.99)


def test_rising_macs_are_a_warning():
    text = CNN.replace("N,", "1,").replace("a = Conv <pads", "a = Conv <strides = [3, 3], pads")
    plan = compress(cnn(text), 1, dry_run=True).plan
    decode = replace(plan.choices[0], option=Option(Fold.DECODE, 1, 8))
    result = compress(cnn(text), plan=replace(plan, choices=(decode, *plan.choices[1:])))
    assert any(warning.startswith("The MACs rise from") for warning in result.report.warnings)


def test_a_plan_above_its_ratio_is_a_warning():
    plan = compress(cnn(), 0.6).plan
    assert "above the 0.2 for which it was made" in warned(model=cnn(), plan=replace(plan, ratio=0.2))


def test_a_dry_run_factorizes_nothing(monkeypatch):
    monkeypatch.setattr("onnx_lowrank.session.build", None)
    result = compress(cnn(), 0.5, dry_run=True)
    assert result.proto == cnn()
    assert result.report.validation is None
    assert any(row.option for row in result.report.layers)
    assert all(row.certificate is None for row in result.report.layers)


# --- the same inputs give the same results ------------------------------------------------------------


@pytest.mark.parametrize("budget", budgets.names())
@pytest.mark.parametrize("recipe", [recipe.name for recipe in recipes.load_all() if not recipe.calibrated])
def test_runs_do_not_differ(recipe, budget):
    model = cnn(CNN.replace("N,", "1,"))
    # A layer's two factors are two nodes, which take time.
    ratio = 0.7 if budget == "latency" else 0.5
    # The processor's own blocks may be wider than all ranks of a model as small as this.
    align = 8 if budget == "latency" else None
    one, two = (compress(model, ratio, recipe=recipe, budget=budget, align=align) for _ in range(2))
    assert one.plan == two.plan
    assert one.report.to_json() == two.report.to_json()
    assert one.proto.SerializeToString() == two.proto.SerializeToString()


def test_a_report_holds_no_path(tmp_path):
    texts = []
    for folder in ("one", "two"):
        path = tmp_path / folder / "in.onnx"
        path.parent.mkdir()
        onnx.save(cnn(), path)
        texts.append(compress(path, 0.5).report.to_json())
    assert texts[0] == texts[1]


# --- external data ------------------------------------------------------------------------------------


def test_external_data_gives_what_inline_data_gives(external, tmp_path, temporary, monkeypatch):
    before = files(external.parent)
    out = tmp_path / "out" / "small.onnx"
    out.parent.mkdir()
    with compress(external, 0.5) as result:
        assert sum(content is not None for content in files(temporary).values()) == 1, (
            "the factors are on disk"
        )
        assert not any(t.raw_data for t in result.proto.graph.initializer if t.name.endswith("coder"))
        result.save(out)
        result.save(out)
    assert files(temporary) == {}
    assert files(external.parent) == before
    small, data = sorted(files(out.parent))
    assert small == "small.onnx"
    assert re.fullmatch(r"small\.onnx\.[0-9a-f]{16}\.data", data)

    inline = compress(DIGITS, 0.5)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    got = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert got.keys() == {t.name for t in inline.proto.graph.initializer}
    for tensor in inline.proto.graph.initializer:
        np.testing.assert_array_equal(got[tensor.name], onnx.numpy_helper.to_array(tensor))
    x = np.random.default_rng(1).random((3, 1, 8, 8), np.float32)
    np.testing.assert_array_equal(run(out, x), run(inline.proto, x))
    assert replace(plain(result.plan), model="") == replace(plain(inline.plan), model="")


def test_external_output_moves_with_its_folder(external, tmp_path):
    (tmp_path / "one").mkdir()
    with compress(external, 0.5) as result:
        result.save(tmp_path / "one" / "small.onnx")
    (tmp_path / "one").rename(tmp_path / "two")
    x = np.zeros((1, 1, 8, 8), np.float32)
    assert np.isfinite(run(tmp_path / "two" / "small.onnx", x)).all()


def test_a_closed_result_says_that_it_cannot_be_saved(external, tmp_path, temporary):
    result = compress(external, 0.5)
    result.close()
    result.close()
    with pytest.raises(InputError):
        result.save(tmp_path / "small.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["input", "temporary"]


def test_a_forgotten_result_leaves_nothing_on_disk(external, temporary):
    result = compress(external, 0.5)
    assert sum(content is not None for content in files(temporary).values()) == 1
    del result
    gc.collect()
    assert files(temporary) == {}


@pytest.mark.parametrize("arguments", [{"max_error": 0}, {"plan": "edited"}])
def test_a_failure_leaves_nothing_on_disk(external, temporary, arguments):
    if "plan" in arguments:
        arguments = {"plan": replace(compress(external, 1, dry_run=True).plan, model="other")}
    else:
        arguments = {"ratio": 0.5, **arguments}
    with pytest.raises((ValidationError, PlanError)):
        compress(external, **arguments)
    gc.collect()
    assert files(temporary) == {}


def test_out_may_not_be_the_data_file_of_the_input(external):
    before = files(external.parent)
    with (
        compress(external, 0.5) as result,
        pytest.raises(InputError, match="is a data file of the input model"),
    ):
        result.save(external.parent / "weights.bin")
    assert files(external.parent) == before


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_external_data_is_told(external, damage):
    data = external.parent / "weights.bin"
    if damage == "cut":
        data.write_bytes(data.read_bytes()[:-100])
    else:
        data.unlink()
    with pytest.raises(InputError, match=r"weights\.bin"):
        compress(external, 0.5)


WRONG = {
    "ratio as text": {"ratio": "0.5"},
    "ratio as truth": {"ratio": True},
    "largest error": {"ratio": 0.5, "max_error": "x"},
    "include": {"ratio": 0.5, "include": 3},
    "exclude": {"ratio": 0.5, "exclude": [3]},
    "shape": {"ratio": 0.5, "input_shape": {"x": 4}},
    "shapes": {"ratio": 0.5, "input_shape": [("x", (1,))]},
    "inputs": {"ratio": 0.5, "inputs": 5},
    "ragged inputs": {"ratio": 0.5, "inputs": {"x": [[1.0], [1.0, 2.0]]}},
    "budget": {"ratio": 0.5, "budget": ["params"]},
    "recipe": {"ratio": 0.5, "recipe": 5},
    "plan": {"plan": {}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_sentence(name):
    with pytest.raises(InputError) as caught:
        compress(cnn(), **WRONG[name])
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [None, b"model", cnn().graph, 3])
def test_what_is_no_model_is_one_sentence(wrong):
    with pytest.raises(InputError, match=r"is no model: give a path or an onnx\.ModelProto"):
        compress(wrong, 0.5)


def test_inputs_tell_the_shapes_that_macs_need():
    proto = cnn()
    (entry,) = proto.graph.input
    sizes = [dim.dim_value or 1 for dim in entry.type.tensor_type.shape.dim]
    entry.type.tensor_type.shape.dim[2].dim_param = "H"
    for budget in ("macs", "latency"):
        with pytest.raises(
            InputError, match="inputs x have open dimensions: pass them as --input-shape x=1,8,"
        ):
            compress(proto, 0.5, budget=budget)
    inputs = {entry.name: np.ones([2, *sizes[1:]], np.float32)}
    report = compress(proto, 0.5, budget="macs", inputs=inputs).report
    assert report.counted == "the inputs (x 2×8×6×6)"
    totals = report.totals
    assert totals.amount("macs").after <= totals.amount("macs").before / 2
    stated = compress(proto, 0.5, budget="macs", input_shape={entry.name: [2, *sizes[1:]]}).report.totals
    assert stated.amount("macs") == totals.amount("macs")


def test_macs_of_an_open_batch_are_those_of_one_sample():
    one = compress(cnn(), 0.5, budget="macs").report
    stated = compress(cnn(), 0.5, budget="macs", input_shape={"x": (1, 8, 6, 6)}).report
    assert one.totals == stated.totals
    assert (one.counted, stated.counted) == ("one sample (x 1×8×6×6)", "")
    assert "made from the graph: x float32 4×8×6×6" in one.validation.inputs


def test_a_plan_can_be_saved_read_and_replayed_from_python(tmp_path):
    result = compress(cnn(), 0.5)
    result.save_plan(tmp_path / "plan.json")
    plan = onnx_lowrank.read_plan(tmp_path / "plan.json")
    assert plan == result.plan
    for again in (plan, tmp_path / "plan.json"):
        assert compress(cnn(), plan=again).proto == result.proto


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("align", [2, 4, 8])
def test_ranks_are_aligned(align, budget):
    shape = {"x": (1, 8, 6, 6)}
    with compress(cnn(), 0.7, align=align, budget=budget, input_shape=shape) as result:
        ranks = [choice.option.j for choice in result.plan.choices if choice.option]
        assert ranks
        assert all(rank % align == 0 for rank in ranks)
        assert result.report.reached <= 0.7


# --- adjacent operators that become one ---------------------------------------------------------------

BOTTLENECKS = """
<ir_version: 8, opset_import: ["": 17]>
net (float[1, 16, 6, 6] x) => (float[1, 32, 6, 6] y) {
  a = Conv (x, project)
  b = Conv (a, expand)
  c = Relu (b)
  y = Conv <pads = [1, 1, 1, 1]> (c, last)
}
"""


def bottlenecks():
    arrays = {
        "project": decaying(1, 24, 16, 1, 1),
        "expand": decaying(2, 48, 24, 1, 1),
        "last": decaying(3, 32, 48, 3, 3),
    }
    return built(BOTTLENECKS, arrays)


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_adjacent_factors_are_multiplied_and_counted(budget):
    model = bottlenecks()
    result = compress(model, 0.4, budget=budget, recipe="svd", align=2)
    report = result.report
    assert report.merges
    assert sum(node.op_type == "Conv" for node in result.proto.graph.node) < 6
    stored = sum(math.prod(tensor.dims) for tensor in result.proto.graph.initializer)
    assert report.totals.amount("params").after == stored
    assert report.totals.amount("macs").after == 36 * stored
    assert report.reached <= 0.4
    x = np.random.default_rng(0).standard_normal((1, 16, 6, 6)).astype(np.float32)
    (output,) = report.validation.outputs
    assert output.relative < 0.9
    assert np.isfinite(run(result.proto, x)).all()
    again = compress(model, plan=result.plan)
    assert again.proto == result.proto
    assert again.report == without_choices(report)
    text = StringIO()
    report.table(Console(file=text, width=100))
    assert "Multiplied, because at most a bias is between them" in text.getvalue()
    assert json.loads(report.to_json())["merges"][0]["layers"]


@pytest.mark.parametrize(
    "selected",
    [
        {"exclude": ["expand"]},
        {"exclude": ["n.b"]},
        {"exclude": ["expand", "project"]},
        {"include": ["last"]},
        {"include": ["project", "last"]},
    ],
)
def test_what_is_excluded_is_not_multiplied_with_its_neighbour(selected):
    model = bottlenecks()
    result = compress(model, 0.75, recipe="svd", **selected)
    assert result.report.merges == ()
    before = {node.name: node for node in model.graph.node}
    after = {node.name: node for node in result.proto.graph.node}
    kept = [skipped.name for skipped in result.report.skipped]
    assert kept
    weights = {tensor.name: tensor for tensor in result.proto.graph.initializer}
    for name in kept:
        assert after[name] == before[name]
        assert weights[after[name].input[1]] in model.graph.initializer


def test_nothing_is_multiplied_where_nothing_is_rewritten():
    result = compress(bottlenecks(), 1)
    assert result.report.merges == ()
    assert result.proto == bottlenecks()


def test_a_past_of_no_length_tells_its_shape():
    rng = np.random.default_rng(0)
    feed = {
        "input_ids": rng.integers(24, size=(2, 5)),
        "attention_mask": np.ones((2, 5), np.int64),
        "position_ids": np.tile(np.arange(5), (2, 1)),
        "past_key_values_0_key": np.empty((2, 2, 0, 8), np.float32),
        "past_key_values_0_value": np.empty((2, 2, 0, 8), np.float32),
    }
    result = compress(decoder(total="all"), ratio=0.7, budget="macs", inputs=feed, dry_run=True)
    layers = 2 * 5 * 32 * (2 * 32 + 2 * 16 + 24)
    assert result.report.totals.amount("macs").before == layers + 2 * 4 * 5 * 5 * 8 * 2
