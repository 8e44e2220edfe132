"""A stranger reads in every message what is wrong, with its value, and what to do."""

import re

import pytest

from messages import VALUE, Message, collected, of_source

_DO = (
    "add apply ask change check choose copy convert correct create delete exclude export fix give guard "
    "install keep leave look make move name pass pip put raise redirect remove repair replace report reshape "
    "restore run save set split start try use write"
)
_ADVICE = re.compile(
    rf"(?:[:;,] |\b(?:or|and|so) )(?:{_DO.replace(' ', '|')})\b|: .*--[a-z]|must (?:be|hold)\b"
)
_KNOWN = re.compile(rf"{re.escape(VALUE)}|(?:^|[ (])--[a-z]|\d")
_PLACE = re.compile(rf"^{re.escape(VALUE)}: ")  # of a fault in a file

_WITHOUT_VALUE = {
    "There are no calibration inputs: give at least one.": "their number is the value",
    "The standard output is closed: redirect it to a file or a program.": "there is one",
    "OUT.onnx is missing: name the file to write, or pass --dry-run.": "what is missing has none",
    "ONNX Runtime, which compares the two models, is not installed: install onnx-lowrank[cpu] or "
    "onnx-lowrank[gpu].": "what is missing has none",
    "Olive, whose package file this is, is not installed: install onnx-lowrank[olive].": "as above",
    "Olive, whose pass this is, is not installed: install onnx-lowrank[olive].": "as above",
    "The package onnx_ir is not installed: install onnx-lowrank[ir].": "as above",
    "A worker process ended by itself: if a script calls compress(workers=...), guard the call with "
    '`if __name__ == "__main__":`; if memory ran out, use fewer workers.': "the system tells no reason",
    "The moments of a layer's activations are not finite in float64: look for NaN, Inf and huge values in "
    "the calibration data and in the model's weights.": "the moments do not know the name of their layer",
}
_ADVICE_IN_VALUE = {
    f"The {VALUE} {VALUE} is wrong: {VALUE}; {VALUE}.": "each document has its own advice",
    f"{VALUE} ({VALUE}): {VALUE}.": "what is read has its own advice",
    f"{VALUE} cannot get smaller than a ratio of {VALUE}, as {VALUE}: {VALUE}.": "each cause has its advice",
    f"The model's MACs are unknown because {VALUE}.": "each reason ends with its advice",
    f"The target cannot be judged, as no output of {VALUE} has {VALUE}.": "each measure ends with its advice",
}


def faults(message: Message) -> list[str]:
    """What a stranger would miss or mind."""
    text = f"--option: {message.text}." if message.is_of_option else message.text
    text = _PLACE.sub("In a file ", text)
    found = {
        "no capital, value or option at the start": not re.match(rf"[A-Z'\"]|{re.escape(VALUE)}|--", text),
        "no full stop": not text.endswith(".") or text.endswith(".."),
        "several sentences": re.search(r"[.!?] +[A-Z]", text),
        "several colons": text.count(": ") > 1 + message.is_of_option,
        "pleads or alarms": re.search(r"(?i)\bplease\b|\berror:|!", text),
        "no value": not _KNOWN.search(text) and message.text not in _WITHOUT_VALUE,
        "no advice": not _ADVICE.search(text) and message.text not in _ADVICE_IN_VALUE,
    }
    return [fault for fault, is_found in found.items() if is_found]


def test_every_message_says_what_is_wrong_with_its_value_and_what_to_do():
    messages = collected()
    assert len(messages) > 250, "they are found"
    wrong = [(message, found) for message in messages if (found := faults(message))]
    assert wrong == []


def test_no_explanation_has_lost_its_message():
    texts = {message.text for message in collected()}
    assert _WITHOUT_VALUE.keys() | _ADVICE_IN_VALUE.keys() <= texts


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("the file {…} is empty: export it again.", "no capital, value or option at the start"),
        ("{…} is empty: export it again", "no full stop"),
        ("{…} is empty. Try another: export it again.", "several sentences"),
        ("{…} is wrong: it is empty: export it again.", "several colons"),
        ("{…} is empty: please export it again.", "pleads or alarms"),
        ("{…} is empty: export it again!.", "pleads or alarms"),
        ("The file is empty: export it again.", "no value"),
        ("{…} is empty.", "no advice"),
        ("{…} is empty: no bytes.", "no advice"),
    ],
)
def test_a_message_of_another_form_is_found(text, fault):
    assert fault in faults(Message("", text, False))


SOURCE = """
def refuse(path, size):
    advice = "copy it again"
    what = f"has {size} bytes" if size else "is empty"
    long = "It is"
    long += f" {path}"
    if size < 0:
        raise InputError(long)
    raise errors.PlanError(f"{path} {what}: {advice}.") from None

class A:
    def other(self):
        def inner(advice):
            return click.BadParameter(f"{self.x!r} is wrong: {advice}")
        raise ValueError("this is no message")
"""


def test_messages_are_found_with_the_texts_of_their_own_function():
    assert {(message.text, message.is_of_option) for message in of_source(SOURCE, "a.py")} == {
        ("It is {…}", False),
        ("{…} has {…} bytes: copy it again.", False),
        ("{…} is empty: copy it again.", False),
        ("{…} is wrong: {…}", True),
    }
