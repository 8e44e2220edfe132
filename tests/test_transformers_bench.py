"""What `tests/benchmarks/bench_transformers.py` measures with; the models themselves are not needed."""

from pathlib import Path

import numpy as np
import pytest
from bench_transformers import COMPARATORS, RECIPES
from trained import minilm, ppocr, smollm2
from trained.page import page
from trained.subject import Subject, spread
from trained.text import paragraphs, sentences


@pytest.mark.parametrize("texts", [paragraphs, sentences])
def test_a_test_has_no_text_that_calibration_sees(texts):
    assert not set(texts("calibration")) & set(texts("test"))


def test_the_manual_has_enough_sentences():
    assert len(sentences("calibration")) >= minilm.CALIBRATION
    assert len(sentences("test")) >= minilm.TEST


def test_items_at_even_distances():
    assert spread(range(9), 3) == [0, 4, 8]
    assert spread("ab", 3) == ["a", "b"]


@pytest.mark.parametrize(
    ("wanted", "given", "edits"),
    [("kitten", "sitting", 3), ("", "ab", 2), ("ab", "", 2), ("same", "same", 0)],
)
def test_the_edit_distance(wanted, given, edits):
    assert ppocr._edits(wanted, given) == edits


def test_embeddings_are_like_themselves_and_unlike_noise():
    rows = np.random.default_rng(0).standard_normal((2, 50, 8))
    wanted, noise = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    assert minilm._likeness(wanted, wanted) == pytest.approx(
        {"cosine": 1, "nearest kept": 1, "ten nearest kept": 1, "rank correlation": 1}
    )
    assert all(score < 0.5 for score in minilm._likeness(wanted, noise).values())


def test_the_loss_of_equal_scores_is_that_of_guessing():
    tokens = np.array([[1, 0, 2]])
    assert smollm2._losses(np.zeros((1, 3, 4)), tokens) == pytest.approx(np.full((1, 2), np.log(4)))


def subject(folder: Path, needs: tuple[str, ...] = ()) -> Subject:
    return Subject(
        "tiny",
        folder / "tiny.onnx",
        about="A model.",
        calibration=dict,
        scores=lambda _: {},
        shapes={},
        times={"time": {}},
        asked={"params": (0.5,)},
        needs=needs,
        goals={("params", 0.5): {"cosine": 0.9}},
    )


def test_a_model_or_a_package_that_is_absent_is_named(tmp_path):
    assert "tiny.onnx is absent" in subject(tmp_path).lacks()
    (tmp_path / "tiny.onnx").touch()
    assert not subject(tmp_path).lacks()
    assert "no_such_package" in subject(tmp_path, ("no_such_package",)).lacks()


def test_the_page_has_a_row_of_one_layout_for_every_recipe(tmp_path):
    asked = [{"model": "tiny", "recipe": name, "budget": "params", "ratio": 0.5} for name in RECIPES]
    figures = {"scores": {"cosine": 0.95}, "params": 0.5, "macs": 0.5, "seconds": 2.0, "peak_mb": 100.0}
    cells = [cell | figures for cell in asked[:-1]] + [asked[-1] | {"refused": "Too small."}]
    text = page([subject(tmp_path)], cells)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| recipe")]
    assert len(tables) == 2
    for head, _, *rows in tables:
        assert {row.count("|") for row in rows} == {head.count("|")}
        assert sorted(row.split("`")[1] for row in rows) == sorted(RECIPES)
    assert {"auto", "output", "activation", *COMPARATORS} == set(RECIPES)


def test_the_page_has_scores_beside_goals_and_what_was_refused(tmp_path):
    original = {"model": "tiny", "recipe": "original", "budget": "", "ratio": 1.0, "scores": {"cosine": 1.0}}
    measured = original | {"recipe": "auto", "budget": "params", "ratio": 0.5, "chosen": "output"}
    measured |= {"scores": {"cosine": 0.95}, "params": 0.5, "macs": None, "seconds": 2.4, "peak_mb": 100.2}
    refused = {"model": "tiny", "recipe": "svd", "budget": "params", "ratio": 0.1, "refused": "Too small."}
    text = page([subject(tmp_path)], [measured, original, refused | {"seconds": 1.0, "peak_mb": 50.0}])
    assert "| `auto` → `output` | params | 0.5 | 0.95 (0.9) |" in text
    assert "| `auto` → `output` | params | 0.5 | 0.500 | – | – | – | 2 s | 100 |" in text
    assert "- params 0.1, `svd`: Too small." in text
    assert text.index("original") < text.index("`auto`") < text.index("`svd`")
