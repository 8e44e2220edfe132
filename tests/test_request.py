"""What compress() refuses, before any work is done."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank import InputError, Options, RecipeError, compress, hardware
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import recipes
from onnx_lowrank.options import DEFAULTS, completed
from onnx_lowrank.request import AUTO_RECIPE, DEFAULT_RECIPE, request
from onnx_lowrank.stages.search import AUTO, Target

CALIBRATED = [recipe.name for recipe in recipes.load_all() if recipe.calibrated]
FREE = [recipe.name for recipe in recipes.load_all() if not recipe.calibrated]
X = np.zeros((4, 8), np.float32)


def plan(fit=Fit.WEIGHTS, recover=False):
    return Plan("0" * 64, "r", "spectral", 0.5, "macs", (), factors=fit, recover=recover)


def asked(ratio=0.5, *, calibrated=False, **options):
    return request(ratio, completed({"calibration": X if calibrated else None} | options))


def target(**options):
    return asked(None, calibrated=True, **options).target


# --- names of options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("ratoi", "did you mean 'ratio'?"),
        ("calibration_sample", "did you mean 'calibration_samples'?"),
        ("q", "help(onnx_lowrank.Options) lists all."),
    ],
)
def test_an_option_that_does_not_exist_is_told(name, hint):
    words = f"compress() got an unexpected keyword argument {name!r}: {hint}"
    with pytest.raises(TypeError, match=f"^{re.escape(words)}$"):
        compress("nosuch.onnx", 0.5, **{name: 1})


def test_every_option_has_a_default_and_is_documented_once():
    assert set(DEFAULTS) == Options.__optional_keys__
    entries = re.findall(
        r"^        (\w+): ", inspect.cleandoc(Options.__doc__).replace("    ", " " * 8), re.M
    )
    assert entries == list(Options.__annotations__)


# --- which recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [None, AUTO_RECIPE])
def test_calibration_makes_auto_the_default(recipe):
    made = asked(recipe=recipe, calibrated=True)
    assert tuple(one.name for one in made.recipes) == AUTO
    assert made.is_search
    assert made.fits_activations


def test_without_calibration_the_default_is_one_recipe_of_weights():
    made = asked()
    assert [one.name for one in made.recipes] == [DEFAULT_RECIPE]
    assert (made.is_search, made.fits_activations) == (False, False)
    assert made.budget.name == "params"


@pytest.mark.parametrize("recipe", CALIBRATED)
def test_a_recipe_of_activations_needs_calibration(recipe):
    with pytest.raises(InputError, match=f"The recipe '{recipe}' needs calibration inputs: pass some with"):
        asked(recipe=recipe)
    made = asked(recipe=recipe, calibrated=True)
    assert made.recipes == (recipes.load(recipe),)
    assert (made.is_search, made.fits_activations) == (False, True)


@pytest.mark.parametrize("recipe", FREE)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_recipe_of_weights_does_not(recipe, calibrated):
    made = asked(recipe=recipe, calibrated=calibrated)
    assert made.recipes == (recipes.load(recipe),)
    assert not made.fits_activations


@pytest.mark.parametrize("recipe", [*CALIBRATED, None])
def test_no_recover_is_for_all_recipes(recipe):
    made = asked(recipe=recipe, calibrated=True, recover=False)
    assert made.recipes
    assert not any(one.recover for one in made.recipes)
    wanted = [recipes.load(one.name).factors for one in made.recipes]
    assert [one.factors for one in made.recipes] == wanted


@pytest.mark.parametrize("kind", [str, Path])
def test_a_recipe_of_a_file_is_taken_as_it_is(tmp_path, kind):
    path = tmp_path / "own.toml"
    path.write_text(
        'summary = "s"\nfolds = ["encode"]\ngroups = [1]\naggregate = "max"\nfactors = "activations"\n'
    )
    assert [one.name for one in asked(recipe=kind(path), calibrated=True).recipes] == ["own"]
    with pytest.raises(InputError, match="'own' needs calibration"):
        asked(recipe=kind(path))


def test_an_unknown_recipe_is_told():
    start = "There is no recipe 'nosuch': name a .toml file or one of "
    with pytest.raises(RecipeError, match=start + "auto, activation, alds"):
        asked(recipe="nosuch", calibrated=True)
    with pytest.raises(RecipeError, match=start + "activation, alds"):
        asked(recipe="nosuch")


# --- one of ratio, plan and target --------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"ratio": 0.5, "plan": plan()},
        {"ratio": 0.5, "target_error": 0.1},
        {"plan": plan(), "target_error": 0.1},
        {"ratio": 0.5, "plan": plan(), "target_error": 0.1},
    ],
)
def test_exactly_one_of_ratio_plan_and_target(given):
    with pytest.raises(
        InputError, match=r"^Give exactly one of these: a ratio, such as --ratio 0\.5; a plan"
    ):
        asked(**{"ratio": None, **given}, calibrated=True)


def test_a_target_is_a_search():
    made = asked(ratio=None, recipe="schatten", target_error=0.1, calibrated=True)
    assert made.is_search
    assert (made.ratio, made.target) == (None, Target(0.1))


@pytest.mark.parametrize("fit", list(Fit))
@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_plan_says_itself_what_it_needs(fit, recover, calibrated):
    given = plan(fit, recover and fit is Fit.ACTIVATIONS)
    if fit is not Fit.WEIGHTS and not calibrated:
        with pytest.raises(InputError, match="plan's factors are fitted to calibration inputs: pass them"):
            asked(ratio=None, plan=given)
        return
    made = asked(ratio=None, plan=given, calibrated=calibrated)
    assert made.plan == given
    assert made.budget.name == "macs"
    assert made.fits_activations == (fit is not Fit.WEIGHTS)
    assert not made.is_search
    if calibrated:
        assert not asked(ratio=None, plan=given, calibrated=True, recover=False).plan.recover


@pytest.mark.parametrize(
    "given", [{"recipe": "svd"}, {"recipe": "auto"}, {"budget": "params"}, {"align": 8}, {"align": "auto"}]
)
def test_a_plan_has_its_own_recipe_budget_and_ranks(given):
    with pytest.raises(
        InputError, match="A plan has its own recipe, budget and ranks: leave out --pass, --budget and"
    ):
        asked(ratio=None, plan=plan(), calibrated=True, **given)


# --- values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, -0.5, 1.0001, float("nan"), float("inf")])
def test_a_ratio_is_above_0_and_at_most_1(ratio):
    with pytest.raises(InputError, match=f"^The ratio is {ratio}, but it must be above 0"):
        asked(ratio=ratio)


@pytest.mark.parametrize("error", [-0.1, float("nan"), float("-inf")])
def test_a_target_error_is_not_negative(error):
    with pytest.raises(InputError, match=f"^The target error is {error}, but it must be 0 or more"):
        target(target_error=error)


@pytest.mark.parametrize("agreement", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_target_agreement_is_a_share(agreement):
    with pytest.raises(InputError, match=f"^The target agreement is {agreement}, but it must be above 0"):
        target(target_agreement=agreement)


@pytest.mark.parametrize(("error", "agreement"), [(0, None), (None, 1), (0.5, 0.5), (3, 0.001)])
def test_targets(error, agreement):
    given = {"target_error": error, "target_agreement": agreement}
    assert target(**given) == Target(error, agreement)
    with pytest.raises(InputError, match=r"^A target is judged on held-out calibration inputs: pass some"):
        asked(None, **given)


@pytest.mark.parametrize("calibrated", [False, True])
def test_no_target_is_none(calibrated):
    assert asked(calibrated=calibrated).target is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"calibration_samples": 5},
            "^--calibration-samples limits what --calibration reads: pass --calibration, too",
        ),
        ({"calibration_samples": 0}, "^--calibration-samples is 0: pass 1 or more"),
        ({"calibration_samples": -3, "calibration": X}, "^--calibration-samples is -3: pass 1 or more"),
        ({"recover": False}, "^--no-recover turns off a step that only runs with --calibration"),
        ({"calibration_samples": 1.5}, "^calibration_samples is '1.5' of type float: give a whole number"),
        ({"calibration_samples": True}, "^calibration_samples is 'True' of type bool: give a whole number"),
        ({"calibration_samples": "7"}, "^calibration_samples is '7' of type str: give a whole number"),
        ({"recover": 0}, "^recover is 0: give True or False"),
        ({"recover": None}, "^recover is None: give True or False"),
    ],
)
def test_arguments_that_go_with_calibration(given, words):
    with pytest.raises(InputError, match=words):
        asked(**given)


@pytest.mark.parametrize("samples", [None, 1, np.int64(7)])
def test_any_number_of_samples_will_do(samples):
    assert asked(calibrated=True, calibration_samples=samples).recipes


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("inputs", "a path or arrays by input name"),
        ("recipe", "a name, a path or a Recipe"),
        ("plan", "a path or a Plan"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(name, wanted):
    ratio = {} if name == "plan" else {"ratio": 0.5}
    with pytest.raises(InputError, match=f"^{name} is an empty text: give {wanted}\\.$"):
        compress("nosuch.onnx", **ratio, **{name: ""})


@pytest.mark.parametrize(
    "given",
    [
        {"recipe": "auto"},
        {"recipe": "output"},
        {"recover": False},
        {"calibration_samples": 3},
        {"target_error": "0.1", "calibration": X},
        {"target_agreement": [1], "calibration": X},
        {"target_error": True, "calibration": X},
        {"ratio": "half", "calibration": X},
        {"recipe": 3, "calibration": X},
        {"budget": "time", "calibration": X},
        {"plan": 4, "calibration": X},
        {"ratio": 0.5, "target_error": 0.1, "calibration": X},
        {"target_error": 0.1},
        {"target_agreement": 0.9},
        {"calibration_samples": 2.0, "calibration": X},
        {"calibration_samples": 0, "calibration": X},
        {"calibration_samples": -1, "calibration": X},
        {"inputs": ""},
        {"recipe": ""},
        {"plan": ""},
        {"recover": "no", "calibration": X},
        {"time": 1},
        {"time": True, "dry_run": True},
        {"ratio": 0.5, "device": "tpu", "calibration": X},
        {"ratio": 0.5, "provider": "NoSuchProvider", "calibration": X},
    ],
    ids=lambda given: "-".join(given),
)
def test_what_is_wrong_is_told_before_the_model_is_read(given):
    needs_ratio = "ratio" not in given and "plan" not in given and "target" not in "".join(given)
    with pytest.raises(InputError) as caught:
        compress("nosuch.onnx", **{"ratio": 0.5} if needs_ratio else {}, **given)
    assert "nosuch" not in str(caught.value)
    assert str(caught.value).endswith((".", ")"))


# --- alignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("align", "block"), [(None, 1), (1, 1), (8, 8), (np.int64(16), 16), (1024, 1024)])
def test_ranks_are_aligned_as_asked(align, block):
    assert asked(align=align).block == block


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_auto_follows_the_provider(provider):
    assert asked(align="auto", provider=provider).block == hardware.block(provider)


@pytest.mark.parametrize("align", [0, -8, 1025, 2.0, "8", "Auto", "", True, float("nan"), [8]])
def test_what_is_no_alignment_is_told(align):
    with pytest.raises(InputError, match=r"^The alignment is .* must be 'auto' or a whole number from 1"):
        asked(align=align)


@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "CUDAExecutionProvider"])
@pytest.mark.parametrize(("align", "block"), [(None, None), ("auto", None), (1, 1), (4, 4)])
def test_times_are_best_in_the_providers_blocks(provider, align, block):
    made = asked(align=align, provider=provider, budget="latency")
    assert (made.budget.name, made.block) == ("latency", block or hardware.block(provider))


def test_convolutions_keep_their_layout_unless_another_alignment_is_asked_for():
    assert asked().blocked
    assert asked(provider="CPUExecutionProvider").blocked
    assert not asked(provider="CUDAExecutionProvider").blocked
    assert not asked(budget="latency").blocked
    assert not any(asked(align=align).blocked for align in (1, 4, "auto"))
