"""The command that writes Olive's package file: `onnx-lowrank olive-package-config > p.json`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import click

from onnx_lowrank.commands import compress
from onnx_lowrank.destinations import print_text
from onnx_lowrank.errors import InputError

_PASS = {
    "module_path": "onnx_lowrank.toolchains.olive.OnnxLowRank",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
    "supported_algorithms": [],
    "supported_quantization_encodings": [],
    "module_dependencies": ["onnx-lowrank[olive]"],
    "dataset": "dataset_optional",
}

_EPILOG = f"""\b
Examples:
  onnx-lowrank olive-package-config > p.json
  olive run --config workflow.json --package-config p.json

{compress.EXIT_CODES}"""


@click.command(
    "olive-package-config",
    context_settings={"max_content_width": 100},
    epilog=_EPILOG,
    add_help_option=False,
)
def command() -> None:
    """Write the package file of the installed Olive, with the pass OnnxLowRank, to stdout.

    A file named by --package-config replaces Olive's own, so this one has all of Olive's passes, too.
    """
    spec = find_spec("olive")
    own = Path(spec.origin).with_name("olive_config.json") if spec is not None and spec.origin else None
    if own is None or not own.is_file():
        raise InputError("Olive, whose package file this is, is not installed: install onnx-lowrank[olive].")
    config = json.loads(own.read_text(encoding="utf-8"))
    config["passes"]["OnnxLowRank"] = _PASS
    print_text(json.dumps(config, indent=4) + "\n")


command.params += [param for param in compress.command.params if param.name == "help"]
