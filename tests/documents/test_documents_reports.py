import json

import msgspec
import numpy as np
import pytest

import onnx_lowrank
from onnx_lowrank import ReportError, compress
from onnx_lowrank.core.outcome import LayerTime, OutputError, Timing, Trial, Validation
from onnx_lowrank.documents import report_schema as schema
from onnx_lowrank.documents import reports
from onnx_lowrank.report.content import Figure, Total, Totals
from tiny import cnn


@pytest.fixture(scope="module")
def made():
    """A report with calibration, trials, a validation and a kept layer."""
    x = np.random.default_rng(5).standard_normal((40, 8, 6, 6), np.float32)
    return compress(cnn(), 0.7, calibration={"x": x}).report


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "report.json"
        path.write_text(text, encoding="utf-8")
        return reports.read(path)

    return read


def changed(report, **values):
    """A report with other contents."""
    fields = {name: getattr(report, name) for name in report.__dataclass_fields__}
    return type(report)(**(fields | values))


def test_a_report_reads_back_as_it_was_written(made, read):
    text = made.to_json()
    table = read(text)
    assert json.dumps(msgspec.to_builtins(table)) == json.dumps(json.loads(text))
    assert [layer.id for layer in table.layers] == ["conv1", "conv2", "fc"]
    assert table.calibration.samples == 40
    assert table.trials
    assert onnx_lowrank.read_report is reports.read


def test_everything_that_can_be_null_or_absent_reads_back(made, read):
    odd = OutputError("y", float("inf"), float("nan"), None, "It is odd.", 0.5, cosine=0.5, neighbours=0.25)
    timing = Timing("e", "i", 5, None, None, {"conv1": LayerTime(3, None, 2)}, 1.5)
    amounts = {
        "params": Total(2, 1),
        "macs": Total(None, None),
        "bytes": Total(5, None),
        "time": Total(7, 8),
    }
    totals = Totals(tuple(Figure(key, total) for key, total in amounts.items()))
    for values in (
        {"validation": Validation("e", "i", (odd,), None, ("n",), (odd,)), "trials": (Trial("svd", 0.5),)},
        {"validation": None, "solver": None, "calibration": None, "target_error": 0.5, "warnings": ("w",)},
        {"timing": timing, "totals": totals, "layers": (), "removed_inputs": ("a",)},
    ):
        text = changed(made, **values).to_json()
        assert json.dumps(msgspec.to_builtins(read(text))) == json.dumps(json.loads(text))


def edited(*path, **values):
    """An edit of the object at a path."""

    def edit(table):
        at = table
        for step in path:
            at = at[step]
        at.update(values)

    return edit


WRONG = {
    "schema 2": (edited(schema=2), "schema is 2, and this program reads version 1"),
    "schema true": (edited(schema=True), "schema is true, and this program reads version 1"),
    "unknown key": (edited(speed=1), "it has an unknown key 'speed', the keys are schema, version, model,"),
    "unknown key of a layer": (
        edited("layers", 0, speed=1),
        "layers[0] ('conv1') has an unknown key 'speed', the keys are id, name, op",
    ),
    "missing key": (lambda table: table["ratio"].pop("asked"), "ratio lacks the key 'asked'"),
    "text for a number": (
        edited("ratio", reached="0.5"),
        "ratio has reached = '0.5', but it must be a number",
    ),
    "boolean for an integer": (
        edited("layers", 1, "params", before=True),
        "layers[1].params has before = true, but it must be a whole number or null",
    ),
    "fold": (
        edited("layers", 2, fold="diagonal"),
        "layers[2] ('fc') has fold = 'diagonal', but it must be one of encode, rows, cols, decode or null",
    ),
    "infinity": (
        edited("trials", 0, "outputs", 0, relative=float("inf")),
        "trials[0].outputs[0] ('y') has relative = inf, but it must be a number or null",
    ),
    "total": (
        edited("totals", "macs", after=0.5),
        "totals.macs has after = 0.5, but it must be a whole number or null",
    ),
    "total that is none": (
        edited("totals", bytes=3),
        "totals has bytes = 3, but it must be an object with the keys before, after, ratio or null",
    ),
    "unknown key of a total": (
        edited("totals", "params", used=3),
        "totals.params has an unknown key 'used', the keys are before, after, ratio",
    ),
    "total of a name in two lines": (
        edited("totals", **{"a\nb": 3}),
        "totals has 'a\\nb' = 3, but it must be an object with the keys before, after, ratio or null",
    ),
    "infinite total": (
        edited("totals", "macs", ratio=float("nan")),
        "totals.macs has ratio = nan, but it must be a number or null",
    ),
    "list": (edited(layers=None), "layers is null, but it must be a list"),
    "object": (edited(model=[]), "model is [], but it must be an object with the keys name, sha256"),
}


@pytest.mark.parametrize(("edit", "told"), WRONG.values(), ids=WRONG.keys())
def test_a_malformed_report_is_told_in_one_sentence(made, read, tmp_path, edit, told):
    table = json.loads(made.to_json())
    edit(table)
    with pytest.raises(ReportError) as caught:
        read(json.dumps(table))
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"The report {tmp_path / 'report.json'} is wrong: ")
    assert str(caught.value).endswith("; write it anew with --report.")
    assert caught.value.exit_code == 2


def test_a_report_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ReportError, match="cannot be read \\(No such file or directory\\): check the path"):
        reports.read(tmp_path / "no.json")


def test_the_keys_of_every_table_are_documented():
    tables = [
        kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, schema.Table)
    ]
    assert len(tables) > 15
    for table in tables:
        documented = [
            line.split(":")[0].strip()
            for line in table.__doc__.splitlines()
            if line.startswith("        ") and not line.startswith("         ") and ":" in line
        ]
        assert documented == list(table.__struct_fields__), table
