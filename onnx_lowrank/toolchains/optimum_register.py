"""optimum-cli: the command `optimum-cli onnxruntime lowrank`.

The wheel, and that of an editable install, has this file in `optimum/commands/register/`, where optimum looks
for commands. It imports nothing else of onnx-lowrank before the command runs, as every call of
optimum-cli imports it.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

OPTIONS = {
    "--ratio": "How much to keep: 0.5 keeps half.",
    "--budget": "The quantity that the ratio bounds: params, macs, bytes or latency.",
    "--pass": "A recipe of `onnx-lowrank --list-passes`, or a TOML file.",
    "--align": "Choose only ranks that are multiples of this number.",
    "--calibration": "Inputs to fit to: a text, which the folder's tokenizer reads, or arrays.",
    "--calibration-samples": "Use at most this number of calibration samples.",
    "--check": "Inputs of another kind, on which the models are compared, too.",
    "--target-error": "Instead of a ratio: the largest output error on held-out calibration inputs.",
    "--target-agreement": "Instead of a ratio: the least agreement on held-out calibration inputs.",
    "--max-error": "Largest accepted relative error of an output.",
    "--include": "Decompose only layers or nodes like this glob. Repeatable.",
    "--exclude": "Keep layers or nodes like this glob. Repeatable.",
    "--input-shape": "Shape of an input whose dimensions the model leaves open. Repeatable.",
    "--weights": "How much the sets of --input-shape count in times.",
    "--memory": "GiB that calibration may take.",
}
"""Options of `onnx-lowrank` and their help."""


class LowRankCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Decompose the ONNX models of a folder; all its other files travel along."""

    COMMAND = CommandInfo(name="lowrank", help="Make ONNX models smaller by low-rank decomposition.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments: those of optimum's other commands, and options of `onnx-lowrank`."""
        required = parser.add_argument_group("Required arguments")
        text = "Path to the directory of the ONNX models to decompose."
        required.add_argument("--onnx_model", type=Path, required=True, help=text)
        text = "Path to the directory where to store the result."
        required.add_argument("-o", "--output", type=Path, required=True, help=text)
        optional = parser.add_argument_group("Options of onnx-lowrank")
        for name, text in OPTIONS.items():
            optional.add_argument(name, action="append", help=text)

    def run(self) -> None:
        """Run `onnx-lowrank` on every model of the directory."""
        from onnx_lowrank.toolchains.optimum import compress_folder

        given = {name: getattr(self.args, name.strip("-").replace("-", "_")) for name in OPTIONS}
        options = [word for name, values in given.items() for value in values or () for word in (name, value)]
        compress_folder(self.args.onnx_model, self.args.output, options)


REGISTER_COMMANDS: list[object] = []
"""optimum adds these after it has looked for their parents, of which `onnxruntime` is none yet."""

try:
    from optimum.commands.onnxruntime.base import ONNXRuntimeCommand
except ImportError:
    pass  # optimum without optimum-onnx has no such command, and all others must go on working.
else:
    ONNXRuntimeCommand.SUBCOMMANDS += (
        CommandInfo(LowRankCommand.COMMAND.name, LowRankCommand.COMMAND.help, LowRankCommand),
    )
