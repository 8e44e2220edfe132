"""Measures are found by their files, known by their names and documented for those who write recipes."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from calibrating import THREADS, measured, seen
from onnx_lowrank import InputError, RecipeError, compress, measures
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets import registry
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents import plans, recipes
from onnx_lowrank.measures import Evidence, Needs, named, names
from onnx_lowrank.progress import Silent
from onnx_lowrank.stages.score import Scores
from tiny import cnn

NAMES = ("activation", "frobenius", "nuclear", "output", "schatten", "spectral", "spectral-bound")
README = (Path(__file__).parents[2] / "passes" / "README.md").read_text(encoding="utf-8")
X = np.random.default_rng(0).standard_normal((20, 8, 6, 6)).astype(np.float32)

RANKS_CUT = '''
"""The share of the ranks that are cut off."""

import numpy as np

from onnx_lowrank.measures import Measure, Needs, of_spectra


def formula(values, whole):
    full = values.shape[-1]
    return np.arange(full, 0, -1, dtype=np.float64), np.float64(full)


MEASURE = Measure("(full rank − j) / full rank", Needs.WEIGHTS, of_spectra(formula), "the share of ranks cut")
'''
WORSE_OF_BOTH = '''
"""The larger of an error of the weight and one of its activations."""

import numpy as np

from onnx_lowrank.measures import Measure, Needs
from onnx_lowrank.measures.activation import MEASURE as ACTIVATION
from onnx_lowrank.measures.frobenius import MEASURE as FROBENIUS


def errors(evidence, *, relative):
    of_weight, of_outputs = (one.errors(evidence, relative=relative) for one in (FROBENIUS, ACTIVATION))
    return {
        key: np.maximum(error[: of_weight[key].size], of_weight[key][: error.size])
        for key, error in of_outputs.items()
    }


MEASURE = Measure("the larger of frobenius and activation", Needs.WEIGHTS | Needs.MOMENTS, errors)
'''


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Add a module to the package, for one test."""
    added = []

    def add(module, text):
        (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(measures, "__path__", [*measures.__path__, str(tmp_path)])
        measures._found.cache_clear()
        added.append(module)

    yield add
    monkeypatch.undo()
    measures._found.cache_clear()
    for module in added:
        sys.modules.pop(f"{measures.__name__}.{module}", None)
        vars(measures).pop(module, None)


def recipe(measure, **keys):
    lines = {"summary": "A test.", "aggregate": "sum", "measure": measure} | keys
    text = "\n".join(f'{key} = "{value}"' for key, value in lines.items())
    return recipes.parse(f'{text}\nfolds = ["encode", "decode"]\ngroups = "divisors"', "test")


# --- what there is ------------------------------------------------------------------------------------


def test_the_names_are_those_of_the_files_sorted():
    files = Path(measures.__file__).parent.glob("[!_]*.py")
    assert names() == NAMES == tuple(sorted(file.stem.replace("_", "-") for file in files))


@pytest.mark.parametrize("name", NAMES)
def test_errors_of_activations_need_calibration_inputs(name):
    assert named(name).calibrated is (name in ("activation", "output"))
    assert recipe(name).calibrated is named(name).calibrated


@pytest.mark.parametrize("name", ["magic", "", "Spectral", "spectral_bound", "__init__"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError, match=f"^There is no measure {name!r}: choose one of {', '.join(NAMES)}"):
        named(name)
    with pytest.raises(
        RecipeError,
        match=f"measure is {re.escape(repr(name))}, but it must be one of {', '.join(NAMES)}; correct it",
    ):
        recipe(name)
    with pytest.raises(InputError, match=f"^There is no measure {name!r}: choose"):
        compress(cnn(), 0.5, recipe=replace(recipe("spectral"), measure=name))


def test_a_plan_with_an_unknown_name_is_refused():
    plan = replace(compress(cnn(), 0.5).plan, measure="magic")
    with pytest.raises(InputError, match=r"^There is no measure 'magic': choose one of activation, "):
        compress(cnn(), plan=plan)


# --- documentation ------------------------------------------------------------------------------------


def documented():
    """The table of measures in passes/README.md: names and formulas."""
    table = re.search(r"^\| measure \| error of rank j \|\n\| --- \| --- \|\n((?:\|.*\n)+)", README, re.M)
    return dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", table[1], re.M))


def test_passes_readme_has_the_formula_of_every_measure():
    assert documented() == {name: named(name).summary for name in names()}


def test_passes_readme_names_every_measure_that_the_key_takes():
    (row,) = re.findall(r"^\| `measure` \| (.+?) \|", README, re.M)
    assert sorted(re.findall(r"`(.+?)`", row)) == list(names())


def test_a_measure_without_documentation_is_noticed(add):
    add("ranks_cut", RANKS_CUT)
    assert documented() != {name: named(name).summary for name in names()}


@pytest.mark.parametrize("name", NAMES)
def test_summary_and_legend_fit_where_they_are_shown(name):
    for text in (named(name).summary, named(name).legend):
        assert text == " ".join(text.split())
        assert "|" not in text, "it would end the cell of a table"
        assert not text.endswith("."), "the report sets the full stop"


# --- one more file is one more measure ----------------------------------------------------------------


def test_an_added_file_is_a_measure_that_recipes_and_plans_use(add, tmp_path):
    add("ranks_cut", RANKS_CUT)
    assert names() == tuple(sorted((*NAMES, "ranks-cut")))
    with compress(cnn(), 0.5, recipe=recipe("ranks-cut")) as result:
        assert result.plan.measure == "ranks-cut"
        full = {row.id: row.full_rank for row in result.report.layers}
        chosen = [choice for choice in result.plan.choices if choice.option is not None]
        assert chosen
        for choice in chosen:
            assert choice.error == pytest.approx(1 - choice.option.j / full[choice.layer], rel=1e-8)
        console = Console(width=200, record=True, file=StringIO())
        result.report.table(console)
        assert "error: ranks-cut, the share of ranks cut." in console.export_text()
        path = tmp_path / "plan.json"
        path.write_text(plans.to_json(result.plan), encoding="utf-8")
        assert plans.read(path) == result.plan


def test_an_added_measure_may_need_weights_and_moments(add):
    add("worse_of_both", WORSE_OF_BOTH)
    assert named("worse-of-both").calibrated
    with pytest.raises(InputError, match="The recipe 'test' needs calibration inputs"):
        compress(cnn(), 0.5, recipe=recipe("worse-of-both"))
    found = seen(cnn())
    grid = Grid(registry.named("params").on(found))
    with measured(found, X) as calibration:
        scores = Scores(found.model, found.walk, found.bindings, grid, THREADS, Silent(), calibration)
        # Uniform recipes see all options, in one order for all measures.
        one, other, worse = (
            scores.candidates(replace(recipe(measure), aggregate=Aggregate.UNIFORM))
            for measure in ("frobenius", "activation", "worse-of-both")
        )
    smaller = [False, False]
    # Slice counts that pay nowhere have no activation errors.
    for tables in zip(one, other, worse, strict=True):
        weights, moments, both = ({t.option(n): t.error[n] for n in range(t.error.size)} for t in tables)
        assert both.keys() == weights.keys() & moments.keys()
        assert all(error == max(weights[option], moments[option]) for option, error in both.items())
        found_smaller = [
            any(known[option] < error for option, error in both.items()) for known in (weights, moments)
        ]
        smaller = [a or b for a, b in zip(smaller, found_smaller, strict=True)]
    assert smaller == [True, True]


def test_a_measure_finds_what_it_needs_and_no_more_is_computed(add, monkeypatch):
    add("ranks_cut", RANKS_CUT)
    seen_evidence = []
    measure = named("ranks-cut")
    spied = replace(
        measure,
        errors=lambda evidence, *, relative: (
            seen_evidence.append(evidence),
            measure.errors(evidence, relative=relative),
        )[1],
    )
    monkeypatch.setitem(measures._found(), "ranks-cut", spied)
    compress(cnn(), 0.5, recipe=recipe("ranks-cut"))
    assert measure.needs == Needs.WEIGHTS
    assert len(seen_evidence) == 3
    for evidence in seen_evidence:
        assert evidence.spectra
        assert replace(evidence, spectra={}) == Evidence()
