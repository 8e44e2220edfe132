"""Sweeps: the same bytes as single runs, resumed where they stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_lowrank import InputError, api, compress
from onnx_lowrank.documents import sweeps
from onnx_lowrank.sweeps import run
from onnx_lowrank.sweeps.run import FILE, spread, sweep
from tiny import cnn, files

RATIOS = (0.8, 0.6)
PASSES = Path(__file__).parents[2] / "passes"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "cnn.onnx"
    onnx.save(cnn(), path)
    return path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The ratios of all models that are made."""
    ratios: list[float | None] = []

    def counted(model: Any, ratio: float | None = None, **options: Any) -> api.Result:
        ratios.append(ratio)
        return compress(model, ratio, **options)

    monkeypatch.setattr(run, "compress", counted)
    return ratios


def contents(folder: Path) -> dict[str, bytes | None]:
    """The files of the points, without the cache."""
    return {name: data for name, data in files(folder).items() if not name.startswith(".")}


def test_every_point_has_the_files_of_a_single_run(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "points"
    found = sweep(source, folder, reversed(RATIOS))
    assert [(point.name, point.asked) for point in found.points] == [("params-0.8", 0.8), ("params-0.6", 0.6)]
    for point in found.points:
        with compress(source, point.asked) as single:
            single.save(tmp_path / "single.onnx")
            assert (folder / point.report).read_text() == single.report.to_json()
            assert point.reached == single.report.reached <= point.asked
            assert point.error == single.report.validation.outputs[0].centred
            assert point.params == single.report.totals.amount("params").ratio
        assert (folder / point.model).read_bytes() == (tmp_path / "single.onnx").read_bytes()


def test_the_plan_of_a_point_makes_its_model_again(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "points"
    (point,) = sweep(source, folder, [0.6]).points
    with compress(source, plan=folder / point.plan) as replayed:
        replayed.save(tmp_path / "again.onnx")
    assert (folder / point.model).read_bytes() == (tmp_path / "again.onnx").read_bytes()
    assert point.command == f"onnx-lowrank {source} params-0.6.onnx --plan {folder / point.plan}"


def test_a_second_sweep_makes_what_is_missing_alone(
    source: Path, tmp_path: Path, made: list[float | None]
) -> None:
    folder = tmp_path / "points"
    first = sweep(source, folder, RATIOS)
    whole = contents(folder)
    assert sweep(source, folder, RATIOS) == first
    assert made == [0.8, 0.6]
    (folder / first.points[1].model).unlink()
    sweep(source, folder, [*RATIOS, 0.7])
    assert made == [0.8, 0.6, 0.7, 0.6]
    assert {name: data for name, data in contents(folder).items() if name in whole and name != FILE} == {
        name: data for name, data in whole.items() if name != FILE
    }


def test_points_that_are_done_stay_when_a_later_one_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "points"

    def failing(model: Any, ratio: float, **options: Any) -> api.Result:
        if ratio < 0.7:
            raise InputError("The disk is full: make room.")
        return compress(model, ratio, **options)

    with monkeypatch.context() as patched:
        patched.setattr(run, "compress", failing)
        with pytest.raises(InputError, match="disk is full"):
            sweep(source, folder, RATIOS)
    assert [point.name for point in sweeps.read(folder / FILE).points] == ["params-0.8"]
    assert [point.name for point in sweep(source, folder, RATIOS).points] == ["params-0.8", "params-0.6"]


def test_a_ratio_that_cannot_be_reached_is_a_point_with_its_reason(source: Path, tmp_path: Path) -> None:
    found = sweep(source, tmp_path / "points", [0.6, 0.001])
    assert [point.is_made for point in found.points] == [True, False]
    assert "0.001" in found.points[1].note
    assert found.front() == {"params-0.6"}


def test_budgets_and_recipes_multiply(source: Path, tmp_path: Path) -> None:
    found = sweep(source, tmp_path / "points", [0.8], budgets=["params", "bytes"], recipes=["svd", "alds"])
    names = [f"{budget}-{recipe}-0.8" for budget in ("bytes", "params") for recipe in ("alds", "svd")]
    assert [point.name for point in found.points] == names
    assert [point.recipe for point in found.points] == ["alds", "svd"] * 2


def test_the_cache_of_the_folder_is_for_all_points(source: Path, tmp_path: Path) -> None:
    sweep(source, tmp_path / "points", [0.8])
    kept = set((tmp_path / "points" / ".cache").rglob("*"))
    assert kept
    sweep(source, tmp_path / "elsewhere", [0.8], cache=tmp_path / "mine")
    assert not (tmp_path / "elsewhere" / ".cache").exists()
    assert any((tmp_path / "mine").rglob("*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda source: onnx.save(cnn(fc=np.ones((4, 16), np.float32)), source), "another input model"),
        (lambda source: None, "other options or data"),
    ],
)
def test_a_folder_holds_one_sweep(source: Path, tmp_path: Path, change: Any, words: str) -> None:
    folder = tmp_path / "points"
    sweep(source, folder, [0.8])
    before = contents(folder)
    change(source)
    with pytest.raises(InputError, match=words):
        sweep(source, folder, [0.8], exclude="fc" if "options" in words else ())
    assert contents(folder) == before


def test_other_data_of_the_same_name_is_noticed(source: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.npz"
    rng = np.random.default_rng(0)
    np.savez(data, x=rng.standard_normal((4, 8, 6, 6)).astype(np.float32))
    sweep(source, tmp_path / "points", [0.8], inputs=data)
    np.savez(data, x=rng.standard_normal((5, 8, 6, 6)).astype(np.float32))
    with pytest.raises(InputError, match="other options or data"):
        sweep(source, tmp_path / "points", [0.8], inputs=data)


def test_arrays_are_told_apart_by_their_numbers(source: Path, tmp_path: Path) -> None:
    arrays = [np.full((4, 8, 6, 6), number, np.float32) for number in (1, 2)]
    for x in (arrays[0], arrays[0].copy()):
        sweep(source, tmp_path / "points", [0.8], inputs={"x": x})
    with pytest.raises(InputError, match="other options or data"):
        sweep(source, tmp_path / "points", [0.8], inputs={"x": arrays[1]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratios": []}, "The ratios are"),
        ({"ratios": [0.5, 1.5]}, "The ratios are"),
        ({"ratios": [0.0]}, "The ratios are"),
        ({"ratios": np.linspace(0.1, 0.9, 2000)}, "more than 1000 points"),
        ({"dry_run": True}, "dry_run chooses a single model"),
        ({"plan": "plan.json"}, "plan chooses a single model"),
        ({"calibration": iter(())}, "calibration can be read only once"),
        ({"evaluate": "nothing"}, "write it like mymodule:accuracy"),
    ],
)
def test_wrong_use_is_refused_before_the_folder_is_made(
    source: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        sweep(source, tmp_path / "points", options.pop("ratios", [0.5]), **options)
    assert not (tmp_path / "points").exists()


def test_a_folder_that_is_a_file(source: Path) -> None:
    with pytest.raises(InputError, match="is a file: name a folder"):
        sweep(source, source, [0.5])


def test_two_sweeps_do_not_share_a_folder(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "points"

    def again(model: str) -> float:
        with pytest.raises(InputError, match="Another sweep runs in"):
            sweep(source, folder, [0.8])
        return 1.0

    assert sweep(source, folder, [0.8], evaluate=again).score == 1.0


def test_scores_of_the_original_and_of_every_model(source: Path, tmp_path: Path) -> None:
    folder, seen = tmp_path / "points", []

    def size(model: str) -> float:
        seen.append(Path(model).name)
        return Path(model).stat().st_size

    found = sweep(source, folder, RATIOS, evaluate=size)
    assert found.score == source.stat().st_size
    assert [point.score for point in found.points] == [
        (folder / p.model).stat().st_size for p in found.points
    ]
    assert seen == ["cnn.onnx", "params-0.8.onnx", "params-0.6.onnx"]


def test_a_named_evaluator_scores_once_and_another_function_of_the_same_name_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = tmp_path / "points", []
    monkeypatch.setitem(
        sys.modules, "scores_of_sweeps", SimpleNamespace(size=lambda model: calls.append(model) or 1)
    )
    for _ in range(2):
        sweep(source, folder, [0.8], evaluate="scores_of_sweeps:size")
    assert len(calls) == 2
    for score in (1.0, 2.0):
        found = sweep(source, folder, [0.8], evaluate=lambda model, score=score: score)
        assert (found.score, found.points[0].score) == (score, score)


def test_a_sweep_can_be_scored_later_and_anew(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "points"
    assert [point.score for point in sweep(source, folder, RATIOS).points] == [None, None]

    def one(model: str) -> int:
        return 1

    def two(model: str) -> np.float32:
        return np.float32(2)

    for function, score in ((one, 1.0), (two, 2.0)):
        found = sweep(source, folder, RATIOS, evaluate=function)
        assert [found.score, *(point.score for point in found.points)] == [score] * 3


def test_another_evaluator_scores_the_points_of_earlier_sweeps_too(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "points"
    sweep(source, folder, RATIOS, evaluate=lambda model: 1.0)
    found = sweep(source, folder, RATIOS[:1], evaluate=lambda model: 2.0)
    assert [(point.name, point.score) for point in found.points] == [("params-0.8", 2.0), ("params-0.6", 2.0)]
    (folder / "params-0.6.onnx").unlink()
    found = sweep(source, folder, RATIOS[:1], evaluate=lambda model: 3.0)
    assert [point.score for point in found.points] == [3.0, None]


def test_a_sweep_without_room_keeps_the_points_that_are_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, written = tmp_path / "points", []
    write = run.write

    def full(result: Any, out: Path, *others: Path) -> None:
        written.append(out)
        if len(written) == 2:
            raise InputError(f"{out} cannot be written (No space left on device): make room.")
        write(result, out, *others)

    monkeypatch.setattr(run, "write", full)
    with pytest.raises(InputError, match=r"params-0\.6\.onnx cannot be written \(No space left"):
        sweep(source, folder, RATIOS)
    assert [point.name for point in sweeps.read(folder / FILE).points] == ["params-0.8"]
    assert not [path for path in folder.iterdir() if "0.6" in path.name]
    found = sweep(source, folder, RATIOS)
    assert [point.is_made for point in found.points] == [True, True]
    assert len(written) == 3


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (float("nan"), "returned 'nan'"),
        (None, "returned 'None'"),
        ("high", "returned 'high'"),
        (ValueError("no labels"), r"failed .* \(ValueError, no labels\)"),
    ],
)
def test_an_evaluator_that_fails_keeps_the_points(
    source: Path, tmp_path: Path, score: Any, words: str
) -> None:
    folder = tmp_path / "points"

    def evaluate(model: str) -> Any:
        if Path(model).name != "params-0.6.onnx":
            return 0.5
        if isinstance(score, Exception):
            raise score
        return score

    with pytest.raises(InputError, match=words):
        sweep(source, folder, RATIOS, evaluate=evaluate)
    kept = sweeps.read(folder / FILE).points
    assert [(point.name, point.score) for point in kept] == [("params-0.8", 0.5), ("params-0.6", None)]


def test_an_evaluator_that_fails_on_the_original_ends_it_at_once(
    source: Path, tmp_path: Path, made: list[float | None]
) -> None:
    with pytest.raises(InputError, match="failed on"):
        sweep(source, tmp_path / "points", RATIOS, evaluate=lambda model: 1 / 0)
    assert not made


@pytest.mark.parametrize(
    ("ends", "number", "ratios"),
    [((0.9, 0.3), 4, (0.9, 0.7, 0.5, 0.3)), ((0.2, 0.8), 2, (0.2, 0.8))],
)
def test_a_range_is_divided_evenly(ends: tuple[float, float], number: int, ratios: tuple[float, ...]) -> None:
    assert spread(*ends, number) == ratios


@pytest.mark.parametrize("number", [-1, 0, 1, 1001])
def test_a_range_has_at_least_two_points(number: int) -> None:
    with pytest.raises(InputError, match=f"{number} points were asked for"):
        spread(0.9, 0.2, number)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../../etc/passwd"),
        ("name", ".hidden"),
        ("name", "a/b"),
        ("asked", "much"),
        ("command", 7),
    ],
)
def test_a_file_of_points_is_no_way_out_of_its_folder(
    source: Path, tmp_path: Path, key: str, value: Any
) -> None:
    folder = tmp_path / "points"
    sweep(source, folder, [0.8])
    table = json.loads((folder / FILE).read_text())
    table["points"][0][key] = value
    (folder / FILE).write_text(json.dumps(table))
    with pytest.raises(InputError, match="is wrong"):
        sweep(source, folder, [0.8])


# --- the places of files ------------------------------------------------------------------------------


def test_no_point_replaces_the_input_model(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "points"
    folder.mkdir()
    model = shutil.copy(source, folder / "params-0.8.onnx")
    before = Path(model).read_bytes()
    with pytest.raises(InputError, match=r"The point params-0\.8 would replace the model"):
        sweep(model, folder, [0.8])
    assert Path(model).read_bytes() == before


def test_points_of_one_name_are_refused(source: Path, tmp_path: Path) -> None:
    recipes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        recipes.append(str(tmp_path / name / "mine.toml"))
        shutil.copy(PASSES / "svd.toml", recipes[-1])
    with pytest.raises(InputError, match=r"would be called params-mine-0\.8"):
        sweep(source, tmp_path / "points", [0.8], recipes=recipes)
    with pytest.raises(InputError, match=r"would be called params-0\.5"):
        sweep(source, tmp_path / "points", [0.5, 0.50000001])


def test_another_recipe_makes_further_points(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.toml"
    shutil.copy(PASSES / "svd.toml", recipe)
    folder = tmp_path / "points"
    sweep(source, folder, [0.8])
    found = sweep(source, folder, [0.8], recipes=[str(recipe), "alds"])
    names = {"params-0.8", "params-my_recipe-0.8", "params-alds-0.8"}
    assert {point.name for point in found.points} == names
    assert sweep(source, folder, [0.8], recipes=[str(recipe)]) == found


def test_a_recipe_that_was_edited_makes_its_points_anew(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    found = []
    for name in ("svd", "schatten"):
        recipe.write_bytes((PASSES / f"{name}.toml").read_bytes())
        (point,) = sweep(source, tmp_path / "points", [0.6], recipes=[str(recipe)]).points
        found.append(point.digest)
    assert found[0] != found[1]


def test_a_model_that_was_damaged_is_made_anew(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "points"
    (point,) = sweep(source, folder, [0.8]).points
    whole = (folder / point.model).read_bytes()
    (folder / point.model).write_bytes(whole[:100])
    sweep(source, folder, [0.8])
    assert (folder / point.model).read_bytes() == whole


def test_other_files_in_a_folder_of_data_are_noticed(source: Path, tmp_path: Path) -> None:
    data, rng = tmp_path / "data", np.random.default_rng(0)
    data.mkdir()
    for size in (1, 2):
        np.savez(data / "a.npz", x=rng.standard_normal((size, 8, 6, 6)).astype(np.float32))
        if size == 1:
            sweep(source, tmp_path / "points", [0.8], check=data)
    with pytest.raises(InputError, match="other options or data"):
        sweep(source, tmp_path / "points", [0.8], check=data)


def test_a_sweep_goes_on_from_another_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[float | None]
) -> None:
    folder = tmp_path / "points"
    sweep(source, folder, [0.8])
    monkeypatch.chdir(tmp_path)
    sweep("cnn.onnx", "points", [0.8], calibration=None, input_shape=[])
    assert made == [0.8]


def test_an_evaluator_may_change_the_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def moving(model: str) -> float:
        os.chdir(tmp_path / "elsewhere")
        return float(Path(model).is_file())

    found = sweep("cnn.onnx", "points", RATIOS, evaluate=moving)
    assert [point.score for point in found.points] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipes": ["svd", "nope"]}, "nope"),
        ({"budgets": ["params", "nope"]}, "nope"),
        ({"recipes": "svd"}, "recipes is 'svd': give a list"),
        ({"recipe": "svd"}, r"give a sweep recipes=\[\.\.\.\]"),
        ({"budget": "macs"}, r"give a sweep budgets=\[\.\.\.\]"),
    ],
)
def test_wrong_arguments_cost_no_point(
    source: Path, tmp_path: Path, made: list[float | None], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        sweep(source, tmp_path / "points", [0.8], **options)
    assert not made


def test_a_file_system_without_locks_is_no_other_sweep(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(file: int, way: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("onnx_lowrank.files.atomic.fcntl.flock", none)
    assert sweep(source, tmp_path / "points", [0.8]).points
