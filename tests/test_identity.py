"""The witness for refactorings reports every kind of difference, and lets pass what is named only."""

from __future__ import annotations

from copy import deepcopy

import pytest
from identity.comparison import ABSENT, Outcome, differences, judged, summary

REPORT = '{"ratio": 0.5, "layers": [{"id": "a", "error": 0.1}, {"id": "b", "error": 0.1}]}\n'
OUTCOME: Outcome = {
    "codes": [0],
    "stdout": "",
    "stderr": "one\ntwo\n",
    "files": {
        "report.json": {"text": REPORT},
        "out.onnx": {"sha256": "ab", "bytes": 10},
        "out.onnx.data": {"sha256": "cd", "bytes": 20},
    },
}


def changed(**parts: object) -> Outcome:
    return deepcopy(OUTCOME) | parts


def reporting(old: str, new: str) -> Outcome:
    assert old in REPORT
    outcome = deepcopy(OUTCOME)
    outcome["files"]["report.json"]["text"] = REPORT.replace(old, new)
    return outcome


def said(after: Outcome) -> list[tuple[str, str, str]]:
    return [(one.path, one.before, one.after) for one in differences(OUTCOME, after)]


def test_the_same_outcome_has_no_difference() -> None:
    assert differences(OUTCOME, deepcopy(OUTCOME)) == []
    assert judged("case", OUTCOME, deepcopy(OUTCOME)).line() == "case: same"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"b", "error": 0.1', '"b", "error": 0.2', ("report.layers[1].error", "0.1", "0.2")),
        ('"ratio": 0.5, ', "", ("report.ratio", "0.5", ABSENT)),
        ('"ratio": 0.5', '"ratio": 0.5, "more": null', ("report.more", ABSENT, "null")),
        ('"ratio": 0.5', '"ratio": "0.5"', ("report.ratio", "0.5", '"0.5"')),
        ('"ratio": 0.5', '"ratio": 0.50000000000000011', ("report.ratio", "0.5", "0.5000000000000001")),
        ("]}\n", "]}", ("report", "the same fields", "in other bytes")),
        (
            '"id": "a", "error": 0.1',
            '"error": 0.1, "id": "a"',
            ("report", "the same fields", "in other bytes"),
        ),
    ],
)
def test_a_changed_field_a_missing_key_and_a_changed_layout_are_differences(
    old: str, new: str, expected: tuple[str, str, str]
) -> None:
    assert said(reporting(old, new)) == [expected]


def test_a_row_less_is_a_difference_in_each_of_its_fields() -> None:
    after = reporting(', {"id": "b", "error": 0.1}', "")
    assert [path for path, _, new in said(after) if new == ABSENT] == [
        "report.layers[1].id",
        "report.layers[1].error",
    ]


def test_a_changed_byte_of_the_model_and_of_its_data_is_a_difference() -> None:
    for name in ("out.onnx", "out.onnx.data"):
        after = deepcopy(OUTCOME)
        after["files"][name]["sha256"] = "ef"
        ((path, old, new),) = said(after)
        assert path == name
        assert old != new


def test_a_file_less_and_a_file_more_are_differences() -> None:
    after = deepcopy(OUTCOME)
    after["files"]["plan.json"] = {"text": "{}"}
    del after["files"]["out.onnx.data"]
    assert {(path, old == ABSENT, new == ABSENT) for path, old, new in said(after)} == {
        ("plan", True, False),
        ("out.onnx.data", False, True),
    }


def test_a_changed_exit_code_and_a_changed_message_are_differences() -> None:
    assert said(changed(codes=[3])) == [("code[0]", "0", "3")]
    assert said(changed(stderr="one\n2\n")) == [("stderr[1]", '"two"', '"2"')]
    assert said(changed(stderr="one\ntwo")) == [("stderr", "the same fields", "in other bytes")]


def test_allowed_differences_are_listed_and_everything_else_stays_strict() -> None:
    after = reporting('"b", "error": 0.1', '"b", "error": 0.2') | {"codes": [3]}
    strict = judged("a/case", OUTCOME, after)
    some = judged("a/case", OUTCOME, after, ["a/*:report.layers[1].error"])
    every = judged("a/case", OUTCOME, after, ["*:report.*", "*:code*"])
    other = judged("a/case", OUTCOME, after, ["b/*:*"])
    assert strict.line() == "a/case: differs: code[0]: 0 → 3, report.layers[1].error: 0.1 → 0.2"
    assert some.line() == "a/case: differs: code[0]: 0 → 3; allowed: report.layers[1].error: 0.1 → 0.2"
    assert other.differs == strict.differs
    same = judged("b/case", OUTCOME, OUTCOME)
    assert [one.status for one in (strict, some, every, same)] == ["differs", "differs", "allowed", "same"]
    assert summary([strict, some, every, same]) == "4 cases, 1 same, 2 differ, 1 allowed"
    assert summary([same]) == "1 cases, 1 same, 0 differ"
