"""Without the packages of the toolchains: one sentence each, and nothing of them is loaded."""

import sys

import pytest

from onnx_lowrank import InputError, cli


@pytest.mark.parametrize(
    ("module", "package", "extra"), [("ir", "onnx_ir", "ir"), ("olive", "olive.common.config_utils", "olive")]
)
def test_an_adapter_without_its_package_says_what_to_install(monkeypatch, module, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, package.partition(".")[0], None)
    monkeypatch.delitem(sys.modules, f"onnx_lowrank.toolchains.{module}", raising=False)
    with pytest.raises(InputError, match=rf"is not installed: install onnx-lowrank\[{extra}\]\.$"):
        __import__(f"onnx_lowrank.toolchains.{module}")


def test_the_command_without_olive_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("onnx_lowrank.commands.olive_package_config.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["olive-package-config"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err == (
        "onnx-lowrank: Olive, whose package file this is, is not installed: install onnx-lowrank[olive].\n"
    )
