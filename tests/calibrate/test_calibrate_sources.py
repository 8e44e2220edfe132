"""The registry of sources: every kind is found, a path belongs to one, and options belong to kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank.calibrate import sources
from onnx_lowrank.calibrate.sources.registry import check_sources, is_made, kind_of, options_of
from onnx_lowrank.calibrate.sources.source import Options
from onnx_lowrank.errors import InputError

ARRAYS, FEEDS, IMAGES, TEXTS = "a file of arrays", "a folder of feeds", "folders of images", "texts"

FILES = {
    "x.npz": (b"anything", ARRAYS),
    "x.NPY": (b"text", ARRAYS),
    "model.onnx": (b"\x08\x07\x00", ARRAYS),
    "latin": (b"caf\xe9 ol\xe9", ARRAYS),
    "a.txt": (b"caf\xe9", TEXTS),
    "empty.md": (b"", TEXTS),
    "novel": ("Käse\n".encode() * 5000, TEXTS),
    "cut": (b"x" * (2**13 - 1) + "ä".encode(), TEXTS),
    "a.jpg": (b"", IMAGES),
    "a.PNG": (b"text", IMAGES),
}

FOLDERS = {
    "empty": ((), FEEDS),
    "texts": (("a.txt",), FEEDS),
    "archives": (("a.npz", "a.png"), FEEDS),
    "arrays": (("a.npy", "a.png"), FEEDS),
    "data": (("input_0.pb",), FEEDS),
    "sets": (("test_data_set_0/input_0.pb", "a.png"), FEEDS),
    "images": (("a.png", "labels.csv", "label_0.pb"), IMAGES),
    "classes": (("cats/a.jpg", "dogs/b.jpg"), IMAGES),
    "hidden": ((".cache/a.jpg", ".a.jpg"), FEEDS),
}


def test_every_module_with_a_kind_is_found():
    assert sorted(kind.what for kind in sources.found()) == sorted([ARRAYS, FEEDS, IMAGES, TEXTS])


@pytest.mark.parametrize("name", FILES)
def test_a_file_belongs_to_one_kind(tmp_path, name):
    content, kind = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path / name).what == kind


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_belongs_to_one_kind(tmp_path, name):
    names, kind = FOLDERS[name]
    for each in names:
        path = tmp_path / each
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert kind_of(tmp_path).what == kind
    assert is_made(tmp_path) != (kind == FEEDS)


@pytest.mark.parametrize("name", ["no.npz", "no.txt", "no", "no.png"])
def test_a_path_to_nothing_belongs_to_the_arrays(tmp_path, name):
    assert kind_of(tmp_path / name).what == ARRAYS


@pytest.mark.parametrize("name", ["tokenizer", "mean", "std"])
def test_an_option_is_for_its_kind(tmp_path, name):
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.png").touch()
    (tmp_path / "a.npz").touch()
    options = Options(**{name: Path("t.json") if name == "tokenizer" else (0.5,)})
    fits, other = ("a.txt", "a.png") if name == "tokenizer" else ("a.png", "a.npz")
    check_sources([tmp_path / fits, None], options)
    check_sources([str(tmp_path / other), tmp_path / fits], options)
    with pytest.raises(InputError, match=rf"--{name} is for .*, but {tmp_path}/{other} is of another kind"):
        check_sources([tmp_path / other, {"x": np.zeros(3)}], options)
    with pytest.raises(InputError, match=rf"--{name} is for .*, but the data is of another kind: leave"):
        check_sources([{"x": np.zeros(3)}, None], options)
    with pytest.raises(
        InputError, match=rf"--{name} .*, but none of --calibration, --inputs and --check is given"
    ):
        check_sources([None, None], options)


def test_a_missing_path_is_left_to_its_reader(tmp_path):
    check_sources([tmp_path / "no.txt"], Options(tokenizer=Path("t.json")))


def test_options_are_made_from_plain_values():
    want = Options(Path("t.json"), (0.5,), (1.0, 2.0, 3.0))
    assert options_of("t.json", 0.5, np.array([1, 2, 3], np.float32)) == want
    assert options_of(None, None, None) == Options()
    assert want.given == ("tokenizer", "mean", "std")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokenizer", 3, "--tokenizer is '3': give the path of a tokenizer.json"),
        ("tokenizer", "", "--tokenizer is '': give the path"),
        ("mean", "0.5", "--mean has the value '0.5': give one number for each channel"),
        ("mean", [], "--mean is empty: give one number for each channel"),
        ("mean", [0.5, True], "--mean has the value 'True': give one number"),
        ("std", [1, float("inf")], "--std has the value 'inf': give one number"),
        ("std", (1, -0.5), "--std has the value -0.5: give values above 0"),
        ("std", 0, "--std has the value 0: give values above 0"),
    ],
)
def test_wrong_values(name, value, message):
    given = {"tokenizer": None, "mean": None, "std": None} | {name: value}
    with pytest.raises(InputError, match=message):
        options_of(*given.values())
