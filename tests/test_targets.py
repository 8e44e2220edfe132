"""The table of targets: every rule has a source, and an option of the user comes first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onnx_lowrank import compress
from onnx_lowrank.core.option import Style
from onnx_lowrank.engines import kinds
from onnx_lowrank.options import completed
from onnx_lowrank.request import request
from onnx_lowrank.targets import TARGETS
from tiny import DIGITS

DOCUMENT = Path(__file__).parents[1] / "docs" / "targets.md"


def asked(**options):
    return request(0.5, completed(options))


@pytest.mark.parametrize("name", TARGETS)
def test_every_rule_has_a_page_and_a_line_in_the_documentation(name):
    target, text = TARGETS[name], DOCUMENT.read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    align = "1" if target.align == 1 else f"multiples of {target.align}" if target.align else "blocked layout"
    assert cells[1:4] == [align, ", ".join(target.styles) or "–", target.engine or "–"]
    assert target.sources
    for source in target.sources:
        assert source.startswith("https://")
        assert f"({source})" in row


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_stands_for_its_options(name):
    made, target = asked(target=name), TARGETS[name]
    assert (made.block, made.styles) == (target.align or 1, frozenset(target.styles))
    assert made.blocked == (target.align is None)
    assert target.engine in (None, *kinds.names())


def test_an_option_takes_the_place_of_the_targets():
    made = asked(target="qnn", align=4, lowering="conv")
    assert (made.block, made.styles) == (4, {Style.CONV})
    assert asked(target="coreml", align=16).styles == {Style.CONV}
    assert asked(target="qnn", lowering=[]).styles == {Style.GROUP_FREE}, "an empty list gives nothing"


def test_a_model_for_an_accelerator_has_full_vectors_and_no_groups():
    result = compress(DIGITS, 0.5, target="qnn")
    options = [row.option for row in result.report.layers if row.option is not None]
    assert options
    assert all(option.j % 32 == 0 for option in options)
    groups = [a.i for node in result.proto.graph.node for a in node.attribute if a.name == "group"]
    assert set(groups) <= {1}
