"""The registry: which budgets there are, and how a new one is found."""

import sys

import pytest

from onnx_lowrank import budgets
from onnx_lowrank.budgets import registry
from onnx_lowrank.errors import InputError


def test_budgets_are_listed_by_their_order():
    assert budgets.names() == ("params", "macs", "latency", "bytes")
    assert tuple(budget.name for budget in registry.every()) == budgets.names()
    assert [budget.order for budget in registry.every()] == sorted(
        budget.order for budget in registry.every()
    )


@pytest.mark.parametrize("name", budgets.names())
def test_a_budget_is_known_by_its_name(name):
    assert registry.named(name).name == name


def test_an_unknown_budget_is_told_with_those_that_there_are():
    listed = ", ".join(budgets.names())
    with pytest.raises(InputError, match=rf"^There is no budget 'speed': choose one of {listed}\.$"):
        registry.named("speed")


def test_a_new_budget_is_one_new_file(tmp_path, monkeypatch):
    """It is found beside the others, and what defines no budget is none."""
    (tmp_path / "nodes.py").write_text(
        "from onnx_lowrank.budgets.params import Params\n\n"
        "class Nodes(Params):\n    name = 'nodes'\n    order = 1\n\n"
        "BUDGET = Nodes()\n"
    )
    (tmp_path / "helper.py").write_text("")
    monkeypatch.setattr(budgets, "__path__", [*budgets.__path__, str(tmp_path)])
    budgets.found.cache_clear()
    try:
        assert budgets.names() == ("params", "macs", "nodes", "latency", "bytes")
        assert registry.named("nodes").order == 1
    finally:
        budgets.found.cache_clear()
        for name in ("nodes", "helper"):
            sys.modules.pop(f"onnx_lowrank.budgets.{name}")
            delattr(budgets, name)
