"""The search for a recipe and a ratio, over models that are only pretended."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.outcome import OutputError, Trial
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import BudgetError, InputError, ValidationError
from onnx_lowrank.progress import Silent
from onnx_lowrank.stages import search as module
from onnx_lowrank.stages.build import Built
from onnx_lowrank.stages.search import AUTO, Search, Target, check_target
from rewriting import model

NAMES = ("a", "b", "c")


def recipe(name):
    return Recipe(name, "For the tests.", (Fold.ENCODE,), (1,), aggregate=Aggregate.SUM)


RECIPES = tuple(map(recipe, NAMES))


def outputs(error, agreement=None):
    return (OutputError("y", error, error, agreement),)


class World:
    """Says what the model of a recipe and a ratio gives, and remembers which models are open."""

    def __init__(self, monkeypatch, outcome):
        self.outcome = outcome
        self.open, self.built = set(), []
        monkeypatch.setattr(module.settling, "make", self.make)
        monkeypatch.setattr(module, "build", self.build)
        monkeypatch.setattr(module, "judge", self.judge)
        monkeypatch.setattr(module, "_content", lambda plan: plan)
        self.search = Search(
            SimpleNamespace(model=SimpleNamespace(proto=onnx.ModelProto())), None, None, None, Silent()
        )

    def make(self, found, goal, scores, progress):
        result = self.outcome(goal.recipe.name, goal.ratio)
        if isinstance(result, BudgetError):
            raise result
        return goal.recipe.name, goal.ratio

    def build(self, found, plan, calibration, backend, progress):
        stack = ExitStack()
        self.built.append(plan)
        self.open.add(plan)
        stack.callback(self.open.discard, plan)
        return Built(plan, None, (), {}, {}, stack)

    def judge(self, model, built, calibration):
        result = self.outcome(*built.plan)
        if isinstance(result, Exception):
            raise result
        return result

    @property
    def chosen(self):
        (trial,) = (trial for trial in self.search.trials if trial.chosen)
        return trial.recipe, trial.ratio


def unreachable(smallest):
    return BudgetError(f"The smallest ratio is {smallest}.", smallest)


# --- one ratio, several recipes -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(100))
def test_the_best_has_the_least_held_out_error_of_all_trials(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    errors = dict(zip(NAMES, rng.integers(1, 5, 3) / 10, strict=True))
    failing = {name for name in NAMES if rng.random() < 0.25}
    failures = (unreachable(0.6), ValidationError("It gives NaN."))

    def outcome(name, ratio):
        return failures[seed % 2] if name in failing else outputs(errors[name])

    world = World(monkeypatch, outcome)
    if len(failing) == 3:
        with pytest.raises(type(failures[seed % 2])):
            world.search.best(RECIPES, 0.5)
        assert not world.open
        return
    built = world.search.best(RECIPES, 0.5)
    least = min(errors[name] for name in NAMES if name not in failing)
    winner = next(name for name in NAMES if name not in failing and errors[name] == least)
    assert built.plan == world.chosen == (winner, 0.5)
    assert world.open == {built.plan}
    assert [trial.recipe for trial in world.search.trials] == list(NAMES)
    for trial in world.search.trials:
        failed = trial.recipe in failing
        assert (trial.outputs == ()) == failed
        assert trial.note == (str(failures[seed % 2]) if failed else "")


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], ("b", "a", "c")])
def test_agreement_decides_between_equal_errors_and_then_the_order(monkeypatch, order):
    table = {"a": outputs(0.1, 0.9), "b": outputs(0.1, 0.95), "c": outputs(0.1, 0.95)}
    world = World(monkeypatch, lambda name, ratio: table[name])
    assert world.search.best([recipe(name) for name in order], 0.5).plan[0] == next(
        n for n in order if n != "a"
    )


def test_a_measured_error_is_better_than_none(monkeypatch):
    table = {"a": outputs(None, 1.0), "b": outputs(5.0)}
    world = World(monkeypatch, lambda name, ratio: table[name])
    assert world.search.best(RECIPES[:2], 0.5).plan[0] == "b"


def test_where_no_recipe_reaches_the_ratio_the_smallest_reach_is_told(monkeypatch):
    reach = {"a": 0.7, "b": 0.4, "c": None}
    world = World(monkeypatch, lambda name, ratio: unreachable(reach[name]))
    with pytest.raises(BudgetError) as caught:
        world.search.best(RECIPES, 0.1)
    assert caught.value.smallest_ratio == 0.4
    assert not any(trial.chosen for trial in world.search.trials)


def test_a_model_that_cannot_be_judged_is_closed(monkeypatch):
    world = World(monkeypatch, lambda name, ratio: InputError("The model fails."))
    with pytest.raises(InputError, match="The model fails"):
        world.search.best(RECIPES[:1], 0.5)
    assert not world.open


def test_an_error_of_a_later_recipe_closes_the_best_so_far(monkeypatch):
    table = {"a": outputs(0.1), "b": InputError("The disk is full.")}
    world = World(monkeypatch, lambda name, ratio: table[name])
    with pytest.raises(InputError):
        world.search.best(RECIPES[:2], 0.5)
    assert not world.open


# --- the smallest ratio that holds a target ------------------------------------------------------------


@pytest.mark.parametrize("reach", [0.0, 0.3, 0.62])
@pytest.mark.parametrize("edge", np.linspace(0.005, 0.995, 34))
def test_the_ratio_found_holds_the_target_and_the_next_smaller_one_tried_does_not(monkeypatch, edge, reach):
    """The error falls from 1 to 0 with the ratio, and the target allows what it is at the edge."""

    def outcome(name, ratio):
        return unreachable(reach) if ratio < reach else outputs(1 - ratio)

    world = World(monkeypatch, outcome)
    built = world.search.smallest(RECIPES[:1], Target(error=1 - edge))
    least = max(edge, reach)
    assert least <= built.plan[1] <= least / (1 - 1 / 128) or (built.plan[1] == 1 and least > 1 - 1 / 128)
    assert world.chosen == built.plan
    assert world.open == {built.plan}
    smaller = [trial for trial in world.search.trials if trial.ratio < built.plan[1]]
    assert not any(Target(error=1 - edge).holds(trial) for trial in smaller)
    tried = max((trial.ratio for trial in smaller), default=0.0)
    assert built.plan[1] * (1 - 1 / 128) <= max(tried, reach if tried < reach else 0.0)


@pytest.mark.parametrize("seed", range(40))
def test_any_curve_gives_a_model_that_holds_and_only_that_stays_open(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    table = {}

    def outcome(name, ratio):
        if ratio == 1:
            return outputs(0.0, 1.0)
        return table.setdefault(
            (name, ratio),
            unreachable(0.2) if rng.random() < 0.2 else outputs(rng.random(), rng.random()),
        )

    target = Target(error=0.6, agreement=0.3)
    world = World(monkeypatch, outcome)
    built = world.search.smallest(RECIPES, target)
    assert world.open == {built.plan}
    chosen = next(trial for trial in world.search.trials if trial.chosen)
    assert target.holds(chosen)
    assert not [t for t in world.search.trials if target.holds(t) and t.ratio < chosen.ratio]


def test_the_best_recipe_half_way_goes_on_alone_until_all_are_tried_again(monkeypatch):
    """Half-way it is b; a is best where the target is met."""

    def error(name, ratio):
        if ratio < 0.5:
            return {"a": 1.0, "b": 1.1, "c": 1.2}[name] * (1 - ratio) ** 2
        return {"a": 0.3, "b": 0.2, "c": 0.4}[name] * (1 - ratio)

    world = World(monkeypatch, lambda name, ratio: outputs(error(name, ratio)))
    target = Target(error=0.6)
    chosen = world.search.smallest(RECIPES, target).plan
    assert chosen[0] == "a"
    tried = {}
    for trial in world.search.trials:
        tried.setdefault(trial.ratio, []).append(trial.recipe)
    all_tried = [ratio for ratio, names in tried.items() if names == list(NAMES)]
    assert len(all_tried) == 2
    assert all_tried[0] == 0.5
    assert [len(names) for names in tried.values()].count(1) == len(tried) - 2
    assert target.holds(Trial("a", chosen[1], outputs=outputs(error(*chosen))))


@pytest.mark.parametrize(
    ("target", "best"), [(Target(error=0.5), "a"), (Target(agreement=0.5), "b"), (Target(0.5, 0.5), "a")]
)
def test_what_the_target_asks_for_decides_between_recipes_that_hold_it(monkeypatch, target, best):
    given = {"a": outputs(0.1, 0.8), "b": outputs(0.2, 0.9)}
    world = World(monkeypatch, lambda name, ratio: given[name])
    assert world.search.smallest(RECIPES[:2], target).plan[0] == best


def test_a_recipe_that_holds_the_target_goes_before_one_of_less_error(monkeypatch):
    given = {"a": outputs(0.1, 0.8), "b": outputs(0.2, 0.9)}
    world = World(monkeypatch, lambda name, ratio: given[name])
    assert world.search.smallest(RECIPES[:2], Target(0.3, 0.85)).plan[0] == "b"


def test_while_no_recipe_reaches_the_ratio_all_stay(monkeypatch):
    world = World(monkeypatch, lambda name, ratio: unreachable(0.7) if ratio < 0.7 else outputs(0.0))
    assert world.search.smallest(RECIPES, Target(error=0.1)).plan == ("a", pytest.approx(0.7, rel=1 / 127))
    assert [trial.recipe for trial in world.search.trials[:6]] == [*NAMES, *NAMES]


def test_a_target_that_only_the_whole_model_holds(monkeypatch):
    world = World(monkeypatch, lambda name, ratio: outputs(0.0 if ratio == 1 else 0.5))
    assert world.search.smallest(RECIPES, Target(error=0.0)).plan == ("a", 1.0)
    assert world.open == {("a", 1.0)}


def test_a_model_that_does_not_even_hold_a_target_uncompressed_is_an_error(monkeypatch):
    world = World(monkeypatch, lambda name, ratio: outputs(0.1))
    with pytest.raises(ValidationError, match="Not even the model of ratio 1 meets the target"):
        world.search.smallest(RECIPES, Target(error=0.05))
    assert not world.open


def test_every_ratio_is_tried_once_for_a_recipe(monkeypatch):
    world = World(monkeypatch, lambda name, ratio: outputs(1 - ratio))
    world.search.smallest(RECIPES[:1], Target(error=0.4))
    assert len(world.built) == len(set(world.built)) == 8


def test_an_error_half_way_closes_what_was_held(monkeypatch):
    world = World(
        monkeypatch, lambda name, ratio: outputs(0.0) if ratio == 0.5 else InputError("It is gone.")
    )
    with pytest.raises(InputError):
        world.search.smallest(RECIPES[:1], Target(error=0.4))
    assert not world.open


# --- what a target asks for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "error", "agreement", "holds"),
    [
        (Target(error=0.1), 0.1, None, True),
        (Target(error=0.1), 0.1000001, 1.0, False),
        (Target(error=0.0), 0.0, None, True),
        (Target(error=0.1), None, 1.0, False),
        (Target(agreement=0.9), 5.0, 0.9, True),
        (Target(agreement=0.9), 0.0, 0.8999, False),
        (Target(agreement=0.9), 0.0, None, False),
        (Target(0.1, 0.9), 0.1, 0.9, True),
        (Target(0.1, 0.9), 0.2, 0.9, False),
        (Target(0.1, 0.9), 0.1, 0.8, False),
    ],
)
def test_what_holds_a_target(target, error, agreement, holds):
    assert target.holds(Trial("a", 0.5, outputs=outputs(error, agreement))) is holds


@pytest.mark.parametrize("target", [Target(error=10.0), Target(agreement=0.1), Target()])
def test_what_gives_nothing_holds_nothing(target):
    assert not target.holds(Trial("a", 0.5, note="It fails."))


def test_the_worst_output_counts():
    both = (
        OutputError("y", 0.1, 1.0, 0.9),
        OutputError("z", 0.3, 1.0, 0.99),
        OutputError("s", None, None, 0.95),
    )
    assert Target(0.3, 0.9).holds(Trial("a", 0.5, outputs=both))
    assert not Target(error=0.2).holds(Trial("a", 0.5, outputs=both))
    assert not Target(agreement=0.91).holds(Trial("a", 0.5, outputs=both))


def test_where_there_are_no_classes_neighbours_count():
    embedding = OutputError("y", 0.1, 1.0, None, cosine=0.99, neighbours=0.85)
    trial = Trial("a", 0.5, outputs=(embedding,))
    assert trial.agreement == 0.85
    assert Target(agreement=0.85).holds(trial)
    assert not Target(agreement=0.86).holds(trial)
    classes = OutputError("z", 0.1, 1.0, 0.8)
    assert Trial("a", 0.5, outputs=(embedding, classes)).agreement == 0.8
    assert Trial("a", 0.5, outputs=(OutputError("y", 0.1, 1.0, None, cosine=0.99),)).agreement is None


def test_auto_tries_recipes_that_ship():
    from onnx_lowrank.documents import recipes

    assert len(set(AUTO)) == len(AUTO) > 1
    assert any(recipes.load(name).recover for name in AUTO)
    assert any(not recipes.load(name).calibrated for name in AUTO)


# --- what can be judged at all ------------------------------------------------------------------------

FLOATS = "g (float[N,4] x) => (float[N,4] y) { y = Abs (x) }"
ROW = "g (float[N,4] x) => (float[N,1] y) { k = Constant <value_ints = [1]> () y = ReduceSum (x, k) }"
LABEL = "g (float[N,4] x) => (int64[N,1] y) { y = ArgMax <axis = 1> (x) }"


@pytest.mark.parametrize(
    ("body", "target", "missing"),
    [
        (FLOATS, Target(0.1, 0.9), ""),
        (ROW, Target(error=0.1), ""),
        (
            ROW,
            Target(agreement=0.9),
            "an agreement, which takes classes, integers or an embedding of three samples or more: leave",
        ),
        (ROW, Target(0.1, 0.9), "an agreement"),
        (LABEL, Target(agreement=0.9), ""),
        (LABEL, Target(error=0.1), "an error, which takes floats: leave --target-error out"),
        (LABEL, Target(0.1, 0.9), "an error"),
    ],
)
def test_a_target_that_no_output_can_be_judged_by_is_refused(body, target, missing):
    feed = {"x": np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)}
    named = {"y": ReferenceEvaluator(model(body)).run(None, feed)[0]}
    if not missing:
        check_target(target, "m.onnx", named, feed, 12)
        return
    with pytest.raises(InputError, match=f"cannot be judged, as no output of m.onnx has {missing}"):
        check_target(target, "m.onnx", named, feed, 12)


UNIT = "g (float[N,4] x) => (float[N,4] y) { y = LpNormalization <axis = 1, p = 2> (x) }"


@pytest.mark.parametrize(("samples", "is_judged"), [(1, False), (2, False), (3, True)])
def test_an_embedding_is_judged_by_neighbours_where_samples_have_any(samples, is_judged):
    feed = {"x": np.random.default_rng(0).standard_normal((1, 4)).astype(np.float32)}
    named = {"y": ReferenceEvaluator(model(UNIT)).run(None, feed)[0]}
    if is_judged:
        check_target(Target(agreement=0.9), "m.onnx", named, feed, samples)
        return
    with pytest.raises(InputError, match=r"has an agreement, which takes .* three samples or more: leave"):
        check_target(Target(agreement=0.9), "m.onnx", named, feed, samples)


def test_another_recipe_may_reach_what_the_best_at_one_half_does_not(monkeypatch):
    def outcome(name, ratio):
        reach = {"a": 0.3, "b": 0.05}[name]
        return unreachable(reach) if ratio < reach else outputs({"a": 0.1, "b": 0.2}[name])

    world = World(monkeypatch, outcome)
    name, ratio = world.search.smallest(RECIPES[:2], Target(error=0.5)).plan
    assert (name, ratio) == ("b", pytest.approx(0.05, rel=1 / 100))


# --- recipes that choose the same -----------------------------------------------------------------


def test_recipes_with_the_same_plan_make_one_model(monkeypatch):
    world = World(monkeypatch, lambda name, ratio: outputs(0.1))
    monkeypatch.setattr(module, "_content", lambda plan: plan[1])
    world.search.best(RECIPES, 0.5)
    assert world.built == [(NAMES[0], 0.5)]
    assert [trial.recipe for trial in world.search.trials] == list(NAMES)
    assert len({trial.outputs for trial in world.search.trials}) == 1
    assert world.chosen == (NAMES[0], 0.5)


def test_a_model_of_an_earlier_ratio_is_made_again(monkeypatch):
    """The model of the earlier ratio may be deleted."""
    world = World(monkeypatch, lambda name, ratio: outputs(0.1 if ratio >= 0.3 else 0.9))
    monkeypatch.setattr(module, "_content", lambda plan: "the same")
    world.search.smallest(RECIPES[:1], Target(error=0.5))
    assert len(world.built) == len(world.search.trials)
