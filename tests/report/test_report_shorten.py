"""Names in little room."""

import pytest

from onnx_lowrank.report.shorten import distinct
from onnx_lowrank.report.words import first_names


def transformer(layers):
    """The nodes of a BERT-like encoder, as PyTorch's exporter names them."""
    inside = ("attention/self/query", "attention/self/key", "attention/output/dense", "intermediate/dense")
    folders = [f"layer.{i}/{folder}" for i in range(layers) for folder in (*inside, "output/dense")]
    return [f"/encoder/encoder/{folder}/MatMul" for folder in folders]


@pytest.mark.parametrize("room", range(16, 55))
@pytest.mark.parametrize("layers", [2, 6, 12, 36])
def test_names_that_differ_in_several_folders_stay_distinct(layers, room):
    names = ["encoder.embeddings.word_embeddings.weight", *transformer(layers)]
    shown = distinct(names, room)
    assert len(set(shown)) == len(names)
    assert max(map(len, shown)) <= room


def test_a_name_keeps_folders_that_no_other_has_together():
    shown = distinct(["fc.weight", *transformer(12)], 24)
    assert shown[:1] + shown[6:11] == (
        "fc.weight",
        "…encoder/layer.1…query…",
        "…layer.1…self/key/MatMul",
        "…encoder/layer.1…output…",
        "/encoder…1/intermediate…",
        "/encoder…1/output/dense…",
    )


@pytest.mark.parametrize("room", [5, 16, 40])
def test_names_of_many_folders_are_cut_too(room):
    names = ["/".join(f"a{i % 7}b{j % 3}" for j in range(3000)) for i in range(300)]
    assert max(map(len, distinct(names, room))) <= room


@pytest.mark.parametrize("room", range(16, 40))
def test_names_that_differ_in_one_folder_stay_distinct(room):
    paths = [f"/layer{i}/layer{i}.{j}/conv{k}/Conv" for i in (1, 2, 3) for j in (0, 1, 2) for k in (1, 2)]
    names = ["linear.weight", "/conv1/Conv", *paths]
    shown = distinct(names, room)
    assert len(set(shown)) == len(names)
    assert max(map(len, shown)) <= room
    assert shown[:2] == ("linear.weight", "/conv1/Conv")


@pytest.mark.parametrize("room", range(3, 12))
def test_names_that_are_equal_or_cannot_be_told_apart_are_cut_all_the_same(room):
    name, end = "abcdefghijkl", room // 2
    assert distinct([name] * 2, room)[0] == f"{name[: room - 1 - end]}…{name[len(name) - end :]}"
    names = [f"{i:03}-{'x' * 20}-{j:03}" for i in range(20) for j in range(20)]
    shown = distinct(names, room)
    assert len(shown) == 400
    assert max(map(len, shown)) <= room


def test_a_list_keeps_its_names_distinct():
    names = [f"/encoder/layer.{i}/attention/self/query/projection/MatMul" for i in range(5)]
    *shown, last = first_names(names).split(", ")
    last, more = last.split(" and ")
    assert len({*shown, last}) == 3
    assert max(map(len, (*shown, last))) <= 40
    assert more == "2 more"
    assert first_names(["a", "b"]) == "a, b"
