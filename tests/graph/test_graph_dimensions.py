"""Sizes that follow from other sizes."""

from __future__ import annotations

import pytest

from onnx_lowrank.graph.dimensions import Dimension, parse, solve

SIZES = {"past_sequence_length": 3, "sequence_length": 5, "n": 2, "s0.1": 7}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("n", 2),
        ("past_sequence_length + sequence_length", 8),
        ("past_sequence_length+sequence_length", 8),
        ("  past_sequence_length  +\tsequence_length ", 8),
        ("past_sequence_length + 1", 4),
        ("2*n", 4),
        ("n * 3 + 4*n*n + 1", 23),
        ("2 * 3", 6),
        ("s0.1+n", 9),
    ],
)
def test_values(text, size):
    assert parse(text).size(SIZES) == size


@pytest.mark.parametrize(
    "text",
    [
        "batch",
        "batch-size",
        "n / 2",
        "n // 2",
        "n - 1",
        "-n + 1",
        "(n + 1) * 2",
        "n +",
        "* n",
        "n ** 2",
        "n + + 1",
        "n 2",
        "2n + 1",
        "n + 1.5",
        "n + ²",
        "٣ + n",
        "n + 1234567890",
        "__import__('os') + n",
        "n + [1]",
        "128",
        "",
        " ",
        "+".join(["n"] * 101),
    ],
)
def test_other_texts_are_names(text):
    assert parse(text) == Dimension(((1, (text,)),))


def test_names_in_their_order():
    assert parse("b + 2*a*b + a").names == ("b", "a")


@pytest.mark.parametrize(
    ("text", "total", "found"),
    [
        ("m", 4, ("m", 4)),
        ("past_sequence_length + m", 9, ("m", 6)),
        ("past_sequence_length + m", 3, ("m", 0)),
        ("past_sequence_length + m", 2, None),
        ("3*m + m + 1", 9, ("m", 2)),
        ("3*m + m + 1", 10, None),
        ("n*m*sequence_length", 30, ("m", 3)),
        ("m*m", 9, None),
        ("m + k", 9, None),
        ("0*m + n", 2, None),
        ("n + 1", 3, None),
    ],
)
def test_solutions(text, total, found):
    assert parse(text).solved(total, SIZES) == found


def test_what_follows_from_what_follows():
    stated = [
        (parse("a + b"), 10),
        (parse("2*b"), 6),
        (parse("a*c"), 14),
        (parse("d + e"), 3),
        (parse("b"), 9),
    ]
    assert solve(stated, {}) == {"b": 3, "a": 7, "c": 2}
    assert solve(stated, {"d": 1, "b": 4}) == {"d": 1, "b": 4, "a": 6, "e": 2}
